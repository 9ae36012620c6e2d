"""Decoding inside kernels gives exactly what `grid.decode` gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import grid
from qjax.formats import parse_format
from qjax.kernels.decode import decode, float16_values

FORMATS = ("int1-g32-sym", "int3-g32", "int4-g32", "int8-g32-sym", "nf4", "fp4_e2m1", "fp4_bnb", "fp8_e4m3-g32", "fp8_e5m2-g32")


@pytest.mark.parametrize("name", FORMATS)
def test_every_code(name):
    fmt = parse_format(name)
    codes = jnp.arange(fmt.largest_code + 1, dtype=jnp.int32)[:, None]
    scale, zero = jnp.float32([[0.7, 3e-5]]), jnp.float32([[3.0, 1.0]]) if fmt.is_affine else None
    expected = grid.decode(codes.astype(jnp.uint8), scale, zero, fmt)
    np.testing.assert_array_equal(jax.jit(decode, static_argnums=3)(codes, scale, zero, fmt), expected)


def test_every_finite_float16():
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits.view(np.float16)
    bits, numbers = bits[np.isfinite(numbers)], numbers[np.isfinite(numbers)]
    np.testing.assert_array_equal(jax.jit(float16_values)(bits.view(np.int16)), numbers.astype(np.float32))
