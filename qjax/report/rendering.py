"""The numbers of a row, as many digits as their standard error leaves meaning; what a table is (a title, columns, rows of plain
values), and its Markdown, LaTeX, CSV and terminal forms.

Markdown, LaTeX and the terminal show each value as its column formats it; CSV holds the value itself with every digit, and its
standard error in a column of its own. The same rows give the same bytes.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from qjax.errors import QjaxError
from qjax.printable import printable

if TYPE_CHECKING:  # `qjax formats` needs no NumPy
    import numpy as np
    import rich.table
    from jaxtyping import Float, Int

Row = Mapping[str, object]
INFINITY, MISSING = "∞", "-"
BYTE_UNITS = (("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12))  # decimal, as disks and papers count
SCIENTIFIC_ABOVE = 1e6
MOST_DECIMALS = 8


def number(row: Row, key: str) -> float:
    """A row's figure; nan where the row has none. Raises QjaxError for what is no number."""
    value = row.get(key)
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise QjaxError(f"row {row.get('key')}: {key} is {value!r}, expected a number; mend or remove the row") from None


def losses(row: Row) -> "Float[np.ndarray, ' windows']":
    """A row's loss of every window, nats; infinite where the model diverged, which a row holds as "inf" or null."""
    import numpy as np

    return np.array([math.inf if loss is None else float(loss) for loss in row["window_nll"]])


def loss_change(row: Row, other: Row) -> "Float[np.ndarray, ' windows']":
    """By how much the row's losses are above the other's; nan where both diverged."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        return losses(row) - losses(other)


def documents_of(row: Row) -> "Int[np.ndarray, ' windows'] | None":
    """The document of every window; None in rows of earlier versions, whose windows count as independent."""
    import numpy as np

    found = row.get("window_documents")
    return None if found is None else np.asarray(found)


def with_error(value: float, error: float, *, sign: str = "") -> str:
    """value ± error, both to the place of the error's second significant digit: 12.345 ± 0.067. Without an error (nan, 0) four
    significant digits of the value. sign: "+" shows the sign of positive values too.
    """
    if not (math.isfinite(value) and math.isfinite(error) and error):
        return significant(value, 4, sign=sign)
    place = Decimal(f"{error:.1e}").as_tuple().exponent  # of the last digit that is shown
    if abs(value) >= SCIENTIFIC_ABOVE:
        digits = min(max(2, Decimal(f"{value:.3e}").adjusted() - place + 1), 6)
        return f"{significant(value, digits, sign=sign)} ± {significant(error, 2)}"
    step = Decimal(1).scaleb(max(place, -MOST_DECIMALS))
    return f"{Decimal(value).quantize(step):{sign}f} ± {Decimal(error).quantize(step):f}"


def significant(value: float, digits: int = 3, *, sign: str = "") -> str:
    """`digits` significant digits: 0.0301, 12.35, 3.01e-5, 1.24e6; ∞ for infinity and - for nan."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return INFINITY if value > 0 else f"-{INFINITY}"
    if value == 0:
        return "0"
    rounded = Decimal(f"{value:.{digits - 1}e}")
    scientific = rounded.adjusted() < -3 or abs(value) >= SCIENTIFIC_ABOVE
    return f"{rounded:{sign}{'e' if scientific else 'f'}}".replace("e+", "e")


def fixed(value: float, decimals: int) -> str:
    """`decimals` decimal places; ∞ for infinity and - for nan."""
    return f"{value:.{decimals}f}" if math.isfinite(value) else significant(value)


def byte_unit(sizes: Sequence[float]) -> tuple[str, int]:
    """The unit (name, bytes) in which the largest size is at least 1: one unit for a whole column."""
    largest = max((size for size in sizes if math.isfinite(size)), default=0)
    return next((unit for unit in reversed(BYTE_UNITS) if largest >= unit[1]), BYTE_UNITS[0])


def _as_text(row: Row, key: str) -> str:
    return "" if row.get(key) is None else str(row[key])


@dataclasses.dataclass(frozen=True)
class TableColumn:
    """How one value of a row is shown.

    format(row, key) -> text; error: the key of the standard error, for CSV; text: left-aligned words, not a number;
    rank: on a narrow terminal columns of higher rank are left out first, those of rank 0 never. A line break in
    `header` is kept on the terminal only.
    """

    key: str
    header: str
    format: Callable[[Row, str], str] = _as_text
    error: str = ""
    text: bool = False
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a title; `notes` are sentences below it. Whatever names are in them is shown as `printable`."""

    title: str
    columns: tuple[TableColumn, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "title", printable(self.title))
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    def cells(self) -> list[list[str]]:
        """The formatted text of every row."""
        return [[printable(column.format(row, column.key)) for column in self.columns] for row in self.rows]

    def headers(self) -> list[str]:
        """The columns' headers, each on one line."""
        return [printable(column.header) for column in self.columns]


def decimals(places: int) -> Callable[[Row, str], str]:
    """A column format with a fixed number of decimal places."""
    return lambda row, key: fixed(number(row, key), places)


def digits(count: int) -> Callable[[Row, str], str]:
    """A column format with a fixed number of significant digits."""
    return lambda row, key: significant(number(row, key), count)


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured table whose source is aligned too."""
    lines = [[_markdown_escape(cell) for cell in line] for line in [table.headers(), *table.cells()]]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    aligned = list(zip(widths, [column.text for column in table.columns], strict=True))
    lines.insert(1, [":".ljust(width, "-") if text else ":".rjust(width, "-") for width, text in aligned])
    cells = (
        [cell.ljust(width) if text else cell.rjust(width) for cell, (width, text) in zip(line, aligned, strict=True)]
        for line in lines
    )
    rows = [f"| {' | '.join(line)} |" for line in cells]
    title, notes = (_markdown_escape(text, cell=False) for text in (table.title, " ".join(table.notes)))
    return "\n".join([f"**{title}**", "", *rows, *(["", notes] if notes else [])]) + "\n"


def _markdown_escape(text: str, *, cell: bool = True) -> str:
    """Text that opens no HTML tag, no link and, in a cell, no column."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("\\", "\\\\")).replace("](", "]\\(")
    return text.replace("|", "\\|") if cell else text


_LATEX_ESCAPES = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "≈": r"$\approx$", "∞": r"$\infty$"}
)
_SIGNED = re.compile(r"[-+](\d[\w .,()%]*)?")  # words that begin with a signed number, or a sign alone
_NUMBER = re.compile(r"(-?)(\d[\d.]*)(?:e(-?\d+))?")


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return text.translate(_LATEX_ESCAPES)


def _latex_number(text: str) -> str:
    """A formatted number with true minus signs and powers of ten."""

    def show(match: re.Match) -> str:
        sign, mantissa, power = match.groups()
        power = f"\\times10^{{{power}}}" if power else ""
        return f"${sign}{mantissa}{power}$" if sign or power else mantissa

    return _NUMBER.sub(show, latex_escape(text))


def to_latex(table: Table) -> str:
    """A floating table with rules of the booktabs package; the title and notes are its caption."""
    alignment = "".join("l" if column.text else "r" for column in table.columns)
    lines = [
        [latex_escape(cell) if column.text else _latex_number(cell) for cell, column in zip(line, table.columns, strict=True)]
        for line in table.cells()
    ]
    caption = " ".join([table.title + ("" if table.title.endswith(".") else "."), *table.notes])
    return (
        "% \\usepackage{booktabs}\n\\begin{table}\n\\centering\n\\small\n"
        f"\\caption{{{latex_escape(caption)}}}\n\\begin{{tabular}}{{{alignment}}}\n\\toprule\n"
        + " & ".join(latex_escape(header) for header in table.headers())
        + " \\\\\n\\midrule\n"
        + "".join(" & ".join(line) + " \\\\\n" for line in lines)
        + "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def to_csv(table: Table) -> str:
    """Keys as the header and values with every digit; a value that a row does not have is an empty field."""
    keys = list(dict.fromkeys(key for column in table.columns for key in (column.key, column.error) if key))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_value(value) for key, value in row.items()} for row in table.rows)
    return text.getvalue()


def _csv_value(value: object) -> object:
    """A value that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    formula = value.startswith(("=", "+", "-", "@", "\t", "\r")) and not _SIGNED.fullmatch(value)
    return f"'{printable(value)}" if formula else printable(value)


@dataclasses.dataclass(frozen=True)
class RichTable:
    """A table for rich consoles; on a narrow one columns of the highest rank are left out, and the caption says which."""

    table: Table

    def __rich_console__(self, console, options):
        from rich.measure import Measurement

        for limit in sorted({column.rank for column in self.table.columns}, reverse=True):
            grid = self._grid(limit)
            if Measurement.get(console, options.update(width=10_000), grid).maximum <= options.max_width:
                break
        yield grid
        yield ""  # a blank line, so that what is printed next stands apart

    def _grid(self, limit: int) -> "rich.table.Table":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as Grid
        from rich.text import Text

        shown = [column.rank <= limit for column in self.table.columns]
        hidden = [header for header, keep in zip(self.table.headers(), shown, strict=True) if not keep]
        notes = [*self.table.notes, *([f"Too narrow for: {', '.join(hidden)}."] if hidden else [])]
        grid = Grid(
            title=Text(self.table.title, style="bold"), title_justify="left", caption_justify="left",
            caption=Text(" ".join(notes), style="dim") if notes else None,
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for column in (column for column in self.table.columns if column.rank <= limit):
            look = {"justify": "left", "overflow": "fold"} if column.text else {"justify": "right", "no_wrap": True}
            grid.add_column(Text("\n".join(map(printable, column.header.split("\n"))), style="bold"), **look)
        for line in self.table.cells():
            grid.add_row(*(Text(cell) for cell, keep in zip(line, shown, strict=True) if keep))
        return grid


def to_rich(table: Table) -> RichTable:
    """What a rich console prints for the table."""
    return RichTable(table)


def columns_of(rows: Sequence[Row], columns: Iterable[TableColumn]) -> tuple[TableColumn, ...]:
    """The columns for which any row has a value."""
    return tuple(column for column in columns if any(row.get(column.key) is not None for row in rows))
