"""Figures: lines and names, every odd row, the same bytes again, and names that do not overlap."""

import io
import itertools
import math

import numpy as np
import pytest
from matplotlib.text import Text

from qjax.errors import QjaxError
from qjax.report.drawing import METHOD_STYLES, SMALL_SIZE, WIDTHS, ink, method_style, new_figure, scale_values
from qjax.report.figures import BELOW, perplexity_figure, with_share
from qjax.report.reports import report_names, write_reports
from qjax.report.series import group_series
from tests.report_rows import infinite_row, measured_row, sweep_rows

DAMAGE = {8: 0.0005, 4: 0.02, 3: 0.12, 2: 1.4}
METHODS = {"rtn": 1.0, "rtn(clip=mse)": 0.8, "gptq": 0.45, "awq": 0.55, "awq+gptq": 0.35}


def many_rows() -> list[dict[str, object]]:
    """Five methods at four widths, and four codebooks that nearly coincide."""
    rows = [measured_row("none")]
    rows += [
        measured_row(f"{method}:int{bits}-g128", factor * damage)
        for (method, factor), (bits, damage) in itertools.product(METHODS.items(), DAMAGE.items())
    ]
    return rows + [measured_row(name, 0.015) for name in ("nf4-g64", "nf4-g64-dq", "fp4_e2m1-g64", "fp4_bnb-g64")]


def extent(text):
    """The box of a name, without the line that leads to it."""
    text.get_window_extent()  # puts it where it belongs
    return Text.get_window_extent(text)


def texts(figure) -> dict[str, object]:
    return {text.get_text(): text for text in figure.axes[0].texts}


def test_a_line_per_method_options_and_grouping():
    rows = [
        measured_row(name, 0.1)
        for name in ("none", "rtn:int4-g128", "rtn:int3-g128", "rtn:int3-g64", "rtn(clip=mse):int3-g64", "rtn:int3-g64-sym")
    ]
    found = {line.label: (line.method, line.variant, len(line.rows)) for line in group_series(rows)}
    assert found == {
        "rtn g128": ("rtn", 0, 2),
        "rtn g64": ("rtn", 1, 1),
        "rtn g64-sym": ("rtn", 2, 1),
        "rtn(clip=mse) g64": ("rtn", 3, 1),
    }


def test_codebooks_are_named_by_their_grid():
    names = ("nf4-g64", "nf4-g128", "nf4-g64-dq", "gptq:nf4-g64", "rtn(clip=mse):nf4-g64", "bf16", "gptq:int4-g64")
    lines = group_series([measured_row(name, 0.1) for name in names])
    assert sorted(line.label for line in lines) == ["bf16", "gptq", "gptq nf4", "nf4", "nf4 dq", "rtn(clip=mse) nf4"]
    assert [row["format"] for row in lines[[line.label for line in lines].index("nf4")].rows] == ["nf4-g128", "nf4-g64"]


def test_rules_make_a_line_of_their_own():
    rules = ["mlp/down=rtn:int8-g128"]
    row = measured_row("rtn:int4-g128", 0.1)
    placed = row | {"recipe": "; ".join([row["recipe"], *rules]), "rules": rules}
    assert [line.label for line in group_series([row, placed])] == ["rtn", "rtn with mlp/down=rtn:int8-g128"]


def test_formats_of_inputs_make_a_line_of_their_own():
    """Not seeds of the lines without, whatever names the weights' format."""
    names = ("rtn:int4-g16", "rtn:int4-g16/int4-token", "nf4-g64", "rtn:nf4-g64/int8-token", "gptq:int4-g16/int8-token@block")
    rows = [measured_row("none"), *(measured_row(name, 0.1 * i) for i, name in enumerate(names, 1))]
    lines = {line.label: [row["recipe"] for row in line.rows] for line in group_series(rows)}
    labels = ("rtn", "rtn/int4-token", "nf4", "nf4/int8-token", "gptq/int8-token@block")
    assert lines == {label: [name] for label, name in zip(labels, names, strict=True)}
    points = [tuple(xy) for line in perplexity_figure(rows).axes[0].lines for xy in line.get_xydata()]
    assert {round(y, 4) for _, y in points} >= {round(10 * math.exp(0.1 * i), 4) for i in (1, 2)}


def test_formats_whose_names_say_their_scales_keep_them():
    names = ("gptq:mxfp4", "gptq:nvfp4", "gptq:fp4_e2m1-g64", "mxfp4", "nvfp4")
    lines = group_series([measured_row(name, 0.1) for name in names])
    assert sorted(line.label for line in lines) == ["gptq fp4_e2m1", "gptq mxfp4", "gptq nvfp4", "mxfp4", "nvfp4"]


def test_another_baseline_and_the_model_as_it_is_have_their_names():
    of_other = {"baseline": "other", "baseline_fingerprint": "fedcba9876543210"}
    other = measured_row("none", model="other", fingerprint="fedcba9876543210", **of_other)
    rows = [other, measured_row("none", 0.1, **of_other), measured_row("rtn:int4-g128", 0.2, **of_other)]
    assert set(texts(perplexity_figure(rows))) == {"other 10.00", "toy", "rtn"}


def test_a_method_looks_the_same_in_every_figure():
    assert len(set(METHOD_STYLES.values())) == len(METHOD_STYLES)
    assert method_style("gptq") == METHOD_STYLES["gptq"]
    assert method_style("somebody's") == ("#117733", ">")  # pinned: a hash must not change with the process


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


@pytest.mark.parametrize("value", ["perplexity", "increase"])
@pytest.mark.parametrize("width", ["single", "double"])
def test_points_are_the_rows(value, width):
    figure = perplexity_figure(sweep_rows(), value=value, width=width)
    assert figure.get_size_inches()[0] == WIDTHS[width]
    points = {tuple(np.round(xy, 6)) for line in figure.axes[0].lines for xy in line.get_xydata()}
    for row in sweep_rows()[2:]:
        y = row["perplexity"] if value == "perplexity" else 100 * (row["perplexity_ratio"] - 1)
        assert (round(row["bits_per_weight"], 6), round(y, 6)) in points
    assert {"rtn", "rtn(clip=mse)", "nf4"} <= set(texts(figure))
    assert ("unquantized 10.00" in texts(figure)) == (value == "perplexity")


def test_error_bars_are_one_paired_standard_error():
    rows = [measured_row("none"), measured_row("rtn:int3-g128", 0.1, 0.02, perplexity_stderr=99.0)]
    (bars,) = perplexity_figure(rows).axes[0].containers
    (segment,) = bars.lines[2][0].get_segments()
    perplexity = 10 * math.exp(0.1)
    np.testing.assert_allclose(segment[:, 1], [perplexity * 0.98, perplexity * 1.02])


def test_axis_is_logarithmic_where_the_range_is_large():
    assert perplexity_figure(sweep_rows()).axes[0].get_yscale() == "log"
    assert perplexity_figure(sweep_rows()[1:]).axes[0].get_yscale() == "linear"
    assert perplexity_figure([*sweep_rows(), measured_row("bf16")]).axes[0].get_xscale() == "log"


@pytest.mark.parametrize("value", ["perplexity", "increase"])
@pytest.mark.parametrize("width", ["single", "double"])
def test_names_overlap_neither_each_other_nor_the_border(value, width):
    figure = perplexity_figure(many_rows(), value=value, width=width)
    boxes = {name: extent(text) for name, text in texts(figure).items()}
    assert len(boxes) == 9 + (value == "perplexity")
    for (name, box), (other, second) in itertools.combinations(boxes.items(), 2):
        width_shared = min(box.x1, second.x1) - max(box.x0, second.x0)
        height_shared = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert min(width_shared, height_shared) < 0.5, f"{name} overlaps {other}"
    frame = figure.bbox
    assert all(
        frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes.values()
    )


def test_axis_labels_are_inside_the_page():
    figure = perplexity_figure([measured_row("none"), measured_row("rtn:int8-g128", 1e-5)])  # ticks of many digits
    box = figure.axes[0].get_tightbbox(figure.canvas.get_renderer())
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("value", ["perplexity", "increase"])
@pytest.mark.parametrize(
    "rows",
    [
        [measured_row("none")],
        [measured_row("rtn:int4-g128", 0.1)],
        [measured_row("none"), measured_row("rtn:int4-g128", 0.1, math.nan)],
        [measured_row("none"), measured_row("rtn:int4-g128", 0.1, nll_delta_stderr=None)],
        [infinite_row()],
        [measured_row("none"), infinite_row(), measured_row("rtn:int3-g128", 0.1)],
        [measured_row("none"), measured_row("rtn:int8-g128", -0.001), measured_row("rtn:int4-g128", 0.1)],
        [measured_row("gptq:int3-g128", 0.1 + 0.01 * seed, seed=seed) for seed in range(3)],
        [measured_row("none", model="somebody/a-model-with-a-very-long-name-" * 3)],
        [measured_row("none"), measured_row("rtn:int1-g64-sym", 11.0), measured_row("rtn:int8-g128", 0.0)],
    ],
    ids=["baseline", "one", "no-error", "null-error", "only-infinite", "infinite", "better", "seeds", "long-name", "huge"],
)
def test_odd_rows(rows, value):
    figure = perplexity_figure(rows, value=value)
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    named = {line.label for line in group_series(rows)}
    assert named <= set(texts(figure))


def test_what_the_axis_cannot_show_is_at_its_end():
    axes = perplexity_figure([measured_row("none"), infinite_row(), measured_row("rtn:int3-g128", 0.1)]).axes[0]
    (mark,) = [line for line in axes.lines if line.get_marker() == r"$\infty$"]
    assert list(mark.get_ydata()) == [axes.get_ylim()[1]]
    better = [measured_row("none"), measured_row("rtn:int8-g128", -0.001), measured_row("rtn:int4-g128", 0.1)]
    axes = perplexity_figure(better, value="increase").axes[0]
    (mark,) = [line for line in axes.lines if line.get_marker() == "v"]
    assert list(mark.get_ydata()) == [axes.get_ylim()[0]]


@pytest.mark.parametrize(
    ("value", "worse", "noted"),
    [("increase", -0.001, True), ("increase", 0.01, True), ("increase", 0.1, False), ("perplexity", -0.001, False)],
    ids=["point", "bar", "none", "perplexity"],
)
def test_a_note_explains_marks_at_the_lower_edge(value, worse, noted):
    """Of a decrease, and of a bar that reaches 0, on a logarithmic axis."""
    figure = perplexity_figure([measured_row("none"), measured_row("rtn:int4-g128", worse, 0.01)], value=value)
    assert (BELOW in [text.get_text() for text in figure.texts]) == noted
    assert ("v" in [line.get_marker() for line in figure.axes[0].lines]) == noted
    note = figure.texts[-1].get_window_extent(figure.canvas.get_renderer())
    assert not note.overlaps(figure.axes[0].xaxis.label.get_window_extent())


@pytest.mark.parametrize(
    ("rows", "value"),
    [
        ([measured_row("rtn:int4-g128", 0.1, 0.03), measured_row("gptq:int4-g128", 0.03, 0.015)], "increase"),
        ([measured_row("rtn:int4-g128", 0.1, 0.08), measured_row("gptq:int4-g128", 0.09, 0.3)], "perplexity"),
        ([measured_row("rtn:int4-g128", accuracy_mean=0.5, accuracy_mean_delta_stderr=0.2)], "accuracy"),
    ],
    ids=["logarithmic", "linear", "few-questions"],
)
def test_limits_include_error_bars(rows, value):
    axes = perplexity_figure([*rows, measured_row("none", accuracy_mean=0.6)], value=value).axes[0]
    ends = np.concatenate([bars.lines[2][0].get_segments()[0][:, 1] for bars in axes.containers])
    low, high = axes.get_ylim()
    assert low < ends.min()
    assert ends.max() < high


@pytest.mark.parametrize("model", ["m" * 55, "a model of many words " * 6, "somebody/a-model-with-a-very-long-name-" * 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_titles_fit(model, width):
    figure = perplexity_figure([row | {"model": model, "baseline": model} for row in sweep_rows()], width=width)
    title = figure.texts[0]
    box = title.get_window_extent(figure.canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
    assert box.y0 >= figure.axes[0].get_window_extent().y1
    assert title.get_fontsize() >= SMALL_SIZE
    assert "".join(title.get_text().split()).startswith("".join(model.split()))


def test_names_moved_from_their_points_have_leaders():
    """Four lines begin at one point: a line from there to each name but one that is beside it."""
    rows = [
        measured_row(f"{method}:int{bits}-g128", damage)
        for method, (bits, damage) in itertools.product(("rtn", "gptq", "awq", "awq+gptq"), DAMAGE.items())
    ]
    figure = perplexity_figure([measured_row("none"), *rows], value="increase")
    moved = [text for text in figure.axes[0].texts if abs(text.get_position()[1]) > 2]
    assert len(moved) >= 3
    assert all(text.arrow_patch for text in moved)


def test_long_names_take_both_columns():
    rows = [measured_row(f"awq+gptq(clip=mse,refine=4):int{bits}-g128", damage) for bits, damage in DAMAGE.items()]
    rows += [measured_row(f"rtn:int{bits}-g128", damage) for bits, damage in DAMAGE.items()]
    assert perplexity_figure(rows).get_size_inches()[0] == WIDTHS["double"]


def test_the_unquantized_line_strikes_no_name():
    figure = perplexity_figure(many_rows())
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    (dashes,) = [line for line in axes.lines if line.get_zorder() == 1]
    line = dashes.get_window_extent(renderer)
    struck = [name for name, text in texts(figure).items() if extent(text).overlaps(line)]
    assert struck == []


def test_figures_refuse_what_tables_refuse():
    with pytest.raises(QjaxError, match="convention"):
        perplexity_figure([*sweep_rows(), measured_row("rtn:int8-g128", convention="windows-1024")])
    with pytest.raises(QjaxError, match="needs rows"):
        perplexity_figure([])
    with pytest.raises(QjaxError, match="allowed are perplexity and increase"):
        perplexity_figure(sweep_rows(), value="nll")


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
        *(f"{stems[0]}{kind}.{suffix}" for kind in ("", "-increase") for suffix in ("png", "pdf")),
        *(f"{stems[1]}.{suffix}" for suffix in ("png", "pdf")),
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

    perplexity_figure(sweep_rows())
    assert "matplotlib.pyplot" not in sys.modules


def scaled(values, *, direction="y", **options):
    """The limits of an axis of a single column and the numbers at its ticks."""
    with new_figure("single") as (_, (axes,)):
        axis = axes.yaxis if direction == "y" else axes.xaxis
        scale_values(axis, np.array(values), np.zeros(len(values)), **options)
        return tuple(axis.get_view_interval()), list(axis.get_ticklocs()), [text.get_text() for text in axis.get_ticklabels()]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((11, 52), [10, 15, 20, 30, 50]),
        ((1, 1000), [1, 3, 10, 30, 100, 300, 1000]),
        ((0.02, 3e4), [0.01, 0.1, 1, 10, 100, 1000, 10000]),
        ((3.3, 3.5), [3.3, 3.35, 3.4, 3.45, 3.5]),
    ],
)
def test_ticks_are_round_and_written_in_full(values, ticks):
    (low, high), places, texts = scaled(values)
    assert low < values[0] and values[1] < high
    assert places == pytest.approx(ticks) and texts == [f"{tick:g}" for tick in ticks]


def test_many_decades_get_few_ticks_all_alike():
    _, places, texts = scaled((1e-3, 1e20), always_log=True)
    assert 4 <= len(places) <= 12
    assert all(text.startswith("$\\mathdefault{10^{") for text in texts)


def test_what_is_too_small_or_not_finite_does_not_stretch_an_axis():
    assert scaled((-1, 0, 1e-9, 1, 10, math.inf, math.nan), smallest=1e-3)[0] == scaled((1, 10))[0]
    assert scaled((-1, 0), smallest=1e-3, always_log=True) == ((0, 1), [], [])


def test_shares_are_of_nearest_rounding_in_the_same_format():
    """Not of formats in which nearest rounding costs next to nothing, nor of codebooks, which have no plain rounding beside."""
    gptq = {"options": "gptq"}
    rows = [
        measured_row("none"),
        measured_row("rtn:int2-g128", 1.0, 0.05, options="rtn"),
        measured_row("rtn:int8-g128", 0.001, 0.0005, options="rtn"),
        measured_row("gptq:int2-g128", 0.5, 0.02, **gptq),
        measured_row("gptq:int8-g128", 0.0005, 0.0005, **gptq),
        measured_row("gptq:int3-g128", 0.1, 0.01, **gptq),
        measured_row("nf4-g64", 0.05, 0.002, options="rtn"),
    ]
    shares = {row["recipe"]: (row["share"], row["share_stderr"]) for row in with_share(rows)}
    assert list(shares) == ["rtn:int2-g128", "gptq:int2-g128"]
    whole = np.expm1(1.0)
    np.testing.assert_allclose(shares["rtn:int2-g128"], (1, 0.05 * np.exp(1.0) / whole))
    np.testing.assert_allclose(shares["gptq:int2-g128"], (np.expm1(0.5) / whole, 0.02 * np.exp(0.5) / whole))
    axes = perplexity_figure(rows, value="share").axes[0]
    assert {text.get_text() for text in axes.texts} >= {"rtn", "gptq"}
    assert "share" in axes.get_ylabel()


def test_shares_are_of_nearest_rounding_with_the_same_inputs():
    rows = [
        measured_row("rtn:int4-g128", 0.1),
        measured_row("rtn:int4-g128/int8-token", 0.2),
        measured_row("gptq:int4-g128", 0.05),
        measured_row("gptq:int4-g128/int8-token", 0.1),
        measured_row("gptq:int4-g128/int4-token", 0.3),
    ]
    shares = {row["recipe"]: row["share"] for row in with_share([row | {"nll_delta_stderr": 0.001} for row in rows])}
    values = (1, 1, *np.expm1([0.05, 0.1]) / np.expm1([0.1, 0.2]))
    expected = dict(zip((row["recipe"] for row in rows[:4]), values, strict=True))
    assert shares == pytest.approx(expected)
