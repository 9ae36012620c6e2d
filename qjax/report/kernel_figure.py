"""The figure of kernels: the time of a product with a packed weight against the rows of x, from rows of the kind "kernels"."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.formats import INTEGERS, parse_format
from qjax.report.axes import POINT, fit_panels, new_figure, scale_values, text_size, thin_ticks, to_points
from qjax.report.labels import spread
from qjax.report.rendering import Row
from qjax.report.style import GREY, LABEL_SIZE, LINE_STYLES, ink, method_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = ("xla", "pallas_tpu", "pallas_gpu")
GAP, AIR = 5, 8  # points: between a line and its name, and beyond the longest name


def has_kernels(rows: Sequence[Row]) -> bool:
    """Whether there are times of packed products, at several M."""
    return len({row.get("rows") for row in rows if row.get("kind") == "kernels" and row.get("implementation") in OURS}) > 1


def kernels_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """A panel for each weight: time over that of the dense product, of the same turns, by M; a line for each format and
    implementation but the reference, which decodes the whole weight and is in the table. Rows are of one device.

    Integers have one colour and a line style each, codebooks their own colours; what is not ours is grey.
    """
    rows = [row for row in rows if row.get("kind") == "kernels" and row["implementation"] not in ("dense", "reference")]
    last = {(row["inputs"], row["outputs"], *_line(row), row["rows"]): row for row in rows}  # measured of each case
    rows = list(last.values())
    weights = list(dict.fromkeys((row["inputs"], row["outputs"]) for row in rows))
    lines = list(dict.fromkeys(map(_line, rows)))
    sizes = sorted({row["rows"] for row in rows})
    names = {line: line[0] if line[1] in OURS else f"{line[0]}, {line[1]}" for line in lines}
    styles = _styles(lines)
    with new_figure(width, len(weights)) as (figure, grid):
        times = np.array([*(1 / row["speedup"] for row in rows), 1.0])
        for axes in grid:
            scale_values(axes, times, np.zeros(len(times)), None)
            axes.set_xticks([])
        fit_panels(
            grid,
            title=f"products with packed weights, {rows[0]['device']}",
            panel_titles=[f"{inputs} x {outputs}" for inputs, outputs in weights],
            x="M, rows of x",
            y="time over the dense product's",
        )
        longest = max(text_size(figure, name)[0] for name in names.values())
        for axes, weight in zip(grid, weights, strict=True):
            _scale_rows(axes, sizes, longest + GAP + AIR)
            axes.plot([axes.get_xlim()[0], sizes[-1]], [1, 1], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
            here = [row for row in rows if (row["inputs"], row["outputs"]) == weight]
            there = [line for line in lines if line in map(_line, here)]
            drawn = {line: _draw(axes, [row for row in here if _line(row) == line], styles[line]) for line in there}
            _write_names(axes, {names[line]: (point, styles[line]["color"]) for line, point in drawn.items()})
    return figure


def _line(row: Row) -> tuple[str, str]:
    return str(row["format"]), str(row["implementation"])


def _styles(lines: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, object]]:
    """How each line is drawn."""
    styles, integers = {}, 0
    for fmt, implementation in lines:
        if implementation not in OURS:
            styles[fmt, implementation] = {"color": GREY, "marker": method_style(implementation)[1], "linestyle": "-"}
            continue
        grid = parse_format(fmt).grid
        colour, marker = method_style("rtn" if grid in INTEGERS else grid)
        style = LINE_STYLES[integers % len(LINE_STYLES) if grid in INTEGERS else 0]
        styles[fmt, implementation] = {"color": colour, "marker": marker, "linestyle": style}
        integers += grid in INTEGERS
    return styles


def _scale_rows(axes: "Axes", sizes: Sequence[int], names: float) -> None:
    """A logarithmic axis of M, with room for names at the right, points."""
    room = min(0.6, names * axes.figure.dpi / POINT / axes.get_window_extent().width)
    low, high = sizes[0] / 1.3, sizes[-1] * 1.1
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high * (high / low) ** (room / (1 - room)))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    thin_ticks(axes)


def _draw(axes: "Axes", rows: Sequence[Row], style: dict[str, object]) -> tuple[float, float]:
    """Draws a line; its last point."""
    points = sorted((row["rows"], 1 / row["speedup"]) for row in rows)
    axes.plot(*zip(*points, strict=True), markersize=3, **style)
    return points[-1]


def _write_names(axes: "Axes", names: dict[str, tuple[tuple[float, float], str]]) -> None:
    """Each name to the right of its line's last point, moved up or down from the others."""
    ordered = sorted(names.items(), key=lambda item: -item[1][0][1])
    ends = np.array([to_points(axes, point) for _, (point, _) in ordered])
    height = text_size(axes.figure, "0")[1] + 1
    low, high = (to_points(axes, (1, value))[1] for value in axes.get_ylim())
    for (name, (point, colour)), end, place in zip(ordered, ends, spread(ends[:, 1], height, low, high), strict=True):
        axes.annotate(
            name, point, (GAP, place - end[1]), textcoords="offset points", va="center", color=ink(colour), fontsize=LABEL_SIZE
        )
