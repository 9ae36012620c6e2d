"""Figures of rows: perplexity against exact bits per weight, one line per method.

Lines, not a legend: each line carries its name. A method has one colour and one marker in every figure (Okabe and Ito's colours, which
colour-blind readers can tell apart); variants of a method (options, groups) differ in line style and filling.

Error bars are one standard error of the difference from the unquantized model, paired window by window, because that is what the
figure compares; the error of perplexity itself is in the tables.
"""

import dataclasses
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.files import write_atomically
from qjax.formats import INTEGERS, parse_format
from qjax.report.labels import Label, place_labels
from qjax.report.numbers import number, significant
from qjax.report.tables import Row, describe, in_order, is_baseline, require_one_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {"single": 3.35, "double": 6.9}  # inches: a column, and both columns, of a two-column paper
PNG_DPI = 300
LOG_ABOVE = 3.0  # ratio of the largest to the smallest value from which the axis is logarithmic
GREY = "#595959"

METHOD_STYLES = {  # method -> colour, marker
    "rtn": ("#0072B2", "o"),
    "gptq": ("#D55E00", "s"),
    "awq": ("#009E73", "^"),
    "awq+gptq": ("#CC79A7", "D"),
    "nf4": ("#E69F00", "P"),
    "fp4_e2m1": ("#56B4E9", "X"),
    "fp4_bnb": ("#7A4EB0", "v"),
    "smoothquant": ("#8C6D1F", "<"),
    "hqq": ("#000000", "h"),
}
FALLBACK_COLOURS = ("#4D4D4D", "#882255", "#117733", "#332288", "#AA4499", "#6B6B00")
FALLBACK_MARKERS = ("p", ">", "*", "d", "H")
LINE_STYLES = ("-", "--", "-.", ":")

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so figures are the same everywhere
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "figure.dpi": 144,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: the measurements of a method with fixed options and grouping. variant counts the method's earlier lines."""

    label: str
    method: str
    variant: int
    rows: tuple[Row, ...]


def method_style(method: str) -> tuple[str, str]:
    """Colour and marker of a method; an unknown one gets the same in every figure, by a hash of its name."""
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    code = hashlib.sha256(method.encode()).digest()
    return FALLBACK_COLOURS[code[0] % len(FALLBACK_COLOURS)], FALLBACK_MARKERS[code[1] % len(FALLBACK_MARKERS)]


def group_series(rows: Iterable[Row]) -> list[Series]:
    """The lines of a figure. Integer formats of all widths make a line per grouping; a codebook makes one over groupings.

    The grouping is part of a label where it says something, that is where integer formats have more than one.
    """
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if not is_baseline(row):
            lines.setdefault((row["method"], *_name_and_grouping(row)), []).append(row)
    groupings = {grouping for _, _, grouping in lines}
    series, counts = [], dict.fromkeys((method for method, _, _ in lines), 0)
    for (method, name, grouping), members in sorted(lines.items()):
        shown = grouping if len(groupings - {""}) > 1 else ""
        ordered = tuple(sorted(members, key=lambda row: number(row, "bits_per_weight")))
        series.append(Series(f"{name} {shown}".strip(), method, counts[method], ordered))
        counts[method] += 1
    return series


def _name_and_grouping(row: Row) -> tuple[str, str]:
    """("rtn(clip=mse)", "g128-sym") of rtn(clip=mse):int4-g128-sym; ("nf4 dq", "") of nf4-g64-dq."""
    recipe, semicolon, rules = str(row["recipe"]).partition("; ")
    stages, colon, _ = recipe.rpartition(":")
    fmt = parse_format(str(row["format"]))
    _, _, parts = str(fmt).partition("-")
    rules = f" with {rules}" if semicolon else ""
    if fmt.grid in INTEGERS:
        return (stages if colon else str(row["method"])) + rules, parts
    grouping, _, others = parts.partition("-")
    plain = stages in ("", "rtn") or fmt.is_float
    return " ".join(filter(None, ("" if plain else stages, fmt.grid, others))) + rules, ""


def perplexity_figure(rows: Sequence[Row], *, value: str = "perplexity", width: str = "single") -> "Figure":
    """Perplexity, or its ratio to the unquantized model's, against exact bits per weight of the quantized layers.

    value: "perplexity" | "perplexity_ratio". width: "single" | "double" column. Values that are not finite are drawn at the upper edge
    with an ∞. Raises QjaxError for other options, for no rows, and for rows of more than one model, text or convention.
    """
    if value not in ("perplexity", "perplexity_ratio") or width not in WIDTHS:
        raise QjaxError(
            f"figure of {value!r}, width {width!r}: allowed are perplexity and perplexity_ratio, {' and '.join(WIDTHS)}"
        )
    require_one_group(rows)
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTHS[width], 2.5 if width == "single" else 3.0))
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        inches = np.array(figure.get_size_inches())
        figure.subplots_adjust(0.5 / inches[0], 0.4 / inches[1], 1 - 0.08 / inches[0], 1 - 0.22 / inches[1])
        axes.set_title(describe(rows[0]), loc="left", color=GREY)
        axes.set_xlabel("bits per weight, scales included")
        axes.set_ylabel("perplexity" if value == "perplexity" else "perplexity / unquantized")
        baseline = next((number(row, value) for row in in_order(rows) if is_baseline(row)), math.nan)
        series = group_series(rows)
        _scale(axes, rows, value, baseline)
        drawn = [_draw(axes, line, value) for line in series]
        if math.isfinite(baseline):
            axes.axhline(baseline, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
        _write_labels(axes, canvas, series, drawn, value, baseline)
    return figure


def _scale(axes: "Axes", rows: Sequence[Row], value: str, baseline: float) -> None:
    """Limits, scales and ticks: logarithmic bits where casts to 16 or 32 bits are among them."""
    bits = np.array([number(row, "bits_per_weight") for row in rows if not is_baseline(row)] or [16.0])
    low, high = math.floor(bits.min() - 0.01), math.ceil(bits.max())
    if high > 9:
        axes.set_xscale("log", base=2)
        ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 16, 32) if low <= tick <= high * 1.01]
        axes.set_xlim(low / 1.06, high * 1.12)
    else:
        ticks = list(range(low, high + 1))
        axes.set_xlim(low - 0.02 * (high - low + 1), high + 0.05 * (high - low + 1))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)

    values = np.array([number(row, value) for row in rows] + [baseline])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        values = np.array([1.0])
    low, high = values.min(), values.max()
    if high / low > LOG_ABOVE:
        axes.set_yscale("log")
        room = (high / low) ** 0.08
        axes.set_ylim(low / room**1.5, high * room)
        ticks = log_ticks(low / room, high * room)
        axes.set_yticks(ticks, [significant(tick, 2) if tick >= SCIENTIFIC_TICKS else f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
    else:
        room = max(high - low, 0.01 * high) * 0.08
        axes.set_ylim(low - 1.8 * room, high + room)


SCIENTIFIC_TICKS = 1e5


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high] for a logarithmic axis, four to eight of them where the range allows."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(np.arange(10, 100, 5) / 10)):
        ticks = [float(f"{step * 10.0**decade:.6g}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return ticks


def _draw(axes: "Axes", series: Series, value: str) -> np.ndarray:
    """Draws one line; returns its points in data coordinates, (points, 2), the ones that are not finite at the upper edge."""
    colour, marker = method_style(series.method)
    x = np.array([number(row, "bits_per_weight") for row in series.rows])
    y = np.array([number(row, value) for row in series.rows])
    finite = np.isfinite(y)
    error = np.where(finite, y, 0) * np.array([number(row, "nll_delta_stderr") for row in series.rows])
    face = colour if series.variant == 0 else "white"
    look = {"color": colour, "linestyle": LINE_STYLES[series.variant % len(LINE_STYLES)], "zorder": 3}
    mean_x = np.unique(x[finite])  # several seeds: the line goes through their mean
    axes.plot(mean_x, [y[finite & (x == each)].mean() for each in mean_x], **look)
    axes.errorbar(
        x[finite], y[finite], np.where(np.isfinite(error), error, 0)[finite],
        fmt=marker, color=colour, markerfacecolor=face, markeredgewidth=0.9, elinewidth=0.8, capsize=1.8, capthick=0.8, zorder=4,
    )  # fmt: skip
    top = axes.get_ylim()[1]
    for each in x[~finite]:
        axes.plot(each, top, marker="^", color=colour, markerfacecolor=face, clip_on=False, zorder=5)
        axes.annotate("∞", (each, top), (4, -3), textcoords="offset points", color=colour, va="center")
    return np.stack([x, np.where(finite, y, top)], axis=1)


def _write_labels(
    axes: "Axes", canvas: object, series: Sequence[Series], drawn: Sequence[np.ndarray], value: str, baseline: float
) -> None:
    """The lines' names, each beside the line's end at the fewest bits, where lines are farthest apart."""
    to_points = 72 / axes.figure.dpi
    renderer = canvas.get_renderer()

    def points(data: np.ndarray) -> np.ndarray:
        return axes.transData.transform(data) * to_points

    def extent(text) -> tuple[float, float, float, float]:
        box = text.get_window_extent(renderer)
        return tuple(to_points * edge for edge in (box.x0, box.y0, box.x1, box.y1))

    box = axes.get_window_extent(renderer)
    area = tuple(to_points * edge for edge in (box.x0, box.y0, box.x1, box.y1))
    samples = [_samples(points(line)) for line in drawn]
    if math.isfinite(baseline):
        text = axes.annotate(
            f"unquantized {significant(baseline, 4)}" if value == "perplexity" else "unquantized",
            (0, baseline), (3, -2), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="top", color=GREY, fontsize=7,
        )  # fmt: skip
        left, bottom, right, top = extent(text)
        across = np.linspace(left, right, 40)
        samples += [np.stack([across, np.full(40, height)], axis=1) for height in np.linspace(bottom, top, 5)]
        level = points(np.array([[axes.get_xlim()[0], baseline], [axes.get_xlim()[1], baseline]]))
        samples.append(_samples(level))
    if not series:
        return
    texts = [axes.annotate(line.label, (0, 0), fontsize=7, color=method_style(line.method)[0]) for line in series]
    sizes = []
    for text in texts:
        left, bottom, right, top = extent(text)
        sizes.append((right - left, top - bottom))
        text.remove()
    ends = [points(line[:1])[0] for line in drawn]
    labels = [Label(tuple(end), size) for end, size in zip(ends, sizes, strict=True)]
    centres = place_labels(labels, np.concatenate(samples), area)
    for line, data, end, centre, size in zip(series, drawn, ends, centres, sizes, strict=True):
        colour = method_style(line.method)[0]
        gap = np.linalg.norm(np.maximum(np.abs(centre - end) - np.array(size) / 2, 0))
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if gap > 12 else None
        axes.annotate(
            line.label, tuple(data[0]), tuple(centre - end), textcoords="offset points",
            ha="center", va="center", fontsize=7, color=colour, arrowprops=leader, zorder=6, annotation_clip=False,
        )  # fmt: skip


def _samples(line: np.ndarray) -> np.ndarray:
    """Points about 2 apart along a line of (points, 2), markers counted more than once."""
    pieces = [line, line + [0, 2], line - [0, 2]]
    for start, end in zip(line[:-1], line[1:], strict=True):
        count = max(2, int(np.linalg.norm(end - start) / 2))
        pieces.append(start + np.linspace(0, 1, count)[:, None] * (end - start))
    return np.concatenate(pieces)


def save_figure(figure: "Figure", folder: str | Path, name: str) -> tuple[Path, Path]:
    """Writes folder/name.png and folder/name.pdf (vector, fonts embedded); the same figure gives the same bytes.

    Raises QjaxError when the folder is missing or cannot be written.
    """
    import matplotlib.style

    paths = []
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Creator": "qjax"})):
        content = io.BytesIO()
        with matplotlib.style.context(["default", STYLE]):
            figure.savefig(content, format=suffix, dpi=PNG_DPI, metadata=metadata)
        paths.append(Path(folder) / f"{name}.{suffix}")
        write_atomically(paths[-1], content.getvalue())
    return tuple(paths)
