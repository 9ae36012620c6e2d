"""Figures of lines: panels, points and intervals, every odd row, the same bytes again; nothing overlaps or leaves the page."""

import io
import itertools
import math

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.report.drawing import LABEL_SIZE, METHOD_STYLES, VARIANTS, WIDTHS, ink, look, method_style, new_page, scale_values
from qjax.report.figures import VALUES, lines_figure, tradeoff_figure, with_share
from qjax.report.reports import captions, report_names, write_reports
from qjax.report.series import by_grid, group_series, line_panels
from tests.report_rows import infinite_row, measured_row, sweep_rows

DAMAGE = {8: 0.0005, 4: 0.02, 3: 0.12, 2: 1.4}
METHODS = {"rtn": 1.0, "rtn(clip=mse)": 0.8, "gptq": 0.45, "awq": 0.55, "awq+gptq": 0.35}


LONG = {
    name: 0.9 - 0.15 * i
    for i, name in enumerate(
        ("rtn", "gptq(clip=mse,damp=0.02)+descend", "gptq", "awq", "awq+gptq(clip=mse,damp=0.02)", "awq+rtn")
    )
}


def swept(methods=METHODS, groups=("g128",), bits=DAMAGE, **changes) -> list[dict[str, object]]:
    """The unquantized model and methods at every width and grouping."""
    return [measured_row("none")] + [
        measured_row(f"{method}:int{width}-{group}", (LONG | METHODS)[method] * DAMAGE[width] * (1 + 0.1 * i), 2e-4, **changes)
        for (i, group), method, width in itertools.product(enumerate(groups), methods, bits)
    ]


def many_rows() -> list[dict[str, object]]:
    """Five methods at four widths, and four codebooks that nearly coincide."""
    return swept() + [measured_row(name, 0.015) for name in ("nf4-g64", "nf4-g64-dq", "fp4_e2m1-g64", "fp4_bnb-g64")]


FORMATS = [measured_row("none")] + [
    measured_row(f"{method}:{grid}", 0.01 + 0.002 * i, 0.001)
    for i, grid in enumerate(("int4-g64", "int4-g128", "int4-g128-dq", "int4-g64-dq", "nf4-g64", "nf4-g128"))
    for method in ("rtn", "gptq")
]


def bars_of(axes) -> dict[str, list]:
    """Every point and its bar by colour and marker: (marker, colour) -> [(x, y, low, high)]."""
    found: dict[tuple, list] = {}
    for bars in axes.containers:
        mark = bars.lines[0]
        for (x, y), segment in zip(mark.get_xydata(), bars.lines[2][0].get_segments(), strict=True):
            found.setdefault((mark.get_marker(), mark.get_color()), []).append((x, y, *segment[:, 1]))
    return found


def boxes(figure) -> dict[str, object]:
    """Where every text of the page is; those of axes' numbers are told apart by their axes."""
    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()
    texts = [(f"{i} {text.get_text()} {j}", text) for i, axes in enumerate(figure.axes)
             for j, text in enumerate([*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts, axes.xaxis.label,
                                       axes.yaxis.label, axes._left_title])]  # fmt: skip
    texts += [(text.get_text(), text) for legend in figure.legends for text in legend.get_texts()]
    texts += [(text.get_text(), text) for text in (figure._supxlabel,) if text]
    return {name: text.get_window_extent(renderer) for name, text in texts if text.get_text() and text.get_visible()}


def assert_legible(figure):
    """All is on the page, nothing overlaps, no letter is small."""
    found = boxes(figure)
    page = figure.bbox
    outside = [name for name, box in found.items() if min(box.x0, box.y0, page.x1 - box.x1, page.y1 - box.y1) < -1]
    assert outside == []
    for (name, box), (other, second) in itertools.combinations(found.items(), 2):
        shared = [
            min(getattr(box, f"{axis}1"), getattr(second, f"{axis}1"))
            - max(getattr(box, f"{axis}0"), getattr(second, f"{axis}0"))
            for axis in "xy"
        ]
        assert min(shared) < 1, f"{name} overlaps {other}"
    written = [text for axes in figure.axes for text in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels())]
    assert min(text.get_fontsize() for text in written) >= LABEL_SIZE == 7


def test_a_line_per_method_and_options():
    rows = [
        measured_row(name, 0.1) for name in ("none", "rtn:int4-g128", "rtn:int3-g128", "rtn:int3-g64", "rtn(clip=mse):int3-g64")
    ]
    rows += [measured_row("gptq:int3-g64"), measured_row("rtn:int3-g64-sym", 0.1)]
    rows.append(measured_row("gptq+descend:int3-g64", 0.1) | {"method": "gptq+descend", "refining": ["descend(sweeps=4)"]})
    found = {line.label: (line.method, line.variant, len(line.rows)) for line in group_series(rows)}
    assert found == {
        "rtn": ("rtn", 0, 3),
        "rtn sym": ("rtn", 1, 1),
        "rtn(clip=mse)": ("rtn", 2, 1),
        "gptq": ("gptq", 0, 1),
        "gptq+descend": ("gptq", 1, 1),
    }


def test_codebooks_are_named_by_their_grid():
    names = (
        "nf4-g64",
        "nf4-g128",
        "nf4-g64-dq",
        "gptq:nf4-g64",
        "rtn(clip=mse):nf4-g64",
        "bf16",
        "gptq:int4-g64",
        "gptq:mxfp4",
    )
    lines = group_series([measured_row(name, 0.1) for name in names])
    assert sorted(line.label for line in lines) == [
        "bf16",
        "gptq",
        "gptq mxfp4",
        "gptq nf4",
        "nf4",
        "nf4 dq",
        "rtn(clip=mse) nf4",
    ]
    assert [row["format"] for row in lines[[line.label for line in lines].index("nf4")].rows] == ["nf4-g128", "nf4-g64"]
    assert [by_grid(measured_row(name)) for name in ("rtn:int4-g64-sym-max-dq", "gptq:nf4-g64-dq")] == ["int4-sym-max", "nf4"]


def test_rules_and_formats_of_inputs_make_lines_of_their_own():
    rules = ["mlp/down=rtn:int8-g128"]
    row = measured_row("rtn:int4-g128", 0.1)
    placed = row | {"recipe": "; ".join([row["recipe"], *rules]), "rules": rules}
    others = [measured_row(name, 0.1) for name in ("rtn:int4-g16/int4-token", "rtn:nf4-g64/int8-token", "gptq:int4-g16@block")]
    assert [line.label for line in group_series([row, placed, *others])] == [
        *("rtn", "rtn with mlp/down=rtn:int8-g128", "rtn/int4-token", "gptq@block", "nf4/int8-token"),
    ]


@pytest.mark.parametrize(
    ("rows", "titles", "lines"),
    [
        (swept(), [""], 5),
        (many_rows(), [""], 9),
        (swept(groups=("g32", "g64", "g128")), ["2 bits", "3 bits", "4 bits", "8 bits"], 5),
        (FORMATS, ["rtn", "gptq"], 2),
        (swept(bits=(4, 3)), [], 0),
        (sweep_rows(), [], 0),
        ([measured_row("none"), measured_row("bf16")], [], 0),
    ],
    ids=["widths", "codebooks", "groupings", "formats", "two-widths", "points", "cast"],
)
def test_panels(rows, titles, lines):
    panels = line_panels(rows)
    assert [title for title, _ in panels] == titles
    assert len({line.label for _, part in panels for line in part}) == lines
    drawn = [row["recipe"] for _, part in panels for line in part for row in line.rows]
    assert sorted(drawn) == sorted(row["recipe"] for row in rows[1:]) * bool(panels)  # each once


def test_a_method_looks_the_same_in_every_figure():
    assert len(set(METHOD_STYLES.values())) == len(METHOD_STYLES)
    assert method_style("gptq") == METHOD_STYLES["gptq"]
    assert method_style("somebody's") == ("#117733", ">")  # pinned: a hash must not change with the process


def test_variants_differ_in_shade_and_filling():
    looks = [look("gptq", variant) for variant in range(len(VARIANTS))]
    assert len({(each.colour, each.face) for each in looks}) == len(looks)
    assert {each.marker for each in looks} == {"s"} and looks[0].colour == METHOD_STYLES["gptq"][0].lower()


def test_unknown_transforms_keep_the_colour_and_change_the_marker():
    """Of awq+cut and cut the hash is the same colour and marker."""
    looks = [method_style(method) for method in ("cut", "awq+cut")]
    assert looks[0][0] == looks[1][0]
    assert looks[0][1] != looks[1][1]


@pytest.mark.parametrize("colour", ["#56B4E9", "#E69F00", "#000000"])
def test_text_is_legible_on_white(colour):
    channels = np.array([int(ink(colour)[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    luminance = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    assert 1.05 / (luminance + 0.05) >= 4.1  # contrast ratio of WCAG 2; 4.5 is its grade AA


def test_points_are_the_rows_and_bars_their_intervals():
    figure = lines_figure(swept())
    found = [point for points in bars_of(figure.axes[0]).values() for point in points]
    assert len(found) == len(swept()) - 1
    for row in swept()[1:]:
        ends = [100 * math.expm1(row[f"nll_delta{end}"]) for end in ("", "_low", "_high")]
        bottom = figure.axes[0].get_ylim()[0] / 2
        expected = (row["bits_per_weight"], ends[0], max(ends[1], bottom), ends[2])
        assert any(np.allclose(point, expected) for point in found)


def test_shares_are_of_nearest_rounding_to_the_same_format():
    rows = swept(("rtn", "gptq"))
    assert [row.get("share_of") for row in with_share(rows)][1:3] == pytest.approx([None, 100 * math.expm1(0.02)])
    increase, share = lines_figure(rows).axes[:2]
    assert [axes.get_ylabel().replace("\n", " ") for axes in (increase, share)] == [VALUES["increase"], VALUES["share"]]
    gptq = bars_of(share)["s", look("gptq").colour]  # not at 8 bits, where nearest rounding's cost is not resolved
    assert [y for _, y, _, _ in gptq] == pytest.approx([math.expm1(0.45 * d) / math.expm1(d) for d in (1.4, 0.12, 0.02)])


def test_divergence_and_accuracy_take_the_place_of_shares():
    ends = {"accuracy_delta_low:piqa": -0.2, "accuracy_delta_high:piqa": 0.0, "accuracy:piqa": 0.5}
    rows = swept(("rtn", "gptq"), kl=0.1, kl_stderr=0.01, accuracy_mean_delta=-0.1, **ends)
    _, kl, accuracy = lines_figure(rows, "double").axes[:3]
    assert (kl.get_ylabel(), accuracy.get_ylabel()) == (VALUES["divergence"], VALUES["accuracy"])
    assert bars_of(accuracy)["o", look("rtn").colour][0][1:] == pytest.approx((-10, -20, 0))
    assert bars_of(kl)["o", look("rtn").colour][0][1:] == pytest.approx((0.1, 0.1 - 0.0196, 0.1 + 0.0196))


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (many_rows(), "single"),
        (swept(groups=("g32", "g128")), "single"),
        (FORMATS, "double"),
        (swept(("rtn", "gptq")), "double"),
        (swept(LONG), "single"),
    ],
    ids=["many", "groupings", "formats", "few", "long"],
)
def test_everything_is_legible_at_its_printed_size(rows, width):
    figure = lines_figure(rows, width)
    assert figure.get_size_inches()[0] == WIDTHS[width] and figure.get_figheight() < 4.5
    assert_legible(figure)
    named = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    named += [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sorted(set(named)) == sorted({line.label for _, part in line_panels(rows) for line in part})


@pytest.mark.parametrize(
    "changed",
    [
        {"nll_delta_low": None, "nll_delta_high": None},
        {"nll_delta": -0.001},
        infinite_row() | {"nll_delta_low": math.nan, "nll_delta_high": math.nan},
    ],
    ids=["no-interval", "better", "infinite"],
)
def test_odd_rows(changed):
    rows = swept()
    rows[4] = (
        rows[4] | changed | {key: rows[4][key] for key in ("recipe", "format", "method", "bits_per_weight", "fingerprint")}
    )
    figure = lines_figure(rows)
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    marks = {line.get_marker(): line for line in figure.axes[0].lines}
    bottom, top = figure.axes[0].get_ylim()
    if changed.get("nll_delta") == -0.001:
        assert list(marks["v"].get_ydata()) == [bottom]
    if "perplexity" in changed:
        assert list(marks["$\\infty$"].get_ydata()) == [top]


@pytest.mark.parametrize(
    ("values", "scale", "holds"),
    [
        ([(1, 0.9, 1.1), (100, 90, 110)], "log", (0.9, 110)),
        ([(1, 0.01, 1.1), (100, 90, 110)], "log", (0.5, 110)),  # a bar lengthens it downwards by half at most
        ([(1, 0.9, 1.1), (2, 1.9, 2.1)], "linear", (0.9, 2.1)),
        ([(1, -1, 3), (0.01, -1, 3), (5, 4, 6)], "linear", (-1, 6)),  # most are not told from zero
        ([(1, 0.9, 1.1), (0.001, -1, 1.2), (5, 4, 6)], "log", (0.9, 6)),  # one that is not does not crush the others
        ([(math.inf, math.nan, math.nan)], "linear", (0, 1)),
    ],
)
def test_scales(values, scale, holds):
    with new_page("single") as figure:
        axes = figure.subplots()
        scale_values(axes.yaxis, np.array(values, float))
        assert axes.get_yscale() == scale
        low, high = axes.get_ylim()
        assert low <= holds[0] and holds[1] <= high and (scale == "linear" or low > holds[0] / 2)


def test_tradeoff_plots_bytes_and_speed():
    speeds = {"decode_tokens_per_second:packed": 100.0, "decode_tokens_per_second:dense": 200.0, "speed_prompt_tokens": 8}
    rows = [row | speeds for row in swept(("rtn", "gptq"))]
    figure = tradeoff_figure(rows)
    size, speed = figure.axes[:2]
    assert {x for x, *_ in bars_of(speed)["o", look("rtn").colour]} == {100.0}
    assert sorted(x for x, *_ in bars_of(size)["o", look("rtn").colour]) == pytest.approx(
        sorted(row["size_bytes"] / 1e6 for row in rows if row["method"] == "rtn")
    )
    assert [list(line.get_xdata()) for line in speed.lines if line.get_linestyle() == "--"] == [[200.0, 200.0]]
    assert_legible(figure)


def test_figures_refuse_what_tables_refuse():
    with pytest.raises(QjaxError, match="convention"):
        lines_figure([*swept(), measured_row("rtn:int8-g128", convention="windows-1024")])
    with pytest.raises(QjaxError, match="needs rows"):
        lines_figure([])
    with pytest.raises(QjaxError, match="three widths"):
        lines_figure(sweep_rows())
    with pytest.raises(QjaxError, match="width 'wide'"):
        lines_figure(swept(), "wide")


WRITTEN = [*sweep_rows(), measured_row("none", corpus="text:a b.txt", corpus_fingerprint="other")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of two texts' reports."""
    return write_reports(tmp_path_factory.mktemp("written"), WRITTEN)


def test_reports_are_written_and_written_again_equal(written, tmp_path):
    again = write_reports(tmp_path, list(reversed(WRITTEN[:4])) + WRITTEN[4:])
    stems = ("toy-python-docs-windows-512", "toy-text-a-b.txt-windows-512")
    assert [path.name for path in written] == [
        *(f"{stem}.{suffix}" for stem in stems for suffix in ("md", "tex", "csv")),
        *(f"{stems[0]}-recipes.{suffix}" for suffix in ("png", "pdf", "caption.txt")),
    ]
    assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(path.name for path in written)
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]


def test_pdf_has_truetype_fonts_and_no_date(written):
    pdf = next(path for path in written if path.suffix == ".pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf


def test_png_is_sharp_enough_to_print(written):
    png = next(path for path in written if path.suffix == ".png").read_bytes()
    assert int.from_bytes(png[16:20]) >= 200 * WIDTHS["single"]


def test_captions_say_what_titles_do_not():
    """Which model and text, how much of it, what bars are."""
    rows = [row | {"window_documents": list(range(8)), "window_nll": [1.0] * 8, "window_tokens": [9] * 8} for row in swept()]
    (name, text), *_ = captions(rows)
    assert name == "toy-python-docs-windows-512"
    for said in (
        "toy on python-docs (windows-512), 8 windows, 4,088 tokens.",
        "share of nearest rounding's",
        "95 % intervals of the difference",
        "8 documents",
    ):
        assert said in text
    (_, placed), *_ = captions([*sweep_rows(), measured_row("gptq:int4-g128", 0.1, model="evil\x1b[2J")])
    assert placed.startswith("Recipes by the increase of perplexity") and "\x1b" not in placed
    assert "the left one has doubly quantized scales" in captions(FORMATS)[0][1] and "doubly" not in text


def test_long_names_stand_beside_short_ones_in_the_legend():
    """Where as they come they would be in one column."""
    (legend,) = lines_figure(swept(LONG)).legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert legend._ncols == 2 and shown[0] == "gptq(clip=mse,damp=0.02)+descend" and shown[-1] == "rtn"


def test_equal_names_are_told_apart():
    rows = [measured_row("none"), measured_row("none", fingerprint="retrained")]
    names = report_names([[row] for row in rows])
    assert len(set(names)) == 2
    assert all(name.startswith("toy-python-docs-windows-512-") for name in names)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QjaxError, match="cannot write"):
        write_reports(tmp_path / "file", sweep_rows())


def test_pyplot_is_left_alone():
    import sys

    lines_figure(swept(("rtn", "gptq")))
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((11, 52), [15, 20, 30, 50]),
        ((1, 1000), [1, 3, 10, 30, 100, 300, 1000]),
        ((0.02, 3e4), [0.01, 0.1, 1, 10, 100, 1000, 10000]),
        ((3.3, 3.5), [3.3, 3.35, 3.4, 3.45, 3.5]),
    ],
)
def test_ticks_are_round_and_written_in_full(values, ticks):
    with new_page("single") as figure:
        axis = figure.subplots().yaxis
        scale_values(axis, np.repeat(np.array(values, float)[:, None], 3, axis=1))
        low, high = axis.get_view_interval()
        assert low < values[0] and values[1] < high
        assert list(axis.get_ticklocs()) == pytest.approx(ticks)
        assert [text.get_text() for text in axis.get_ticklabels()] == [f"{tick:g}" for tick in ticks]


def test_shares_are_of_nearest_rounding_with_the_same_inputs():
    rows = [
        measured_row("rtn:int4-g128", 0.1),
        measured_row("rtn:int4-g128/int8-token", 0.2),
        measured_row("gptq:int4-g128", 0.05),
        measured_row("gptq:int4-g128/int8-token", 0.1),
        measured_row("gptq:int4-g128/int4-token", 0.3),
    ]
    shares = [row.get("share_of") for row in with_share([row | {"nll_delta_stderr": 0.001} for row in rows])]
    assert shares == pytest.approx([*2 * list(100 * np.expm1([0.1, 0.2])), None])
