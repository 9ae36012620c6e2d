"""What a table is (a title, columns, rows of plain values) and its Markdown, LaTeX, CSV and terminal forms.

Markdown, LaTeX and the terminal show each value as its column formats it; CSV holds the value itself with every digit, and its
standard error in a column of its own. The same rows give the same bytes.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qjax.report.numbers import fixed, number, significant

if TYPE_CHECKING:
    import rich.table

Row = Mapping[str, object]


def _as_text(row: Row, key: str) -> str:
    return str(row.get(key, ""))


@dataclasses.dataclass(frozen=True)
class Column:
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
    """Rows under a title; `notes` are sentences below it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """The formatted text of every row."""
        return [[column.format(row, column.key) for column in self.columns] for row in self.rows]

    def headers(self) -> list[str]:
        """The columns' headers, each on one line."""
        return [column.header.replace("\n", " ") for column in self.columns]


def decimals(places: int) -> Callable[[Row, str], str]:
    """A column format with a fixed number of decimal places."""
    return lambda row, key: fixed(number(row, key), places)


def digits(count: int) -> Callable[[Row, str], str]:
    """A column format with a fixed number of significant digits."""
    return lambda row, key: significant(number(row, key), count)


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured table whose source is aligned too."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in [table.headers(), *table.cells()]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(table.columns))]
    rule = [":" + "-" * (w - 1) if c.text else "-" * (w - 1) + ":" for c, w in zip(table.columns, widths, strict=True)]
    lines.insert(1, rule)
    body = [
        f"{cell:<{width}}" if column.text else f"{cell:>{width}}"
        for line in lines
        for cell, column, width in zip(line, table.columns, widths, strict=True)
    ]
    count = len(table.columns)
    rows = ["| " + " | ".join(body[i : i + count]) + " |" for i in range(0, len(body), count)]
    return "\n".join([f"**{table.title}**", "", *rows, *(["", " ".join(table.notes)] if table.notes else [])]) + "\n"


_LATEX_ESCAPES = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
}


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX_ESCAPES.get(letter, letter) for letter in text)


_NUMBER = re.compile(r"(-?)(\d[\d.]*)(?:e(-?\d+))?")


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
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([["" if row.get(key) is None else row[key] for key in keys] for row in table.rows])
    return text.getvalue()


@dataclasses.dataclass(frozen=True)
class RichTable:
    """A table for rich consoles; on a narrow one columns of the highest rank are left out, and the caption says which."""

    table: Table

    def __rich_console__(self, console, options):
        from rich.measure import Measurement
        from rich.text import Text

        ranks = sorted({column.rank for column in self.table.columns}, reverse=True)
        for limit in ranks:
            grid = self._grid(limit)
            if Measurement.get(console, options.update(width=10_000), grid).maximum <= options.max_width:
                break
        yield grid
        yield Text()  # a blank line, so that what is printed next stands apart

    def _grid(self, limit: int) -> "rich.table.Table":
        from rich import box
        from rich.table import Table as Grid
        from rich.text import Text

        shown = [column.rank <= limit for column in self.table.columns]
        hidden = [header for header, keep in zip(self.table.headers(), shown, strict=True) if not keep]
        notes = [*self.table.notes, *([f"Too narrow for: {', '.join(hidden)}."] if hidden else [])]
        grid = Grid(
            title=Text(self.table.title, style="bold"),
            title_justify="left",
            caption=Text(" ".join(notes), style="dim") if notes else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            header_style="bold",
        )
        for column, keep in zip(self.table.columns, shown, strict=True):
            if keep:
                justify = "left" if column.text else "right"
                grid.add_column(
                    Text(column.header),
                    justify=justify,
                    no_wrap=not column.text,
                    overflow="fold" if column.text else "ellipsis",
                    vertical="top",
                )
        for line in self.table.cells():
            grid.add_row(*(Text(cell) for cell, keep in zip(line, shown, strict=True) if keep))
        return grid


def to_rich(table: Table) -> RichTable:
    """What a rich console prints for the table."""
    return RichTable(table)


def columns_of(rows: Sequence[Row], columns: Iterable[Column]) -> tuple[Column, ...]:
    """The columns for which any row has a value."""
    return tuple(column for column in columns if any(row.get(column.key) is not None for row in rows))
