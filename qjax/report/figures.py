"""Figures of rows: perplexity, or its increase over the unquantized model, against exact bits per weight.

Lines carry their names; there is no legend. Error bars are one standard error of the difference from the unquantized model,
paired window by window, because that difference is what the figure shows; the error of perplexity itself is in the tables.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.report.accuracy import tasks_of
from qjax.report.axes import POINT, fit_panels, new_figure, scale_bits, scale_values, text_size, to_points, write_note
from qjax.report.labels import Label, leader_line, place_labels, spread
from qjax.report.numbers import number, significant
from qjax.report.rendering import Row
from qjax.report.sensitivity import ordinary, placed_alone
from qjax.report.series import MOST_LINES, Series, group_series, increase, split_panels
from qjax.report.style import GREY, HEIGHTS, LABEL_SIZE, LINE_STYLES, WIDTHS, ink, method_style
from qjax.report.tables import describe, distinctions, is_baseline, require_one_group

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
SMALLEST = {"increase": 1e-3, "divergence": 1e-6}  # values on a logarithmic axis; what is less is drawn at its lower edge
RESOLVED = 10  # standard errors of a cost that others are shares of: it is the denominator
COLUMN_GAP = 12  # points between the names at the left and the first point
NEAR, FAR = 8, COLUMN_GAP + 5  # points; a name, or one at the left, that is farther from its point has a leader line,
SHIFTED = 1.5  # and so has one at the left that is so much above or below its point
WIDEST_NAMES = 1 / 3  # of the page; a figure with longer names at the left takes both columns
BELOW = "▼ below the axis"


def perplexity_figure(rows: Sequence[Row], *, value: str = "perplexity", width: str = "single") -> "Figure":
    """A figure of one model, text and convention: one line per method, options and grouping.

    value: "perplexity", with the unquantized model as a dashed line and a logarithmic axis where the range is large; or
    "increase" over it in percent, on a logarithmic axis, which shows 8, 4 and 2 bits alike; or "accuracy", the mean over the
    rows' tasks, or "divergence" from the unquantized model, logarithmic too; or "share", the increase over that of nearest
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
        lines = [[(line, _values(line.rows, value)) for line in group_series(part)] for _, part in panels]
        unquantized = [row for row in rows if is_baseline(row) and value not in ("share", *SMALLEST)]
        baseline = float(_values(unquantized[:1], value)[1][0]) if unquantized else math.nan
        data = [np.zeros((3, 0)), *(np.array(each) for panel in lines for _, each in panel)]
        bits, values, errors = np.concatenate(data, axis=1)
        columns = [_names_at_the_left(panel) for panel in lines]
        texts = [[line.label for line, _ in panel] for panel in lines]
        if math.isfinite(baseline):
            texts = [[*panel, f"unquantized {significant(baseline, 4)}"] for panel in texts]
            columns = [[*column, len(panel)] if column else [] for column, panel in zip(columns, lines, strict=True)]
        sizes = [[text_size(figure, text) for text in panel] for panel in texts]
        longest = max((size[i][0] for size, column in zip(sizes, columns, strict=True) for i in column), default=0)
        if len(panels) == 1 and longest > WIDEST_NAMES * POINT * figure.get_size_inches()[0]:
            figure.set_size_inches(WIDTHS["double"], HEIGHTS["double"])
        for axes in grid:
            scale_values(axes, np.append(values, baseline), np.append(errors, 0), SMALLEST.get(value))
            axes.set_xticks([])  # until there is a width to scale bits to
        tasks = tasks_of(rows)
        fit_panels(
            grid,
            title=describe(rows[0]),
            panel_titles=[name for name, _ in panels],
            x="bits per weight, scales included",
            y=VALUES[value].format(tasks=", ".join(tasks) if len(tasks) < 4 else "all tasks"),
        )
        for axes, panel, column, text, size in zip(grid, lines, columns, texts, sizes, strict=True):
            scale_bits(axes, bits, longest + COLUMN_GAP + 2 if longest else 0)
            drawn = [_draw(axes, line, *each) for line, each in panel]
            colours = [ink(method_style(line.method)[0]) for line, _ in panel]
            obstacles = [_samples(to_points(axes, points)) for points in drawn]
            if math.isfinite(baseline):
                start = min(drawn[i][0, 0] for i in column if i < len(panel)) if column else axes.get_xlim()[0]
                drawn.append(_draw_baseline(axes, baseline, start))
                colours.append(GREY)
                obstacles.append(_samples(to_points(axes, drawn[-1])))
            if math.isfinite(baseline) and not column:
                obstacles.append(_name_baseline(axes, text[-1], baseline, above=value == "accuracy"))
            names = [Name(*each) for each in zip(text, colours, drawn, size, strict=True)][: None if column else len(panel)]
            _write_labels(axes, names, column=column, obstacles=np.concatenate([np.zeros((0, 2)), *obstacles]))
        if np.any(values - np.nan_to_num(errors, posinf=0) < grid[0].get_ylim()[0]):
            write_note(figure, BELOW)
    return figure


def with_share(rows: Sequence[Row]) -> list[Row]:
    """The rows of integer formats that nearest rounding was measured in too, with `share`, increase over its increase there,
    and share_stderr, of the numerator. Formats whose cost by nearest rounding is less than RESOLVED standard errors are left
    out.
    """
    nearest = {row["format"]: row for row in rows if row.get("method") == row.get("options") == "rtn" and _resolved(row)}
    return [
        {**row, "share": increase(row) / whole, "share_stderr": (100 + increase(row)) * number(row, "nll_delta_stderr") / whole}
        for row in rows
        if row.get("format") in nearest
        for whole in [increase(nearest[row["format"]])]
    ]


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


def _names_at_the_left(panel: Sequence[tuple]) -> list[int]:
    """The lines whose names stand in a column at the left: those of more than one point, where there are several."""
    column = [i for i, (_, (x, _, _)) in enumerate(panel) if len(np.unique(x)) > 1]
    return column if len(column) > 1 else []


def _values(rows: Sequence[Row], value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits per weight, the values of the vertical axis and their standard errors (nan where not known)."""
    bits = np.array([number(row, "bits_per_weight") for row in rows])
    if value == "accuracy":
        y, error = (
            100 * np.array([number(row, key) for row in rows]) for key in ("accuracy_mean", "accuracy_mean_delta_stderr")
        )
        return bits, y, error
    if value == "share":
        return bits, np.array([number(row, "share") for row in rows]), np.array([number(row, "share_stderr") for row in rows])
    if value == "divergence":
        return bits, np.array([number(row, "kl") for row in rows]), np.array([number(row, "kl_stderr") for row in rows])
    y = np.array([number(row, "perplexity") if value == "perplexity" else increase(row) for row in rows])
    slope = np.where(np.isfinite(y), y if value == "perplexity" else 100 + y, 0)  # dy / d nll
    return bits, y, slope * np.array([number(row, "nll_delta_stderr") for row in rows])


def _draw(axes: "Axes", series: Series, x: np.ndarray, y: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Draws one line; returns its points in data coordinates, (points, 2), those beyond the axis at its end."""
    colour, marker = method_style(series.method)
    face = colour if series.variant == 0 else "white"
    bottom, top = axes.get_ylim()
    low = y < bottom
    shown = np.isfinite(y) & ~low
    mean_x = np.unique(x[shown])  # several seeds: the line goes through their mean
    mean_y = [y[shown & (x == each)].mean() for each in mean_x]
    axes.plot(mean_x, mean_y, color=colour, linestyle=LINE_STYLES[series.variant % len(LINE_STYLES)], zorder=3)
    axes.errorbar(
        x[shown], y[shown], np.where(np.isfinite(error), error, 0)[shown], fmt=marker, color=colour, markerfacecolor=face,
        markeredgewidth=0.9, elinewidth=0.8, capsize=1.8, capthick=0.8, zorder=4 if len(mean_x) > 1 else 4.5,
    )  # fmt: skip
    beyond = (  # which, where on the axis, how
        (low, bottom, {"marker": "v", "markerfacecolor": face}),
        (shown & (y - error < bottom), bottom, {"marker": "v", "markersize": 2}),
        (~shown & ~low, top, {"marker": "$\\infty$", "markersize": 8, "markeredgewidth": 0}),
    )
    for which, edge, look in beyond:
        if which.any():
            axes.plot(x[which], np.full(which.sum(), edge), color=colour, linestyle="none", clip_on=False, zorder=5, **look)
    return np.stack([x, np.where(shown, y, np.where(low, bottom, top))], axis=1)


def _draw_baseline(axes: "Axes", baseline: float, start: float) -> np.ndarray:
    """The dashed line from so many bits to the right edge; returns its ends in data coordinates."""
    ends = np.array([(start, baseline), (axes.get_xlim()[1], baseline)])
    axes.plot(*ends.T, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
    return ends


def _name_baseline(axes: "Axes", name: str, baseline: float, *, above: bool) -> np.ndarray:
    """The dashed line's name, above or below it, where the lines are not; returns samples of it, points."""
    text = axes.annotate(
        name, (0, baseline), (3, 2 if above else -2), xycoords=("axes fraction", "data"), textcoords="offset points",
        va="bottom" if above else "top", color=GREY, fontsize=LABEL_SIZE,
    )  # fmt: skip
    box = text.get_window_extent(axes.figure.canvas.get_renderer())
    grid = np.stack(np.meshgrid(np.linspace(box.x0, box.x1, 30), np.linspace(box.y0, box.y1, 5)), axis=-1).reshape(-1, 2)
    return grid * (POINT / axes.figure.dpi)


def _samples(line: np.ndarray) -> np.ndarray:
    """Points about 2 apart along a line of (points, 2), and around its markers."""
    pieces = [line + offset for offset in ((0, 0), (2, 0), (-2, 0), (0, 3), (0, -3))]
    for start, end in itertools.pairwise(line):
        count = max(2, int(np.linalg.norm(end - start) / 2))
        pieces.append(start + np.linspace(0, 1, count)[:, None] * (end - start))
    return np.concatenate(pieces)


class Name(NamedTuple):
    """The name of a line, its points in data coordinates, (points, 2), and the name's width and height."""

    text: str
    colour: str
    line: np.ndarray
    size: tuple[float, float]


def _write_labels(axes: "Axes", names: Sequence[Name], *, column: Sequence[int], obstacles: np.ndarray) -> None:
    """The lines' names, each beside the line's end at the fewest bits, where lines are farthest apart."""
    box = axes.get_window_extent()
    left, bottom, right, top = (edge * POINT / axes.figure.dpi for edge in (box.x0, box.y0, box.x1, box.y1))
    ends = np.array([to_points(axes, name.line[:1])[0] for name in names]).reshape(-1, 2)
    sizes = np.array([name.size for name in names]).reshape(-1, 2)
    centres, halves = np.zeros_like(ends), sizes / 2
    column = sorted(column, key=lambda i: (-ends[i, 1], ends[i, 0]))
    if column:
        height = sizes[:, 1].max()
        centres[column, 0] = ends[column, 0].min() - COLUMN_GAP - halves[column, 0]
        centres[column, 1] = spread(ends[column, 1], height, bottom + height / 2, top - height / 2)
        halves[column] = halves[column] * (1, 0) + (1, 0)  # their leaders end at mid-height, before the last letter
        leaders = [leader_line(ends[i], centres[i], halves[i]) for i in column]
        obstacles = np.concatenate([obstacles, *leaders])
    others = [i for i in range(len(names)) if i not in column]
    area = (left if not column else ends[column, 0].min() - COLUMN_GAP, bottom, right, top)
    centres[others] = place_labels([Label(tuple(ends[i]), tuple(sizes[i])) for i in others], obstacles, area)
    for i, (name, end, centre, half) in enumerate(zip(names, ends, centres, halves, strict=True)):
        axes.annotate(
            name.text, tuple(name.line[0]), tuple(centre - end), textcoords="offset points", ha="center", va="center",
            fontsize=LABEL_SIZE, color=name.colour, zorder=6, annotation_clip=False,
        )  # fmt: skip
        leader = leader_line(end, centre, half)
        far = np.linalg.norm(leader[-1] - end) > (FAR if i in column else NEAR)
        if far or (i in column and abs(centre[1] - end[1]) > SHIFTED):
            ends_of_leader = axes.transData.inverted().transform(leader[[0, -1]] * (axes.figure.dpi / POINT))
            axes.plot(*ends_of_leader.T, color=name.colour, linewidth=0.5, zorder=2.5, clip_on=False)
