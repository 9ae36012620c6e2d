"""The values of codes inside a Pallas kernel: shifts, masks, compares and selects only, no table in memory.

    value = (code - zero) * scale, or grid value(code) * scale

`grid.decode` is the definition. FP8 is put together from its exponent and mantissa. Scales in float16, which Mosaic does not
load, come as their bits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int16, Int32

from qjax.formats import Format
from qjax.grid import select

FLOAT8 = {"fp8_e4m3": (3, 7), "fp8_e5m2": (2, 15)}  # bits of the mantissa, bias of the exponent


def decode(
    codes: Int32[Array, "units out"], scale: Float[Array, "..."], zero: Float[Array, "..."] | None, fmt: Format
) -> Float[Array, "units out"]:
    """float32 values of codes; scale and zero, float32, broadcast against codes. zero is None unless fmt is affine.

    Codes that are none of the format give some finite number, times the scale.
    """
    return values(codes, zero, fmt) * scale


def values(codes: Int32[Array, "units out"], zero: Float[Array, "..."] | None, fmt: Format) -> Float[Array, "units out"]:
    """float32 grid values of codes, before the scale."""
    if fmt.grid in FLOAT8:
        return _float8(codes, *FLOAT8[fmt.grid], middle=len(fmt.codebook.values) // 2)
    if fmt.codebook:
        return select(codes, fmt.codebook.values)
    return codes.astype(jnp.float32) - (2.0 ** (fmt.bits - 1) if zero is None else zero)


def float16_values(bits: Int16[Array, "..."]) -> Float[Array, "..."]:
    """float32 values of finite float16 numbers given as their bits, subnormal ones too."""
    bits = bits.astype(jnp.int32)
    magnitude = _small_float(bits & 0x7FFF, mantissa_bits=10, bias=15)
    return jnp.where(bits < 0, -magnitude, magnitude)


def _float8(codes, mantissa_bits: int, bias: int, middle: int):
    """Sorted codes of FP8: `middle` is 0, and the distance from it is the magnitude's bits."""
    signed = codes - middle
    magnitude = _small_float(jnp.abs(signed), mantissa_bits, bias)
    return jnp.where(signed < 0, -magnitude, magnitude)


def _small_float(bits, mantissa_bits: int, bias: int):
    """float32 of a float without sign given as its bits. Subnormal numbers by a product: hardware flushes float32's to zero."""
    normal = (bits + ((127 - bias) << mantissa_bits)) << (23 - mantissa_bits)
    subnormal = bits.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa_bits)
    return jnp.where(bits < (1 << mantissa_bits), subnormal, jax.lax.bitcast_convert_type(normal, jnp.float32))
