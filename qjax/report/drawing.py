"""What all figures share: colours and sizes, the page, limits and ticks of its axes, and names beside what is drawn.

A method has one colour and one marker in every figure. Colours are Okabe and Ito's (jfly.uni-koeln.de/color), which
colour-blind readers can tell apart, and some darker ones; markers differ too, so that nothing rests on colour alone. Variants
of a method (options, groupings) differ in line style and filling. Sizes are those of a two-column paper.

matplotlib lays the page out and finds the ticks. Names of lines that begin side by side stand in a column in the order of their
points, moved apart as little as possible (`spread`); any other name goes where textalloc finds room near its point.
"""

import contextlib
import hashlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTHS = {"single": 3.35, "double": 6.9}  # inches: one column, both columns
HEIGHTS = {"single": 2.5, "double": 3.0}
COLUMNS = {"single": 1, "double": 2}  # of panels
PANEL = 1.95  # inches high, one of several rows
PNG_DPI = 300
POINT = 72.0  # an inch
GREY = "#595959"
LABEL_SIZE = 7
SMALL_SIZE = 6  # points; nothing is smaller
EDGE = 3  # points between text and the page's edge
LOG_ABOVE = 3.0  # ratio of the largest to the smallest value from which an axis is logarithmic
DECADE = 10.0  # by how much error bars may lengthen a logarithmic axis
ROOM = 0.08  # of an axis, beyond what is drawn; twice that at the lower end, for names below points
STEPS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3))  # ticks of a decade: the most that there is room for, or one
COLUMN_GAP = 12  # points between a column of names and the nearest point
SHIFTED = 1.5  # points; a name in a column that is so much above or below its point, and one elsewhere that is
NEAR, FAR = 8, 72  # farther, has a line that leads to it; no name is farther
CLEAR, APART = 3, 5  # points between a name and what is drawn, and between it and the points that have names

METHOD_STYLES = {  # method -> colour, marker
    "rtn": ("#0072B2", "o"),
    "gptq": ("#D55E00", "s"),
    "awq": ("#009E73", "^"),
    "awq+gptq": ("#CC79A7", "D"),
    "nf4": ("#E69F00", "P"),
    "fp4_e2m1": ("#56B4E9", "X"),
    "fp4_bnb": ("#7A4EB0", "v"),
    "fp8_e4m3": ("#A6761D", "p"),
    "fp8_e5m2": ("#666600", "p"),
    "bf16": (GREY, "*"),
    "fp16": (GREY, "d"),
    "fp32": (GREY, ">"),
    "smoothquant": ("#8C6D1F", "<"),
    "hqq": ("#000000", "h"),
}
FALLBACK_COLOURS = ("#4D4D4D", "#882255", "#117733", "#332288", "#AA4499", "#6B6B00")
FALLBACK_MARKERS = ("p", ">", "*", "d", "H")
LINE_STYLES = ("-", "--", "-.", ":")
BARS = {"elinewidth": 0.8, "capsize": 1.8, "capthick": 0.8}

RC = {  # matplotlib's settings, on top of its defaults
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that figures are the same everywhere
    "font.size": LABEL_SIZE,
    "axes.titlesize": LABEL_SIZE,
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "figure.labelsize": 8,
    "xtick.labelsize": LABEL_SIZE,
    "ytick.labelsize": LABEL_SIZE,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "figure.dpi": PNG_DPI,  # the width of letters changes a little with it
}


def method_style(method: str) -> tuple[str, str]:
    """Colour and marker of a method; an unknown one gets the same in every figure, by a hash of its name.

    Unknown transforms before a rounding keep its colour and change its marker.
    """
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    code = hashlib.sha256(method.encode()).digest()
    transforms, _, rounding = method.rpartition("+")
    colour, taken = method_style(rounding) if transforms else (FALLBACK_COLOURS[code[0] % len(FALLBACK_COLOURS)], None)
    markers = [marker for marker in FALLBACK_MARKERS if marker != taken]
    return colour, markers[code[1] % len(markers)]


def ink(colour: str, darkest: float = 0.2) -> str:
    """The colour for text: darkened until its relative luminance (WCAG 2) is at most `darkest`, legible on white."""
    from matplotlib.colors import to_hex, to_rgb

    channels = np.array(to_rgb(colour))
    while (
        np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
        > darkest
    ):
        channels *= 0.95
    return to_hex(channels)


@contextlib.contextmanager
def new_figure(width: str, panels: int = 1) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A page of "single" or "double" column width, in the house style, with its axes, row by row; values are on one scale."""
    if width not in WIDTHS:
        raise QjaxError(f"figure of width {width!r}: allowed are {' and '.join(WIDTHS)}")
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, COLUMNS[width])
    rows = math.ceil(panels / columns)
    with matplotlib.style.context(["default", RC]):
        figure = Figure(figsize=(WIDTHS[width], HEIGHTS[width] if rows == 1 else PANEL * rows + 0.3))
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes in grid[panels:]:
            axes.remove()
        yield figure, list(grid[:panels])


def write_titles(figure: "Figure", title: str, *, x: str, y: str, panels: Sequence[str] = ()) -> None:
    """The page's title, in lines that fit, the names of both axes, and the panels' titles."""
    width = figure.get_size_inches()[0] * POINT
    lines = wrap(figure, printable(title), width - 2 * EDGE)
    figure.suptitle(plain("\n".join(lines)), x=EDGE / width, ha="left", color=GREY, fontsize=LABEL_SIZE)
    grid = figure.axes
    columns = grid[0].get_gridspec().ncols
    (figure.supylabel if len(grid) > columns else grid[0].set_ylabel)(plain(y))
    for axes in grid[-columns:]:
        axes.set_xlabel(x, loc="right")
    for axes, name in zip(grid, panels, strict=False):
        axes.set_title(plain(name), loc="left")


def write_note(figure: "Figure", text: str) -> None:
    """A remark in the page's lower left corner."""
    place = EDGE / POINT / figure.get_size_inches()
    figure.text(*place, text, color=GREY, fontsize=SMALL_SIZE)


def lay_out(figure: "Figure") -> None:
    """Gives the axes their places, which they keep whatever is drawn later. Values are scaled and titles written before."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")


def wrap(figure: "Figure", text: str, space: float) -> list[str]:
    """The lines of a text, each at most `space` points wide: broken at spaces and hyphens, else anywhere."""
    lines, count = [text], len(text)
    while count > 1 and max(text_size(figure, line)[0] for line in lines) > space:
        count -= 1
        lines = textwrap.wrap(text, count)
    return lines


def plain(text: str) -> str:
    """Text as matplotlib writes it, which takes what stands between two $ for a formula."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def text_size(figure: "Figure", text: str) -> tuple[float, float]:
    """Width and height of a name, points."""
    artist = figure.text(0, 0, plain(text), fontsize=LABEL_SIZE)
    box = artist.get_window_extent()
    artist.remove()
    return box.width * POINT / figure.dpi, box.height * POINT / figure.dpi


def to_points(axes: "Axes", data: np.ndarray) -> np.ndarray:
    """From data coordinates to points on the page."""
    return axes.transData.transform(data) * (POINT / axes.figure.dpi)


def scale_values(
    axis: "Axis", values: np.ndarray, errors: np.ndarray, smallest: float = 0.0, *, always_log: bool = False
) -> None:
    """Limits and ticks of an axis around the values and their error bars (nan: none), logarithmic where the range is large.

    smallest: of a value worth showing on a logarithmic axis. Bars lengthen such an axis downwards by a decade at most.
    """
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

    name, shown = axis.axis_name, np.isfinite(values)
    positive = shown & (values > smallest)
    log = always_log or (positive.any() and values[positive].max() > LOG_ABOVE * values[positive].min())
    shown = positive if log else shown
    if not shown.any():
        axis.axes.set(**{f"{name}lim": (0, 1), f"{name}ticks": []})
        return
    values, errors = values[shown], np.nan_to_num(errors[shown], posinf=0)
    low, high = (values - errors).min(), (values + errors).max()
    if log:
        low = min(values.min(), max(smallest, values.min() / DECADE, low))
        high = max(high, 3 * low) if always_log else high
        room = (high / low) ** ROOM
        low, high = low / room**2, high * room
        plain = low >= 1e-4 and high < 1e5
        space = axis.get_tick_space() * (1.2 if plain else 0.6) / math.log10(high / low)  # for the ticks of a decade
        steps = next((steps for steps in STEPS if len(steps) <= space), (1,))
        locator = LogLocator(subs=steps, numticks=max(2, axis.get_tick_space()))
    else:
        room = ROOM * max(high - low, 0.02 * abs(high), 1e-9)
        low, high = low - 2 * room, high + room
        plain, locator = True, MaxNLocator(min(6, axis.get_tick_space()), steps=(1, 2, 2.5, 5, 10))
    axis.axes.set(**{f"{name}scale": "log" if log else "linear", f"{name}lim": (low, high)})
    axis.set_ticks([tick for tick in locator.tick_values(low, high) if low <= tick <= high])
    axis.set(minor_locator=NullLocator(), major_formatter="{x:g}" if plain else LogFormatterSciNotation())


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Heights nearest to the wanted ones (descending), at least `gap` apart, within [low, high] where there is room:

    minimise sum_i (y_i - wanted_i)^2  subject to  y_i - y_(i+1) >= gap,  which is isotonic regression of wanted_i + i gap.
    """
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(wanted))
    flat = isotonic_regression(np.asarray(wanted) + steps, increasing=False).x
    lowest = low + gap * (len(wanted) - 1)
    return np.clip(flat, min(lowest, high), high) - steps


class Name(NamedTuple):
    """A name, the point it belongs to in data coordinates, and its colour."""

    text: str
    point: Sequence[float]
    colour: str


def name_column(axes: "Axes", names: Sequence[Name], *, side: str) -> list[np.ndarray]:
    """Writes names in a column at the "left" or "right" of all their points, each at its point's height or moved from it and
    led to. Returns the lines from points to names, (2, 2) each, data coordinates.
    """
    ends = to_points(axes, [name.point for name in names])
    sign, outer = (-1, ends[:, 0].min()) if side == "left" else (1, ends[:, 0].max())
    bottom, top = axes.bbox.intervaly * POINT / axes.figure.dpi
    height = max(text_size(axes.figure, name.text)[1] for name in names)
    order = np.lexsort((ends[:, 0], -ends[:, 1]))
    heights = spread(ends[order, 1], height, bottom + height / 2, top - height / 2)
    leaders = []
    for i, y in zip(order, heights, strict=True):
        name, place = names[i], np.array([outer + sign * COLUMN_GAP, y])
        led = abs(y - ends[i, 1]) > SHIFTED or np.linalg.norm(place - ends[i]) > COLUMN_GAP + 5
        axes.annotate(
            plain(name.text), name.point, place - ends[i], textcoords="offset points", ha="right" if side == "left" else "left",
            va="center", fontsize=LABEL_SIZE, color=name.colour, zorder=6, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": name.colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4,
                        "relpos": (float(side == "left"), 0.5)} if led else None,
        )  # fmt: skip
        leaders.append(axes.transData.inverted().transform(np.stack([ends[i], place]) * axes.figure.dpi / POINT))
    return leaders


class DataCoordinates:
    """Says to textalloc that points are in data coordinates; it draws the whole figure first where nothing says so."""

    def _as_mpl_transform(self, axes: "Axes"):
        return axes.transData


def name_points(axes: "Axes", names: Sequence[Name], lines: Sequence[np.ndarray], *, left: float) -> None:
    """Writes each name near its point, right of `left` and off the lines, (n, 2) each; all in data coordinates."""
    import textalloc

    if not names:
        return
    pixels = axes.figure.dpi / POINT  # of a point
    names = sorted(names, key=lambda name: -name.point[0])  # the first place that is tried is at the upper right
    colours, ends = [name.colour for name in names], [name.point for name in names]
    drawn = np.concatenate([*lines, ends])
    leaders = textalloc.allocate(
        axes, *np.array(ends).T, [plain(name.text) for name in names], x_scatter=drawn[:, 0], y_scatter=drawn[:, 1],
        x_lines=[line[:, 0] for line in lines], y_lines=[line[:, 1] for line in lines],
        scatter_sizes=np.repeat((CLEAR, APART), (len(drawn) - len(ends), len(ends))) * pixels,
        text_scatter_sizes=np.full(len(names), (APART + 1.5) * pixels), min_distance=0, margin=0.005,
        max_distance=FAR * pixels / axes.bbox.width, nbr_candidates=400, avoid_label_lines_overlap=True,
        xlims=(left, axes.get_xlim()[1]), textsize=LABEL_SIZE, textcolor=colours, va="bottom", zorder=6,
        transform=DataCoordinates(), linecolor=colours, linewidth=0.5, plot_kwargs={"zorder": 2.5},
    )[3]  # fmt: skip
    for leader in filter(None, leaders):
        if np.linalg.norm(np.diff(to_points(axes, leader.get_xydata()), axis=0)) < NEAR:
            leader.remove()
