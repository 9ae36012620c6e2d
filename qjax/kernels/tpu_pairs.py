"""A tile of few rows times packed integers of up to 7 bits, two codes at a time and without scaling a single weight.

    x W = sum over groups g of scale_g * (x_g (128 + code_g) - (128 + zero_g) sum(x_g))

For few rows the vector unit, which decodes, is slower than memory unless it does little for a weight. The bits 0x4300 | code
are the bfloat16 number 128 + code, exactly, for code < 128; a 32-bit word holds two of them. So a shift, a mask and an OR make
two weights, where decoding to scaled values takes a shift, a mask, a conversion, a subtraction, a product and a rounding for
each. The scale multiplies sums of a whole group, in float32: more exact than weights that are rounded to bfloat16.

By the compiler's schedule for v5e, int4-g128 takes 703 instructions for a tile of 4096 x 256 this way and 1627 the other way;
reading the tile takes about 980 cycles. No TPU has run it yet.

The matrix unit wants long sums, at least 128 inputs. Groups that are shorter meet in one product: x stands there once for each,
with zeros outside its group. Such a block of groups has its inputs in the order [code in the first half of a unit][unit][half].
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
    if fmt.grid not in INTEGERS or fmt.bits == 8 or fmt.codebook:
        return False
    share = shared_groups(fmt.bits, part)
    return units % (share * part) == 0 and (share == 1 or part & (part - 1) == 0) and share * part % 8 == 0


def shared_groups(bits: int, part: int) -> int:
    """How many groups of `part` units one product takes: 8 units and 128 inputs, or more."""
    return next(
        share for share in (1, 2, 4, 8) if share == 8 or (share * part % 8 == 0 and share * part * unit(bits)[0] >= 128)
    )


def order_inputs(x: Float[Array, "rows in"], bits: int, part: int) -> Float[Array, "rows in"]:
    """x with the inputs of each block of groups in the order that `product` takes; `part` units share a scale."""
    count, _ = unit(bits)
    return x.reshape(len(x), -1, part * shared_groups(bits, part), 2, count // 2).transpose(0, 1, 4, 2, 3).reshape(x.shape)


def product(
    x: BFloat16[Array, "rows inputs"],
    words: Int32[Array, "width units columns"],
    scale: Float[Array, "groups columns"],
    zero: Float[Array, "groups columns"] | None,
    bits: int,
) -> Float[Array, "rows columns"]:
    """x W of one tile in float32, inside a kernel; x in the order of `order_inputs`."""
    count, _ = unit(bits)
    part, rows = words.shape[1] // len(scale), len(x)
    share = shared_groups(bits, part)
    units = share * part
    pairs = [_pair(words, bits, index) for index in range(count // 2)]
    total = jnp.zeros((rows, words.shape[-1]), jnp.float32)
    for block in range(len(scale) // share):
        tile = jnp.concatenate([pair[2 * units * block : 2 * units * (block + 1)] for pair in pairs])
        inputs = x[:, block * units * count : (block + 1) * units * count].astype(jnp.float32)
        apart = [_only_group(inputs, i, part, units) for i in range(share)]
        with_offset = jnp.dot(jnp.concatenate(apart).astype(x.dtype), tile, preferred_element_type=jnp.float32)
        for i, alone in enumerate(apart):
            group = slice(block * share + i, block * share + i + 1)
            middle = OFFSET + (2.0 ** (bits - 1) if zero is None else zero[group])
            sums = with_offset[i * rows : (i + 1) * rows] - middle * jnp.sum(alone, axis=1, keepdims=True)
            total += scale[group] * sums
    return total


def _only_group(inputs: Float[Array, "rows inputs"], group: int, part: int, units: int) -> Float[Array, "rows inputs"]:
    """The inputs of one group of a block, zeros in place of the others; `part` and `units`, if they differ, are powers of 2."""
    if part == units:
        return inputs
    index = (jax.lax.broadcasted_iota(jnp.int32, inputs.shape, 1) >> 1) & (units - 1)
    return jnp.where((index >= group * part) & (index < (group + 1) * part), inputs, 0.0)


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
