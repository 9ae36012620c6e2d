"""A page of panels with lines: where each is, on which axes, and how its lines are named.

Up to DIRECT lines that all end at the right of the last panel of one row are named beside their ends; others have a legend
above the panels or in the place of a missing one.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from qjax.report.drawing import (
    ALONE,
    BARS,
    COLUMN_GAP,
    COLUMNS,
    DIRECT,
    EDGE,
    GREY,
    HANDLE,
    LABEL_SIZE,
    PANELS,
    POINT,
    TITLE_SIZE,
    WIDEST_NAMES,
    WIDTHS,
    Look,
    Name,
    lay_out,
    name_column,
    new_page,
    plain,
    scale_values,
    text_size,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BELOW = 34  # points of a panel's height that are not its axes'


class Line(NamedTuple):
    """A name, its look, and points by ascending x; y: value, and the ends of its 95 % interval (nan: not known)."""

    name: str
    look: Look
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, "n 3"]


class Panel(NamedTuple):
    """Lines, the names of both axes, what the panel is of; values that have a dashed line, across or upright; ticks of x, if
    not those that are found; whether points are joined; whether x counts from 0, on a linear axis.
    """

    lines: Sequence[Line]
    x: str
    y: str
    title: str = ""
    across: float = math.nan
    upright: float = math.nan
    ticks: Sequence[float] = ()
    joined: bool = True
    counted: bool = False


def panels_figure(panels: Sequence[Panel], width: str, *, shared: bool = False) -> "Figure":
    """The page. width: "single" | "double" column; shared: whether all panels have the same vertical axis.

    Infinity is drawn as ∞ at the upper edge, and a value that is below a logarithmic axis as ▼ at its lower edge.
    """
    looks = {line.name: line.look for panel in panels for line in panel.lines}
    with new_page(width) as figure:
        columns = min(len(panels), COLUMNS[width])
        rows = math.ceil(len(panels) / columns)
        figure.set_figheight(ALONE if len(panels) == 1 else PANELS[width] * rows + 0.25)
        grid = figure.subplots(rows, columns, sharey=shared, squeeze=False).ravel()
        every = np.concatenate([line.y for panel in panels for line in panel.lines])
        for axes, panel in zip(grid, panels, strict=False):
            y = every if shared else np.concatenate([line.y for line in panel.lines])
            scale_values(axes.yaxis, np.vstack([y, 3 * [panel.across]]))
            x = np.append(np.concatenate([line.x for line in panel.lines]), panel.upright)
            scale_values(axes.xaxis, np.stack([x, 0 * x if panel.counted else x, x], axis=1), panel.ticks)
            axes.set_title(plain(panel.title), loc="left")
        _name_axes(figure, grid, panels, columns)
        longest = max(text_size(figure, name)[0] for name in looks) + COLUMN_GAP + 2 * EDGE
        page, right = WIDTHS[width] * POINT, max(line.x[-1] for line in panels[-1].lines)
        last = {line.name for line in panels[-1].lines if line.x[-1] == right}
        direct = rows == 1 and len(looks) <= DIRECT and last == set(looks) and longest < WIDEST_NAMES * page
        if direct:
            figure.get_layout_engine().set(rect=(0, 0, 1 - longest / page, 1))
        else:
            _legend(figure, looks, grid[len(panels) :], page / columns)
        lay_out(figure)
        for axes, panel in zip(grid, panels, strict=False):
            ends = [_draw(axes, line, panel.joined) for line in panel.lines]
            look = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 0.8, "zorder": 1}
            for value, draw in ((panel.across, axes.axhline), (panel.upright, axes.axvline)):
                if not math.isnan(value):
                    draw(value, **look)
        if direct:
            last = {line.name: Name(line.name, end, line.look.colour) for line, end in zip(panel.lines, ends, strict=True)}
            name_column(axes, list(last.values()))
    return figure


def _name_axes(figure: "Figure", grid: Sequence["Axes"], panels: Sequence[Panel], columns: int) -> None:
    """A name that all panels have once: below the page, in its first column."""
    wide, tall = figure.get_figwidth() / columns * POINT, figure.get_figheight() * columns / len(grid) * POINT
    for place, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        if place % columns == 0 or panel.y != panels[0].y:
            axes.set_ylabel(plain("\n".join(wrap(figure, panel.y, (tall - BELOW) * LABEL_SIZE / TITLE_SIZE))))
        if panel.x != panels[0].x or panel.x != panels[-1].x:
            axes.set_xlabel(plain("\n".join(wrap(figure, panel.x, 0.7 * wide))))
    if all(panel.x == panels[0].x for panel in panels):
        figure.supxlabel(plain(panels[0].x))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()


def _legend(figure: "Figure", looks: dict[str, Look], empty: Sequence["Axes"], room: float) -> None:
    """Where a panel is missing and names fit into its room, points; else above the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, markerfacecolor=look.face, markeredgewidth=0.8, label=plain(name))
        for name, look in looks.items()
    ]
    wide = np.array([text_size(figure, name)[0] + HANDLE for name in looks])
    if len(empty) and max(wide) < room:
        empty[0].legend(handles=handles, loc="center left", borderaxespad=0)
        return
    page = figure.get_figwidth() * POINT
    order = np.arange(len(wide))
    columns, beside = _columns(wide, page), np.argsort(-wide, kind="stable")  # as they come; or long names beside short ones
    more = _columns(wide[beside], page)
    if math.ceil(len(wide) / more) < math.ceil(len(wide) / columns):
        order, columns = beside, more
    figure.set_figheight(figure.get_figheight() + 0.13 * math.ceil(len(wide) / columns) + 0.05)
    figure.legend(handles=[handles[number] for number in order], loc="outside upper left", ncols=columns)


def _columns(wide: Float[np.ndarray, " n"], page: float) -> int:
    """The most columns of a legend that fit; matplotlib fills them with as equal numbers as there can be."""
    counts = range(len(wide), 1, -1)
    return next((count for count in counts if sum(map(max, np.array_split(wide, count))) < page), 1)


def _draw(axes: "Axes", line: Line, joined: bool) -> tuple[float, float]:
    """Draws a line; returns its last point, one beyond the axis at its end."""
    colour, marker, face = line.look
    (bottom, top), x, (y, low, high) = axes.get_ylim(), line.x, line.y.T
    if axes.get_yscale() == "log":
        below, low = y < bottom, np.maximum(low, bottom / 2)  # no logarithm of less than zero
    else:
        below = np.zeros(len(y), bool)
    shown = np.isfinite(y) & ~below
    if joined:
        axes.plot(x[shown], y[shown], color=colour, zorder=3)
    bars = np.nan_to_num(np.maximum(0, [y - low, high - y]))[:, shown]
    axes.errorbar(
        x[shown], y[shown], bars, fmt=marker, color=colour, markerfacecolor=face, markeredgewidth=0.8, zorder=4, **BARS
    )
    for which, edge, mark in (
        (below, bottom, {"marker": "v", "markerfacecolor": face}),
        (np.isposinf(y), top, {"marker": "$\\infty$", "markersize": 8, "markeredgewidth": 0}),
    ):
        if which.any():
            axes.plot(x[which], np.full(which.sum(), edge), color=colour, linestyle="none", clip_on=False, zorder=5, **mark)
    return x[-1], np.where(below, bottom, np.where(shown, y, top))[-1]
