"""Every method in every integer format side by side: a line a format, a column a method, the change of perplexity in each cell.

The table of a paper: for sweeps of several methods over several widths and groupings, whose table of recipes is long.
"""

import functools
from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.formats import INTEGERS, parse_format
from qjax.recipe import UNQUANTIZED
from qjax.report.numbers import MISSING, number
from qjax.report.rendering import Column, Row, Table, decimals
from qjax.report.seeds import seeds_of
from qjax.report.sensitivity import ordinary
from qjax.report.tables import change_of_perplexity, describe, require_one_group

FEWEST = 2  # methods, widths and groupings


def has_widths(rows: Sequence[Row]) -> bool:
    """Whether the rows are of several methods, widths and groupings, each once."""
    found = _cells(rows)
    formats = {parse_format(fmt) for fmt, _ in found}
    methods = {method for _, method in found}
    counts = (len(methods), len({fmt.bits for fmt in formats}), len({(fmt.granularity, fmt.group) for fmt in formats}))
    return min(counts) >= FEWEST and not seeds_of(rows)


def widths_table(rows: Sequence[Row]) -> Table:
    """The table of one model, text and convention. Raises QjaxError without rows of integer formats."""
    require_one_group(rows)
    found = _cells(rows)
    if not found:
        raise QjaxError("a table of widths needs rows of integer formats, got none; `qjax sweep --bits 8,4,3,2` measures some")
    methods = list(dict.fromkeys(method for _, method in found))
    lines = []
    for fmt in sorted({fmt for fmt, _ in found}, key=_width_then_size):
        line = {"format": fmt}
        for method in (method for method in methods if (fmt, method) in found):
            row = found[fmt, method]
            error = number(row, "perplexity_ratio_stderr")
            line |= {f"ratio:{method}": row["perplexity_ratio"], f"ratio_stderr:{method}": error, f"row:{method}": row}
            line.setdefault("bits_per_weight", row["bits_per_weight"])  # of nearest rounding, whose column is the first
        lines.append(line)
    columns = [
        Column("format", "format", text=True),
        Column("bits_per_weight", "bits per\nweight", decimals(3)),
        *(Column(f"ratio:{m}", m, functools.partial(_change, m), error=f"ratio_stderr:{m}") for m in methods),
    ]
    notes = (
        "Change of perplexity from the unquantized model, percent. "
        "±: standard error of the difference, window by window; ≈: within two of them of no change.",
        "Bits per weight are those of the first method; AWQ's input scales add to them where they cannot be folded.",
    )
    return Table(f"Methods by width, {describe(rows[0])}", tuple(columns), tuple(lines), notes)


def _cells(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """(format, method with options and order) -> row, of integer formats."""
    found = {}
    for row in ordinary(rows):
        fmt = str(row["format"])
        if fmt != UNQUANTIZED and parse_format(fmt).grid in INTEGERS:
            found[fmt, str(row["recipe"]).replace(f":{fmt}", "")] = row
    return found


def _width_then_size(name: str) -> tuple[int, float, str]:
    fmt = parse_format(name)
    return -fmt.bits, -fmt.bits_per_weight(), name


def _change(method: str, line: Row, key: str) -> str:
    row = line.get(f"row:{method}")
    return change_of_perplexity(row, "perplexity_ratio") if row else MISSING
