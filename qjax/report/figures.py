"""Figures of rows: perplexity, or its increase over the baseline, against exact bits per weight.

Lines carry their names; there is no legend. Error bars are one standard error of the difference from the baseline, paired
window by window, because that difference is what the figure shows; the error of perplexity itself is in the tables.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.report.accuracy import tasks_of
from qjax.report.drawing import (
    BARS,
    COLUMN_GAP,
    GREY,
    HEIGHTS,
    LINE_STYLES,
    POINT,
    WIDTHS,
    Name,
    ink,
    lay_out,
    method_style,
    name_column,
    name_points,
    new_figure,
    scale_values,
    text_size,
    write_note,
    write_titles,
)
from qjax.report.rendering import Row, number, significant
from qjax.report.sensitivity import ordinary, placed_alone
from qjax.report.series import MOST_LINES, group_series, increase, split_panels
from qjax.report.tables import OWN, baseline_name, describe, distinctions, is_baseline, model_of, require_one_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALUES = {
    "perplexity": "perplexity",
    "increase": "increase of perplexity (%)",
    "share": "share of nearest rounding's increase",
    "accuracy": "accuracy on {tasks} (%)",
    "divergence": "KL divergence (nats a token)",
}
COLUMNS = {"accuracy": ("accuracy_mean", "accuracy_mean_delta_stderr"), "divergence": ("kl", "kl_stderr")} | {
    "share": ("share", "share_stderr")
}
SMALLEST = {"increase": 1e-3, "divergence": 1e-6}  # values on a logarithmic axis; what is less is drawn at its lower edge
RESOLVED = 10  # standard errors of a cost that others are shares of: it is the denominator
WIDEST_NAMES = 1 / 3  # of the page; a figure with longer names at the left takes both columns
BELOW = "▼ below the axis"


class Line(NamedTuple):
    """A line of a figure: its name, its method, how many lines of that come before it, its bits per weight, values and their
    standard errors (nan where not known), whether its name stands in the column at the left.
    """

    name: str
    method: str
    variant: int
    bits: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    aside: bool


def perplexity_figure(rows: Sequence[Row], *, value: str = "perplexity", width: str = "single") -> "Figure":
    """A figure of one model, text and convention: one line per method, options and grouping.

    value: "perplexity", with the baseline as a dashed line and a logarithmic axis where the range is large; or
    "increase" over it in percent, on a logarithmic axis, which shows 8, 4 and 2 bits alike; or "accuracy", the mean over the
    rows' tasks, or "divergence" from the baseline, logarithmic too; or "share", the increase over that of nearest
    rounding to the same format, for recipes that have one (`with_share`). width: "single" | "double" column; with long names
    at the left "double" in any case.
    Many lines of several groupings are shown in a panel per grouping, all with the same axes. Infinity is drawn as ∞ at the
    upper edge, an increase below 0.001 % (or a decrease) as a triangle at the lower edge, an error bar that reaches below it as
    a small one; a note says so.
    Raises QjaxError for other options, for no rows, and for rows of more than one model, text or convention.
    """
    if value not in VALUES:
        raise QjaxError(f"figure of {value!r}: allowed are {' and '.join(VALUES)}")
    require_one_group(rows)
    rows = with_share(rows) if value == "share" else rows
    panels = split_panels(rows)
    with new_figure(width, len(panels)) as (figure, grid):
        lines = [_lines(part, value) for _, part in panels]
        shown = [row for row in rows if is_baseline(row) and value not in ("share", *SMALLEST)]
        baseline = float(_values(shown[:1], value)[0][0]) if shown else math.nan
        own = {baseline_name(row) for row in rows} == {OWN}
        dashed = f"{'unquantized' if own else model_of(rows[0])} {significant(baseline, 4)}" if shown else ""
        every = [line for part in lines for line in part]
        bits, values, errors = np.concatenate([np.zeros((3, 0)), *(np.array(line[3:6]) for line in every)], axis=1)
        asides = [line.name for line in every if line.aside]
        longest = max((text_size(figure, name)[0] for name in asides and [dashed, *asides]), default=0)
        if len(panels) == 1 and longest > WIDEST_NAMES * POINT * WIDTHS[width]:
            figure.set_size_inches(WIDTHS["double"], HEIGHTS["double"])
        scale_values(
            grid[0].yaxis,
            np.append(values, baseline),
            np.append(errors, 0),
            SMALLEST.get(value, 0),
            always_log=value in SMALLEST,
        )
        tasks = tasks_of(rows)
        write_titles(
            figure,
            describe(rows[0]),
            x="bits per weight, scales included",
            y=VALUES[value].format(tasks=", ".join(tasks) if len(tasks) < 4 else "all tasks"),
            panels=[panel for panel, _ in panels],
        )
        lay_out(figure)
        for axes in grid:
            _scale_bits(axes, bits, longest + COLUMN_GAP + 2 if longest else 0)
        for axes, part in zip(grid, lines, strict=True):
            _draw_panel(axes, part, dashed, baseline)
        if np.any(values - np.nan_to_num(errors, posinf=0) < grid[0].get_ylim()[0]):
            write_note(figure, BELOW)
    return figure


def _draw_panel(axes: "Axes", lines: Sequence[Line], dashed: str, baseline: float) -> None:
    """The lines with their names, and the dashed line of the baseline with its own."""
    points = [_draw(axes, line) for line in lines]
    named = [
        (line.aside, Name(line.name, each[0], ink(method_style(line.method)[0])))
        for line, each in zip(lines, points, strict=True)
    ]
    points += [bar for bars in axes.containers for bar in bars.lines[2][0].get_segments()]
    left, right = axes.get_xlim()
    if dashed:
        start = min((name.point[0] for aside, name in named if aside), default=left)
        points.append(np.array([(start, baseline), (right, baseline)]))
        axes.plot(*points[-1].T, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
        named.append((start > left, Name(dashed, points[-1][0], GREY)))
    column = [name for aside, name in named if aside]
    if column:
        left = min(name.point[0] for name in column)
        points += name_column(axes, column, side="left")
    name_points(axes, [name for aside, name in named if not aside], points, left=left)


def with_share(rows: Sequence[Row]) -> list[Row]:
    """The rows of integer formats that nearest rounding was measured in too (of the same model, with the same format of inputs
    and rules), with `share`, increase over its increase there, and share_stderr, of the numerator. Formats whose cost by
    nearest rounding is less than RESOLVED standard errors are left out.
    """
    nearest = {_place(row): row for row in rows if row.get("method") == row.get("options") == "rtn" and _resolved(row)}
    return [
        {**row, "share": increase(row) / whole, "share_stderr": (100 + increase(row)) * number(row, "nll_delta_stderr") / whole}
        for row in rows
        if _place(row) in nearest
        for whole in [increase(nearest[_place(row)])]
    ]


def _place(row: Row) -> tuple[str, ...]:
    """What a recipe that is a share of another has in common with it."""
    return tuple(str(row.get(column)) for column in ("fingerprint", "format", "activation", "rules"))


def _resolved(row: Row) -> bool:
    return number(row, "nll_delta") > RESOLVED * number(row, "nll_delta_stderr")


def has_lines(rows: Sequence[Row]) -> bool:
    """Whether lines over bits show the rows well: not where one place is quantized at a time, where calibration differs, where
    a method has more lines than line styles tell apart, or where most of many lines are a point.
    """
    if (placed_alone(rows) and not ordinary(rows)) or distinctions(rows, seed=False):
        return False
    series = group_series(rows)
    points = sum(len({number(row, "bits_per_weight") for row in line.rows}) == 1 for line in series)
    variants = max(
        (line.variant for _, part in split_panels(rows) for line in group_series(part) if len(line.rows) > 1), default=0
    )
    return variants < len(LINE_STYLES) - 1 and (len(series) <= MOST_LINES or 2 * points <= len(series))


def _lines(rows: Sequence[Row], value: str) -> list[Line]:
    """The lines of a panel. Names stand at the left where several lines have more than one point."""
    lines = [
        Line(
            line.label,
            line.method,
            line.variant,
            np.array([number(row, "bits_per_weight") for row in line.rows]),
            *_values(line.rows, value),
            False,
        )
        for line in group_series(rows)
    ]
    long = [len(np.unique(line.bits)) > 1 for line in lines]
    return [line._replace(aside=each and sum(long) > 1) for line, each in zip(lines, long, strict=True)]


def _values(rows: Sequence[Row], value: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of the vertical axis and their standard errors (nan where not known)."""
    if value in COLUMNS:
        y, error = (np.array([number(row, key) for row in rows]) for key in COLUMNS[value])
        return (100 * y, 100 * error) if value == "accuracy" else (y, error)
    y = np.array([number(row, "perplexity") if value == "perplexity" else increase(row) for row in rows])
    slope = np.where(np.isfinite(y), y if value == "perplexity" else 100 + y, 0)  # dy / d nll
    return y, slope * np.array([number(row, "nll_delta_stderr") for row in rows])


def _draw(axes: "Axes", line: Line) -> np.ndarray:
    """Draws one line; returns its points in data coordinates, (points, 2), those beyond the axis at its end."""
    colour, marker = method_style(line.method)
    face = colour if line.variant == 0 else "white"
    x, y = line.bits, line.values
    bottom, top = axes.get_ylim()
    low = y < bottom
    shown = np.isfinite(y) & ~low
    mean_x = np.unique(x[shown])  # several seeds: the line goes through their mean
    mean_y = [y[shown & (x == each)].mean() for each in mean_x]
    axes.plot(mean_x, mean_y, color=colour, linestyle=LINE_STYLES[line.variant % len(LINE_STYLES)], zorder=3)
    axes.errorbar(
        x[shown], y[shown], np.where(np.isfinite(line.errors), line.errors, 0)[shown], fmt=marker, color=colour,
        markerfacecolor=face, markeredgewidth=0.9, zorder=4 if len(mean_x) > 1 else 4.5, **BARS,
    )  # fmt: skip
    beyond = (  # which, where on the axis, how
        (low, bottom, {"marker": "v", "markerfacecolor": face}),
        (shown & (y - line.errors < bottom), bottom, {"marker": "v", "markersize": 2}),
        (~shown & ~low, top, {"marker": "$\\infty$", "markersize": 8, "markeredgewidth": 0}),
    )
    for which, edge, look in beyond:
        if which.any():
            axes.plot(x[which], np.full(which.sum(), edge), color=colour, linestyle="none", clip_on=False, zorder=5, **look)
    return np.stack([x, np.where(shown, y, np.where(low, bottom, top))], axis=1)


def _scale_bits(axes: "Axes", bits: np.ndarray, names: float) -> None:
    """Limits and ticks, logarithmic where casts to 16 or 32 bits are shown. names: width of those at the left, points."""
    from matplotlib.ticker import MaxNLocator

    low, high = (bits.min(), bits.max()) if len(bits) else (16.0, 16.0)
    room = min(0.62, names * axes.figure.dpi / POINT / axes.bbox.width)
    room /= 1 - room
    beside = 0 if names else 1  # names keep a distance themselves
    if high > 9:
        axes.set_xscale("log", base=2)
        first, low, high = low / 1.1, low / 1.1**beside, high * 1.15
        ticks, low = (1, 2, 3, 4, 8, 16, 32), low * (low / high) ** room
    else:
        margin = max(0.04 * (high - low), 0.2)
        first, low, high = low - 0.2, low - margin * beside, high + margin
        ticks, low = MaxNLocator(7, steps=(1, 2, 5, 10)).tick_values(low, high), low - (high - low) * room
    axes.set_xlim(low, high)
    ticks = [tick for tick in ticks if first <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
