"""Methods over formats: which rows make a line of a figure, and what it is called; and the table with a column for each method.

The table is that of a paper: a line for each integer format, in each cell the change of perplexity; for sweeps of several
methods over several widths and groupings, whose table of recipes is long.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

from qjax.errors import QjaxError
from qjax.formats import INTEGERS, UNQUANTIZED, parse_format
from qjax.report.draws import merge_draws
from qjax.report.rendering import MISSING, Row, Table, TableColumn, decimals, number
from qjax.report.sensitivity import ordinary
from qjax.report.tables import (
    NOISE,
    baseline_name,
    change_of_perplexity,
    describe,
    is_baseline,
    over_units,
    require_one_group,
)
from qjax.sweep.rows import recipe_without_rules

MOST_LINES = 12  # in one panel: more names are not legible
FEWEST = 2  # methods, widths and groupings of a table


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: the measurements of a method with fixed options and grouping, by ascending bits per weight.

    variant: how many lines of the same method come before it.
    """

    label: str
    method: str
    variant: int
    rows: tuple[Row, ...]


def group_series(rows: Iterable[Row]) -> list[Series]:
    """The lines of a figure. Integer formats of all widths make a line per grouping; a codebook makes one over its groupings.

    The grouping is part of the labels where integer formats have more than one.
    """
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if not is_baseline(row):
            lines.setdefault((str(row["method"]), *_name_and_grouping(row)), []).append(row)
    several = len({grouping for _, _, grouping in lines} - {""}) > 1
    series, counts = [], dict.fromkeys((method for method, _, _ in lines), 0)
    for (method, name, grouping), members in sorted(lines.items()):
        ordered = tuple(sorted(members, key=lambda row: number(row, "bits_per_weight")))
        series.append(Series(f"{name} {grouping}" if several and grouping else name, method, counts[method], ordered))
        counts[method] += 1
    return series


def _name_and_grouping(row: Row) -> tuple[str, str]:
    """("rtn(clip=mse)", "g128-sym") of rtn(clip=mse):int4-g128-sym; ("nf4 dq/int8-token", "") of nf4-g64-dq/int8-token; the
    model's name of one as it is that is not the baseline.
    """
    rules = "; ".join(row["rules"])
    if row["format"] == UNQUANTIZED:  # only the kernels that a rule names are quantized
        return f"{UNQUANTIZED} with {rules}" if rules else str(row["model"]), ""
    recipe, at, order = recipe_without_rules(row).partition("@")
    activation = f"/{row['activation']}" if row.get("activation") else ""
    stages = recipe.removesuffix(activation).removesuffix(str(row["format"])).removesuffix(":")
    fmt = parse_format(str(row["format"]))
    grouping, _, others = str(fmt).partition("-")[2].partition("-")
    placed = activation + at + order + (f" with {rules}" if rules else "")
    if fmt.grid in INTEGERS:
        return (stages or str(row["method"])) + placed, "-".join(filter(None, (grouping, others)))
    stages = "" if stages == "rtn" else stages
    return " ".join(filter(None, (stages, fmt.grid_name, others))) + placed, ""


def split_panels(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(grouping, rows) of the panels of a figure: one, or for many lines over several groupings of integers one for each.

    What has no grouping (casts, the baseline) is in every panel.
    """
    groupings = {id(row): "" if is_baseline(row) else _grouping(row) for row in rows}
    integers = {_name_and_grouping(row)[1] for row in rows if not is_baseline(row)} - {""}
    if len(integers) < 2 or len(group_series(rows)) <= MOST_LINES:
        return [("", list(rows))]
    names = sorted(set(groupings.values()) - {""}, key=_by_size)
    return [(name, [row for row in rows if groupings[id(row)] in ("", name)]) for name in names]


def _grouping(row: Row) -> str:
    """The panel of a row: the grouping of an integer format, or of a codebook without what is in its name already."""
    return _name_and_grouping(row)[1] or str(row["format"]).partition("-")[2].partition("-")[0]


def _by_size(grouping: str) -> tuple:
    size, _, others = grouping.partition("-")
    return (int(size[1:]), others) if size[1:].isdigit() else (math.inf, grouping)


def increase(row: Row) -> float:
    """By how many percent perplexity is above the baseline's; nan where that is not known."""
    delta = number(row, "nll_delta")
    return 100 * math.expm1(delta) if delta < 700 else number(row, "perplexity_ratio")


def has_widths(rows: Sequence[Row]) -> bool:
    """Whether the rows are of several methods, widths and groupings."""
    found = _cells(rows)
    formats = {parse_format(fmt) for fmt, _ in found}
    methods = {method for _, method in found}
    counts = (len(methods), len({fmt.bits for fmt in formats}), len({(fmt.granularity, fmt.group) for fmt in formats}))
    return min(counts) >= FEWEST


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
            line |= {f"ratio:{method}": row.get("perplexity_ratio"), f"ratio_stderr:{method}": error, f"row:{method}": row}
            line.setdefault("bits_per_weight", row["bits_per_weight"])  # of nearest rounding, whose column is the first
        lines.append(line)
    columns = [
        TableColumn("format", "format", text=True),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        *(TableColumn(f"ratio:{m}", m, functools.partial(_change, m), error=f"ratio_stderr:{m}") for m in methods),
    ]
    notes = (
        f"Change of perplexity from {baseline_name(rows[0])}, percent. "
        f"±: standard error of the difference, over {over_units(list(found.values()))}. {NOISE}",
        "Bits per weight are those of the first method; AWQ's input scales add to them where they cannot be folded.",
    )
    return Table(f"Methods by width, {describe(rows[0])}", tuple(columns), tuple(lines), notes)


def _cells(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """(format, method with options and order) -> row, of integer formats."""
    found = {}
    for row in ordinary(merge_draws(rows)):
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
