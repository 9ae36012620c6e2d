"""The figure of recipes one under the other: which rows it shows, in which facet, in what order; names that fit."""

import io
import itertools
import math

import pytest

from qjax.errors import QjaxError
from qjax.report.dots import dots_figure, facets_of, has_dots
from qjax.report.drawing import WIDTHS, ink, look
from qjax.report.series import line_panels
from tests.report_rows import alone_row, calibrated_rows, infinite_row, measured_row, sweep_rows
from tests.test_report_figures import assert_legible, many_rows, swept

ALONE = [measured_row("none"), alone_row("^block_0/", 0.02), alone_row("^block_1/", 0.001), alone_row("^block_2/", -0.001)]
ORDERS = [measured_row("none")] + [
    measured_row(f"{method}:int{bits}-g128@{order}", 0.01 * i / bits, 0.001)
    for bits in (4, 3)
    for i, (method, order) in enumerate(itertools.product(("gptq", "awq"), ("qep", "block", "parallel")), 1)
]
MIXED = [measured_row("none")] + [
    measured_row(name, 0.01 * i, 0.001)
    for i, name in enumerate(("rtn:int4-channel", "nf4-g64", "gptq:int3-g128@block", "awq:int3-g64", "rtn:int2-g32"), 1)
]


def names(axes) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


@pytest.mark.parametrize(
    ("rows", "lines", "dots"),
    [
        (swept(("rtn", "gptq")), True, False),
        (many_rows(), True, True),
        (ALONE, False, True),
        (ORDERS, False, True),
        (calibrated_rows(), False, True),
        (sweep_rows()[1:3], False, True),
        (sweep_rows()[1:2], False, False),
    ],
    ids=["sweep", "crowded", "alone", "orders", "calibration", "one", "none"],
)
def test_lines_or_dots(rows, lines, dots):
    assert (bool(line_panels(rows)), has_dots(rows)) == (lines, dots)


def test_facets_are_widths_with_the_same_lines():
    """In the order of the first facet; the format, which all share, is not in their names."""
    figure = dots_figure(ORDERS)
    assert [axes._left_title.get_text() for axes in figure.axes] == ["3 bits: 3.15", "4 bits: 4.16"]
    expected = [f"{method}@{order}" for method in ("gptq", "awq") for order in ("qep", "block", "parallel")]
    assert names(figure.axes[0]) == expected and set(names(figure.axes[1])) == {""}
    assert [len(axes.containers) for axes in figure.axes] == [6, 6]


def test_a_facet_of_caches_has_a_title():
    cache = measured_row("none", 0.01, 0.001) | {"recipe": "kv:int8-token", "cache": "int8-token", "bits": None}
    titles = [axes._left_title.get_text() for axes in dots_figure([*MIXED, cache]).axes]
    assert titles[-1] == "weights as they are" and "weights as they are" not in titles[:-1]


def test_a_title_that_is_too_wide_is_broken_before_its_format():
    rows = [measured_row("none"), *(alone_row(f"^block_{i}/", 0.01, by="gptq(clip=mse)+descend:int3-g128") for i in (0, 1))]
    rows += [alone_row(f"^block_{i}/", 0.02) for i in (0, 1)]
    titles = [axes._left_title.get_text() for axes in dots_figure(rows).axes]
    assert any(title.endswith(":\nint3-g128") for title in titles)


def test_widths_with_other_lines_stand_one_under_the_other():
    figure = dots_figure(MIXED)
    assert [names(axes) for axes in figure.axes] == [
        ["rtn:int2-g32"],
        ["gptq:int3-g128@block", "awq:int3-g64"],
        ["rtn:int4-channel", "nf4-g64"],
    ]
    tops = [axes.get_window_extent().y1 for axes in figure.axes]
    assert tops == sorted(tops, reverse=True)


def test_a_bar_is_the_interval_in_the_colour_of_the_method():
    figure = dots_figure(ORDERS)
    (bars,) = [bars for bars in figure.axes[0].containers if bars.lines[0].get_ydata()[0] == 1]
    delta = 0.02 / 3
    assert bars.lines[0].get_xdata()[0] == pytest.approx(100 * math.expm1(delta))
    ((left, right),) = [segment[:, 0] for segment in bars.lines[2][0].get_segments()]
    assert (left, right) == pytest.approx([100 * math.expm1(delta + sign * 1.96e-3) for sign in (-1, 1)])
    assert (bars.lines[0].get_marker(), bars.lines[0].get_color()) == look("gptq")[1::-1]
    assert figure.axes[0].get_yticklabels()[3].get_color() == ink(look("awq").colour)


def test_places_in_the_order_of_the_rows():
    figure = dots_figure(ALONE)
    assert names(figure.axes[0]) == ["block 0", "block 1", "block 2"]
    assert names(dots_figure([measured_row("gptq(clip=mse):int3-g128", 0.1), *ALONE]).axes[0])[-1] == "whole model"
    assert figure.axes[0]._left_title.get_text() == "gptq(clip=mse):int3-g128"
    assert figure.axes[0].containers[0].lines[0].get_color() == look("gptq").colour


def test_draws_are_one_line_with_one_interval():
    """Wider than that of the documents alone."""
    figure = dots_figure(calibrated_rows())
    (axes,) = figure.axes
    assert names(axes) == [f"{text}, {windows} x 256 tokens" for text in ("c4", "python-docs") for windows in (8, 32)]
    assert [len(bars.lines[0].get_xdata()) for bars in axes.containers] == [1] * 4
    first = axes.containers[0]
    assert first.lines[0].get_xdata()[0] == pytest.approx(100 * math.expm1(0.151))  # the mean of 0.150 and 0.152
    ((left, right),) = [segment[:, 0] for segment in first.lines[2][0].get_segments()]
    assert right - left > 2 * 100 * math.exp(0.151) * 12.7 * 0.0009  # t of one degree of freedom


def test_rows_that_cannot_be_put_together_keep_their_seed():
    rows = [measured_row("gptq:int3-g128", 0.1 + 0.01 * seed, seed=seed) for seed in range(3)]
    (facet,) = facets_of(rows).values()
    assert list(facet) == [f"gptq, seed {seed}" for seed in range(3)]


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (many_rows(), "double"),
        (ALONE, "single"),
        (MIXED, "single"),
        ([measured_row("none"), infinite_row(), measured_row("rtn:int4-g128", 0.1, math.nan)], "single"),
        ([measured_row(f"gptq({'act_order=false,' * 5}):int3-g128@block", 0.1), measured_row("nf4", 0.2)], "single"),
        ([infinite_row()], "single"),
        ([measured_row("none"), measured_row("rtn:int8-g128", -0.1)], "double"),
    ],
    ids=["many", "places", "mixed", "infinite", "long", "only-infinite", "better"],
)
def test_everything_is_legible(rows, width):
    figure = dots_figure(rows, width)
    assert figure.get_size_inches()[0] in (WIDTHS[width], WIDTHS["double"])
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    assert_legible(figure)
    assert all(axes.get_window_extent().width > 0.1 * figure.bbox.width for axes in figure.axes)


def test_what_the_axis_cannot_show_is_at_its_end():
    rows = [
        measured_row("none"),
        *(measured_row(f"{name}:int4-g64", 0.1 * 10**i) for i, name in enumerate(("gptq", "awq", "rtn"))),
    ]
    rows += [measured_row("hqq:int4-g64", -0.01), infinite_row() | {"recipe": "rtn(clip=mse):int4-g64", "bits": 4}]
    (axes,) = dots_figure(rows).axes
    marks = {line.get_marker(): tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in ("<", "$\\infty$")}
    assert marks == {"<": (axes.get_xlim()[0], 0), "$\\infty$": (axes.get_xlim()[1], 4)}


def test_refusals():
    with pytest.raises(QjaxError, match="quantized models, got none"):
        dots_figure([measured_row("none")])
    with pytest.raises(QjaxError, match="width 'wide'"):
        dots_figure(sweep_rows(), "wide")
