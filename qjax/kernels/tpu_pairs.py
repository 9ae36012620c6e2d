"""A tile of few rows times packed integers of up to 7 bits, two codes at a time and without scaling a single weight.

    x W = sum over groups g of scale_g * (x_g (128 + code_g) - (128 + zero_g) sum(x_g))

For few rows the vector unit, which decodes, is slower than memory unless it does little for a weight. The bits 0x4300 | code
are the bfloat16 number 128 + code, exactly, for code < 128; a 32-bit word holds two of them. So a shift, a mask and an OR make
two weights, where decoding to scaled values takes a shift, a mask, a conversion, a subtraction, a product and a rounding for
each. The scale multiplies sums of a whole group, in float32: more exact than weights that are rounded to bfloat16.

The matrix unit sees the inputs of each group in the order [code in the first half of a unit][unit][half of the unit].
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int32

from qjax.formats import INTEGERS, Format
from qjax.kernels.layout import unit

OFFSET, OFFSET_BITS = 128, 0x43004300  # bfloat16 128.0, twice


def serves(fmt: Format, part: int, units: int) -> bool:
    """True if tiles of `units` units, of which each `part` share a scale, can be multiplied like this."""
    return fmt.grid in INTEGERS and fmt.bits < 8 and fmt.codebook is None and part % 8 == 0 and units % part == 0


def order_inputs(x: Float[Array, "rows in"], bits: int, part: int) -> Float[Array, "rows in"]:
    """x with the inputs of each group, `part` units, in the order that `product` takes."""
    count, _ = unit(bits)
    return x.reshape(len(x), -1, part, 2, count // 2).transpose(0, 1, 4, 2, 3).reshape(x.shape)


def product(
    x: BFloat16[Array, "rows inputs"],
    words: Int32[Array, "width units columns"],
    scale: Float[Array, "groups columns"],
    zero: Float[Array, "groups columns"] | None,
    bits: int,
) -> Float[Array, "rows columns"]:
    """x W of one tile in float32, inside a kernel; x in the order of `order_inputs`."""
    count, _ = unit(bits)
    groups = len(scale)
    pairs = [_pair(words, bits, index) for index in range(count // 2)]
    size, inputs = len(pairs[0]) // groups, x.shape[1] // groups
    total = jnp.zeros((len(x), words.shape[-1]), jnp.float32)
    for g in range(groups):
        tile = jnp.concatenate([pair[g * size : (g + 1) * size] for pair in pairs])
        part = x[:, g * inputs : (g + 1) * inputs]
        with_offset = jnp.dot(part, tile, preferred_element_type=jnp.float32)
        middle = OFFSET + (2.0 ** (bits - 1) if zero is None else zero[g : g + 1])
        total += scale[g : g + 1] * (with_offset - middle * jnp.sum(part.astype(jnp.float32), axis=1, keepdims=True))
    return total


def _pair(words: Int32[Array, "width units columns"], bits: int, index: int) -> BFloat16[Array, "halves columns"]:
    """128 + code for codes `index` and `index + count / 2` of every unit, in rows that alternate."""
    mask, half = 2**bits - 1, unit(bits)[0] // 2
    if 16 % bits == 0:
        both = _shift_right(words[0], index * bits) & (mask << 16 | mask)
    else:
        both = _place(words, bits, index, 0) | _place(words, bits, index + half, 16)
    return pltpu.bitcast(both | OFFSET_BITS, jnp.bfloat16)


def _place(words: Int32[Array, "width units columns"], bits: int, index: int, position: int) -> Int32[Array, "units columns"]:
    """Code `index` of every unit, in the bits that start at `position`."""
    word, offset = divmod(index * bits, 32)
    found = _shift_right(words[word], offset - position)
    if offset + bits > 32:
        found |= words[word + 1] << (32 - offset + position)
    return found & ((2**bits - 1) << position)


def _shift_right(words: Int32[Array, "..."], by: int) -> Int32[Array, "..."]:
    return words << -by if by < 0 else jax.lax.shift_right_logical(words, jnp.full_like(words, by))
