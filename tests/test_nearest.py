"""qjax.rounding.nearest: against the float64 oracle, the theorems of uniform rounding, known errors, and odd weights."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import grid, qtensor
from qjax.errors import QjaxError
from qjax.format_table import EXAMPLES
from qjax.formats import parse_format
from qjax.qtensor import dequantize
from qjax.rounding.nearest import nearest_values, rtn, search_shrink
from tests.oracles import nearest as oracle

unpack_codes = jax.jit(qtensor.unpack_codes)
QUANTIZED = [name for name, _ in EXAMPLES if not (parse_format(name).is_float or parse_format(name).is_read_only)]
ODD = (70, 6)  # no group size divides 70, so every grouped format pads, and flat blocks cross columns
encode = jax.jit(grid.encode, static_argnames="fmt")
MORE = [
    "int7-g16-sym-max-bf16",
    "int1-g32",
    "int2-b32",
    "int3-tensor",
    "nf4-tensor-fp16",
    "int3-b7-sym-max-dq",
    "int2-g32-sym-dq",
    "int4-b32-dq",
    "nf4-b32-dq",
    *("int4-g32-z32-dq", "int3-b7-z16", "int2-tensor-z16", "int1-g16-sym-full", "int4-b7-sym-full-dq", "int8-channel-sym-full"),
    *("mxfp4_ceil", "mxfp4_even", "mxfp8_e4m3_even", "nf4-b24-e8m0", "int8-g32-sym-max-e8m0_even", "int4-g16-e8m0_ceil"),
    *("fp8_e5m2-b24-e4m3", "int4-g16-e4m3", "int4-g16-sym-full-e4m3"),
    *("int3-b32-m16", "int2-tensor-m16-fp32", "int6-g16-m16-dq"),
]


def weights(shape, seed=0, freedom=4) -> np.ndarray:
    """Weights with heavy tails."""
    return (np.random.default_rng(seed).standard_t(freedom, shape) * 0.02).astype(np.float32)


def relative_error(q, weight) -> float:
    difference = np.asarray(dequantize(q), np.float64) - weight
    return float(np.sum(difference**2) / np.sum(np.square(weight, dtype=np.float64)))


@pytest.mark.parametrize("name", QUANTIZED + MORE)
def test_equals_the_oracle(name):
    """The same values but where the second nearest is as near within float32's rounding; and Info says the true error."""
    fmt = parse_format(name)
    weight = weights(ODD)
    q, info = rtn(jnp.asarray(weight), fmt)
    expected = oracle.rtn(weight, fmt)
    decided = expected.margin > 1e-5 * np.maximum(1, np.abs(weight / np.where(expected.scales == 0, 1, expected.scales)))
    assert decided.mean() > 0.99
    # Where a scale differs, all of its group does: one bit of float16 or a code of dq moves the values by more than 1e-6.
    small = 1e-9 if fmt.has_whole_zeros else 3e-6 * np.abs(expected.scales).max()  # code - zero is not exact
    np.testing.assert_allclose(np.asarray(dequantize(q))[decided], expected.values[decided], rtol=1e-6, atol=small)
    assert float(info.weight_error) == pytest.approx(relative_error(q, weight), rel=1e-5)
    assert q.shape == ODD
    assert q.nbytes == fmt.nbytes(*ODD)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", *QUANTIZED, *MORE])
def test_values_are_those_of_the_codes(name):
    """To the bit, compiled, but for scales that are a product: what a search compares is what rounding gives."""
    fmt = parse_format(name)
    values = jax.jit(nearest_values, static_argnames="fmt")(jnp.asarray(weights(ODD)), fmt)
    expected = jax.jit(dequantize)(rtn(jnp.asarray(weights(ODD)), fmt)[0])
    np.testing.assert_allclose(values, expected, rtol=3e-7 if fmt.scale_codec.together else 0)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_floating_point_formats_are_casts(name):
    weight = weights(ODD)
    q, info = rtn(jnp.asarray(weight), name)
    dtype = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}[name]
    np.testing.assert_array_equal(q.codes, weight.astype(dtype))
    assert float(info.weight_error) == pytest.approx(relative_error(q, weight), rel=1e-3)
    assert float(info.clipped) == 0
    big = jnp.array([[1e38, -1e38, 1.0]])
    q, info = rtn(big, name)
    assert np.all(np.isfinite(np.asarray(q.codes, np.float32)))
    assert float(info.clipped) == pytest.approx(2 / 3 if name == "fp16" else 0)


def test_takes_any_float_type():
    weight = jnp.asarray(weights((64, 4)), jnp.bfloat16)
    q, _ = rtn(weight, "int8-channel")
    same, _ = rtn(weight.astype(jnp.float32), "int8-channel")
    np.testing.assert_array_equal(q.codes, same.codes)


@pytest.mark.parametrize("name", ["int8-g32-sym-max-bf16", "int4-g32-dq", "nf4-g32-dq"])
def test_codes_are_chosen_for_the_scale_as_stored(name):
    """Encoding again with the scales that the QTensor holds gives its codes, also where storing them rounds a lot."""
    fmt = parse_format(name)
    weight = jnp.asarray(weights((256, 64)))
    q, _ = rtn(weight, fmt)
    scale, zero = qtensor.unpack_parameters(q)
    codes = encode(grid.to_groups(weight, fmt), scale[:, None], None if zero is None else zero[:, None], fmt=fmt)
    assert np.mean(np.asarray(unpack_codes(q)) != np.asarray(codes.reshape(256, 64))) < 1e-3  # ties within rounding
    exact = jnp.max(jnp.abs(grid.to_groups(weight, fmt)), axis=1) / (127 if fmt.bits == 8 else 1)
    if not fmt.is_affine:
        finer = encode(grid.to_groups(weight, fmt), exact[:, None], None, fmt=fmt)
        assert np.mean(np.asarray(unpack_codes(q)) != np.asarray(finer.reshape(256, 64))) > 5e-3


@pytest.mark.parametrize("name", ["nf4-g64", "nf4-b64", "fp4-g32", "fp4_bnb-g64", "fp8_e4m3-channel", "int4-g32-fp32"])
def test_is_idempotent(name):
    """What was rounded once is exactly representable: the same codes, and the same values to a bit of the scale."""
    once, _ = rtn(jnp.asarray(weights((96, 8))), name)
    again, info = rtn(dequantize(once), name)
    np.testing.assert_array_equal(unpack_codes(once), unpack_codes(again))
    np.testing.assert_allclose(dequantize(again), dequantize(once), rtol=5e-7)
    assert float(info.weight_error) < 1e-12


def test_error_falls_six_decibels_a_bit():
    """A uniform grid over a fixed range has steps of range / (2^b - 1) and a squared error of step^2 / 12."""
    weight = np.random.default_rng(1).uniform(-1, 1, (1024, 32)).astype(np.float32)
    errors = {}
    for bits in range(3, 9):
        _, info = rtn(jnp.asarray(weight), f"int{bits}-channel-fp32")
        errors[bits] = float(info.weight_error)
        step = 2 / (2**bits - 1)
        assert errors[bits] == pytest.approx(step**2 / 12 / (1 / 3), rel=0.05)
    for bits in range(3, 8):
        expected = 20 * np.log10((2 ** (bits + 1) - 1) / (2**bits - 1))
        assert 10 * np.log10(errors[bits] / errors[bits + 1]) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [
        ("int8-g128-sym", (1024, 1024), 4.26e-5),
        ("int4-channel", (4096, 256), 1.96e-2),
        ("int4-g128", (1024, 1024), 1.01e-2),
        ("int4-g64", (1024, 1024), 8.29e-3),
        ("int4-g32", (1024, 1024), 6.52e-3),
        ("int4-g128-sym", (1024, 1024), 1.23e-2),
        ("int4-g128-sym-max", (1024, 1024), 1.38e-2),
        ("int4-b64-sym-max", (1024, 1024), 1.16e-2),
        ("nf4-b64", (1024, 1024), 8.45e-3),
        ("fp4_bnb-b64", (1024, 1024), 1.49e-2),
        ("fp4_e2m1-b64", (1024, 1024), 1.12e-2),
        ("mxfp4", (1024, 1024), 1.32e-2),
        ("mxfp4_ceil", (1024, 1024), 1.33e-2),
        ("nvfp4", (1024, 1024), 9.03e-3),
        ("int3-g128", (1024, 1024), 4.65e-2),
        ("int2-g128", (1024, 1024), 0.254),
    ],
)
def test_known_errors_on_normal_weights(name, shape, error):
    """Relative squared errors of 2^20 normal weights, computed once with independent NumPy code; 2 % for the sample."""
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _, info = rtn(jnp.asarray(weight), name)
    assert float(info.weight_error) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(("name", "error"), [("int4-g128", 9.08e-3), ("int3-g128", 3.52e-2), ("int2-g128", 0.137)])
def test_known_errors_with_the_range_search(name, error):
    weight = np.random.default_rng(0).standard_normal((1024, 128)).astype(np.float32)
    _, info = rtn(jnp.asarray(weight), name, clip="mse")
    assert float(info.weight_error) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(
    "name",
    [
        *("int2-g32", "int3-channel-sym-fp32", "nf4-b32", "int2-tensor", "int1-g32-sym"),
        *("mxfp4_ceil", "nvfp4", "int2-g32-sym-full", "int2-g32-z16", "int2-g32-m16"),
    ],
)
def test_the_range_search_finds_the_best_shrink_of_every_group(name):
    """No shrink of 1, 0.99, ..., 0.2 has a smaller error in any group, the padded and the flat ones included."""
    fmt = parse_format(name)
    weight = weights(ODD, seed=3)
    index = oracle.group_index(ODD, fmt)
    count = index.max() + 1

    def group_errors(values):
        return np.bincount(index.ravel(), np.square(values - weight.astype(np.float64)).ravel(), count)

    q, info = rtn(jnp.asarray(weight), fmt, clip="mse")
    found = group_errors(np.asarray(dequantize(q)))
    best = np.min([group_errors(oracle.rtn(weight, fmt, 1 - i / 100).values) for i in range(81)], axis=0)
    np.testing.assert_allclose(found, best, rtol=1e-4)
    plain, plain_info = rtn(jnp.asarray(weight), fmt)
    assert np.all(found <= group_errors(np.asarray(dequantize(plain))) * (1 + 1e-6))
    assert float(info.weight_error) < float(plain_info.weight_error)
    assert float(plain_info.clipped) <= float(info.clipped)


def test_importance_weighs_the_errors_of_the_search():
    """With all importance on the largest weight of a group nothing may be cut off; with none on it much is."""
    weight = np.full((1, 32, 1), 0.3, np.float32)
    weight[0, 5] = 1.0
    on_outlier = jnp.asarray(weight == 1, jnp.float32)
    fmt = parse_format("int2-channel-sym-max-fp32")
    assert float(search_shrink(jnp.asarray(weight), on_outlier, fmt)[0, 0]) == 1
    assert float(search_shrink(jnp.asarray(weight), 1 - on_outlier, fmt)[0, 0]) == pytest.approx(0.3)


def test_clipped_counts_weights_beyond_the_grid():
    weight = jnp.concatenate([jnp.linspace(-1, 1, 99), jnp.array([8.0])])[:, None]
    assert float(rtn(weight, "int4-channel-sym-max-fp32")[1].clipped) == 0
    q, info = rtn(weight, "int4-channel-sym-fp32")  # the outermost value is 7 / 7.5 of the largest weight
    assert float(info.clipped) == pytest.approx(0.01)
    assert float(dequantize(q)[-1, 0]) == pytest.approx(8 * 7 / 7.5)
    _, info = rtn(-weight, "int4-channel-sym-full-fp32")  # the outermost value on the other side is 7 / 8
    assert float(info.clipped) == 0
    _, info = rtn(weight.at[:9].set(-8.0), "int4-channel-sym-full-fp32")
    assert float(info.clipped) == pytest.approx(0.09)


EXTREMES = {
    "zeros": np.zeros((64, 4)),
    "a column of zeros": np.random.default_rng(0).standard_normal((64, 4)) * [1, 0, 1, 1],
    "one weight": np.eye(64, 4, k=-40),
    "constant": np.full((64, 4), 0.3),
    "negative constant": np.full((64, 4), -0.3),
    "huge": np.random.default_rng(0).standard_normal((64, 4)) * 1e30,
    "near the largest float": np.tile([[1e37, -1e37]], (64, 2)),
    "tiny": np.random.default_rng(0).standard_normal((64, 4)) * 1e-30,
    "denormal": np.random.default_rng(0).standard_normal((64, 4)) * 1e-40,
    "mixed": np.random.default_rng(0).standard_normal((64, 4)) * [1e30, 1, 1e-30, 0],
}
WIDE = ["int4-g32-fp32", "int4-g32-sym-bf16", "nf4-g32", "nf4-b32", "fp8_e4m3-channel", "fp8_e5m2-tensor"]
NARROW = ["int4-g32", "int4-g32-m16", "int8-g32-sym-max", "int1-g32-sym", "int4-g32-dq", "nf4-b32-dq"]


@pytest.mark.parametrize("name", WIDE + NARROW)
def test_extreme_weights_stay_finite_and_sane(name):
    for kind, values in EXTREMES.items():
        weight = values.astype(np.float32)
        q, info = rtn(jnp.asarray(weight), name)
        restored = np.asarray(dequantize(q), np.float64)
        assert np.all(np.isfinite(restored)), kind
        assert np.isfinite(info.weight_error), kind
        assert 0 <= float(info.clipped) <= 1, kind
        # No value is further out than the largest weight by more than the rounding of a scale can bring.
        assert np.abs(restored).max() <= 1.3 * float(np.abs(weight).max()) + 1e-12, kind
        if kind == "zeros":
            assert not restored.any()
            assert float(info.weight_error) == 0
        if name in WIDE and kind not in ("zeros", "denormal", "mixed"):
            assert float(info.weight_error) < 0.02, kind
            assert float(info.weight_error) == pytest.approx(relative_error(q, weight), rel=1e-3, abs=1e-7), kind


def test_too_large_and_too_small_for_float16_scales():
    """A scale beyond float16 stops at its largest number, one below its smallest becomes zero; Info tells."""
    big, info = rtn(jnp.full((32, 1), 1e30), "int4-channel")
    assert float(dequantize(big)[0, 0]) == 15 * 65504
    assert float(info.clipped) == 1
    small, info = rtn(jnp.full((32, 1), 1e-30), "int4-channel")
    assert not np.any(np.asarray(dequantize(small)))
    assert float(info.weight_error) == pytest.approx(1)
    assert float(info.clipped) == 1


def test_nothing_is_lost_on_constant_groups():
    for value in (0.3, -0.3):
        q, _ = rtn(jnp.full((64, 2), value), "int2-g32-fp32")
        np.testing.assert_allclose(dequantize(q), value, rtol=1e-6)


def test_errors():
    with pytest.raises(QjaxError, match="unknown clip 'mae'; allowed: none, mse"):
        rtn(jnp.ones((4, 4)), "int4-g4", clip="mae")
    with pytest.raises(QjaxError, match=r"expected a weight \(in, out\), got shape \(4,\)"):
        rtn(jnp.ones(4), "int4-g4")
    with pytest.raises(QjaxError, match=r"expected a weight \(in, out\), got shape \(0, 4\)"):
        rtn(jnp.ones((0, 4)), "int4-g4")
    with pytest.raises(QjaxError, match="unknown grid"):
        rtn(jnp.ones((4, 4)), "int44-g4")
