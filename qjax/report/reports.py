"""A folder of results: every table and figure that its rows fill, made from the rows alone.

What may be shown is data: `TABLES` and `FIGURES` for each group of rows of one model, text and convention (`split_tables`),
`FOLDER_TABLES` and `FOLDER_FIGURES` for all rows of a folder at once. A new table or figure is a pure function of rows and a
line here; the command line prints it, `write_reports` writes it, and the test of committed results makes it again.

Rows that are no cells of a sweep (`kind`) reach only the exhibits of the whole folder.
"""

import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qjax.errors import QjaxError
from qjax.files import expand, write_atomically
from qjax.folders import prepare_results_folder
from qjax.report.accuracy import accuracy_table, tasks_of
from qjax.report.captions import dots_caption, kernels_caption, lines_caption, tradeoff_caption
from qjax.report.dots import dots_figure, has_dots
from qjax.report.drawing import PNG_DPI, RC
from qjax.report.estimates import shown_rows
from qjax.report.figures import has_tradeoff, lines_figure, tradeoff_figure
from qjax.report.inputs import INPUTS, has_inputs, inputs_caption, inputs_figure, inputs_table
from qjax.report.kernels import by_device, has_kernels, kernels_figure, kernels_table
from qjax.report.measured import has_measured, measured_table, shown_measurements
from qjax.report.memory import memory_rows_table
from qjax.report.paper_shapes import KIND, paper_shapes_table
from qjax.report.rendering import Row, Table, to_csv, to_latex, to_markdown
from qjax.report.scaling import COSTS, SCALING, has_scaling, scaling_caption, scaling_figure, scaling_table
from qjax.report.seeds import seeds_of, seeds_table
from qjax.report.sensitivity import ordinary, placed_alone, sensitivity_table
from qjax.report.series import has_widths, line_panels, widths_table
from qjax.report.speeds import SPEED, speeds_table
from qjax.report.tables import perplexity_table, split_tables
from qjax.report.tradeoff import has_speed, tradeoff_table
from qjax.report.training import training_table
from qjax.sweep.rows import with_baseline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NOTHING = "None"  # in a file's name, of a value that a row has not
LONGEST = 60  # letters of a name in a file's name, which the system allows 255


class Exhibit(NamedTuple):
    """A table or figure. suffix: of its file name; shows(rows): true where the rows fill it; make(rows), of a figure
    make(rows, width). split(rows), of a folder's: further suffix -> rows, each of a table of their own; None: one of all.
    caption(rows): of a figure.
    """

    suffix: str
    shows: Callable[[Sequence[Row]], object]
    make: Callable[..., object]
    split: Callable[[Sequence[Row]], dict[str, list[Row]]] | None = None
    caption: Callable[[Sequence[Row]], str] | None = None


def of_kind(kind: str) -> Callable[[Sequence[Row]], bool]:
    """Whether any row is of that kind."""
    return lambda rows: any(row.get("kind") == kind for row in rows)


TABLES = (
    Exhibit("", ordinary, lambda rows: perplexity_table(ordinary(rows))),
    Exhibit("accuracy", tasks_of, accuracy_table),
    Exhibit("widths", has_widths, widths_table),
    Exhibit("seeds", seeds_of, seeds_table),
    Exhibit("tradeoff", has_speed, tradeoff_table),
    Exhibit("sensitivity", placed_alone, sensitivity_table),
)
FIGURES = (
    Exhibit("", lambda rows: not has_tradeoff(rows) and line_panels(rows), lines_figure, caption=lines_caption),
    Exhibit("recipes", lambda rows: not has_tradeoff(rows) and has_dots(rows), dots_figure, caption=dots_caption),
    Exhibit("tradeoff", has_tradeoff, tradeoff_figure, caption=tradeoff_caption),
)
FOLDER_TABLES = (
    Exhibit("memory", of_kind("memory"), memory_rows_table),
    Exhibit(INPUTS, of_kind(INPUTS), inputs_table),
    Exhibit(KIND, of_kind(KIND), paper_shapes_table),
    Exhibit("kernels", of_kind("kernels"), kernels_table, by_device),
    Exhibit("training", of_kind("training"), training_table),
    Exhibit(SPEED, of_kind(SPEED), speeds_table),
    Exhibit(SCALING, of_kind(SCALING), scaling_table),
)
FOLDER_FIGURES = (
    Exhibit("kernels", has_kernels, kernels_figure, by_device, kernels_caption),
    Exhibit(INPUTS, has_inputs, inputs_figure, caption=inputs_caption),
    *(
        Exhibit(
            f"{SCALING}-{name}",
            has_scaling,
            functools.partial(scaling_figure, cost),
            caption=functools.partial(scaling_caption, cost),
        )
        for cost, name in zip(COSTS, ("time", "memory"), strict=True)
    ),
)


def table_exhibits() -> list[Exhibit]:
    """The tables of a group: those of `TABLES`, and one for each measurement that declares what it shows."""
    measured = [
        Exhibit(each.name, functools.partial(has_measured, each), functools.partial(measured_table, each))
        for each in shown_measurements()
    ]
    return [*TABLES, *measured]


def tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """(file name without suffix, table) of everything the rows fill; raises QjaxError when there are no rows."""
    if not rows:
        raise QjaxError("a report needs rows, got none; `qjax sweep` measures some")
    found = [(name, exhibit.make(group)) for name, exhibit, group in _exhibits(rows, table_exhibits())]
    found += [(name, exhibit.make(group)) for name, exhibit, group in _folder_exhibits(rows, FOLDER_TABLES)]
    if not found:
        kinds = ", ".join(dict.fromkeys(str(row.get("kind")) for row in rows))
        raise QjaxError(f"no table or figure shows rows of the kind {kinds}; `qjax sweep` measures some that are shown")
    return found


def figures(rows: Sequence[Row], width: str = "single") -> Iterator[tuple[str, "Figure"]]:
    """(file name without suffix, figure) of everything the rows fill, drawn one by one. width: "single" | "double" column."""
    for name, exhibit, group in _all_figures(rows):
        yield name, exhibit.make(group, width)


def captions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(file name without suffix, text) of every figure's caption."""
    return [(name, exhibit.caption(group)) for name, exhibit, group in _all_figures(rows)]


def _all_figures(rows: Sequence[Row]) -> Iterator[tuple[str, Exhibit, list[Row]]]:
    yield from _exhibits(rows, FIGURES)
    yield from _folder_exhibits(rows, FOLDER_FIGURES)


def write_reports(folder: str | Path, rows: Sequence[Row], *, width: str = "single") -> list[Path]:
    """Writes every table (md, tex, csv) and figure (png, pdf, caption.txt) that the rows fill.

    width: of the figures, "single" or "double" column. Returns the paths. Raises QjaxError when there are no rows or the folder
    cannot be written.
    """
    folder = prepare_results_folder(folder)
    paths = [path for name, table in tables(rows) for path in write_table(folder, name, table)]
    paths += [path for name, figure in figures(rows, width) for path in save_figure(figure, folder, name)]
    for name, caption in captions(rows):
        paths.append(folder / f"{name}.caption.txt")
        write_atomically(paths[-1], caption)
    return paths


def write_table(folder: str | Path, name: str, table: Table) -> list[Path]:
    """Writes folder/name.md, .tex and .csv."""
    paths = []
    for suffix, render in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
        paths.append(expand(folder) / f"{name}.{suffix}")
        write_atomically(paths[-1], render(table))
    return paths


def save_figure(figure: "Figure", folder: str | Path, name: str) -> list[Path]:
    """Writes folder/name.png and folder/name.pdf (vector, fonts embedded); the same figure gives the same bytes.

    Raises QjaxError when the folder is missing or cannot be written.
    """
    import matplotlib.style

    paths = []
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Creator": "qjax"})):
        content = io.BytesIO()
        with matplotlib.style.context(["default", RC]):
            figure.savefig(content, format=suffix, dpi=PNG_DPI, metadata=metadata)
        paths.append(expand(folder) / f"{name}.{suffix}")
        write_atomically(paths[-1], content.getvalue())
    return paths


def _folder_exhibits(rows: Sequence[Row], exhibits: Sequence[Exhibit]) -> Iterator[tuple[str, Exhibit, list[Row]]]:
    """(file name, exhibit, rows) of what all rows together fill."""
    for exhibit in (exhibit for exhibit in exhibits if exhibit.shows(rows)):
        for more, group in (exhibit.split(rows) if exhibit.split else {"": list(rows)}).items():
            if exhibit.shows(group):
                yield f"{exhibit.suffix}-{more}".rstrip("-"), exhibit, group


def _exhibits(rows: Sequence[Row], exhibits: Sequence[Exhibit]) -> Iterator[tuple[str, Exhibit, list[Row]]]:
    """(file name, exhibit, rows) of what each group fills, a row for every cell."""
    groups = split_tables(rows)
    for name, group in zip(report_names(groups), groups, strict=True):
        shown = shown_rows(group)
        yield from ((f"{name}-{exhibit.suffix}".rstrip("-"), exhibit, shown) for exhibit in exhibits if exhibit.shows(shown))


def report_names(groups: Sequence[Sequence[Row]]) -> list[str]:
    """File names, without suffix, by model, text and convention; what tells two of the same name apart is appended."""
    names = [_slug("baseline", "corpus", "convention", row=group[0]) for group in groups]
    for keys in (("tasks",), ("baseline_fingerprint", "corpus_fingerprint", "windows"), ("device",), ("compute_dtype",)):
        details = [_slug(*keys, row=group[0]) for group in groups]
        pairs = list(zip(names, details, strict=True))
        telling = {name for name, _ in pairs if len({more for other, more in pairs if other == name}) > 1}
        names = [f"{name}-{more}" if name in telling and more != NOTHING else name for name, more in pairs]
    return names


def _slug(*keys: str, row: Row) -> str:
    row = with_baseline(row)
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", str(row.get(key))).strip("-.")[:LONGEST] or "x" for key in keys)
