"""The commands that measure many cells: sweep, sensitivity."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli.early import check_names
from qjax.cli.loading import Draw, calibrations_for, default_windows, load_model
from qjax.cli.options import (
    MODEL_HELP,
    CalibrationCompute,
    CalibrationName,
    CalibrationWindow,
    CalibrationWindows,
    ComputeName,
    ConventionName,
    Data,
    MaxQuestions,
    MaxWindows,
    ModelName,
    OrderName,
    Out,
    RecipeName,
    Rules,
    Seed,
    Seeds,
    Tasks,
    split_names,
    split_numbers,
    split_seeds,
)
from qjax.cli.terminal import live_sweep, live_workers, print_states, print_tables
from qjax.errors import KEPT, QjaxError, one_line
from qjax.folders import prepare_results_folder, refuse_inputs

if TYPE_CHECKING:
    from qjax.models.model import Model
    from qjax.sweep.runner import Sweep

METHODS, BITS = "rtn,gptq,awq,awq+gptq,nf4", "8,4,3,2"


def sweep(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = "bundled",
    recipes: Annotated[
        str | None, typer.Option(help="Comma-separated recipes, see `qjax recipes`; instead of --methods, --bits, --group.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods or codebooks, times --bits.", show_default=METHODS)
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Comma-separated bits per code.", show_default=BITS)] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Weights per scale: a number, channel (or -1) or tensor.", show_default="128, codebooks 64"),
    ] = None,
    data: Data = ["python-docs"],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    tasks: Tasks = None,
    max_questions: MaxQuestions = None,
    compute: ComputeName = None,
    divergence: Annotated[
        bool, typer.Option("--divergence", help="Measure the divergence from the unquantized model, or from --baseline.")
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Time prefill and decoding, dense and packed.")] = False,
    measure: Annotated[str | None, typer.Option(help="Comma-separated measurements, see `qjax columns`.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="A model that differences are from, as MODEL.", show_default="the model as it is")
    ] = None,
    calibration: CalibrationName = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    order: OrderName = None,
    rule: Rules = None,
    seed: Seed = 0,
    seeds: Seeds = None,
    out: Out = Path("qjax-results"),
    workers: Annotated[int, typer.Option(min=1, help="So many workers share the cells of this sweep.")] = 1,
    launcher: Annotated[
        str,
        typer.Option(
            help="What starts them: local, slurm(OPTION=VALUE,...) or ray(...); none: something else does, this is one.",
            metavar="NAME",
        ),
    ] = "local",
    stale: Annotated[
        float,
        typer.Option(
            min=0.1, max=1e6, help="Seconds after which a worker that gives no sign of life loses its cells to others."
        ),
    ] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and how far they are; measure nothing.")] = False,
) -> None:
    """Measure perplexity of a model in many formats; table and figure go to --out.

    The same command may run any number of times at once, on all machines that see --out: every cell is measured once.
    """
    from qjax.sweep.launch import parse_launcher

    engine, _ = parse_launcher(launcher)
    asked, drawing = _recipes(recipes, methods, bits, group), split_seeds(seeds, seed)
    asked_names = {"recipes": recipes, "methods": methods, "order": order, "rules": rule, "convention": convention}
    asked_names |= {"tasks": tasks, "measure": measure}
    check_names(**asked_names, texts=(*data, calibration), models=(model, baseline))
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.tasks import load_tasks
    from qjax.evaluate.windows import parse_convention
    from qjax.recipe import UNQUANTIZED
    from qjax.sweep.cells import canonical
    from qjax.sweep.columns import require_measurements
    from qjax.sweep.runner import Sweep, cell_states, rules_in_order

    names, rules, measured = canonical(asked, order), rules_in_order(rule or (), order), parse_convention(convention)
    measures = require_measurements(split_names(measure, "--measure"))
    if not dry_run:
        refuse_inputs(out, [model])
        prepare_results_folder(out)
    corpora = load_corpora(data)
    asked = load_tasks(split_names(tasks, "--tasks"), max_questions or None)
    launched = not dry_run and (workers > 1 if engine == "local" else engine != "none")
    if launched:
        _launch(context, workers, launcher, out)
    loaded = load_model(model, lazy=dry_run)
    if loaded.recipe != UNQUANTIZED and (recipes, methods, bits, group) == (None, None, None, None):
        names = [UNQUANTIZED]  # there is nothing left to quantize
    against = None if baseline is None else load_model(baseline)
    max_windows = default_windows(model, data, max_windows)
    draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
    tokens = calibrations_for(loaded, (names, rules), draw, data, drawing)
    request = Sweep(
        tuple(names),
        corpora,
        measured,
        max_windows or None,
        rules,
        tasks=asked,
        divergence=divergence,
        speed=speed,
        measures=measures,
        baseline=against,
        seeds=drawing,
        calibration=tokens,
        compute=compute,
    )
    if dry_run:
        print_states(cell_states(loaded, request, out))
        return
    _run(loaded, request, out, workers=workers, stale_seconds=stale, of_others=not launched and engine != "none")


def _launch(context: typer.Context, workers: int, launcher: str, out: Path) -> None:
    """Runs this command by so many workers; ends with the exit code of the first that failed."""
    from qjax.sweep.launch import WorkerError, run_workers

    given = {**context.params, "launcher": "none"}
    words = [str(given["model"])]
    for option in context.command.params:
        value = given[option.name]
        if option.name == "model" or value is None or value is False:
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words.append(option.opts[0] if each is True else f"{option.opts[0]}={each}")
    command = [sys.executable, "-c", "from qjax.cli.app import main; main()", "sweep", *words]
    try:
        with live_workers(out) as show:
            run_workers(command, workers, out, launcher, on_wait=show)
    except WorkerError as error:
        typer.echo(one_line(f"error: {error}; {KEPT}"), err=True)
        raise typer.Exit(error.code) from None


def _recipes(recipes: str | None, methods: str | None, bits: str | None, group: str | None) -> list[str]:
    """Recipes as they are given, or of methods times bits."""
    from qjax.sweep.crossed import crossed

    if recipes is not None and (methods, bits, group) != (None, None, None):
        raise QjaxError("--recipes says everything; give either it or --methods, --bits and --group")
    if recipes is not None:
        return split_names(recipes, "--recipes")
    return crossed(
        split_names(METHODS if methods is None else methods, "--methods"), split_numbers(BITS if bits is None else bits), group
    )


def sensitivity(
    model: ModelName,
    recipe: RecipeName,
    data: Data = ["python-docs"],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    calibration: CalibrationName = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    order: OrderName = None,
    seed: Seed = 0,
    seeds: Seeds = None,
    out: Out = Path("qjax-sensitivity"),
) -> None:
    """Measure what each block costs when it alone is quantized; rows and a table go to --out."""
    drawing = split_seeds(seeds, seed)
    check_names(recipes=recipe, order=order, convention=convention, texts=(*data, calibration), models=(model,))
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.windows import parse_convention
    from qjax.sweep.cells import canonical
    from qjax.sweep.runner import Sweep

    names, measured = canonical([recipe], order), parse_convention(convention)
    refuse_inputs(out, [model])
    prepare_results_folder(out)
    corpora = load_corpora(data)
    loaded = load_model(model)
    draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
    tokens = calibrations_for(loaded, (names, ()), draw, data, drawing)
    max_windows = default_windows(model, data, max_windows)
    request = Sweep(tuple(names), corpora, measured, max_windows or None, seeds=drawing, calibration=tokens, one_block=True)
    _run(loaded, request, out)


def _run(model: "Model", request: "Sweep", out: Path, *, of_others: bool = True, **options: object) -> None:
    """Measures, prints the tables of this sweep, and writes those of all rows in the folder. of_others: rows that other runs
    measured are shown too; options: of `run_sweep`.
    """
    from qjax.numbers import NotFiniteError
    from qjax.report.reports import write_reports
    from qjax.sweep.runner import run_sweep
    from qjax.sweep.store import ROWS, read_rows

    broken = None
    with live_sweep(of_others=of_others) as watcher:
        try:
            rows = run_sweep(model, request, out, watcher, **options)
        except NotFiniteError as error:  # some cells have no row, which the others' are shown without
            rows, broken = read_rows(out / ROWS), error
        except KeyboardInterrupt:
            typer.echo(f"{watcher.done} of {watcher.total} cells are kept in {out / ROWS}", err=True)
            raise
    if rows:
        print_tables(rows)
        for path in write_reports(out, read_rows(out / ROWS)):
            typer.echo(path)
    if broken is not None:
        raise broken
