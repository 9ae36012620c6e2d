"""Figures of rows: perplexity, or its increase over the unquantized model, against exact bits per weight.

Lines carry their names; there is no legend. Error bars are one standard error of the difference from the unquantized model,
paired window by window, because that difference is what the figure shows; the error of perplexity itself is in the tables.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.files import write_atomically
from qjax.report.accuracy import accuracy_table, divergence_table, has_divergence, tasks_of
from qjax.report.labels import Label, leader_line, place_labels, spread
from qjax.report.numbers import number, significant
from qjax.report.rendering import Row, Table, to_csv, to_latex, to_markdown
from qjax.report.seeds import seeds_of, seeds_table
from qjax.report.series import Series, group_series, increase
from qjax.report.style import GREY, HEIGHTS, LABEL_SIZE, LINE_STYLES, PNG_DPI, RC, WIDTHS, ink, method_style
from qjax.report.tables import describe, is_baseline, perplexity_table, require_one_group, split_tables
from qjax.report.tradeoff import has_speed, tradeoff_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALUES = {
    "perplexity": "perplexity",
    "increase": "increase of perplexity (%)",
    "accuracy": "accuracy on {tasks} (%)",
    "divergence": "KL divergence (nats a token)",
}
SMALLEST = {"increase": 1e-3, "divergence": 1e-6}  # values on a logarithmic axis; what is less is drawn at its lower edge
LOG_ABOVE = 3.0  # ratio of the largest to the smallest value from which the axis is logarithmic
POINT = 72.0  # an inch
COLUMN_GAP = 9  # points between the names at the left and the first point


def perplexity_figure(rows: Sequence[Row], *, value: str = "perplexity", width: str = "single") -> "Figure":
    """A figure of one model, text and convention: one line per method, options and grouping.

    value: "perplexity", with the unquantized model as a dashed line and a logarithmic axis where the range is large; or
    "increase" over it in percent, on a logarithmic axis, which shows 8, 4 and 2 bits alike; or "accuracy", the mean over the
    rows' tasks, or "divergence" from the unquantized model, logarithmic too. width: "single" | "double" column.
    Infinity is drawn as ∞ at the upper edge, an increase below 0.001 % (or a decrease) as a triangle at the lower edge.
    Raises QjaxError for other options, for no rows, and for rows of more than one model, text or convention.
    """
    if value not in VALUES or width not in WIDTHS:
        allowed = f"allowed are {' and '.join(VALUES)}, widths {' and '.join(WIDTHS)}"
        raise QjaxError(f"figure of {value!r}, width {width!r}: {allowed}")
    require_one_group(rows)
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", RC]):
        figure = Figure(figsize=(WIDTHS[width], HEIGHTS[width]))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlabel("bits per weight, scales included")
        axes.set_ylabel(VALUES[value].format(tasks=", ".join(tasks_of(rows)) if len(tasks_of(rows)) < 4 else "all tasks"))
        series = group_series(rows)
        lines = [_values(line.rows, value) for line in series]
        unquantized = [row for row in rows if is_baseline(row) and value not in SMALLEST]
        baseline = float(_values(unquantized[:1], value)[1][0]) if unquantized else math.nan
        _scale_values(axes, np.concatenate([[baseline], *(y for _, y, _ in lines)]), SMALLEST.get(value))
        _fit_margins(axes, describe(rows[0]))
        sizes = [_text_size(axes, line.label) for line in series]
        column = [i for i, (x, _, _) in enumerate(lines) if len(x) > 1]  # lines whose names stand in a column at the left
        column = column if len(column) > 1 else []
        names = max((sizes[i][0] + COLUMN_GAP + 2 for i in column), default=0)
        _scale_bits(axes, np.concatenate([[], *(x for x, _, _ in lines)]), names)
        drawn = [_draw(axes, line, *data) for line, data in zip(series, lines, strict=True)]
        obstacles = [_samples(_to_points(axes, points)) for points in drawn]
        if math.isfinite(baseline):
            obstacles.append(_draw_baseline(axes, baseline))
        _write_labels(axes, series, drawn, sizes, column=column, obstacles=np.concatenate([np.zeros((0, 2)), *obstacles]))
    return figure


def _values(rows: Sequence[Row], value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits per weight, the values of the vertical axis and their standard errors (nan where not known)."""
    bits = np.array([number(row, "bits_per_weight") for row in rows])
    if value == "accuracy":
        y, error = (
            100 * np.array([number(row, key) for row in rows]) for key in ("accuracy_mean", "accuracy_mean_delta_stderr")
        )
        return bits, y, error
    if value == "divergence":
        return bits, np.array([number(row, "kl") for row in rows]), np.array([number(row, "kl_stderr") for row in rows])
    y = np.array([number(row, "perplexity") if value == "perplexity" else increase(row) for row in rows])
    slope = np.where(np.isfinite(y), y if value == "perplexity" else 100 + y, 0)  # dy / d nll
    return bits, y, slope * np.array([number(row, "nll_delta_stderr") for row in rows])


def _scale_values(axes: "Axes", values: np.ndarray, smallest: float | None) -> None:
    """Limits and ticks. smallest: of a value worth showing on an axis that is always logarithmic."""
    always_log = smallest is not None
    values = values[np.isfinite(values) & (values > (smallest or 0))]
    if not len(values):
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        return
    low, high = values.min(), values.max()
    if always_log or high / low > LOG_ABOVE:
        high = max(high, 3 * low) if always_log else high
        room = (high / low) ** 0.08
        axes.set_yscale("log")
        axes.set_ylim(low / room**1.7, high * room)
        ticks = log_ticks(*axes.get_ylim())
        axes.set_yticks(ticks, [tick_text(tick) for tick in ticks])
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


def tick_text(tick: float) -> str:
    """A tick's number: 0.003, 12, 10^5."""
    if 1e-4 < tick < 1e5:
        return f"{tick:g}"
    mantissa, _, power = f"{tick:e}".partition("e")
    factor = "" if float(mantissa) == 1 else f"{float(mantissa):g} \\cdot "
    return f"${factor}10^{{{int(power)}}}$"


def _scale_bits(axes: "Axes", bits: np.ndarray, names: float) -> None:
    """Limits and ticks, logarithmic where casts to 16 or 32 bits are shown. names: width of those at the left."""
    bits = bits if len(bits) else np.array([16.0])
    low, high = bits.min(), bits.max()
    room = min(0.5, names * axes.figure.dpi / POINT / axes.get_window_extent().width)
    room /= 1 - room
    if high > 9:
        axes.set_xscale("log", base=2)
        ticks = np.array([1, 2, 3, 4, 6, 8, 16, 32])
        low /= 1.1
        axes.set_xlim(low * (low / high) ** room, high * 1.15)
    else:
        margin = max(0.04 * (high - low), 0.2)
        span = high - low + 2 * margin
        axes.set_xlim(low - margin - span * room, high + margin)
        step = next((step for step in (0.1, 0.2, 0.5) if span / step <= 6), 1)
        ticks = np.round(np.arange(0, high + margin, step), 1)
        low -= margin
    ticks = [f"{tick:g}" for tick in ticks if low <= tick <= axes.get_xlim()[1]]
    axes.set_xticks([float(tick) for tick in ticks], ticks)
    axes.set_xticks([], minor=True)


def _fit_margins(axes: "Axes", title: str) -> None:
    """Margins as wide as what is written in them; a title that fits."""
    figure = axes.figure
    width, height = figure.get_size_inches()
    axes.set_position([0.2, 0.4 / height, 0.7, 1 - 0.62 / height])
    left = (axes.get_window_extent().x0 - axes.yaxis.get_tightbbox(figure.canvas.get_renderer()).x0) / figure.dpi + 0.04
    axes.set_position([left / width, 0.4 / height, 1 - (left + 0.06) / width, 1 - 0.62 / height])
    space = (width - left - 0.06) * POINT / _text_size(axes, title)[0]
    axes.set_title(title, loc="left", color=GREY, fontsize=LABEL_SIZE * min(1, space))


def _text_size(axes: "Axes", text: str) -> tuple[float, float]:
    """Width and height of a name, points."""
    figure = axes.figure
    artist = figure.text(0, 0, text, fontsize=LABEL_SIZE)
    box = artist.get_window_extent(figure.canvas.get_renderer())
    artist.remove()
    return box.width * POINT / figure.dpi, box.height * POINT / figure.dpi


def _to_points(axes: "Axes", data: np.ndarray) -> np.ndarray:
    return axes.transData.transform(data) * (POINT / axes.figure.dpi)


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
        markeredgewidth=0.9, elinewidth=0.8, capsize=1.8, capthick=0.8, zorder=4,
    )  # fmt: skip
    beyond = (  # which, where on the axis, how
        (low, bottom, {"marker": "v", "markerfacecolor": face}),
        (~shown & ~low, top, {"marker": "$\\infty$", "markersize": 8, "markeredgewidth": 0}),
    )
    for which, edge, look in beyond:
        if which.any():
            axes.plot(x[which], np.full(which.sum(), edge), color=colour, linestyle="none", clip_on=False, zorder=5, **look)
    return np.stack([x, np.where(shown, y, np.where(low, bottom, top))], axis=1)


def _draw_baseline(axes: "Axes", baseline: float) -> np.ndarray:
    """The dashed line and its name; returns samples of both, points."""
    figure, left, right = axes.figure, *axes.get_xlim()
    axes.axhline(baseline, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
    text = axes.annotate(
        f"unquantized {significant(baseline, 4)}", (0, baseline), (3, -2), xycoords=("axes fraction", "data"),
        textcoords="offset points", va="top", color=GREY, fontsize=LABEL_SIZE,
    )  # fmt: skip
    box = text.get_window_extent(figure.canvas.get_renderer())
    grid = np.stack(np.meshgrid(np.linspace(box.x0, box.x1, 30), np.linspace(box.y0, box.y1, 5)), axis=-1).reshape(-1, 2)
    return np.concatenate([_samples(_to_points(axes, [(left, baseline), (right, baseline)])), grid * (POINT / figure.dpi)])


def _samples(line: np.ndarray) -> np.ndarray:
    """Points about 2 apart along a line of (points, 2), and around its markers."""
    pieces = [line + offset for offset in ((0, 0), (2, 0), (-2, 0), (0, 3), (0, -3))]
    for start, end in itertools.pairwise(line):
        count = max(2, int(np.linalg.norm(end - start) / 2))
        pieces.append(start + np.linspace(0, 1, count)[:, None] * (end - start))
    return np.concatenate(pieces)


def _write_labels(
    axes: "Axes",
    series: Sequence[Series],
    drawn: Sequence[np.ndarray],
    sizes: Sequence[tuple[float, float]],
    *,
    column: Sequence[int],
    obstacles: np.ndarray,
) -> None:
    """The lines' names, each beside the line's end at the fewest bits, where lines are farthest apart."""
    box = axes.get_window_extent()
    left, bottom, right, top = (edge * POINT / axes.figure.dpi for edge in (box.x0, box.y0, box.x1, box.y1))
    ends = np.array([_to_points(axes, points[:1])[0] for points in drawn]).reshape(-1, 2)
    sizes = np.array(sizes).reshape(-1, 2)
    centres = np.zeros_like(ends)
    column = sorted(column, key=lambda i: (-ends[i, 1], ends[i, 0]))
    if column:
        height = sizes[:, 1].max()
        centres[column, 0] = ends[column, 0].min() - COLUMN_GAP - sizes[column, 0] / 2
        centres[column, 1] = spread(ends[column, 1], height, bottom + height / 2, top - height / 2)
        leaders = [leader_line(ends[i], centres[i], sizes[i] / 2) for i in column]
        obstacles = np.concatenate([obstacles, *leaders])
    others = [i for i in range(len(series)) if i not in column]
    area = (left if not column else ends[column, 0].min() - COLUMN_GAP, bottom, right, top)
    centres[others] = place_labels([Label(tuple(ends[i]), tuple(sizes[i])) for i in others], obstacles, area)
    for line, points, end, centre, half in zip(series, drawn, ends, centres, sizes / 2, strict=True):
        colour = ink(method_style(line.method)[0])
        axes.annotate(
            line.label, tuple(points[0]), tuple(centre - end), textcoords="offset points", ha="center", va="center",
            fontsize=LABEL_SIZE, color=colour, zorder=6, annotation_clip=False,
        )  # fmt: skip
        leader = leader_line(end, centre, half)
        if np.linalg.norm(leader[-1] - end) > COLUMN_GAP + 1:
            ends_of_leader = axes.transData.inverted().transform(leader[[0, -1]] * (axes.figure.dpi / POINT))
            axes.plot(*ends_of_leader.T, color=colour, linewidth=0.5, zorder=2.5, clip_on=False)


def save_figure(figure: "Figure", folder: str | Path, name: str) -> list[Path]:
    """Writes folder/name.png and folder/name.pdf (vector, fonts embedded); the same figure gives the same bytes.

    Raises QjaxError when the folder is missing or cannot be written.
    """
    import matplotlib.style

    paths = []
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Creator": "qjax"})):
        content = io.BytesIO()
        with matplotlib.style.context(["default", RC]):
            figure.savefig(content, format=suffix, dpi=PNG_DPI, metadata=metadata)
        paths.append(Path(folder) / f"{name}.{suffix}")
        write_atomically(paths[-1], content.getvalue())
    return paths


def write_reports(folder: str | Path, rows: Sequence[Row]) -> list[Path]:
    """Writes tables (md, tex, csv) and figures (png, pdf) per model, text and convention: of perplexity and its increase, and
    where they were measured of accuracy and divergence.

    Returns the paths. Raises QjaxError when there are no rows or the folder cannot be written.
    """
    paths = []
    groups = split_tables(rows)
    for name, group in zip(report_names(groups), groups, strict=True):
        paths += write_table(folder, name, perplexity_table(group))
        paths += save_figure(perplexity_figure(group), folder, name)
        if any(increase(row) > 0 for row in group):
            paths += save_figure(perplexity_figure(group, value="increase"), folder, f"{name}-increase")
        if tasks_of(group):
            paths += write_table(folder, f"{name}-accuracy", accuracy_table(group))
            paths += save_figure(perplexity_figure(group, value="accuracy"), folder, f"{name}-accuracy")
        if seeds_of(group):
            paths += write_table(folder, f"{name}-seeds", seeds_table(group))
        if has_speed(group):
            paths += write_table(folder, f"{name}-tradeoff", tradeoff_table(group))
        if has_divergence(group):
            paths += write_table(folder, f"{name}-divergence", divergence_table(group))
            paths += save_figure(perplexity_figure(group, value="divergence"), folder, f"{name}-divergence")
    return paths


def write_table(folder: str | Path, name: str, table: Table) -> list[Path]:
    """Writes folder/name.md, .tex and .csv."""
    paths = []
    for suffix, render in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
        paths.append(Path(folder) / f"{name}.{suffix}")
        write_atomically(paths[-1], render(table))
    return paths


def report_names(groups: Sequence[Sequence[Row]]) -> list[str]:
    """File names, without suffix, by model, text and convention; what tells two of the same name apart is appended."""
    names = [_slug("model", "corpus", "convention", row=group[0]) for group in groups]
    details = [_slug("fingerprint", "corpus_fingerprint", "windows", "tasks", row=group[0]) for group in groups]
    return [f"{name}-{more}" if names.count(name) > 1 else name for name, more in zip(names, details, strict=True)]


def _slug(*keys: str, row: Row) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", str(row.get(key))).strip("-.") for key in keys)
