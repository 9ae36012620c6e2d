"""What all figures share: looks and sizes, the page, limits and ticks of its axes, a legend or names beside the lines.

A method has one colour and one marker in every figure. Colours are Okabe and Ito's (jfly.uni-koeln.de/color), which
colour-blind readers can tell apart, and some darker ones; markers differ too, so that nothing rests on colour alone. Variants
of a method (options, refiners) differ in shade and in the filling of their markers; every line is solid. Sizes are those of a
two-column paper; what a figure shows, of which model and text, stands in its caption (`captions.py`), not in the page.
"""

import contextlib
import hashlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from qjax.errors import QjaxError
from qjax.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTHS = {"single": 3.35, "double": 6.9}  # inches: one column, both columns
COLUMNS = {"single": 2, "double": 4}  # of panels
PANELS = {"single": 1.55, "double": 1.85}  # inches high, with the numbers of its axes
ALONE = 2.2  # inches high, a panel that has the page
PNG_DPI = 200
POINT = 72.0  # an inch
GREY = "#595959"
LABEL_SIZE = 7  # points; nothing is smaller
TITLE_SIZE = 8
EDGE = 3  # points between text and the page's edge
LOG_ABOVE = 3.0  # ratio of the largest to the smallest value from which an axis is logarithmic
LENGTHENED = 2.0  # by how much bars may lengthen a logarithmic axis downwards
ROOM = 0.06  # of an axis, beyond what is drawn
NEAREST = 0.9  # of an axis' lower end: how far it reaches down to a given tick
STEPS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3))  # ticks of a decade: the most that there is room for, or one
DIRECT = 6  # lines that are named beside their ends; more have a legend
WIDEST_NAMES = 0.28  # of the page, beside the lines
COLUMN_GAP = 9  # points between a column of names and the axes
SHIFTED = 1.5  # points; a name that is so much above or below its point has a line that leads to it
HANDLE = 27  # points of a legend's entry beside its name

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
VARIANTS = ((0.0, True), (0.3, False), (-0.45, True), (-0.45, False), (0.3, True), (0.0, False))  # shade, filled
BARS = {"elinewidth": 0.8, "capsize": 1.6, "capthick": 0.8}

RC = {  # matplotlib's settings, on top of its defaults
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that figures are the same everywhere
    "font.size": LABEL_SIZE,
    "axes.titlesize": LABEL_SIZE,
    "axes.titleweight": "bold",
    "axes.titlepad": 4,
    "axes.labelsize": TITLE_SIZE,
    "figure.labelsize": TITLE_SIZE,
    "xtick.labelsize": LABEL_SIZE,
    "ytick.labelsize": LABEL_SIZE,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": LABEL_SIZE,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 0.8,
    "legend.labelspacing": 0.3,
    "legend.borderaxespad": 0.1,
    "legend.handletextpad": 0.5,
    "legend.borderpad": 0.1,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.6,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "figure.dpi": PNG_DPI,  # the width of letters changes a little with it
}


class Look(NamedTuple):
    """How a line is drawn: the colour of line, bars and edge, the marker, its face."""

    colour: str
    marker: str
    face: str


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


def look(method: str, variant: int = 0) -> Look:
    """The look of a method's line. variant: how many lines of the same method come before it."""
    from matplotlib.colors import to_hex, to_rgb

    colour, marker = method_style(method)
    shade, filled = VARIANTS[variant % len(VARIANTS)]
    colour = to_hex((1 - abs(shade)) * np.array(to_rgb(colour)) + max(shade, 0))
    return Look(colour, marker, colour if filled else "white")


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
def new_page(width: str) -> Iterator["Figure"]:
    """A page of "single" or "double" column width, in the house style, without axes."""
    if width not in WIDTHS:
        raise QjaxError(f"figure of width {width!r}: allowed are {' and '.join(WIDTHS)}")
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", RC]):
        figure = Figure(figsize=(WIDTHS[width], ALONE))
        FigureCanvasAgg(figure)
        yield figure


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


def scale_values(axis: "Axis", values: Float[np.ndarray, "n 3"], ticks: Sequence[float] = ()) -> None:
    """Limits and ticks of an axis around values and the ends of their intervals (columns: value, low, high; nan: not known).

    Logarithmic where values that are resolved from zero differ by LOG_ABOVE and are at least half of all; their bars lengthen
    such an axis downwards by LENGTHENED at most, and what is not resolved does not. ticks: instead of those that are found.
    """
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

    name = axis.axis_name
    values = values[np.isfinite(values[:, 0])]
    ends = np.where(np.isfinite(values), values, values[:, :1])
    resolved = ends[ends[:, :2].min(axis=1) > 0]
    if not len(values):
        axis.axes.set(**{f"{name}lim": (0, 1), f"{name}ticks": []})
        return
    log = 2 * len(resolved) >= len(values) and resolved[:, 0].max() > LOG_ABOVE * resolved[:, 0].min()
    low, high = ends.min(), ends.max()
    if log:
        low = max(resolved.min(), resolved[:, 0].min() / LENGTHENED)
        room = (high / low) ** ROOM
        low, high = low / room, high * room
        plainly = low >= 1e-4 and high < 1e5
        space = axis.get_tick_space() * (1.2 if plainly else 0.6) / math.log10(high / low)  # for the ticks of a decade
        steps = next((steps for steps in STEPS if len(steps) <= space), (1,))
        locator = LogLocator(subs=steps, numticks=max(2, axis.get_tick_space()))
    else:
        room = ROOM * max(high - low, 0.02 * abs(high), 1e-9)
        low, high = low - room, high + room
        plainly, locator = True, MaxNLocator(max(2, min(6, axis.get_tick_space())), steps=(1, 2, 2.5, 5, 10))
    low = max((tick for tick in ticks if NEAREST * low < tick <= low), default=low)
    axis.axes.set(**{f"{name}scale": "log" if log else "linear", f"{name}lim": (low, high)})
    axis.set_ticks([tick for tick in ticks or locator.tick_values(low, high) if low <= tick <= high])
    axis.set(minor_locator=NullLocator(), major_formatter="{x:g}" if plainly else LogFormatterSciNotation())


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


def name_column(axes: "Axes", names: Sequence[Name]) -> None:
    """Writes names in a column right of the axes, each at its point's height or moved from it and led to."""
    points = POINT / axes.figure.dpi
    ends = axes.transData.transform([name.point for name in names]) * points
    bottom, top = axes.bbox.intervaly * points
    height = max(text_size(axes.figure, name.text)[1] for name in names)
    order = np.lexsort((ends[:, 0], -ends[:, 1]))
    heights = spread(ends[order, 1], height, bottom + height / 2, top - height / 2)
    for i, y in zip(order, heights, strict=True):
        name, place = names[i], np.array([axes.bbox.x1 * points + COLUMN_GAP, y])
        led = abs(y - ends[i, 1]) > SHIFTED or place[0] - ends[i, 0] > COLUMN_GAP + 8
        axes.annotate(
            plain(name.text), name.point, place - ends[i], textcoords="offset points", ha="left", va="center",
            fontsize=LABEL_SIZE, color=ink(name.colour), zorder=6, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": name.colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4,
                        "relpos": (0, 0.5)} if led else None,
        )  # fmt: skip
