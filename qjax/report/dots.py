"""Figure of recipes, or of places quantized alone, one under the other: the increase of perplexity of each with its error.

For what lines over bits per weight do not show: formats of equal size, orders and amounts of calibration, several seeds, one
block at a time. A dot is a measurement, a marker with a bar the mean and its standard error, of windows and seeds together.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.formats import UNQUANTIZED
from qjax.report.drawing import (
    BARS,
    LABEL_SIZE,
    POINT,
    SMALL_SIZE,
    WIDTHS,
    ink,
    lay_out,
    method_style,
    new_figure,
    plain,
    scale_values,
    text_size,
    wrap,
    write_note,
    write_titles,
)
from qjax.report.figures import SMALLEST, VALUES, has_lines
from qjax.report.rendering import Row, number
from qjax.report.seeds import seeds_of
from qjax.report.sensitivity import placed_alone
from qjax.report.series import increase
from qjax.report.tables import describe, distinctions, is_baseline, require_one_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST = 2  # lines
WIDEST_NAMES = 0.57  # of the page
BELOW = "◀ below the axis"
LINE_HEIGHT, MARGINS = 0.155, 0.75  # inches
CALIBRATED = {"calibration": "{}", "calibration_windows": "{} windows", "calibration_window_tokens": "{} tokens each"}


def has_dots(rows: Sequence[Row]) -> bool:
    """Whether the rows are better shown one under the other than as lines over bits."""
    shown = _shown(rows)
    apart = placed_alone(rows) or seeds_of(rows) or not has_lines(rows)
    return bool(apart) and len(_lines(shown)) >= FEWEST and any(increase(row) > 0 for row in shown)


def dots_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """The figure of one model, text and convention. width: "single" | "double" column.

    Recipes stand in the order of their increase, places in the order of the rows. Long names are written smaller; the figure
    takes both columns where that is not enough, and names too long for these are broken into lines. Raises QjaxError for rows
    of more than one model, text or convention, and where there is nothing to show.
    """
    require_one_group(rows)
    shown = _shown(rows)
    if not shown:
        raise QjaxError("a figure of recipes needs rows of quantized models, got none")
    lines = _lines(shown)
    if not placed_alone(rows):
        lines = dict(sorted(lines.items(), key=lambda item: _mean(item[1])))
    merged = _merged(rows, shown)
    bars = np.array([_value_and_error(members, merged.get(name)) for name, members in lines.items()])
    with new_figure(width) as (figure, (axes,)):
        longest = max(text_size(figure, name)[0] for name in lines)
        page = WIDTHS[width if SMALL_SIZE / LABEL_SIZE * longest < _space(WIDTHS[width]) else "double"]
        size = max(SMALL_SIZE, LABEL_SIZE * min(1, _space(page) / longest))
        names = [wrap(figure, name, _space(page) * LABEL_SIZE / size) for name in lines]
        figure.set_size_inches(page, MARGINS + LINE_HEIGHT * max(map(len, names)) * (len(lines) + 1))
        axes.set_ylim(len(lines) - 0.5, -0.5)  # the first line on top
        axes.set_yticks(range(len(lines)), [plain("\n".join(name)) for name in names], fontsize=size)
        axes.tick_params(axis="y", length=0, pad=5)  # a mark at the edge touches no name
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
        title = ": ".join(filter(None, (_common_recipe(shown) or _common_format(shown), describe(rows[0]))))
        write_titles(figure, title, x=VALUES["increase"], y="")
        figure.get_layout_engine().execute(figure)  # how many ticks there is room for
        values = np.array([increase(row) for row in shown])
        errors = np.where(np.isfinite(bars[:, 1]), bars[:, 1], 0)
        scale_values(axes.xaxis, np.append(values, bars[:, 0]), np.append(np.zeros(len(values)), errors), SMALLEST["increase"])
        for height, (bar, members) in enumerate(zip(bars, lines.values(), strict=True)):
            colour, marker = method_style(_method(members[0]))
            axes.get_yticklabels()[height].set_color(ink(colour))
            _draw(axes, height, members, bar, colour=colour, marker=marker)
        lay_out(figure)
        if any(line.get_marker() == "<" for line in axes.lines):
            write_note(figure, BELOW)
    return figure


def _space(page: float) -> float:
    """Points that names may take of a page, inches."""
    return WIDEST_NAMES * POINT * page


def _shown(rows: Sequence[Row]) -> list[Row]:
    return placed_alone(rows) or [row for row in rows if not is_baseline(row)]


def _lines(shown: Sequence[Row]) -> dict[str, list[Row]]:
    """Name -> its measurements, each of another seed."""
    lines: dict[str, list[Row]] = {}
    for row in shown:
        lines.setdefault(_name(row, shown), []).append(row)
    return lines


def _name(row: Row, shown: Sequence[Row]) -> str:
    """The place or recipe, and how it was calibrated where that tells rows apart."""
    several = len({each.get("place_recipe") for each in shown}) > 1
    recipe = str(row["recipe"]).removesuffix(f":{_common_format(shown)}")
    name = row["place"] + (f": {row['place_recipe']}" if several else "") if "place" in row else recipe
    told = [column.key for column in distinctions(shown, seed=False) if row.get(column.key) not in (None, UNQUANTIZED)]
    told = [CALIBRATED.get(key, "{}").format(row[key]) for key in told]
    return ", ".join([*([] if told and _common_recipe(shown) else [name]), *told])


def _common_recipe(shown: Sequence[Row]) -> str:
    """What all the lines are of: the recipe where calibration alone differs, or that of places quantized alone; else ""."""
    recipes = {str(row.get("place_recipe", row["recipe"])) for row in shown}
    return recipes.pop() if len(recipes) == 1 else ""


def _common_format(shown: Sequence[Row]) -> str:
    """The format, and order, of recipes that all have the same, without rules: it stands in the title; else ""."""
    recipes = [str(row["recipe"]) for row in shown]
    formats = {recipe.rpartition(":")[2] for recipe in recipes}
    return formats.pop() if len(formats) == 1 and not any(";" in recipe or ":" not in recipe for recipe in recipes) else ""


def _merged(rows: Sequence[Row], shown: Sequence[Row]) -> dict[str, Row]:
    """The lines of several draws."""
    return {_name(row, shown): row for row in seeds_of(rows)}


def _mean(members: Sequence[Row]) -> float:
    values = [increase(row) for row in members]
    return float(np.mean(values)) if np.isfinite(values).all() else math.inf


def _method(row: Row) -> str:
    if "place_recipe" not in row:
        return str(row["method"])
    from qjax.recipe import method_name, parse_recipe

    return method_name(parse_recipe(row["place_recipe"]))


def _value_and_error(members: Sequence[Row], merged: Row | None) -> tuple[float, float]:
    """The mean of a line and its standard error, nan where that is not known."""
    mean = increase(merged) if merged else float(np.mean([increase(row) for row in members]))
    return mean, number(merged or members[0], "nll_delta_stderr") * (100 + mean)


def _draw(axes: "Axes", height: int, members: Sequence[Row], bar: Sequence[float], *, colour: str, marker: str) -> None:
    """One line. bar: mean and standard error. What is below the axis is at its left edge, infinity at the right."""
    left, right = axes.get_xlim()
    mean, error = bar
    if len(members) > 1:
        values = np.array([increase(row) for row in members])
        inside = values[(values > left) & (values < right)]
        axes.plot(inside, np.full(len(inside), height), "o", color=colour, markersize=2, alpha=0.6, markeredgewidth=0, zorder=3)
    if not left < mean < right:
        look = {"marker": "$\\infty$", "markersize": 8} if mean > left else {"marker": "<"}
        axes.plot([right if mean > left else left], [height], color=colour, clip_on=False, zorder=5, **look)
        return
    xerr = [error] if math.isfinite(error) else None
    axes.errorbar([mean], [height], xerr=xerr, fmt=marker, color=colour, markersize=3.5, zorder=4, **BARS)
    if mean - error < left:
        axes.plot([left], [height], "<", color=colour, markersize=2, clip_on=False, zorder=5)
