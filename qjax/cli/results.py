"""The commands about folders of results: report, rerun, compare. Only `app.py` imports it."""

from pathlib import Path
from typing import Annotated

import typer

from qjax.cli.options import Folder, split_names
from qjax.cli.terminal import console, live_sweep, print_tables
from qjax.errors import QjaxError
from qjax.files import expand

UNEQUAL = 1  # exit code of a rerun that gave other figures


def report(
    folder: Folder,
    width: Annotated[str, typer.Option(help="Of the figures: single or double column of a paper.")] = "single",
) -> None:
    """Tables and figures of a finished or unfinished sweep, from its rows alone."""
    from qjax.report.reports import write_reports

    rows = _read(folder)
    print_tables(rows)
    for path in write_reports(folder, rows, width=width):
        typer.echo(path)


def rerun(
    folder: Folder,
    row: Annotated[str, typer.Option("--row", help="The start of the row's key, or its recipe.", metavar="KEY")],
    model: Annotated[str | None, typer.Option(help="Where the model is, if its name does not say.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the text is, as text:PATH.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Where the calibration text is, as text:PATH.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Where task files are, as NAME:PATH, comma-separated.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Where the model is that differences are from.")] = None,
) -> None:
    """Measure a row's cell once again and compare every column; nothing is written.

    Exit code 0 where all columns but times, speeds, memory and versions are equal to the last bit, 1 otherwise.
    """
    rows = _read(folder)
    from qjax.cache import enable_compilation_cache
    from qjax.report.rendering import to_rich
    from qjax.report.rerun_table import rerun_table, unequal
    from qjax.sweep.request import find_row
    from qjax.sweep.rerun import rerun as measure_again
    from qjax.sweep.rows import restated

    old = find_row(rows, row, str(folder))
    named = split_names(tasks, "--tasks")
    enable_compilation_cache()
    with live_sweep() as watcher:
        places = {"model": model, "data": data, "calibration": calibration, "tasks": named, "baseline": baseline}
        new = measure_again(old, **places, watcher=watcher)
    old = restated(old)
    console().print(to_rich(rerun_table(old, new)))
    if unequal(old, new):
        raise typer.Exit(UNEQUAL)


def compare(
    old: Annotated[Path, typer.Argument(metavar="A", help="A folder with rows.jsonl.", parser=expand)],
    new: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="The folder that is compared with it.", parser=expand)
    ] = None,
    metric: Annotated[str, typer.Option(help="A column of numbers, as nll, kl, size_bytes, accuracy:TASK.")] = "perplexity",
    baseline: Annotated[
        str | None,
        typer.Option(help="Compare every row with this one of A: the start of its key, or its recipe.", metavar="KEY"),
    ] = None,
    holm: Annotated[
        bool, typer.Option("--holm", help="Mark * so that one wrong mark in a table has a probability of 5 %, not each.")
    ] = False,
) -> None:
    """Rows of two folders that were asked the same, old and new, or all rows with one of them; draws (--seeds) are one line.

    A difference whose 95 % interval does not hold zero is marked *.
    """
    from qjax.report.comparison import baseline_table, comparison_tables
    from qjax.report.rendering import to_rich
    from qjax.report.tables import cells_of
    from qjax.sweep.request import find_row

    if new is None and baseline is None:
        raise QjaxError("compare: give a second folder, or --baseline, a row that every other is compared with")
    before, after = _read(old), [] if new is None else _read(new)
    if baseline is not None:
        row = find_row(cells_of(before), baseline, str(old), any_draw=True)
        found = [baseline_table([*before, *after], row, metric, family=holm)]
    else:
        names = (old.name, new.name) if old.name != new.name else (str(old), str(new))
        found = comparison_tables(before, after, names, metric, family=holm)
    for table in found:
        console().print(to_rich(table))


def _read(folder: Path) -> list[dict[str, object]]:
    """The folder's rows; an error where there are none."""
    from qjax.sweep.store import ROWS, read_rows

    if not folder.is_dir():
        raise QjaxError(f"{folder}: no such folder; a folder of results holds {ROWS}")
    rows = read_rows(folder / ROWS)
    if not rows:
        raise QjaxError(f"{folder / ROWS} holds no rows; `qjax sweep --out {folder}` writes them")
    return rows
