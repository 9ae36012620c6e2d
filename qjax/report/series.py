"""From rows to the lines of a figure: which measurements belong together, and what the line is called."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from qjax.formats import INTEGERS, parse_format
from qjax.recipe import UNQUANTIZED
from qjax.report.numbers import number
from qjax.report.rendering import Row
from qjax.report.tables import is_baseline


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
    """("rtn(clip=mse)", "g128-sym") of rtn(clip=mse):int4-g128-sym; ("nf4 dq", "") of nf4-g64-dq."""
    recipe, rule, rules = str(row["recipe"]).partition("; ")
    recipe, at, order = recipe.partition("@")
    stages, method, _ = recipe.rpartition(":")
    if row["format"] == UNQUANTIZED:  # only the kernels that a rule names are quantized
        return f"{UNQUANTIZED} with {rules}", ""
    fmt = parse_format(str(row["format"]))
    grouping, _, others = str(fmt).partition("-")[2].partition("-")
    placed = at + order + (f" with {rules}" if rule else "")
    if fmt.grid in INTEGERS:
        return (stages if method else str(row["method"])) + placed, "-".join(filter(None, (grouping, others)))
    stages = "" if stages == "rtn" or fmt.is_float else stages
    return " ".join(filter(None, (stages, fmt.grid, others))) + placed, ""


MOST_LINES = 12  # in one panel: more names are not legible


def split_panels(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(grouping, rows) of the panels of a figure: one, or for many lines over several groupings of integers one for each.

    What has no grouping (casts, the unquantized model) is in every panel.
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
    """By how many percent perplexity is above the unquantized model's; nan where that is not known."""
    delta = number(row, "nll_delta")
    return 100 * math.expm1(delta) if delta < 700 else number(row, "perplexity_ratio")
