"""qjax.packing: exact inverse, and the layout against a NumPy bit stream and GPTQ's int32 words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import packing

BITS = range(1, 9)
pack = jax.jit(packing.pack, static_argnums=1)
unpack = jax.jit(packing.unpack, static_argnums=(1, 2))


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Oracle: the codes of one column as a little-endian bit stream, in whole packing units, as bytes."""
    count, width = packing.unit(bits)
    stream = [(int(code) >> bit) & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(codes) % count * bits)
    packed = np.packbits(np.array(stream, np.uint8), bitorder="little")
    assert len(packed) % width == 0
    return packed


def random_codes(*shape: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_unit_is_the_smallest_whole_number_of_bytes(bits):
    count, width = packing.unit(bits)
    assert count * bits == 8 * width
    assert not any(smaller * bits % 8 == 0 for smaller in range(1, count))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 33])
def test_layout_and_inverse(bits, rows):
    codes = random_codes(rows, 3, bits=bits, seed=rows)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8
    expected = np.stack([bit_stream(column, bits) for column in codes.T], axis=1)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpack(packed, bits, rows), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_is_gptq_qweight(bits):
    """32-bit words down the input axis: 8 codes of 4 bits, or 32 codes of 3 bits in 3 words with two of them straddling."""
    codes = random_codes(64, 5, bits=bits)
    words = np.ascontiguousarray(np.asarray(pack(jnp.asarray(codes), bits)).T).view("<u4").T
    assert words.shape == (64 * bits // 32, 5)
    if bits == 4:
        expected = [sum(int(codes[8 * word + j, 0]) << (4 * j) for j in range(8)) for word in range(8)]
        np.testing.assert_array_equal(words[:, 0], expected)
    else:  # code 10: 2 low bits on top of word 0, 1 bit at the bottom of word 1; code 21: 1 and 2 bits
        first, second, third = (int(word) for word in words[:3, 0])
        assert (first >> 30) | ((second & 1) << 2) == codes[10, 0]
        assert (second >> 31) | ((third & 3) << 1) == codes[21, 0]
        assert [(first >> (3 * j)) & 7 for j in range(10)] == codes[:10, 0].tolist()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_batch_axes_jit_vmap_and_scan(bits):
    codes = jnp.asarray(random_codes(2, 3, 21, 4, bits=bits))
    packed = pack(codes, bits)
    np.testing.assert_array_equal(unpack(packed, bits, 21), codes)
    by_vmap = jax.vmap(jax.vmap(lambda x: packing.pack(x, bits)))(codes)
    np.testing.assert_array_equal(by_vmap, packed)
    _, by_scan = jax.lax.scan(lambda carry, x: (carry, unpack(x, bits, 21)), None, packed)
    np.testing.assert_array_equal(by_scan, codes)


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_and_padding(bits):
    """The largest code everywhere: no bit leaks into a neighbour, and the padding is zero."""
    codes = jnp.full((5, 2), 2**bits - 1, jnp.uint8)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(unpack(packed, bits, 5), codes)
    count, width = packing.unit(bits)
    everything = unpack(packed, bits, packed.shape[0] // width * count)
    assert not np.any(np.asarray(everything)[5:])
