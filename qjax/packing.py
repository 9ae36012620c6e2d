"""Codes of 1 to 8 bits <-> bytes: a little-endian bit stream along the input axis, one stream per output column.

With b bits, 8 / gcd(8, b) codes fill b / gcd(8, b) bytes exactly; the axis is padded with zeros to whole such units. For 1, 2,
4 and 8 bits a byte holds 8 / b codes, the first in the lowest bits; for the others codes straddle bytes. Read as 32-bit
little-endian words this is the layout of GPTQ's `qweight` and of compressed-tensors' dense `weight_packed`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest whole packing unit."""
    shared = math.gcd(8, bits)
    return 8 // shared, bits // shared


def pack(codes: UInt8[Array, "*batch rows columns"], bits: int) -> UInt8[Array, "*batch packed columns"]:
    """Packs codes (< 2**bits, uint8) along axis -2."""
    count, width = unit(bits)
    *batch, rows, columns = codes.shape
    codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, -rows % count), (0, 0)])
    codes = codes.reshape(*batch, -1, count, columns)
    packed = []
    for byte in range(width):
        shifts = [(code, code * bits - 8 * byte) for code in range(count)]  # where each code lands in this byte
        parts = [_shift(codes[..., code, :], left) for code, left in shifts if -bits < left < 8]
        packed.append(_or(parts))
    return jnp.stack(packed, axis=-2).reshape(*batch, -1, columns)


def unpack(packed: UInt8[Array, "*batch packed columns"], bits: int, rows: int) -> UInt8[Array, "*batch rows columns"]:
    """The first `rows` codes along axis -2; the exact inverse of `pack`."""
    count, width = unit(bits)
    *batch, _, columns = packed.shape
    units = packed.reshape(*batch, -1, width, columns)
    codes = jnp.stack([take(units, bits, index) for index in range(count)], axis=-2)
    return codes.reshape(*batch, -1, columns)[..., :rows, :]


def take(units: UInt8[Array, "*batch units width columns"], bits: int, index: int) -> UInt8[Array, "*batch units columns"]:
    """Code `index` of every packing unit."""
    first, offset = divmod(index * bits, 8)
    parts = [_shift(units[..., first, :], -offset)]
    if offset + bits > 8:
        parts.append(_shift(units[..., first + 1, :], 8 - offset))
    return _or(parts) & jnp.uint8(2**bits - 1)


def _shift(x: UInt8[Array, "..."], left: int) -> UInt8[Array, "..."]:
    return x << jnp.uint8(left) if left >= 0 else x >> jnp.uint8(-left)


def _or(parts: list[UInt8[Array, "..."]]) -> UInt8[Array, "..."]:
    total = parts[0]
    for part in parts[1:]:
        total = total | part
    return total
