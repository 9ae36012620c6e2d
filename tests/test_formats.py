"""qjax.formats: the grammar both ways, exact sizes, and the values and ties of every codebook."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.codebooks import NF4_VALUES, codebooks
from qjax.errors import QjaxError
from qjax.format_table import EXAMPLES, format_table
from qjax.formats import (
    ALIASES,
    BOUNDS,
    FLOATS,
    GRIDS,
    INTEGERS,
    Format,
    parse_format,
)
from qjax.scales import SCALES, dynamic_map
from qjax.zeros import ZEROS

FLOAT8 = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}


@st.composite
def formats(draw) -> Format:
    """Any format."""
    name = draw(st.sampled_from(list(GRIDS)))
    if name in FLOATS:
        return Format(name)
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "flat"]))
    group = draw(st.integers(1, 10**6)) if granularity in ("group", "flat") else 0
    symmetric = name in INTEGERS and draw(st.booleans())
    bound = draw(st.sampled_from(BOUNDS)) if symmetric else ""
    zeros = draw(st.sampled_from([*ZEROS])) if name in INTEGERS and not symmetric else "none"
    scales = [scales for scales, codec in SCALES.items() if codec.signed or bound != "full"]
    return Format(name, granularity, group, bound, draw(st.sampled_from(scales)), zeros)


@given(formats())
@settings(deadline=None, max_examples=300)
def test_every_format_prints_and_parses_back(fmt):
    assert parse_format(str(fmt)) == fmt
    assert str(parse_format(str(fmt))) == str(fmt)


@given(formats(), st.randoms())
@settings(deadline=None, max_examples=100)
def test_parts_after_the_granularity_come_in_any_order(fmt, random):
    name = str(fmt)
    head, *parts = ALIASES.get(name, name).split("-")
    tail = parts[1:]
    random.shuffle(tail)
    assert parse_format("-".join([head, *parts[:1], *tail])) == fmt


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("nf4", "nf4-g64"),
        ("nf4-dq", "nf4-g64-dq"),
        ("fp4", "fp4_e2m1-g64"),
        ("fp4-b64", "fp4_e2m1-b64"),
        ("fp4_bnb", "fp4_bnb-g64"),
        (" int4-g128 ", "int4-g128"),
        ("int4-g128-fp16", "int4-g128"),
        ("int4-g128-sym-edge", "int4-g128-sym"),
        ("int4-g128-bf16-max-sym", "int4-g128-sym-max-bf16"),
        ("nf4-g64-fp32", "nf4-g64"),
        ("fp8_e4m3-tensor", "fp8_e4m3-tensor"),
        ("mxfp8", "mxfp8_e4m3"),
        ("fp4-g32-e8m0", "mxfp4"),
        ("fp4_e2m1-g32-e8m0_even", "mxfp4_even"),
        ("fp4-g64-e8m0", "fp4_e2m1-g64-e8m0"),
        ("fp4-g16-e4m3", "nvfp4"),
        ("int2-g32-full-sym", "int2-g32-sym-full"),
        ("int4-g64-fp32-z16", "int4-g64-z16-fp32"),
    ],
)
def test_short_forms(text, canonical):
    assert str(parse_format(text)) == canonical


def test_a_format_parses_to_itself():
    fmt = parse_format("int3-g128")
    assert parse_format(fmt) is fmt


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("int9-g128", ["unknown grid 'int9'", "did you mean", "int8", "nf4", "fp8_e5m2", "bf16"]),
        ("", ["unknown grid ''", "int1"]),
        ("int4-g", ["after 'int4'", "'g'"]),
        ("int4-foo", ["after 'int4'", "'foo'", "tensor, channel, gN", "bN"]),
        ("int4-g0", ["'g0'", "at least 1"]),
        ("int4-g128-foo", ["unknown part 'foo'", "sym, sym-max, sym-edge, sym-full, z16, z32, m16, k4m, k6m, fp32", "dq"]),
        ("nf4-g64-sym", ["unknown part 'sym' for nf4", "gN or bN: fp32, fp16, bf16, e8m0", "e4m3, dq"]),
        ("nf4-64-foo", ["after 'nf4'", "'64'", "gN"]),
        ("int4-g128-max", ["'max'", "goes with sym"]),
        ("int4-g128-sym-sym", ["'sym'", "give one"]),
        ("int4-g128-sym-max-edge", ["'edge'", "give one"]),
        ("int4-g128-fp16-bf16", ["'bf16'", "give one"]),
        ("nf4-g64-dq-fp16", ["'fp16' comes after 'dq'", "give one"]),
        ("mxfp4-g64", ["unknown part 'g64' for fp4_e2m1"]),
        ("mxfp4-fp32", ["'fp32' comes after 'e8m0'"]),
        ("nf4-g64-z16", ["unknown part 'z16' for nf4"]),
        ("int4-g64-sym-z16", ["'z16'", "sym has none"]),
        ("int2-g32-sym-full-e8m0", ["may be negative", "e8m0 cannot"]),
        ("bf16-g64", ["bf16 takes no further parts", "'g64'"]),
    ],
)
def test_errors_name_the_part_and_list_what_is_allowed(text, parts):
    with pytest.raises(QjaxError) as error:
        parse_format(text)
    message = str(error.value)
    assert message.startswith(f"format {text!r}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "bits"),
    [  # of a 4096 x 4096 weight
        ("fp32", 32),
        ("bf16", 16),
        ("fp16", 16),
        ("int8-tensor", 8 + (16 + 8) / 4096**2),
        ("int8-channel", 8 + (16 + 8) / 4096),
        ("int8-channel-sym-max", 8 + 16 / 4096),
        ("int4-g128-sym", 4.125),
        ("int4-g128", 4.15625),
        ("int4-g64-sym", 4.25),
        ("int4-g64", 4.3125),
        ("int4-g32-sym", 4.5),
        ("int4-g128-sym-fp32", 4.25),
        ("int3-g128-sym", 3.125),
        ("int3-g128", 3.1484375),
        ("int2-g64-sym", 2.25),
        ("int2-g64", 2.28125),
        ("int1-g64-sym", 1.25),
        ("int5-g128-sym-bf16", 5.125),
        ("nf4-g64", 4.5),
        ("nf4-b64", 4.5),
        ("nf4-g64-dq", 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2),
        ("fp8_e4m3-channel", 8 + 32 / 4096),
        ("mxfp4", 4.25),
        ("mxfp8_e5m2_even", 8.25),
        ("nvfp4", 4.5 + 32 / 4096**2),
        ("int2-g32-sym-full", 2.5),
        ("int4-g64-z16", 4.5),
        ("int4-g32-m16", 5.0),
        ("int2-g16-k4m-k4", 2.625),
        ("int3-g16-sym-full-k6s", 3.4375),
        ("int4-g32-k6m-k6", 4.5),
        ("int5-g32-k6m-k6", 5.5),
        ("int6-g16-sym-full-k8s", 6.5625),
        ("iq4_nl", 5.0),
        ("iq4_nl-g32-fp16", 4.5),
        ("int3-g64-z32-fp32", 4),
    ],
)
def test_bits_per_weight(text, bits):
    assert parse_format(text).bits_per_weight(4096, 4096) == bits


@pytest.mark.parametrize(
    ("text", "shape", "size"),
    [
        ("int4-g128", (100, 7), 50 * 7 + 7 * 2 + 4),  # one short group; 7 zero points in 4 bytes
        ("int3-g64", (65, 3), 27 * 3 + 2 * 3 * 2 + 2 * 3),  # 9 units of 8 codes in 3 bytes; 3 zero points in one unit
        ("nf4-b64", (65, 3), 33 * 3 + 4 * 4),  # 195 weights are 4 blocks
        ("nf4-b64-dq", (65, 3), 33 * 3 + 4 + 4 + 4),
        ("int4-b64", (65, 3), 33 * 3 + 4 * 2 + 2),  # 4 zero points in a row
        ("int8-tensor", (3, 5), 15 + 2 + 1),
        ("mxfp4", (65, 3), 33 * 3 + 3 * 3),
        ("nvfp4", (65, 3), 33 * 3 + 5 * 3 + 4),
        ("int4-g64-z16", (65, 3), 33 * 3 + 2 * 3 * (2 + 2)),
        ("int4-b64-z16", (65, 3), 33 * 3 + 4 * (2 + 2)),
        ("int4-g32-k6m-k6", (65, 3), 33 * 3 + 2 * (9 + 2 * 2)),  # 9 codes of 6 bits in 3 units, of 2 super-blocks
        ("int1-g64-sym", (1, 1), 1 + 2),
        ("bf16", (3, 5), 30),
    ],
)
def test_bytes_of_odd_shapes(text, shape, size):
    assert parse_format(text).nbytes(*shape) == size
    assert parse_format(text).bits_per_weight(*shape) == 8 * size / (shape[0] * shape[1])


def test_the_table_lists_every_example():
    rows = format_table()
    assert [row["format"] for row in rows] == [name for name, _ in EXAMPLES]
    assert [str(parse_format(row["format"])) for row in rows] == [row["format"] for row in rows], "names are canonical"
    assert {parse_format(row["format"]).grid for row in rows} == set(GRIDS) - {"int7"}, "every grid has an example, int7 aside"
    for row in rows:
        assert row["ratio_to_fp16"] * row["bits_per_weight"] == pytest.approx(16)


@pytest.mark.parametrize("name", codebooks())
def test_codebooks_are_sorted_symmetric_or_documented(name):
    book = codebooks()[name]
    values = np.array(book.values)
    assert np.all(np.diff(values) > 0)
    if name == "iq4_nl":  # no 0, and the positive end is nearer
        assert (book.bound, values.max(), values.min()) == (113, 113, -127)
    else:
        assert 0.0 in book.values
        assert book.bound == values.max() == -values.min()
    assert len(book.thresholds) == len(values) - 1
    assert all(low < cut < high for low, cut, high in zip(values[:-1], book.thresholds, values[1:], strict=True))
    # Every constant is a float32, so that comparing in float32 compares with the constant itself.
    np.testing.assert_array_equal(np.float32(book.thresholds), book.thresholds)
    np.testing.assert_array_equal(np.float32(values), values)


def test_nf4_values_are_normal_quantiles():
    """QLoRA, appendix E: 8 positive and 7 negative quantiles with equal probabilities between them, and zero."""
    from statistics import NormalDist

    largest = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(largest, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(largest, 0.5, 8)[:-1]]
    expected = np.sort([*negative, 0, *positive]) / quantile(largest)
    np.testing.assert_allclose(NF4_VALUES, expected, atol=1e-6)


def codes_of(name: str, values) -> np.ndarray:
    """Codes by definition: how many thresholds are strictly below."""
    return np.array([sum(value > cut for cut in codebooks()[name].thresholds) for value in np.float32(values)])


def test_nf4_thresholds_are_those_of_bitsandbytes():
    """They are the middles in float32; its CUDA code spells them out."""
    expected = (
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    )  # fmt: skip
    np.testing.assert_array_equal(codebooks()["nf4"].thresholds, np.float32(expected))


def test_fp4_bnb_is_bitsandbytes_table():
    book = codebooks()["fp4_bnb"]
    magnitudes = [0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1]
    np.testing.assert_allclose(book.values[7:], magnitudes, rtol=1e-7)
    cuts = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    np.testing.assert_allclose(book.thresholds[7:], cuts, rtol=2e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4_bnb"])
def test_ties_of_bitsandbytes_codebooks_go_to_the_smaller_value(name):
    cuts = codebooks()[name].thresholds
    np.testing.assert_array_equal(codes_of(name, cuts), np.arange(len(cuts)))
    np.testing.assert_array_equal(codes_of(name, np.nextafter(np.float32(cuts), np.float32(2))), np.arange(len(cuts)) + 1)


def test_fp4_e2m1_ties_go_to_the_even_code():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    values = np.array(codebooks()["fp4_e2m1"].values)
    np.testing.assert_array_equal(values, [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for tie, value in ties.items():
        assert values[codes_of("fp4_e2m1", [tie, -tie])].tolist() == [value, -value]
    between = np.nextafter(np.float32([0.25, 1.25, 5]), np.float32(9))
    np.testing.assert_array_equal(values[codes_of("fp4_e2m1", between)], [0.5, 1.5, 6])


@pytest.mark.parametrize("name", FLOAT8)
def test_fp8_is_the_cast_of_ml_dtypes(name):
    book = codebooks()[name]
    values = np.array(book.values, np.float32)
    all_bits = np.arange(256, dtype=np.uint8).view(FLOAT8[name]).astype(np.float32)
    np.testing.assert_array_equal(values, np.unique(all_bits[np.isfinite(all_bits)]))
    middles = (values[:-1] + values[1:]) / 2
    normal = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    candidates = [values, middles, normal, normal * 100, normal * 1e-2, normal * 1e-5]
    candidates += [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    candidates = np.clip(np.concatenate(candidates), -book.bound, book.bound)
    codes = np.searchsorted(book.thresholds, candidates, side="left")
    np.testing.assert_array_equal(values[codes], candidates.astype(FLOAT8[name]).astype(np.float32))


def test_dynamic_map_covers_seven_decades():
    values = dynamic_map()
    assert values.shape == (256,)
    assert values.dtype == np.float32
    assert np.all(np.diff(values) > 0)
    assert values[-1] == 1
    np.testing.assert_array_equal(values[128:255], -values[126::-1])
    assert values[127] == 0
    for decade in range(7):
        inside = (values > 10.0 ** (decade - 7)) & (values < 10.0 ** (decade - 6))
        assert inside.sum() == 2**decade
    np.testing.assert_allclose(values[254], 1 - 0.9 / 128, rtol=1e-6)


def test_integer_codes_run_over_all_bits():
    for name, bits in INTEGERS.items():
        for tail in ("", "-sym", "-sym-full"):
            assert parse_format(f"{name}-g64{tail}").largest_code == 2**bits - 1
    assert parse_format("int1-g64-sym").codebook.values == (-1.0, 1.0)
    assert parse_format("int1-g64").codebook is None


def test_a_name_that_stands_for_others_is_printed():
    for name, text in ALIASES.items():
        assert parse_format(name) == parse_format(text)
        assert "-" not in text or str(parse_format(text)) in (name, "mxfp8_e4m3")


def test_what_formats_say_of_themselves():
    for name, granularity in itertools.product(GRIDS, ("tensor", "channel", "g3", "b4")):
        fmt = parse_format(name if name in FLOATS else f"{name}-{granularity}")
        assert fmt.is_float == (name in FLOATS)
        assert fmt.is_affine == (name in INTEGERS)
        if not fmt.is_float:
            rows, columns = {"tensor": (1, 1), "channel": (1, 5), "g3": (3, 5), "b4": (2, 5)}[granularity]
            assert fmt.parameter_shape(8, 5) == (rows, columns)
            assert fmt.groups(8, 5) == rows * columns
            assert parse_format(f"{name}-b4").parameter_shape(7, 5) == (9, 1)
            assert [fmt.crosses_columns(inputs) for inputs in (7, 8)] == [granularity == "b4", False]
