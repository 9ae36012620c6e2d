"""The commands about one model: eval, generate, info."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli.early import check_names
from qjax.cli.loading import Draw, calibration_for, load_model, own_text
from qjax.cli.options import (
    LARGEST_SEED,
    CalibrationAlone,
    CalibrationCompute,
    CalibrationWindow,
    CalibrationWindows,
    ComputeName,
    ConventionName,
    Data,
    MaxQuestions,
    MaxWindows,
    ModelName,
    Packed,
    Tasks,
    split_names,
)
from qjax.cli.terminal import console, print_accuracies, print_perplexity, progress_bars
from qjax.errors import QjaxError
from qjax.printable import printable

if TYPE_CHECKING:
    from qjax.report.rendering import Table


def evaluate(
    model: ModelName,
    data: Data = [],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    tasks: Tasks = None,
    lm_eval: Annotated[str | None, typer.Option("--lm-eval", help="Comma-separated tasks of lm-evaluation-harness.")] = None,
    lm_eval_folder: Annotated[
        Path | None, typer.Option("--lm-eval-folder", help="Folder of local task files (YAML) for --lm-eval.")
    ] = None,
    max_questions: MaxQuestions = None,
    packed: Packed = False,
    compute: ComputeName = None,
) -> None:
    """Perplexity of one model, quantized or not, on python-docs or --data; with --tasks or --lm-eval its accuracy, and
    perplexity where --data is given too.
    """
    check_names(convention=convention, texts=data, tasks=tasks, models=(model,))
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.perplexity import perplexity
    from qjax.evaluate.tasks import load_tasks
    from qjax.evaluate.windows import parse_convention

    measured, harness = parse_convention(convention), split_names(lm_eval, "--lm-eval")
    asked = load_tasks(split_names(tasks, "--tasks"), max_questions or None)
    corpora = load_corpora(data or ([] if asked or harness else ["python-docs"]))
    loaded = load_model(model)._replace(compute=compute)
    if harness:
        from qjax.evaluate.lm_eval import evaluate as evaluate_harness

        found = evaluate_harness(loaded, harness, folder=lm_eval_folder, limit=max_questions or None, packed=packed)
        for task, figures in found.items():
            shown = ", ".join(f"{name.removesuffix(',none')} {value:.4f}" for name, value in figures.items() if "," in name)
            typer.echo(printable(f"{loaded.name} ({loaded.recipe}) on {task}: {shown}"))
    print_accuracies(loaded, asked, packed=packed)
    for corpus in corpora:
        with progress_bars() as progress:
            task = progress.add_task(printable(corpus.name), total=None)
            result = perplexity(
                loaded,
                corpus,
                measured,
                max_windows=max_windows or None,
                packed=packed,
                on_batch=lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )
        print_perplexity(loaded, result)


def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; 1 draws from the distribution.")
    ] = 0.0,
    recipe: Annotated[str | None, typer.Option(help="Quantize the model with this first, for example rtn:int3-g128.")] = None,
    calibration: CalibrationAlone = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    packed: Packed = False,
    compute: ComputeName = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the draws.")] = 0,
) -> None:
    """Let a model, quantized or not, go on with a prompt."""
    check_names(recipes=recipe, texts=(calibration,), models=(model,))
    from qjax.driver.decoder import quantize as quantize_model
    from qjax.evaluate.generate import generate_text
    from qjax.evaluate.likelihood import require_tokenizer
    from qjax.sweep.cells import canonical

    asked_of = ([] if recipe is None else canonical([recipe]), ())
    loaded = load_model(model)._replace(compute=compute)
    require_tokenizer(loaded)  # before anything is shown
    if recipe is not None:
        draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
        read = calibration_for(loaded, asked_of, draw, own_text(model), seed)
        loaded, _ = quantize_model(loaded, recipe, calibration=read)
    typer.echo(prompt, nl=False)
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits for the rest
            typer.echo(text[len(shown) :], nl=False)
            shown = text

    text = generate_text(loaded, prompt, tokens, temperature=temperature, seed=seed, packed=packed, on_token=show)
    typer.echo(text[len(shown) :] if text.startswith(shown) else "")


def info(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A model, as for sweep.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Instead of a model: its number of parameters, as 7e9.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Estimate time and memory of loading, evaluating and quantizing the model.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="With --plan: tokens that are scored or calibrated on.")] = 128 * 2048,
    constants: Annotated[
        Path | None, typer.Option(help="With --plan: constants that experiments/scaling.py measured elsewhere.")
    ] = None,
) -> None:
    """The memory table: exact bytes of a model in every precision, and of its cache of keys and values. With --plan what
    loading, evaluating and quantizing it would take.
    """
    check_names(models=(model,))
    from qjax.report.memory import memory_table, parameters_table
    from qjax.report.rendering import to_rich

    if (model is None) == (parameters is None):
        raise QjaxError("info: give either a model or --parameters, for example `qjax info --parameters 7e9`")
    if plan and model is None:
        raise QjaxError("info: --plan needs a model, not --parameters alone; its time depends on shapes")
    if model is None:
        console().print(to_rich(parameters_table(parameters)))
        return
    if plan:
        console().print(to_rich(_plan(model, tokens, constants)))
        return
    from qjax.driver.decoder import kernel_shapes
    from qjax.driver.report import files_size, stored_size

    loaded = load_model(model, lazy=True)
    console().print(to_rich(memory_table(*kernel_shapes(loaded), title=model)))
    cache, (each, window) = loaded.config.cache, loaded.config.cache_bytes
    kept = "16 bits" if cache is None else f"kv:{cache}, and {window:,} of a text in 16 bits"
    typer.echo(printable(f"cache of keys and values: {each:,.10g} bytes a token in {kept}"))
    if loaded.recipe != "none":
        bits, size = stored_size(loaded.params)
        disk = files_size(loaded.params)
        stored = f"as it is stored, {loaded.recipe}: {bits:.3f} bits per quantized weight, {disk:,} bytes in its files"
        typer.echo(printable(f"{stored}; as qjax holds it in memory, {size:,} bytes"))


def _plan(model: str, tokens: int, constants: Path | None) -> "Table":
    """What `info --plan` shows; constants are read before the model."""
    from qjax.report.plan import plan_table, read_constants, terms

    found = read_constants(constants)
    from qjax.driver.decoder import kernel_shapes
    from qjax.sweep.machine import device

    loaded = load_model(model, lazy=True)
    shapes, others = kernel_shapes(loaded)
    parameters = sum(inputs * outputs for inputs, outputs in shapes) + sum(count for count, _ in others)
    sizes = terms(shapes, parameters, loaded.config.vocabulary_size, loaded.config.hidden_size, tokens)
    title = f"{model} (every expert counted for every token)" if loaded.config.experts else model
    return plan_table(found, sizes, tokens=tokens, title=title, here=device())
