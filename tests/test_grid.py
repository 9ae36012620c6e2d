"""qjax.grid: groups and back, codes at their ties, scales as they are stored."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import grid
from qjax.formats import codebooks, dynamic_map, parse_format
from tests.oracles import nearest as oracle

SHAPES = [(8, 5), (7, 5), (1, 1)]
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


def test_block_formats_code_with_the_exact_maximum():
    """As bitsandbytes does: the maximum is quantized after the weights."""
    groups = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64, 8)), jnp.float32)
    largest = jnp.max(jnp.abs(groups), axis=1)
    block = grid.find_parameters(groups, parse_format("nf4-b64-dq"))
    np.testing.assert_array_equal(block.scale, largest)
    np.testing.assert_array_equal(block.decoded_scale, grid.load_scales(block.stored, parse_format("nf4-b64-dq"), (4, 8)))
    assert np.any(np.asarray(block.decoded_scale) != np.asarray(largest))
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
