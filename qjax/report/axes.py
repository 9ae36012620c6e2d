"""What the figures' axes share: the page, margins as wide as what is written in them, limits and round ticks."""

import contextlib
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.report.style import GREY, HEIGHTS, LABEL_SIZE, RC, SMALL_SIZE, WIDTHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_ABOVE = 3.0  # ratio of the largest to the smallest value from which the axis is logarithmic
POINT = 72.0  # an inch
LABEL_GROWTH = RC["axes.labelsize"] / LABEL_SIZE
PANEL = 1.6  # inches high, one of several rows
COLUMNS = {"single": 1, "double": 2}  # of panels
BOTTOM, TICKS, TOP, RIGHT, BETWEEN = 0.4, 0.2, 0.22, 0.1, 0.12  # inches: below the last row, below others, above, beside
EDGE, TITLE_LINE = 0.04, 0.12  # inches: between text and the page's edge, from one line of a title to the next
TICK_GAP = 3  # points between the numbers of ticks
DECADE = 10.0  # by how much error bars may lengthen a logarithmic axis


@contextlib.contextmanager
def new_figure(width: str, panels: int = 1) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A page of "single" or "double" column width with its axes, in the house style."""
    if width not in WIDTHS:
        raise QjaxError(f"figure of width {width!r}: allowed are {' and '.join(WIDTHS)}")
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(panels / COLUMNS[width])
    several = rows * (PANEL + TICKS + TOP) + TOP + BOTTOM - TICKS
    height = HEIGHTS[width] if rows == 1 else several
    with matplotlib.style.context(["default", RC]):
        figure = Figure(figsize=(WIDTHS[width], height))
        FigureCanvasAgg(figure)
        columns = min(panels, COLUMNS[width])
        yield figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def fit_panels(grid: Sequence["Axes"], *, title: str, panel_titles: Sequence[str], x: str, y: str) -> None:
    """Places the panels, row by row: margins fit the ticks, the title fits the page. Call it when the ticks are set.

    Several rows of panels share one name of the vertical axis.
    """
    figure = grid[0].figure
    width, height = figure.get_size_inches()
    columns = grid[0].get_gridspec().ncols
    rows = math.ceil(len(grid) / columns)
    lines = wrap(figure, title, (width - 2 * EDGE) * POINT)
    above = (TOP if len(grid) == 1 else 1.7 * TOP) + TITLE_LINE * (len(lines) - 1)  # the title, and the first row's names
    each = (height - above - BOTTOM - (rows - 1) * (TICKS + TOP)) / rows
    grid[0].set_ylabel(y, y=0.5 - 0.5 * (rows - 1) * (1 + (TICKS + TOP) / each))
    grid[0].set_position([0.2, BOTTOM / height, 0.7, each / height])
    box = grid[0].yaxis.get_tightbbox(figure.canvas.get_renderer())
    left = (grid[0].get_window_extent().x0 - box.x0) / figure.dpi + 0.04
    wide = (width - left - RIGHT - (columns - 1) * BETWEEN) / columns
    for index, axes in enumerate(grid):
        row, column = divmod(index, columns)
        bottom = height - above - each - row * (each + TICKS + TOP)
        axes.set_position([(left + column * (wide + BETWEEN)) / width, bottom / height, wide / width, each / height])
        if index + columns >= len(grid):
            axes.set_xlabel(x)
            if text_size(figure, x)[0] * LABEL_GROWTH > wide * POINT:  # a narrow panel: the name may reach under the margin
                axes.xaxis.label.set(ha="right", x=1)
        if column:
            axes.tick_params(labelleft=False)
        if len(grid) > 1:
            axes.set_title(panel_titles[index], loc="left", fontsize=LABEL_SIZE, fontweight="bold", pad=3)
    start = min(left, width - EDGE - max(text_size(figure, line)[0] for line in lines) / POINT)
    figure.text(start / width, 1 - 0.07 / height, "\n".join(lines), va="top", color=GREY, fontsize=LABEL_SIZE)


def wrap(figure: "Figure", text: str, space: float) -> list[str]:
    """The lines of a text, each at most `space` points wide: broken at spaces and hyphens, else anywhere."""
    lines, count = [text], len(text)
    while count > 1 and max(text_size(figure, line)[0] for line in lines) > space:
        count -= 1
        lines = textwrap.wrap(text, count)
    return lines


def write_note(figure: "Figure", text: str) -> None:
    """A remark in the page's lower left corner."""
    width, height = figure.get_size_inches()
    figure.text(EDGE / width, EDGE / height, text, color=GREY, fontsize=SMALL_SIZE)


def thin_ticks(axes: "Axes") -> None:
    """Leaves out numbers of the horizontal axis that would be cut at the page's edge, and every other one while they touch."""
    low, high = axes.get_xlim()
    page = axes.figure.get_size_inches()[0] * POINT
    ticks = []  # place, number, left and right end in points
    for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        if low <= place <= high:
            centre, half = to_points(axes, (place, 0))[0], text_size(axes.figure, label.get_text())[0] / 2
            ticks.append((place, label.get_text(), centre - half, centre + half))
    ticks = [tick for tick in ticks if tick[2] >= 0 and tick[3] <= page]
    while any(right[2] - left[3] < TICK_GAP for left, right in itertools.pairwise(ticks)):
        ticks = ticks[::2]
    axes.set_xticks([tick[0] for tick in ticks], [tick[1] for tick in ticks])


def scale_values(axes: "Axes", values: np.ndarray, errors: np.ndarray, smallest: float | None) -> None:
    """Limits and ticks of the vertical axis, around the values and their error bars (nan: none).

    smallest: of a value worth showing on an axis that is always logarithmic. Bars lengthen a logarithmic axis downwards by a
    decade at most.
    """
    always_log = smallest is not None
    shown = np.isfinite(values) & (values > (smallest or 0))
    values, errors = values[shown], np.nan_to_num(errors[shown], posinf=0)
    if not len(values):
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        return
    low, high = values.min(), values.max()
    logarithmic = always_log or high / low > LOG_ABOVE
    least = max(smallest or 0, low / DECADE) if logarithmic else -math.inf
    low, high = min(low, max(least, (values - errors).min())), (values + errors).max()
    if logarithmic:
        high = max(high, 3 * low) if always_log else high
        room = (high / low) ** 0.08
        axes.set_yscale("log")
        axes.set_ylim(low / room**1.7, high * room)
        ticks = log_ticks(*axes.get_ylim())
        axes.set_yticks(ticks, tick_texts(ticks))
        axes.set_yticks([], minor=True)
    else:
        room = 0.08 * max(high - low, 0.02 * high)
        axes.set_ylim(low - 2.2 * room, high + room)
        axes.locator_params(axis="y", nbins=6)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high] for a logarithmic axis, four to eight of them where the range allows."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(step / 10 for step in range(10, 100, 5))):
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: math.ceil(len(ticks) / 8)] if ticks else []


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The numbers of an axis, all alike: 0.003 and 12, or where one is very small or large 10^-5 and 10^2."""
    if all(1e-4 < tick < 1e5 for tick in ticks):
        return [f"{tick:g}" for tick in ticks]
    return [_power(tick) for tick in ticks]


def _power(tick: float) -> str:
    mantissa, _, power = f"{tick:e}".partition("e")
    factor = "" if float(mantissa) == 1 else f"{float(mantissa):g} \\cdot "
    return f"${factor}10^{{{int(power)}}}$"


def scale_bits(axes: "Axes", bits: np.ndarray, names: float) -> None:
    """Limits and ticks, logarithmic where casts to 16 or 32 bits are shown. names: width of those at the left."""
    bits = bits if len(bits) else np.array([16.0])
    low, high = bits.min(), bits.max()
    room = min(0.62, names * axes.figure.dpi / POINT / axes.get_window_extent().width)
    room /= 1 - room
    beside = 0 if names else 1  # names keep a distance themselves
    first = low / 1.1 if high > 9 else low - 0.2  # tick
    if high > 9:
        axes.set_xscale("log", base=2)
        ticks = np.array([1, 2, 3, 4, 6, 8, 16, 32])
        low, high = low / 1.1**beside, high * 1.15
        axes.set_xlim(low * (low / high) ** room, high)
    else:
        margin = max(0.04 * (high - low), 0.2)
        low, high = low - margin * beside, high + margin
        span = high - low
        axes.set_xlim(low - span * room, high)
        step = next((step for step in (0.1, 0.2, 0.5) if span / step <= 6), 1)
        ticks = np.round(np.arange(0, high, step), 1)
    ticks = [f"{tick:g}" for tick in ticks if first <= tick <= axes.get_xlim()[1]]
    axes.set_xticks([float(tick) for tick in ticks], ticks)
    axes.set_xticks([], minor=True)
    thin_ticks(axes)


def text_size(figure: "Figure", text: str) -> tuple[float, float]:
    """Width and height of a name, points."""
    artist = figure.text(0, 0, text, fontsize=LABEL_SIZE)
    box = artist.get_window_extent(figure.canvas.get_renderer())
    artist.remove()
    return box.width * POINT / figure.dpi, box.height * POINT / figure.dpi


def to_points(axes: "Axes", data: np.ndarray) -> np.ndarray:
    """From data coordinates to points on the page."""
    return axes.transData.transform(data) * (POINT / axes.figure.dpi)
