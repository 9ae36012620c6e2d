"""Which rows make a line of a figure, in which panel, and what it is called; and the table with a column for each method.

The table is that of a paper: a line for each integer format, in each cell the change of perplexity; for sweeps of several
methods over several widths and groupings, whose table of recipes is long.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

from qjax.errors import QjaxError
from qjax.formats import FLOATS, INTEGERS, UNQUANTIZED, parse_format
from qjax.report.drawing import METHOD_STYLES
from qjax.report.draws import merge_draws
from qjax.report.rendering import MISSING, Row, Table, TableColumn, decimals, number
from qjax.report.sensitivity import ordinary, placed_alone
from qjax.report.tables import (
    NOISE,
    baseline_name,
    change_of_perplexity,
    describe,
    distinctions,
    is_baseline,
    over_units,
    require_one_group,
)
from qjax.sweep.rows import recipe_without_rules

MOST_LINES = 13  # in one figure: more looks and names are not told apart
DOUBLY = "dq"  # of a format whose scales are quantized
FEWEST = 2  # methods, widths and groupings of a table


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: the measurements of a method with fixed options, by ascending bits per weight.

    method: without refiners; variant: how many lines of the same method come before it.
    """

    label: str
    method: str
    variant: int
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A recipe in parts: rtn(clip=mse), int4, g128, sym, /int8-token@block with mlp/down=rtn:int8-g128."""

    stages: str
    grid: str
    grouping: str = ""
    others: str = ""
    placed: str = ""


def parts_of(row: Row) -> Parts:
    """Of the model as it is, and of one of which a rule quantizes some kernels, `stages` is a name."""
    rules, cache = "; ".join(row["rules"]), f" kv:{row['cache']}" if row.get("cache") else ""
    if row["format"] == UNQUANTIZED:
        alone = cache.strip() or (UNQUANTIZED if rules else str(row["model"]))
        return Parts(f"{alone} with {rules}" if rules else alone, UNQUANTIZED)
    recipe, at, order = recipe_without_rules(row).removesuffix(cache).partition("@")
    activation = f"/{row['activation']}" if row.get("activation") else ""
    activation = activation if recipe.endswith(activation) else ""  # llm_int8 is among the stages
    stages = recipe.removesuffix(activation).removesuffix(str(row["format"])).removesuffix(":")
    fmt = parse_format(str(row["format"]))
    grouping, _, others = str(fmt).partition("-")[2].partition("-")
    placed = activation + at + order + cache + (f" with {rules}" if rules else "")
    return Parts(stages or ("rtn" if grouping else str(fmt)), fmt.grid_name, grouping, others, placed)


def by_method(row: Row) -> str:
    """The name of a line over widths or groupings: "rtn(clip=mse)", "gptq sym", "nf4 dq", "gptq nf4"."""
    parts = parts_of(row)
    codebook = parts.grid not in (UNQUANTIZED, *INTEGERS)
    stages = "" if codebook and parts.stages in ("rtn", parts.grid) else parts.stages
    return " ".join(filter(None, (stages, parts.grid if codebook else "", parts.others))) + parts.placed


def by_grid(row: Row) -> str:
    """The name of lines over groupings, scales doubly quantized or not: "int4-sym", "nf4"."""
    parts = parts_of(row)
    return "-".join((parts.grid, *(part for part in parts.others.split("-") if part not in ("", DOUBLY))))


def _doubly(row: Row) -> bool:
    return DOUBLY in parts_of(row).others.split("-")


def group_series(rows: Iterable[Row], name: Callable[[Row], str] = by_method) -> list[Series]:
    """The lines of a figure, those of a method one after another."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in (row for row in rows if not is_baseline(row)):
        grid = parts_of(row).grid
        looks = base_method(row) if name is by_method else "rtn" if grid in INTEGERS else grid
        lines.setdefault((looks, name(row)), []).append(row)
    series, counts = [], dict.fromkeys((method for method, _ in lines), 0)
    known = list(METHOD_STYLES)
    for (method, label), members in sorted(lines.items(), key=lambda item: ((*known, item[0][0]).index(item[0][0]), item[0])):
        ordered = tuple(sorted(members, key=lambda row: number(row, "bits_per_weight")))
        series.append(Series(label, method, counts[method], ordered))
        counts[method] += 1
    return series


def base_method(row: Row) -> str:
    """The method without its refiners, which are variants of it: gptq of gptq(clip=mse)+descend."""
    refiners = {str(stage).partition("(")[0] for stage in row.get("refining", ())}
    return "+".join(stage for stage in str(row["method"]).split("+") if stage not in refiners)


def is_cast(row: Row) -> bool:
    """Whether the weights are of another floating-point type: twice the bits of everything else, and no loss to see."""
    return str(row["format"]) in FLOATS


def line_panels(rows: Sequence[Row]) -> list[tuple[str, list[Series]]]:
    """(title, lines) of the panels of a figure of lines over bits per weight; none where dots one under the other show more.

    One panel for one grouping at three widths or more; a panel for each width where there are several groupings; for a single
    width one for each method, with a line for each grid. Not where one place is quantized at a time, calibration differs, there
    are more than MOST_LINES, or most lines would be a point.
    """
    rows = [row for row in rows if not is_baseline(row) and not is_cast(row)]
    if not rows or placed_alone(rows) or distinctions(rows, seed=False):
        return []
    widths = {width: f"{width} bits" for width in sorted(row["bits"] for row in rows if row.get("bits"))}
    cells: dict[tuple[str, object], set[float]] = {}
    for row in rows:
        cells.setdefault((by_method(row), row.get("bits")), set()).add(number(row, "bits_per_weight"))
    if all(len(bits) == 1 for bits in cells.values()):
        panels = _split(rows, by_method, lambda row: "") if len(widths) > FEWEST else []
    elif len(widths) > 1:
        panels = _split(rows, by_method, lambda row: widths.get(row.get("bits"), ""))
        panels.sort(key=lambda panel: [*widths.values(), ""].index(panel[0]))
    else:
        panels = _split(rows, by_grid, lambda row: parts_of(row).stages + parts_of(row).placed)
        panels = [(title, [_part(line, _doubly, dq) for line in lines for dq in (False, True)]) for title, lines in panels]
        panels = [(title, [line for line in lines if line.rows]) for title, lines in panels]
    lines = [line for _, part in panels for line in part]
    points = sum(len({number(row, "bits_per_weight") for row in line.rows}) == 1 for line in lines)
    return panels if 2 * points <= len(lines) and len({line.label for line in lines}) <= MOST_LINES else []


def _split(rows: Sequence[Row], name: Callable[[Row], str], title: Callable[[Row], str]) -> list[tuple[str, list[Series]]]:
    """The lines of all rows, cut at the borders of panels."""
    lines = group_series(rows, name)
    panels = ((each, [_part(line, title, each) for line in lines]) for each in dict.fromkeys(map(title, rows)))
    return [(each, [line for line in part if line.rows]) for each, part in panels]


def _part(line: Series, key: Callable[[Row], object], value: object) -> Series:
    return dataclasses.replace(line, rows=tuple(row for row in line.rows if key(row) == value))


def increase(row: Row) -> float:
    """By how many percent perplexity is above the baseline's; nan where that is not known."""
    return percent(number(row, "nll_delta"))


def percent(delta: float) -> float:
    """The increase of perplexity of a loss that is `delta` nats higher."""
    return math.inf if delta >= 700 else 100 * math.expm1(delta)


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
