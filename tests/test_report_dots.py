"""The figure of recipes one under the other: which rows it shows, where, in what order; names that fit."""

import io
import itertools
import math

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.report.dots import BELOW, dots_figure, has_dots
from qjax.report.drawing import SMALL_SIZE, WIDTHS, ink, method_style
from qjax.report.figures import has_lines, perplexity_figure
from qjax.report.series import MOST_LINES, group_series, split_panels
from tests.report_rows import alone_row, calibrated_rows, infinite_row, measured_row, sweep_rows
from tests.test_report_figures import many_rows

ALONE = [measured_row("none"), alone_row("^block_0/", 0.02), alone_row("^block_1/", 0.001), alone_row("^block_2/", -0.001)]
FORMATS = [measured_row("none")] + [
    measured_row(f"{method}:int4-{grouping}", 0.01 + 0.002 * i, 0.001)
    for i, grouping in enumerate(("g64", "g64-sym", "g128", "g128-sym", "g64-dq", "g128-dq", "channel"))
    for method in ("rtn", "gptq")
]


def names(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize(
    ("rows", "lines", "dots"),
    [(sweep_rows(), True, False), (ALONE, False, True), (FORMATS, False, True), (calibrated_rows(), False, True)],
    ids=["sweep", "alone", "formats", "calibration"],
)
def test_lines_or_dots(rows, lines, dots):
    assert (has_lines(rows), has_dots(rows)) == (lines, dots)


def test_recipes_by_increase_with_their_error_in_their_colour():
    figure = dots_figure(sweep_rows())
    assert names(figure) == ["nf4-g64", "rtn(clip=mse):int4-g128", "rtn:int2-g128"]
    (low,) = [bars for bars in figure.axes[0].containers if bars.lines[0].get_ydata()[0] == 1]
    assert low.lines[0].get_xdata()[0] == pytest.approx(100 * math.expm1(0.02))
    ((left, right),) = [segment[:, 0] for segment in low.lines[2][0].get_segments()]
    assert right - left == pytest.approx(2 * 100 * math.exp(0.02) * 0.004)
    assert low.lines[0].get_marker() == method_style("rtn")[1]
    assert figure.axes[0].get_yticklabels()[0].get_color() == ink(method_style("nf4")[0])


def test_places_in_the_order_of_the_rows_and_what_lowers_perplexity_at_the_edge():
    figure = dots_figure(ALONE)
    assert names(figure) == ["block 0", "block 1", "block 2"]
    assert names(dots_figure([measured_row("gptq(clip=mse):int3-g128", 0.1), *ALONE]))[-1] == "whole model"
    bar, mark = sorted(
        (line for line in figure.axes[0].lines if line.get_marker() == "<"), key=lambda line: line.get_markersize()
    )
    assert bar.get_ydata()[0] == 1  # reaches 0
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (figure.axes[0].get_xlim()[0], 2)
    assert figure.texts[0].get_text().startswith("gptq(clip=mse):int3-g128: ")
    assert figure.axes[0].containers[0].lines[0].get_color() == method_style("gptq")[0]


def test_seeds_are_dots_around_their_mean():
    rows = calibrated_rows()
    figure = dots_figure(rows)
    assert names(figure)[0] == "c4, 32 windows"
    small = [line for line in figure.axes[0].lines if line.get_markersize() == 2]
    assert [len(line.get_xdata()) for line in small] == [2] * 4
    mean = figure.axes[0].containers[0].lines[0].get_xdata()[0]
    assert min(small[0].get_xdata()) < mean < max(small[0].get_xdata())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "rows",
    [
        FORMATS,
        [measured_row("none"), infinite_row(), measured_row("rtn:int4-g128", 0.1, math.nan)],
        [measured_row("none"), measured_row("awq+gptq(clip=mse):int3-g128" + "@sequential", 0.1), measured_row("nf4", 0.2)],
        [infinite_row()],
        [measured_row("none"), measured_row("rtn:int8-g128", -0.1)],
    ],
    ids=["formats", "infinite", "long", "only-infinite", "better"],
)
def test_everything_is_on_the_page(rows, width):
    figure = dots_figure(rows, width)
    assert figure.get_size_inches()[0] == WIDTHS[width]
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    box = axes.get_tightbbox(renderer)
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1
    assert axes.get_window_extent().width > 0.35 * figure.bbox.width
    boxes = [text.get_window_extent(renderer) for text in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))
    ticks = [text.get_window_extent(renderer) for text in axes.get_xticklabels() if text.get_text()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ticks))


def test_refusals():
    with pytest.raises(QjaxError, match="quantized models, got none"):
        dots_figure([measured_row("none")])
    with pytest.raises(QjaxError, match="width 'wide'"):
        dots_figure(sweep_rows(), "wide")


def test_many_lines_get_a_panel_for_every_grouping():
    rows = many_rows()
    assert len(split_panels(rows)) == 1
    rows += [row | {key: row[key].replace("g128", "g32") for key in ("recipe", "format")} for row in rows[1:21]]
    assert len(group_series(rows)) > MOST_LINES
    panels = split_panels(rows)
    assert [name for name, _ in panels] == ["g32", "g64", "g128"]
    assert all(part[0]["recipe"] == "none" for _, part in panels)
    assert [len(group_series(part)) for _, part in panels] == [5, 4, 5]
    assert all(f"-{name}" in row["recipe"] for name, part in panels for row in part[1:])  # of codebooks too
    figure = perplexity_figure(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["g32", "g64", "g128"]
    assert figure.get_supylabel() == "perplexity"


LONG = "gptq(act_order=false,static_groups=false)"


@pytest.mark.parametrize(
    ("recipes", "width", "title"),
    [
        (("gptq:int4-g128", "rtn:int4-g128"), "single", "int4-g128: toy"),
        (("gptq:int4-g128", "rtn:int4-g64"), "single", "toy"),
        (("bf16", "rtn:int4-g64"), "single", "toy"),
        ((f"{LONG}:int4-g128@block", "rtn:int4-g128"), "double", "toy"),
        ((f"{LONG}:int4-g128@block", f"gptq:int4-g128@block; {'/'.join(['layer'] * 30)}=rtn:int8-g128"), "double", "toy"),
    ],
    ids=["one-format", "two-formats", "cast", "long", "longer"],
)
def test_type_is_never_small(recipes, width, title):
    rows = [measured_row(recipe.partition(";")[0], 0.1) | {"recipe": recipe} for recipe in recipes]
    figure = dots_figure([measured_row("none"), *rows])
    assert figure.get_size_inches()[0] == WIDTHS[width]
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.get_yticklabels()]
    assert all(box.x0 >= 0 for box in boxes)
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))
    written = [*axes.get_yticklabels(), *axes.get_xticklabels(), *figure.texts]
    assert min(text.get_fontsize() for text in written) >= SMALL_SIZE
    assert figure.texts[0].get_text().startswith(title)


def test_numbers_of_a_narrow_axis_stay_apart_and_inside():
    rows = [measured_row(f"{name}:int4-g{group}", delta, 0) for name, group, delta in (
        ("gptq(clip=mse,refine=4)", 64, 0.0008), ("awq+gptq(clip=mse,refine=4)", 128, 4.7),
    )]  # fmt: skip
    figure = dots_figure([measured_row("none"), *rows])
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in figure.axes[0].get_xticklabels()]
    assert len(boxes) > 1
    assert boxes[-1].x1 <= figure.bbox.x1
    assert all(one.x1 + 2 < other.x0 for one, other in itertools.pairwise(boxes))


def test_a_note_explains_marks_at_the_left_edge():
    assert BELOW in [text.get_text() for text in dots_figure(ALONE).texts]
    assert BELOW not in [text.get_text() for text in dots_figure(FORMATS).texts]


def test_the_bar_of_what_is_below_does_not_lengthen_the_axis():
    above = [measured_row("none"), measured_row("gptq:int4-g64", 0.1, 0.001), measured_row("rtn:int2-g64", 1, 0.001)]
    below = dots_figure([*above, measured_row("rtn:int8-g64", -0.01, 0.02)])
    assert below.axes[0].get_xlim() == dots_figure(above).axes[0].get_xlim()


def test_limits_include_error_bars():
    axes = dots_figure(
        [measured_row("none"), measured_row("gptq:int4-g64", 0.1, 0.03), measured_row("rtn:int2-g64", 1, 0.4)]
    ).axes[0]
    ends = np.concatenate([bars.lines[2][0].get_segments()[0][:, 0] for bars in axes.containers])
    left, right = axes.get_xlim()
    assert left < ends.min()
    assert ends.max() < right


def test_numbers_of_ticks_are_whole():
    """No factor beside the axis, which would get lost."""
    places = [alone_row(f"^block_{i}/", (i + 1) * 1e-7) | {"nll_delta_stderr": 1e-8} for i in range(3)]
    axes = dots_figure([measured_row("none"), *places]).axes[0]
    texts = [label.get_text().replace("\N{MINUS SIGN}", "-") for label in axes.get_xticklabels()]
    assert list(map(float, texts)) == pytest.approx(axes.get_xticks(), rel=1e-3)
    assert 0 < max(axes.get_xticks()) < 1e-4
