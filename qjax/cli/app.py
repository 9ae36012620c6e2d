"""The command line: parse, call, print. Exit code 2 and one line for a user's mistake; 130 when interrupted.

JAX and everything that needs it is imported inside the commands, so that `qjax --help` answers at once.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli.options import (
    MODEL_HELP,
    CalibrationName,
    CalibrationWindow,
    CalibrationWindows,
    ConventionName,
    Data,
    MaxQuestions,
    MaxWindows,
    ModelName,
    OrderName,
    Out,
    Overwrite,
    Rules,
    Seed,
    Tasks,
    split_names,
    split_numbers,
)
from qjax.cli.results import compare, report, rerun
from qjax.cli.terminal import console, live_sweep, print_accuracies, print_perplexity, print_tables, progress_bars
from qjax.errors import QjaxError
from qjax.files import require_writable

if TYPE_CHECKING:
    from qjax.calibrate.tokens import Calibration
    from qjax.models.model import Model

app = typer.Typer(
    name="qjax",
    help="Quantize language models and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130  # exit code after Ctrl-C
METHODS, BITS = "rtn,gptq,awq,awq+gptq,nf4", "8,4,3,2"
DEFAULT_WINDOWS = 128  # of the bundled text: paired differences to 0.2 % at 4 bits, 0.01 % at 8


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = "bundled",
    recipes: Annotated[
        str | None, typer.Option(help="Comma-separated recipes, see `qjax recipes`; instead of --methods, --bits, --group.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods or codebooks, times --bits.", show_default=METHODS)
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Comma-separated bits per code.", show_default=BITS)] = None,
    group: Annotated[
        str | None, typer.Option(help="Weights per scale: a number, channel or tensor.", show_default="128, codebooks 64")
    ] = None,
    data: Data = ["python-docs"],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    tasks: Tasks = None,
    max_questions: MaxQuestions = None,
    divergence: Annotated[
        bool, typer.Option("--divergence", help="Measure the divergence from the unquantized model.")
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Time prefill and decoding, dense and packed.")] = False,
    calibration: CalibrationName = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    order: OrderName = None,
    rule: Rules = None,
    seed: Seed = 0,
    out: Out = Path("qjax-results"),
) -> None:
    """Measure perplexity of a model in many formats; table and figure go to --out."""
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.perplexity import parse_convention
    from qjax.evaluate.tasks import load_tasks
    from qjax.report.reports import write_reports
    from qjax.sweep.cells import canonical, expand
    from qjax.sweep.runner import Sweep, rules_in_order, run_sweep
    from qjax.sweep.store import ROWS, read_rows

    if recipes is not None and (methods, bits, group) != (None, None, None):
        raise QjaxError("--recipes says everything; give either it or --methods, --bits and --group")
    if recipes is not None:
        names = canonical(split_names(recipes), order)
    else:
        wanted = split_names(METHODS if methods is None else methods), split_numbers(BITS if bits is None else bits)
        names = expand(*wanted, group, order)
    rules = rules_in_order(rule or (), order)
    measured = parse_convention(convention)
    require_writable(out)
    corpora = load_corpora(data)
    asked = load_tasks(split_names(tasks) if tasks else (), max_questions or None)
    loaded = _load(model)
    max_windows = _default_windows(model, data, max_windows)
    tokens = _calibration(loaded, (names, rules), calibration, data, calibration_windows, calibration_window, seed)
    plan = Sweep(tuple(names), corpora, measured, max_windows or None, rules, seed, asked, divergence, speed, tokens)
    with live_sweep() as watcher:
        rows = run_sweep(loaded, plan, out, watcher)
    print_tables(rows)
    for path in write_reports(out, read_rows(out / ROWS)):  # of earlier sweeps into this folder too
        typer.echo(path)


@app.command()
def quantize(
    model: ModelName,
    recipe: Annotated[str, typer.Option(help="For example gptq:int4-g128; see `qjax recipes`.")],
    out: Out,
    rule: Rules = None,
    calibration: CalibrationName = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    order: OrderName = None,
    seed: Seed = 0,
    report: Annotated[bool, typer.Option("--report", help="Print a line for every layer.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Quantize a model and save it packed; `qjax eval` and qjax.load read the folder back bit-equal.

    layers.jsonl beside the weights has a row for every kernel.
    """
    from qjax.checkpoints.packed import save
    from qjax.driver import decoder as driver
    from qjax.files import prepare_output_folder, write_atomically
    from qjax.report.rendering import to_rich
    from qjax.report.tables import layers_table
    from qjax.sweep.cells import canonical
    from qjax.sweep.record import layer_rows
    from qjax.sweep.runner import rules_in_order
    from qjax.sweep.store import LAYERS

    (recipe,), rules = canonical([recipe], order), rules_in_order(rule or (), order)
    prepare_output_folder(out, overwrite=overwrite)
    loaded = _load(model)
    total = len(driver.placement(loaded, recipe, rules))
    asked_of = ([recipe], rules)
    tokens = _calibration(loaded, asked_of, calibration, _own_text(model), calibration_windows, calibration_window, seed)
    with progress_bars() as progress:
        task = progress.add_task("quantizing", total=total)
        quantized, done = driver.quantize(
            loaded, recipe, calibration=tokens, rules=rules, on_layer=lambda _: progress.advance(task)
        )
    save(out, quantized, overwrite=True)
    write_atomically(out / LAYERS, "".join(json.dumps(row) + "\n" for row in layer_rows(None, done)))
    if report:
        console().print(to_rich(layers_table(done.layers)))
    typer.echo(
        f"{out}: {quantized.recipe}, {done.bits_per_weight:.3f} bits per quantized weight, "
        f"{done.model_bits_per_weight:.3f} over the whole model, {done.size_bytes:,} bytes"
    )


@app.command()
def sensitivity(
    model: ModelName,
    recipe: Annotated[str, typer.Option(help="For example gptq:int3-g128; see `qjax recipes`.")],
    data: Data = ["python-docs"],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    calibration: CalibrationName = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    order: OrderName = None,
    seed: Seed = 0,
    out: Out = Path("qjax-sensitivity"),
) -> None:
    """Measure what each block costs when it alone is quantized; rows and a table go to --out."""
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.perplexity import parse_convention
    from qjax.report.reports import write_reports
    from qjax.sweep.cells import canonical
    from qjax.sweep.runner import Sweep, run_sweep
    from qjax.sweep.store import ROWS, read_rows

    names, measured = canonical([recipe], order), parse_convention(convention)
    require_writable(out)
    corpora = load_corpora(data)
    loaded = _load(model)
    tokens = _calibration(loaded, (names, ()), calibration, data, calibration_windows, calibration_window, seed)
    max_windows = _default_windows(model, data, max_windows)
    plan = Sweep(tuple(names), corpora, measured, max_windows or None, seed=seed, calibration=tokens, one_block=True)
    with live_sweep() as watcher:
        rows = run_sweep(loaded, plan, out, watcher)
    print_tables(rows)
    for path in write_reports(out, read_rows(out / ROWS)):
        typer.echo(path)


@app.command("eval")
def evaluate(
    model: ModelName,
    data: Data = ["python-docs"],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    tasks: Tasks = None,
    lm_eval: Annotated[str | None, typer.Option("--lm-eval", help="Comma-separated tasks of lm-evaluation-harness.")] = None,
    lm_eval_folder: Annotated[
        Path | None, typer.Option("--lm-eval-folder", help="Folder of local task files (YAML) for --lm-eval.")
    ] = None,
    max_questions: MaxQuestions = None,
    packed: Annotated[bool, typer.Option("--packed", help="Multiply with packed weights.")] = False,
) -> None:
    """Perplexity of one model, quantized or not; with --tasks or --lm-eval its accuracy instead."""
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.perplexity import parse_convention, perplexity
    from qjax.evaluate.tasks import load_tasks

    measured = parse_convention(convention)
    asked = load_tasks(split_names(tasks) if tasks else (), max_questions or None)
    corpora = () if asked or lm_eval else load_corpora(data)
    loaded = _load(model)
    if lm_eval:
        from qjax.evaluate.lm_eval import evaluate as evaluate_harness

        harness = split_names(lm_eval)
        found = evaluate_harness(loaded, harness, folder=lm_eval_folder, limit=max_questions or None, packed=packed)
        for task, figures in found.items():
            shown = ", ".join(f"{name.removesuffix(',none')} {value:.4f}" for name, value in figures.items() if "," in name)
            typer.echo(f"{loaded.name} ({loaded.recipe}) on {task}: {shown}")
    print_accuracies(loaded, asked, packed=packed)
    for corpus in corpora:
        with progress_bars() as progress:
            task = progress.add_task(corpus.name, total=None)
            result = perplexity(
                loaded,
                corpus,
                measured,
                max_windows=max_windows or None,
                packed=packed,
                on_batch=lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )
        print_perplexity(loaded, result)


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; 1 draws from the distribution.")
    ] = 0.0,
    recipe: Annotated[str | None, typer.Option(help="Quantize the model with this first, for example rtn:int3-g128.")] = None,
    calibration: CalibrationName = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    packed: Annotated[bool, typer.Option("--packed", help="Multiply with packed weights.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Let a model, quantized or not, go on with a prompt."""
    from qjax.driver.decoder import quantize as quantize_model
    from qjax.evaluate.generate import generate_text
    from qjax.sweep.cells import canonical

    asked_of = ([] if recipe is None else canonical([recipe]), ())
    loaded = _load(model)
    if recipe is not None:
        read = _calibration(loaded, asked_of, calibration, _own_text(model), calibration_windows, calibration_window, seed)
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


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A model, as for sweep.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Instead of a model: its number of parameters, as 7e9.")] = None,
) -> None:
    """The memory table: exact bytes of a model in every precision."""
    from qjax.report.memory import memory_table, parameters_table
    from qjax.report.rendering import to_rich

    if (model is None) == (parameters is None):
        raise QjaxError("info: give either a model or --parameters, for example `qjax info --parameters 7e9`")
    if model is None:
        console().print(to_rich(parameters_table(parameters)))
        return
    from qjax.driver.decoder import kernel_shapes

    console().print(to_rich(memory_table(*kernel_shapes(_load(model)), title=model)))


for command in (report, rerun, compare):
    app.command()(command)


@app.command()
def formats() -> None:
    """Every number format, with exact bits per weight."""
    from qjax.report.rendering import to_rich
    from qjax.report.tables import formats_table

    console().print(to_rich(formats_table()))


@app.command()
def recipes() -> None:
    """Every method, with its options."""
    from qjax.report.rendering import to_rich
    from qjax.report.tables import recipes_table

    console().print(to_rich(recipes_table()))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the command and turns a user's mistake into one line and exit code 2.

    arguments: words of the command line, None for those of this process.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            app(arguments)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("interrupted; what was finished is kept, the same command goes on from there", err=True)
        raise
    except QjaxError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")


def _print_warning(message: Warning | str, *_: object) -> None:
    typer.echo("warning: " + " ".join(str(message).split()), err=True)


def _fail(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(2)


def _load(name: str) -> "Model":
    """The named model, with compiled programs kept between runs."""
    from qjax.cache import enable_compilation_cache
    from qjax.checkpoints.load import load

    enable_compilation_cache()
    return load(name)


def _calibration(
    model: "Model", asked: tuple, name: str | None, data: list[str], windows: int, window: int, seed: int
) -> "Calibration | None":
    """Calibration tokens where a recipe or rule of `asked` reads any; the text defaults to the first named one of `data`."""
    from qjax.calibrate.tokens import load_calibration
    from qjax.driver.placement import parse_rule
    from qjax.recipe import parse_recipe

    recipes = [*map(parse_recipe, asked[0]), *(parse_rule(rule).recipe for rule in asked[1])]
    if not any(recipe and recipe.statistics for recipe in recipes):
        return None
    named = [spec for spec in data if ":" not in spec]
    if name is None and not named:
        needing = next(str(recipe) for recipe in recipes if recipe and recipe.statistics)
        raise QjaxError(f"{needing} reads calibration data; name a text with --calibration, for example text:PATH or c4")
    return load_calibration(model, name or named[0], windows=windows, window=window, seed=seed)


def _default_windows(model: str, data: list[str], asked: int | None) -> int | None:
    """How many windows are measured: of the bundled model's own text not all, unless asked for."""
    if asked is not None or model != "bundled" or data != ["python-docs"]:
        return asked
    typer.echo(f"measuring the first {DEFAULT_WINDOWS} windows; --max-windows 0 measures all", err=True)
    return DEFAULT_WINDOWS


def _own_text(model: str) -> list[str]:
    """The text that a model of that name is calibrated on where none is named."""
    return ["python-docs"] if model == "bundled" else []
