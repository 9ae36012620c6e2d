"""The commands that measure many cells: sweep, sensitivity."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli.early import check_names
from qjax.cli.loading import calibration_for, default_windows, load_model
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
    RecipeName,
    Rules,
    Seed,
    Tasks,
    split_names,
    split_numbers,
)
from qjax.cli.terminal import live_sweep, print_tables
from qjax.errors import QjaxError
from qjax.files import require_writable

if TYPE_CHECKING:
    from qjax.models.model import Model
    from qjax.sweep.runner import Sweep

METHODS, BITS = "rtn,gptq,awq,awq+gptq,nf4", "8,4,3,2"


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
        str | None,
        typer.Option(help="Weights per scale: a number, channel (or -1) or tensor.", show_default="128, codebooks 64"),
    ] = None,
    data: Data = ["python-docs"],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    tasks: Tasks = None,
    max_questions: MaxQuestions = None,
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
    order: OrderName = None,
    rule: Rules = None,
    seed: Seed = 0,
    out: Out = Path("qjax-results"),
) -> None:
    """Measure perplexity of a model in many formats; table and figure go to --out."""
    asked_names = {"recipes": recipes, "methods": methods, "order": order, "rules": rule}
    check_names(**asked_names, texts=(*data, calibration), models=(model, baseline))
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.perplexity import parse_convention
    from qjax.evaluate.tasks import load_tasks
    from qjax.recipe import UNQUANTIZED
    from qjax.sweep.columns import require_measurements
    from qjax.sweep.runner import Sweep, rules_in_order

    names = _recipes(recipes, methods, bits, group, order)
    rules = rules_in_order(rule or (), order)
    measured = parse_convention(convention)
    measures = require_measurements(split_names(measure) if measure else ())
    require_writable(out)
    corpora = load_corpora(data)
    asked = load_tasks(split_names(tasks) if tasks else (), max_questions or None)
    loaded = load_model(model)
    if loaded.recipe != UNQUANTIZED and (recipes, methods, bits, group) == (None, None, None, None):
        names = [UNQUANTIZED]  # there is nothing left to quantize
    against = None if baseline is None else load_model(baseline)
    max_windows = default_windows(model, data, max_windows)
    tokens = calibration_for(loaded, (names, rules), calibration, data, calibration_windows, calibration_window, seed)
    further = {"measures": measures, "baseline": against}
    request = Sweep(
        tuple(names), corpora, measured, max_windows or None, rules, seed, asked, divergence, speed, tokens, **further
    )
    _run(loaded, request, out)


def _recipes(recipes: str | None, methods: str | None, bits: str | None, group: str | None, order: str | None) -> list[str]:
    """Canonical recipes as they are given, or of methods times bits."""
    from qjax.sweep.cells import canonical, expand

    if recipes is not None and (methods, bits, group) != (None, None, None):
        raise QjaxError("--recipes says everything; give either it or --methods, --bits and --group")
    if recipes is not None:
        return canonical(split_names(recipes), order)
    wanted = split_names(METHODS if methods is None else methods), split_numbers(BITS if bits is None else bits)
    return expand(*wanted, group, order)


def sensitivity(
    model: ModelName,
    recipe: RecipeName,
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
    check_names(recipes=recipe, order=order, texts=(*data, calibration), models=(model,))
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.perplexity import parse_convention
    from qjax.sweep.cells import canonical
    from qjax.sweep.runner import Sweep

    names, measured = canonical([recipe], order), parse_convention(convention)
    require_writable(out)
    corpora = load_corpora(data)
    loaded = load_model(model)
    tokens = calibration_for(loaded, (names, ()), calibration, data, calibration_windows, calibration_window, seed)
    max_windows = default_windows(model, data, max_windows)
    request = Sweep(tuple(names), corpora, measured, max_windows or None, seed=seed, calibration=tokens, one_block=True)
    _run(loaded, request, out)


def _run(model: "Model", request: "Sweep", out: Path) -> None:
    """Measures, prints the tables of this sweep, and writes those of all rows in the folder."""
    from qjax.report.reports import write_reports
    from qjax.sweep.runner import run_sweep
    from qjax.sweep.store import ROWS, read_rows

    with live_sweep() as watcher:
        rows = run_sweep(model, request, out, watcher)
    print_tables(rows)
    for path in write_reports(out, read_rows(out / ROWS)):
        typer.echo(path)
