"""qjax.grid: groups and back, codes at their ties, scales as they are stored."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import grid
from qjax.formats import codebooks, parse_format
from qjax.scales import dynamic_map
from tests.oracles import nearest as oracle

SHAPES = [(8, 5), (7, 5), (1, 1)]
GRADED = [
    *(f"int{bits}-g8{end}" for bits in (1, 2, 4, 8) for end in ("", "-sym", "-sym-full", "-z32", "-m16")),
    *(f"{n}-g8" for n in codebooks()),
]
GRANULARITIES = ["tensor", "channel", "g4", "g3", "b4", "b3", "g100", "b100"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_hold_what_shares_a_scale(shape, granularity):
    """Against the oracle's numbering: a group of the view is one group of weights and padding at its end."""
    fmt = parse_format(f"int4-{granularity}")
    weight = np.arange(1, 1 + shape[0] * shape[1], dtype=np.float32).reshape(shape)
    groups = grid.to_groups(jnp.asarray(weight), fmt)
    np.testing.assert_array_equal(grid.from_groups(groups, fmt, *shape), weight)
    assert groups.shape[1] <= weight.size, "a group larger than the weight takes no more memory"
    expected = {}
    for value, group in zip(weight.T.ravel(), oracle.group_index(shape, fmt).T.ravel(), strict=True):
        expected.setdefault(group, []).append(value)
    rows = np.asarray(groups).transpose(2, 0, 1).reshape(-1, groups.shape[1])
    if granularity == "tensor":
        rows = rows.reshape(1, -1)
    assert [[value for value in row if value] for row in rows.tolist()] == list(expected.values())
    mask = grid.padding_mask(groups, weight.size)
    np.testing.assert_array_equal(np.asarray(groups) != 0, np.broadcast_to(True if mask is None else mask, groups.shape))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ranges_hold_zero_and_have_the_shape_of_the_scales(granularity):
    fmt = parse_format(f"int4-{granularity}")
    weight = jnp.linspace(1, 2, 35).reshape(7, 5)
    low, high = grid.find_range(grid.to_groups(weight, fmt), fmt)
    assert low.shape == high.shape == fmt.parameter_shape(7, 5)
    assert not np.any(low)
    assert np.max(high) == 2
    low, high = grid.find_range(grid.to_groups(-weight, fmt), fmt)
    assert not np.any(high)
    assert np.min(low) == -2


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ranges_with_minima_are_those_of_the_weights(granularity):
    """Without zero, and without the padding of a last group."""
    fmt = parse_format(f"int4-{granularity}-m16")
    weight = np.random.default_rng(0).uniform(1, 2, (7, 5)).astype(np.float32)
    index = oracle.group_index(weight.shape, fmt)
    for sign in (1, -1):
        groups, present = grid.weight_groups(jnp.asarray(sign * weight), fmt)
        np.testing.assert_array_equal(grid.from_groups(groups, fmt, 7, 5), sign * weight)
        np.testing.assert_array_equal(present, grid.padding_mask(groups, weight.size))
        low, high = (np.asarray(part).T.reshape(-1) for part in grid.find_range(groups, fmt))
        expected = [sign * weight[index == group] for group in range(index.max() + 1)]
        np.testing.assert_array_equal(low, [group.min() for group in expected])
        np.testing.assert_array_equal(high, [group.max() for group in expected])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.floats(-100, 100), st.floats(0.001, 10), st.integers(1, 40), st.integers(0, 99))
def test_minima_are_half_a_step_from_what_they_stand_for(bits, middle, spread, size, seed):
    """And what float16 takes of the minimum and of the scale: the only other errors there are."""
    fmt = parse_format(f"int{bits}-g{size}-m16")
    weight = (middle + spread * np.random.default_rng(seed).standard_normal((size, 3))).astype(np.float32)
    groups, _ = grid.weight_groups(jnp.asarray(weight), fmt)
    found = grid.find_parameters(groups, fmt)
    low, span = weight.min(axis=0).astype(np.float64), np.ptp(weight.astype(np.float64), axis=0)
    scale, minimum = (np.asarray(part, np.float64)[0] for part in (found.scale, found.zero))
    np.testing.assert_array_equal(minimum, np.float16(low))
    np.testing.assert_allclose(scale, span / fmt.largest_code, rtol=2.0**-11 + 1e-6, atol=2.0**-25)
    codes = grid.encode(groups, found.scale[:, None], found.zero[:, None], fmt)
    values = np.asarray(grid.decode(codes, found.scale[:, None], found.zero[:, None], fmt), np.float64)[0]
    least = scale / 2 + np.abs(minimum - low) + np.abs(scale * fmt.largest_code - span)
    assert np.all(np.abs(values - weight) <= least + 1e-6 * np.abs(weight).max())


@pytest.mark.parametrize("name", codebooks())
def test_codes_at_and_beside_every_threshold(name):
    """The definition: as many thresholds as are strictly below. Compiled or not."""
    book, fmt = codebooks()[name], parse_format(f"{name}-tensor")
    cuts = np.float32(book.thresholds)
    values = np.concatenate([cuts, np.nextafter(cuts, np.float32(1e9)), np.nextafter(cuts, np.float32(-1e9)), book.values])
    values = np.concatenate([values, [2 * book.bound, -2 * book.bound, 1e-30, -1e-30]]).astype(np.float32)
    expected = np.searchsorted(cuts, values, side="left")
    for encode in (grid.encode, jax.jit(grid.encode, static_argnames="fmt")):
        codes = encode(jnp.asarray(values), jnp.float32(1), None, fmt=fmt)
        assert codes.dtype == jnp.uint8
        np.testing.assert_array_equal(codes, expected)
    decoded = grid.decode(jnp.arange(len(book.values), dtype=jnp.uint8), jnp.float32(1), None, fmt)
    np.testing.assert_array_equal(decoded, np.float32(book.values))


def test_integers_round_half_to_even_and_stop_at_the_ends():
    values = jnp.array([-99, -8.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5, 99.0])
    codes = grid.encode(values, jnp.float32(1), None, parse_format("int4-tensor-sym"))
    np.testing.assert_array_equal(codes.astype(int) - 8, [-8, -8, -2, 0, 0, 2, 2, 7, 7])
    codes = grid.encode(values, jnp.float32(1), jnp.float32(3), parse_format("int4-tensor"))
    np.testing.assert_array_equal(codes, [0, 0, 1, 3, 3, 5, 5, 11, 15])


@pytest.mark.parametrize("name", ["int4-tensor", "int4-tensor-sym", "nf4-tensor", "fp8_e4m3-tensor"])
def test_a_scale_of_zero_decodes_to_zero(name):
    fmt = parse_format(name)
    zero = jnp.float32(0) if fmt.is_affine else None
    codes = grid.encode(jnp.array([-1.0, 0, 1e30]), jnp.float32(0), zero, fmt)
    assert not np.any(np.asarray(grid.decode(codes, jnp.float32(0), zero, fmt)))
    assert len(set(np.asarray(codes).tolist())) == 1


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_scales_are_rounded_to_their_type(name):
    fmt = parse_format(f"int4-g4-{name}")
    scale = jnp.array([[0.1, 1e-9, 1e6], [0.0, 1.0, 3.0]])
    stored = grid.store_scales(scale, fmt)
    dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[name]
    assert stored.dtype == dtype
    expected = np.minimum(np.asarray(scale), ml_dtypes.finfo(dtype).max).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(grid.load_scales(stored, fmt, scale.shape), expected)
    flat = grid.store_scales(scale, parse_format(f"int4-b4-{name}"))
    np.testing.assert_array_equal(flat, np.asarray(stored).T.ravel())
    np.testing.assert_array_equal(grid.load_scales(flat, parse_format(f"int4-b4-{name}"), scale.shape), expected)


@pytest.mark.parametrize("shape", [(3, 100), (2, 128), (1, 1)])
def test_doubly_quantized_scales(shape):
    """dynamic_map[code] * block maximum + mean, blocks of 256 scales along the output channels; the nearest such value."""
    fmt = parse_format("nf4-g64-dq")
    scale = np.random.default_rng(0).gamma(9, size=shape).astype(np.float32)
    stored = grid.store_scales(jnp.asarray(scale), fmt)
    blocks = -(-scale.size // 256)
    assert stored.codes.shape == (scale.size,)
    assert stored.codes.dtype == jnp.uint8
    assert stored.scales.shape == (blocks,)
    flat = scale.T.ravel().astype(np.float64)
    assert float(stored.offset) == pytest.approx(flat.mean(), rel=1e-6)
    centred = flat - flat.mean()
    largest = np.array([np.abs(centred[256 * i : 256 * (i + 1)]).max() for i in range(blocks)])
    np.testing.assert_allclose(stored.scales, largest, rtol=1e-5, atol=1e-6)
    loaded = np.asarray(grid.load_scales(stored, fmt, shape)).T.ravel()
    unit = np.repeat(largest, 256)[: flat.size]
    distance = np.abs(centred[:, None] - dynamic_map() * unit[:, None]).min(axis=1)
    np.testing.assert_allclose(np.abs(loaded - flat), distance, atol=2e-6)


@pytest.mark.parametrize("count", [3, 11, 300])
def test_equal_scales_are_their_mean_to_the_last_bit(count):
    """Though a float32 mean of equal numbers need not be that number."""
    scale, fmt = jnp.full((1, count), 0.1, jnp.float32), parse_format("nf4-g64-dq")
    assert float(jnp.mean(scale)) != float(scale[0, 0])
    stored = grid.store_scales(scale, fmt)
    assert stored.offset == scale[0, 0]
    np.testing.assert_array_equal(grid.load_scales(stored, fmt, scale.shape), scale)


@pytest.mark.parametrize("name", ["nf4-g8-e8m0_ceil", "nf4-g8-e8m0_even"])
def test_powers_of_two_stop_at_the_largest(name):
    """Where rounding up would write byte 255, which stands for NaN."""
    found = grid.find_parameters(jnp.full((1, 8, 1), 3.4e38, jnp.float32), parse_format(name))
    assert found.stored == 254 and found.scale == 2.0**127


def test_flat_formats_code_with_the_exact_maximum():
    """As bitsandbytes does: the maximum is quantized after the weights."""
    groups = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64, 8)), jnp.float32)
    largest = jnp.max(jnp.abs(groups), axis=1)
    flat = grid.find_parameters(groups, parse_format("nf4-b64-dq"))
    np.testing.assert_array_equal(flat.scale, largest)
    np.testing.assert_array_equal(flat.decoded_scale, grid.load_scales(flat.stored, parse_format("nf4-b64-dq"), (4, 8)))
    assert np.any(np.asarray(flat.decoded_scale) != np.asarray(largest))
    other = grid.find_parameters(groups, parse_format("nf4-g64-dq"))
    assert np.any(np.asarray(other.scale) != np.asarray(largest))
    np.testing.assert_array_equal(other.scale, other.decoded_scale)
    np.testing.assert_array_equal(other.scale, grid.load_scales(other.stored, parse_format("nf4-g64-dq"), (4, 8)))


def test_shrink_may_differ_between_groups():
    groups = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 3)), jnp.float32)
    fmt = parse_format("int4-g16-fp32")
    whole, half = grid.find_parameters(groups, fmt), grid.find_parameters(groups, fmt, 0.5)
    mixed = grid.find_parameters(groups, fmt, jnp.array([[1.0, 0.5, 1.0], [0.5, 0.5, 0.5]]))
    chosen = np.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(mixed.scale, np.where(chosen, whole.scale, half.scale))
    np.testing.assert_allclose(half.scale, whole.scale / 2, rtol=1e-6)
    np.testing.assert_array_equal(mixed.zero, np.where(chosen, whole.zero, half.zero))


def quantize_exactly(weight, scale, zero, offset, fmt):
    """Values in float64 by the definition, and whether each weight is in the range."""
    if fmt.has_minima:
        value, found, inside = quantize_exactly(weight - zero, scale, 0, offset, dataclasses.replace(fmt, zeros="z32"))
        return value + zero, found, inside
    scaled = weight / scale + offset
    if fmt.codebook:
        levels = np.array(fmt.codebook.values)
        found = levels[np.searchsorted(np.float64(fmt.codebook.thresholds), scaled, side="left")]
        steps = levels[1] - levels[0], levels[-1] - levels[-2]
        inside = (scaled > levels[0] - steps[0] / 2) & (scaled < levels[-1] + steps[1] / 2)
        return found * scale, found, inside
    middle = 2 ** (fmt.bits - 1) if zero is None else zero
    codes = np.round(scaled + middle)
    inside = (codes >= 0) & (codes < 2**fmt.bits)
    found = np.clip(codes, 0, 2**fmt.bits - 1) - middle
    return found * scale, found, inside


@pytest.mark.parametrize("name", GRADED)
def test_fake_quantization_and_its_gradients(name):
    """Against the formulas of its docstring in float64: values, and gradients with respect to all four arguments."""
    fmt = parse_format(name)
    rng = np.random.default_rng(0)
    scale = 0.37 * (rng.choice([-1, 1], 6) if fmt.bound == "full" else np.ones(6))
    reach = 2.1 * fmt.codebook.values[-1] - 0.7 * fmt.codebook.values[-2] if fmt.codebook else 0.7 * 2**fmt.bits
    weight, offset = rng.uniform(-reach, reach, (50, 6)) * scale, rng.uniform(-0.4, 0.4, (50, 6))
    zero = None if not fmt.is_affine else rng.uniform(0, fmt.largest_code, 6)
    zero = np.round(zero) if fmt.is_affine and fmt.has_whole_zeros else zero
    zero = -0.37 * zero if fmt.has_minima else zero
    narrow = [None if x is None else jnp.asarray(x, jnp.float32) for x in (weight, scale, zero, offset)]
    values, to_arguments = jax.vjp(lambda w, s, z, v: grid.fake_quantize(w, s, z, fmt, offset=v), *narrow)
    value, found, inside = quantize_exactly(weight, scale, zero, offset, fmt)
    decided = np.abs(np.asarray(values) - value) < 1e-4 * reach
    assert decided.mean() > 0.99 and 0.3 < inside.mean() < 0.95
    cotangent = rng.standard_normal((50, 6)) * decided
    to_weight, to_scale, to_zero, to_offset = to_arguments(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(to_weight, cotangent * inside, atol=1e-5)
    np.testing.assert_allclose(to_offset, cotangent * inside * scale, atol=1e-5)
    above = weight - zero if fmt.has_minima else weight
    expected = np.sum(cotangent * np.where(inside, found - above / scale, found), axis=0)
    np.testing.assert_allclose(to_scale, expected, rtol=1e-4, atol=1e-4 * np.abs(found).max())
    if fmt.is_affine:
        beyond = 1 if fmt.has_minima else -scale
        np.testing.assert_allclose(to_zero, np.sum(cotangent * np.where(inside, 0, beyond), axis=0), rtol=1e-4, atol=1e-4)
    plain = grid.fake_quantize(narrow[0], narrow[1], narrow[2], fmt)
    codes = grid.encode(*narrow[:3], fmt)
    np.testing.assert_array_equal(plain, grid.decode(codes, *narrow[1:3], fmt))


@pytest.mark.parametrize("name", ["int4-g4", "int4-g4-z16", "int4-g4-m16", "nf4-g4", "fp8_e4m3-g4"])
def test_fake_quantization_with_a_scale_of_zero_has_finite_gradients(name):
    fmt = parse_format(name)
    zero = jnp.zeros(()) if fmt.is_affine else None
    gradients = jax.grad(lambda w, s: jnp.sum(grid.fake_quantize(w, s, zero, fmt)), (0, 1))(jnp.ones(3), jnp.zeros(()))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.any(gradients[0])
