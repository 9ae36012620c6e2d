"""The arithmetic of a format: the scale and zero point of a group of weights, the codes of weights, the values of codes.

    symmetric, codebook:  scale = max|w| * shrink / bound,                  code = nearest(w / scale)
    affine:               scale = (max(w, 0) - min(w, 0)) * shrink / (2^b - 1),  zero = round(-min(w, 0) * shrink / scale),
                          code = clip(round(w / scale) + zero, 0, 2^b - 1)
    value = grid value(code) * scale, or (code - zero) * scale

Zero is always representable (the range of an affine group is widened to hold it, as in GPTQ). Everything works on groups:
(groups, size, columns) arrays whose middle axis shares a scale, with scales and zeros (groups, columns). `to_groups` and
`from_groups` go between that view and the (in, out) weight. Every rounding method is built from these few functions.

A scale is rounded to the type it is stored in before it is used, so codes are chosen for the scale that decoding will see.
`block` formats with dq follow bitsandbytes, which departs from this: it codes weights with the exact maximum and quantizes that
afterwards, with a table of 2^16 equal steps instead of the nearest code.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from qjax.formats import DOUBLE_QUANT_BLOCK, Format, dynamic_map

FLOAT8 = {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedScales:
    """Doubly quantized scales of QLoRA: dynamic_map[codes] * scales + offset, in blocks of 256 scales.

    Scales are flattened output channel after output channel. codes: (scales,) uint8; scales: (blocks,) float32, the
    largest |scale - offset| of each block; offset: () float32, the mean scale.
    """

    codes: jax.Array
    scales: jax.Array
    offset: jax.Array


class Parameters(NamedTuple):
    """The grid of every group.

    scale: (groups, columns) float32, what `encode` divides by. decoded_scale: the same shape, what `decode` multiplies with;
    it differs for block formats with dq only. zero: (groups, columns) float32 integers, or None. stored: the scales in the
    form a QTensor holds, see `store_scales`.
    """

    scale: jax.Array
    decoded_scale: jax.Array
    zero: jax.Array | None
    stored: jax.Array | QuantizedScales


def to_groups(weight: Shaped[Array, "in out"], fmt: Format) -> Shaped[Array, "groups size columns"]:
    """The weight (or codes) with the axis that shares a scale in the middle, padded with zeros to whole groups."""
    rows, columns = weight.shape
    match fmt.granularity:
        case "tensor" | "channel":
            return weight[None]
        case "block" if rows % fmt.group:
            flat = weight.T.reshape(-1)
            size = min(fmt.group, flat.size)
            return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size, 1)
        case _:
            size = min(fmt.group, rows)
            return jnp.pad(weight, ((0, -rows % size), (0, 0))).reshape(-1, size, columns)


def from_groups(groups: Shaped[Array, "groups size width"], fmt: Format, rows: int, columns: int) -> Shaped[Array, "in out"]:
    """The inverse of `to_groups` for an (in=rows, out=columns) weight."""
    if fmt.granularity == "block" and rows % fmt.group:
        return groups.reshape(-1)[: rows * columns].reshape(columns, rows).T
    return groups.reshape(-1, columns)[:rows]


def padding_mask(groups: Shaped[Array, "groups size columns"], weights: int) -> Bool[Array, "groups size 1"] | None:
    """True where `to_groups` of a weight with `weights` elements put weights, not padding; None where it did not pad."""
    if groups.size == weights:
        return None
    count, size, columns = groups.shape
    return (jnp.arange(count * size) < weights // columns).reshape(count, size, 1)


def find_range(
    groups: Float[Array, "groups size columns"], fmt: Format
) -> tuple[Float[Array, "groups channels"], Float[Array, "groups channels"]]:
    """(min, max) of every group, widened to hold zero; shape fmt.parameter_shape."""
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    if fmt.granularity == "tensor":
        low, high = jnp.min(low, axis=1, keepdims=True), jnp.max(high, axis=1, keepdims=True)
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def find_parameters(
    groups: Float[Array, "groups size columns"], fmt: Format, shrink: float | Float[Array, "..."] = 1.0
) -> Parameters:
    """The grid of every group that spans its range times `shrink`."""
    return range_parameters(*find_range(groups, fmt), fmt, shrink)


def range_parameters(
    low: Float[Array, "groups channels"],
    high: Float[Array, "groups channels"],
    fmt: Format,
    shrink: float | Float[Array, "..."] = 1.0,
) -> Parameters:
    """The grid of every group whose weights span low <= 0 <= high, both times `shrink`."""
    low, high = low * shrink, high * shrink
    if fmt.is_affine:
        exact = high / fmt.largest_code - low / fmt.largest_code  # the difference itself could overflow
    else:
        bound = fmt.codebook.bound if fmt.codebook else 2 ** (fmt.bits - 1) - (1.0 if fmt.bound == "max" else 0.5)
        exact = jnp.maximum(high, -low) / bound
    stored = store_scales(exact, fmt)
    decoded = load_scales(stored, fmt, exact.shape)
    scale = exact if fmt.double_quantized and fmt.granularity == "block" else decoded
    zero = jnp.clip(jnp.round(-low / _nonzero(scale)), 0, fmt.largest_code) if fmt.is_affine else None
    return Parameters(scale, decoded, zero, stored)


def encode(
    values: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."] | None, fmt: Format
) -> UInt8[Array, "..."]:
    """Nearest codes of values, elementwise; scale and zero broadcast against values. A scale of 0 gives the code of 0."""
    # By the reciprocal, like bitsandbytes; XLA would make that of a division, but only when it compiles.
    scaled = jnp.where(scale == 0, 0.0, values * (1 / _nonzero(scale)))
    if fmt.codebook is None:
        return integer_codes(scaled, 2 ** (fmt.bits - 1) if zero is None else zero, fmt.largest_code)
    return codebook_codes(scaled, fmt)


def integer_codes(
    scaled: Float[Array, "..."], zero: float | Float[Array, "..."], largest: int | Int[Array, ""]
) -> UInt8[Array, "..."]:
    """Codes of weights divided by their scale; `largest` may be traced, so that one program serves every number of bits."""
    return jnp.clip(jnp.round(scaled) + zero, 0, largest).astype(jnp.uint8)


def codebook_codes(scaled: Float[Array, "..."], fmt: Format) -> UInt8[Array, "..."]:
    """Codes of weights divided by their scale, for a format with a codebook."""
    book = fmt.codebook
    if fmt.grid in FLOAT8:  # the cast rounds to nearest, ties to even, like 252 thresholds but at once
        bits = jnp.clip(scaled, -book.bound, book.bound).astype(FLOAT8[fmt.grid])
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint8)
        magnitude, middle = bits & 127, len(book.values) // 2
        return jnp.where(bits > 127, middle - magnitude, middle + magnitude).astype(jnp.uint8)
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for threshold in book.thresholds:
        codes += (scaled > jnp.float32(threshold)).astype(jnp.uint8)
    return codes


def decode(
    codes: UInt8[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."] | None, fmt: Format
) -> Float[Array, "..."]:
    """float32 values of codes, elementwise; scale and zero broadcast against codes."""
    if fmt.codebook is None:
        zero = 2 ** (fmt.bits - 1) if zero is None else zero
        return (codes.astype(jnp.float32) - zero) * scale
    if fmt.grid in FLOAT8:
        middle = jnp.int16(len(fmt.codebook.values) // 2)
        codes = codes.astype(jnp.int16)
        bits = jnp.where(codes < middle, 128 + middle - codes, codes - middle).astype(jnp.uint8)
        return jax.lax.bitcast_convert_type(bits, FLOAT8[fmt.grid]).astype(jnp.float32) * scale
    return select(codes, fmt.codebook.values) * scale


def select(codes: Int[Array, "..."], values: Sequence[float]) -> Float[Array, "..."]:
    """values[codes], bit after bit of the codes: selects become vector instructions, a table look-up does not.

    Codes past the end name some of the values.
    """
    found = [np.float32(value) for value in values]
    bit = 1
    while len(found) > 1:
        found += found[-1:] * (len(found) % 2)
        odd = (codes & bit) != 0
        found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def store_scales(scale: Float[Array, "groups channels"], fmt: Format) -> jax.Array | QuantizedScales:
    """Scales in the form a QTensor holds: (groups, columns), flat for block formats, QuantizedScales for dq.

    A scale above the largest number of its type becomes that number.
    """
    if not fmt.double_quantized:
        scale = in_scale_type(scale, fmt)
        return scale.T.reshape(-1) if fmt.granularity == "block" else scale
    flat = scale.T.reshape(-1)
    offset = jnp.mean(flat)
    offset += jnp.mean(flat - offset)  # what rounding of the sum took
    blocks = jnp.pad(flat - offset, (0, -flat.size % DOUBLE_QUANT_BLOCK)).reshape(-1, DOUBLE_QUANT_BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks * (1 / _nonzero(largest))[:, None]
    if fmt.granularity == "block":  # bitsandbytes' table
        step = jnp.floor((scaled + 1) * 0.5 * 65535 + 0.5)
        scaled = 2 * step / 65535 - 1
    table = jnp.array(dynamic_map())
    codes = jnp.searchsorted((table[:-1] + table[1:]) / 2, scaled, side="left").astype(jnp.uint8)
    return QuantizedScales(codes.reshape(-1)[: flat.size], largest, offset)


def in_scale_type(scale: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    """Scales in the format's type for them; one above its largest number becomes that number."""
    return jnp.minimum(scale, jnp.finfo(fmt.scale_dtype).max).astype(fmt.scale_dtype)


def load_scales(stored: jax.Array | QuantizedScales, fmt: Format, shape: tuple[int, int]) -> Float[Array, "groups channels"]:
    """float32 scales of `shape` (groups, columns) from what `store_scales` gave."""
    if isinstance(stored, QuantizedScales):
        values = jnp.array(dynamic_map())[stored.codes]
        scales = jnp.repeat(stored.scales, DOUBLE_QUANT_BLOCK)[: values.size]
        stored = values * scales + stored.offset
    flat = stored.astype(jnp.float32)
    return flat if flat.ndim == 2 else flat.reshape(shape[::-1]).T


def _nonzero(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(scale == 0, 1.0, scale)
