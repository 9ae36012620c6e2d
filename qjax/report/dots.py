"""Figure of recipes, or of places quantized alone, one under the other: the increase of perplexity of each with its error.

For what lines over bits per weight do not show: formats of equal size, orders and amounts of calibration, several seeds, one
block at a time. A dot is a measurement, a marker with a bar the mean and its standard error, of windows and seeds together.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.recipe import method_name, parse_recipe
from qjax.report.axes import LOG_ABOVE, POINT, fit_panels, log_ticks, new_figure, text_size, tick_text
from qjax.report.figures import SMALLEST, VALUES, has_lines
from qjax.report.numbers import number
from qjax.report.rendering import Row
from qjax.report.seeds import merge_seeds, seeds_of
from qjax.report.sensitivity import ordinary, placed_alone
from qjax.report.series import increase
from qjax.report.style import LABEL_SIZE, ink, method_style
from qjax.report.tables import describe, distinctions, is_baseline, require_one_group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 2  # lines
WIDEST_NAMES = 0.55  # of the page; longer names are written smaller
LINE_HEIGHT, MARGINS = 0.155, 0.75  # inches
CALIBRATED = {"calibration": "{}", "calibration_windows": "{} windows", "calibration_window_tokens": "{} tokens each"}


def has_dots(rows: Sequence[Row]) -> bool:
    """Whether the rows are better shown one under the other than as lines over bits."""
    shown = _shown(rows)
    apart = placed_alone(rows) or seeds_of(rows) or not has_lines(rows)
    return bool(apart) and len(_lines(shown)) >= FEWEST and any(increase(row) > 0 for row in shown)


def dots_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """The figure of one model, text and convention. width: "single" | "double" column.

    Recipes stand in the order of their increase, places in the order of the rows. Raises QjaxError for rows of more than one
    model, text or convention, and where there is nothing to show.
    """
    require_one_group(rows)
    shown = _shown(rows)
    if not shown:
        raise QjaxError("a figure of recipes needs rows of quantized models, got none")
    lines = _lines(shown)
    if not placed_alone(rows):
        lines = dict(sorted(lines.items(), key=lambda item: _mean(item[1])))
    merged = _merged(rows, shown)
    with new_figure(width, height=MARGINS + LINE_HEIGHT * (len(lines) + 1)) as (figure, (axes,)):
        _scale(axes, np.array([increase(row) for row in shown]), len(lines))
        longest = max(text_size(figure, name)[0] for name in lines) / (POINT * figure.get_size_inches()[0])
        axes.set_yticks(range(len(lines)), list(lines), fontsize=LABEL_SIZE * min(1, WIDEST_NAMES / longest))
        axes.tick_params(axis="y", length=0)
        for height, (text, (name, members)) in enumerate(zip(axes.get_yticklabels(), lines.items(), strict=True)):
            colour, marker = method_style(_method(members[0]))
            text.set_color(ink(colour))
            _draw(axes, height, members, merged.get(name), colour=colour, marker=marker)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
        fit_panels(
            [axes],
            title=": ".join(filter(None, (_common_recipe(shown), describe(rows[0])))),
            panel_titles=[""],
            x=VALUES["increase"],
            y="",
        )
    return figure


def _shown(rows: Sequence[Row]) -> list[Row]:
    alone = placed_alone(rows)
    return alone if alone and not ordinary(rows) else [row for row in ordinary(rows) if not is_baseline(row)]


def _lines(shown: Sequence[Row]) -> dict[str, list[Row]]:
    """Name -> its measurements, each of another seed."""
    lines: dict[str, list[Row]] = {}
    for row in shown:
        lines.setdefault(_name(row, shown), []).append(row)
    return lines


def _name(row: Row, shown: Sequence[Row]) -> str:
    """The place or recipe, and how it was calibrated where that tells rows apart."""
    several = len({each.get("place_recipe") for each in shown}) > 1
    name = row["place"] + (f": {row['place_recipe']}" if several else "") if "place" in row else str(row["recipe"])
    told = [column.key for column in distinctions(shown, seed=False) if row.get(column.key) is not None]
    told = [CALIBRATED[key].format(row[key]) for key in told]
    return ", ".join([*([] if told and _common_recipe(shown) else [name]), *told])


def _common_recipe(shown: Sequence[Row]) -> str:
    """What all the lines are of: the recipe where calibration alone differs, or that of places quantized alone; else ""."""
    recipes = {str(row.get("place_recipe", row["recipe"])) for row in shown}
    return recipes.pop() if len(recipes) == 1 else ""


def _merged(rows: Sequence[Row], shown: Sequence[Row]) -> dict[str, Row]:
    """The lines of several seeds, merged where the unquantized model was measured too."""
    baseline = [row for row in rows if is_baseline(row) and "window_nll" in row]
    return {_name(row, shown): row for row in merge_seeds([*baseline, *shown])} if baseline and seeds_of(shown) else {}


def _mean(members: Sequence[Row]) -> float:
    values = [increase(row) for row in members]
    return float(np.mean(values)) if np.isfinite(values).all() else math.inf


def _method(row: Row) -> str:
    return method_name(parse_recipe(row["place_recipe"])) if "place_recipe" in row else str(row["method"])


def _scale(axes, values: np.ndarray, lines: int) -> None:
    """Limits and ticks, logarithmic where the range is large. What is below is at the left edge, infinity at the right."""
    axes.set_ylim(lines - 0.5, -0.5)  # the first line on top
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    positive = values[values > SMALLEST["increase"]]
    if not len(positive) or positive.max() / positive.min() <= LOG_ABOVE:
        room = 0.1 * max(np.ptp(values), 0.1 * np.abs(values).max(initial=1e-3))
        axes.set_xlim(values.min() - room, values.max() + room)
        axes.locator_params(axis="x", nbins=4)
        return
    room = (positive.max() / positive.min()) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(positive.min() / room, positive.max() * room)
    ticks = log_ticks(*axes.get_xlim())
    axes.set_xticks(ticks, [tick_text(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _draw(axes, height: int, members: Sequence[Row], merged: Row | None, *, colour: str, marker: str) -> None:
    """One line of the figure."""
    left, right = axes.get_xlim()
    values = np.array([increase(row) for row in members])
    if len(values) > 1:
        inside = values[(values > left) & (values < right)]
        axes.plot(inside, np.full(len(inside), height), "o", color=colour, markersize=2, alpha=0.6, markeredgewidth=0, zorder=3)
    mean = increase(merged) if merged else float(np.mean(values))
    error = number(merged or members[0], "nll_delta_stderr") * (100 + mean)
    if not left < mean < right:
        look = {"marker": "$\\infty$", "markersize": 8} if mean > left else {"marker": "<"}
        axes.plot([right if mean > left else left], [height], color=colour, clip_on=False, zorder=5, **look)
        return
    axes.errorbar(
        [mean], [height], xerr=[error] if math.isfinite(error) else None, fmt=marker, color=colour, markersize=3.5,
        elinewidth=0.8, capsize=1.8, capthick=0.8, zorder=4,
    )  # fmt: skip
