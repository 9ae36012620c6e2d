"""The arithmetic of a format: the scale and zero point of a group of weights, the codes of weights, the values of codes.

    symmetric, codebook:  scale = max|w| * shrink / bound,                  code = nearest(w / scale)
    full-range symmetric: scale = -w_m * shrink / 2^(b-1),  w_m the weight of the largest magnitude
    affine:               scale = (max(w, 0) - min(w, 0)) * shrink / (2^b - 1),  zero = round(-min(w, 0) * shrink / scale),
                          code = clip(round(w / scale) + zero, 0, 2^b - 1)
    real zeros:           zero = -min(w, 0) * shrink / scale,               code = clip(round(w / scale + zero), 0, 2^b - 1)
    minima:               scale = (max(w) - min(w)) * shrink / (2^b - 1),
                          minimum = min(w) + (max(w) - min(w)) * (1 - shrink) / 2,
                          code = clip(round((w - minimum) / scale), 0, 2^b - 1)
    value = grid value(code) * scale, or (code - zero) * scale, or code * scale + minimum

How scales are stored, and found where it is not by this division, and how zeros are, is the codecs' (`scales.py`).

Zero is always representable (the range of an affine group is widened to hold it, as in GPTQ), but with minima. A minimum
stands where others have a zero point, and is the smallest weight of its group unless a search shrinks the range, as llama.cpp
has it for Q4_1 and Q5_1: no level lies between the weights of a group of one sign and zero. Such a range shrinks towards its
middle, others towards zero.

Everything works on groups: (groups, size, columns) arrays whose middle axis shares a scale, with scales and zeros (groups,
columns). `to_groups` and `from_groups` go between that view and the (in, out) weight. Every rounding method is built from these
few functions.

Scales and minima are stored before they are used, so codes are chosen for what decoding will see (but for bitsandbytes' flat
blocks with dq).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from qjax.errors import QjaxError
from qjax.file_scales import SuperBlocks
from qjax.formats import Format, not_rounded_to
from qjax.scales import QuantizedScales, ScaledFloats, nonzero

FLOAT8 = {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}
StoredScales = jax.Array | QuantizedScales | ScaledFloats | SuperBlocks


class Parameters(NamedTuple):
    """The grid of every group.

    scale: (groups, columns) float32, what `encode` divides by. decoded_scale: the same shape, what `decode` multiplies with;
    it differs for flat formats with dq only. zero: (groups, columns) float32, zero points or minima, or None. stored: the
    scales in the form a QTensor holds, see `store_scales`.
    """

    scale: jax.Array
    decoded_scale: jax.Array
    zero: jax.Array | None
    stored: StoredScales


def to_groups(weight: Shaped[Array, "in out"], fmt: Format) -> Shaped[Array, "groups size columns"]:
    """The weight (or codes) with the axis that shares a scale in the middle, padded with zeros to whole groups."""
    rows, columns = weight.shape
    match fmt.granularity:
        case "tensor" | "channel":
            return weight[None]
        case "flat" if fmt.crosses_columns(rows):
            flat = weight.T.reshape(-1)
            size = min(fmt.group, flat.size)
            return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size, 1)
        case _:
            size = min(fmt.group, rows)
            return jnp.pad(weight, ((0, -rows % size), (0, 0))).reshape(-1, size, columns)


def from_groups(groups: Shaped[Array, "groups size width"], fmt: Format, rows: int, columns: int) -> Shaped[Array, "in out"]:
    """The inverse of `to_groups` for an (in=rows, out=columns) weight."""
    if fmt.crosses_columns(rows):
        return groups.reshape(-1)[: rows * columns].reshape(columns, rows).T
    return groups.reshape(-1, columns)[:rows]


def padding_mask(groups: Shaped[Array, "groups size columns"], weights: int) -> Bool[Array, "groups size 1"] | None:
    """True where `to_groups` of a weight with `weights` elements put weights, not padding; None where it did not pad."""
    if groups.size == weights:
        return None
    count, size, columns = groups.shape
    return (jnp.arange(count * size) < weights // columns).reshape(count, size, 1)


def weight_groups(
    weight: Float[Array, "in out"], fmt: Format
) -> tuple[Float[Array, "groups size columns"], Bool[Array, "groups size 1"] | None]:
    """`to_groups` of a weight and its `padding_mask`. Padding is in the range of its group: zeros, or where the range need not
    hold zero the group's first weight.
    """
    groups = to_groups(weight, fmt)
    present = padding_mask(groups, weight.size)
    return filled(groups, present, fmt), present


def filled(
    groups: Float[Array, "groups size columns"], present: Bool[Array, "groups size 1"] | None, fmt: Format
) -> Float[Array, "groups size columns"]:
    """Groups padded with zeros as `weight_groups` pads them."""
    return jnp.where(present, groups, groups[:, :1]) if fmt.has_minima and present is not None else groups


def find_range(
    groups: Float[Array, "groups size columns"], fmt: Format
) -> tuple[Float[Array, "groups channels"], Float[Array, "groups channels"]]:
    """(min, max) of every group, widened to hold zero but for minima; shape fmt.parameter_shape."""
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    if fmt.granularity == "tensor":
        low, high = jnp.min(low, axis=1, keepdims=True), jnp.max(high, axis=1, keepdims=True)
    return (low, high) if fmt.has_minima else (jnp.minimum(low, 0), jnp.maximum(high, 0))


def find_parameters(
    groups: Float[Array, "groups size columns"],
    fmt: Format,
    shrink: float | Float[Array, "..."] = 1.0,
    *,
    common: Float[Array, ""] | None = None,
) -> Parameters:
    """The grid of every group that spans its range times `shrink`. common: as in `range_parameters`."""
    return range_parameters(*find_range(groups, fmt), fmt, shrink, common=common)


def range_parameters(
    low: Float[Array, "groups channels"],
    high: Float[Array, "groups channels"],
    fmt: Format,
    shrink: float | Float[Array, "..."] = 1.0,
    *,
    common: Float[Array, ""] | None = None,
) -> Parameters:
    """The grid of every group whose weights span low .. high, as `find_range` has them, of which `shrink` is kept.

    common: what scales are stored relative to, where that does not come from these groups.
    """
    if fmt.is_read_only:
        raise QjaxError(not_rounded_to(fmt))
    codec, bound = fmt.scale_codec, fmt.largest_value
    if common is None:  # of the whole ranges: a search shrinks one group, not all
        common = codec.common(_largest(low, high, fmt), bound)
    low, high = _shrunk(low, high, shrink, fmt)
    largest = _largest(low, high, fmt)
    from_zero = fmt.is_affine and not fmt.has_minima
    exact = high / bound - low / bound if from_zero else largest / bound  # the difference itself could overflow
    exact = codec.find(exact, largest, bound, fmt.mantissa)
    stored = store_scales(exact, fmt, common)
    decoded = load_scales(stored, fmt, exact.shape)
    scale = exact if codec.codes_exactly(fmt.is_flat) else decoded
    zero = None
    if fmt.is_affine:
        zero = fmt.zero_codec.nearest(low if fmt.has_minima else -low / nonzero(scale), fmt.largest_code)
    return Parameters(scale, decoded, zero, stored)


def _shrunk(low, high, shrink, fmt):
    if not fmt.has_minima:
        return low * shrink, high * shrink
    cut = (high - low) * ((1 - shrink) / 2)
    return low + cut, high - cut


def _largest(low, high, fmt):
    """What stands for a group's largest value: max |w|, in full-range formats negative if it is a positive w; or the range."""
    if fmt.is_affine:
        return high - low
    if fmt.bound == "full":
        return jnp.where(high >= -low, -high, -low)
    return jnp.maximum(high, -low)


def encode(
    values: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."] | None, fmt: Format
) -> UInt8[Array, "..."]:
    """Nearest codes of values, elementwise; scale and zero broadcast against values. A scale of 0 gives the code of 0, of
    minima code 0.
    """
    return nearest_codes(_scaled(values, scale, zero, fmt), zero, fmt)


def _scaled(values, scale, zero, fmt):
    # By the reciprocal, like bitsandbytes; XLA would make that of a division, but only when it compiles.
    return jnp.where(scale == 0, 0.0, above_minimum(values, zero, fmt) * (1 / nonzero(scale)))


def above_minimum(values: Float[Array, "..."], zero: Float[Array, "..."] | None, fmt: Format) -> Float[Array, "..."]:
    """What is divided by the scale: the values, less their minimum where the format has minima."""
    return values - zero if fmt.has_minima else values


def nearest_codes(scaled: Float[Array, "..."], zero: Float[Array, "..."] | None, fmt: Format) -> UInt8[Array, "..."]:
    """Codes of weights (`above_minimum`) divided by their scale, in any format."""
    if fmt.codebook:
        return codebook_codes(scaled, fmt)
    if fmt.has_minima:
        return integer_codes(scaled, 0, fmt.largest_code)
    if not fmt.has_whole_zeros:
        return integer_codes(scaled + zero, 0, fmt.largest_code)
    return integer_codes(scaled, 2 ** (fmt.bits - 1) if zero is None else zero, fmt.largest_code)


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
    if fmt.has_minima:
        return codes.astype(jnp.float32) * scale + zero
    if fmt.codebook is None:
        zero = 2 ** (fmt.bits - 1) if zero is None else zero
        return (codes.astype(jnp.float32) - zero) * scale
    if fmt.grid in FLOAT8:
        middle = jnp.int16(len(fmt.codebook.values) // 2)
        codes = codes.astype(jnp.int16)
        bits = jnp.where(codes < middle, 128 + middle - codes, codes - middle).astype(jnp.uint8)
        return jax.lax.bitcast_convert_type(bits, FLOAT8[fmt.grid]).astype(jnp.float32) * scale
    return select(codes, fmt.codebook.values) * scale


def fake_quantize(
    weight: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero: Float[Array, "..."] | None,
    fmt: Format,
    *,
    offset: float | Float[Array, "..."] = 0.0,
) -> Float[Array, "..."]:
    """decode(encode(weight)), elementwise, with gradients that pass through the rounding (straight-through).

    offset: added to weight / scale before rounding, as learned rounding has it (Nagel et al. 2020, arXiv 2004.10568; Cheng et
    al. 2023, 2309.05516). With v = weight / scale + offset and q = value / scale, where v is

        in the grid's range        d/d weight = 1   d/d offset = scale   d/d scale = q - weight / scale   d/d zero = 0
        beyond it                               0                    0               q                              -scale

    which is LSQ's (Esser et al. 2020, 1902.08153) and LSQ+'s (Bhalgat et al. 2020, 2004.09576). With minima, weight and value
    are those above the minimum, whose gradient is 0 in the range and 1 beyond it. The range goes half a step beyond the
    outermost values: what rounds to them without being cut off is in it. A scale of 0 gives value (above the minimum) and
    gradients 0 but for the scale's own and the minimum's, which is 1.
    """
    scaled = _scaled(weight, scale, zero, fmt) + offset
    value = decode(jax.lax.stop_gradient(nearest_codes(scaled, zero, fmt)), scale, zero, fmt)
    low, high = _ends(zero, fmt)
    inside = (scaled >= low) & (scaled <= high)
    passing = jnp.where(inside, scaled if zero is None or fmt.has_minima else scaled + zero, 0.0)
    return value + jax.lax.stop_gradient(scale) * (passing - jax.lax.stop_gradient(passing))


def _ends(zero, fmt):
    """The range of weights (`above_minimum`) divided by their scale that round to some value without being cut off."""
    if fmt.codebook:
        values = fmt.codebook.values
        return values[0] - (values[1] - values[0]) / 2, values[-1] + (values[-1] - values[-2]) / 2
    if fmt.has_minima:
        return -0.5, fmt.largest_code + 0.5
    zero = 2 ** (fmt.bits - 1) if zero is None else jax.lax.stop_gradient(zero)
    return -0.5 - zero, fmt.largest_code + 0.5 - zero


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


def store_scales(scale: Float[Array, "groups channels"], fmt: Format, common: Float[Array, ""] | None = None) -> StoredScales:
    """Scales in the form a QTensor holds: (groups, columns), flat for flat formats, or what the format's codec makes of them.

    common: what the codec stores scales relative to, `fmt.scale_codec.common`; None for one that stores each alone.
    """
    return fmt.scale_codec.store(scale, common, fmt.is_flat)


def load_scales(stored: StoredScales, fmt: Format, shape: tuple[int, int]) -> Float[Array, "groups channels"]:
    """float32 scales of `shape` (groups, columns) from what `store_scales` gave."""
    return fmt.scale_codec.load(stored, shape)
