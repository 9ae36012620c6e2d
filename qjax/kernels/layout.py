"""The layout that accelerator kernels read: codes in 32-bit words, their parameters unpacked, made once from a QTensor.

    words   int32 (width, units, out)   a unit is `width` words that hold `count` whole codes of consecutive inputs
    scales  (groups, out) float16, bfloat16 or float32; scales that are no floats themselves are decoded to float32
    zeros   uint8 (groups, out); or None

A QTensor packs a little-endian bit stream along the input axis, so words are its bytes, four at a time, and nothing is
computed. Code c of unit u is bits [c * bits, (c + 1) * bits) of the unit and belongs to input u * count + c. A kernel never
interleaves rows: it takes code c of many units at once, a (units, out) matrix, and multiplies it with every count-th input,
starting from the c-th:

    y = sum over c of x[:, c::count] @ decode(code c of all units)

This is the same for 1 to 8 bits; where 32 is a multiple of the bits, width is 1 and no code straddles two words.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, PyTree

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.qtensor import QTensor, nbytes, unpack_parameters


def unit(bits: int) -> tuple[int, int]:
    """(count, width): how many codes of `bits` bits fill how many 32-bit words exactly."""
    shared = math.gcd(32, bits)
    return 32 // shared, bits // shared


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("words", "scales", "zeros"),
    meta_fields=("format", "in_features"),
)
@dataclasses.dataclass(frozen=True)
class KernelWeight:
    """A quantized (in, out) weight as kernels read it; made by `prepare`, holds what its QTensor held."""

    words: Int32[Array, "width units out"]
    scales: Float[Array, "groups out"]
    zeros: Int[Array, "groups out"] | None
    format: Format
    in_features: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(in, out) of the weight that this stands for."""
        return (*self.words.shape[:-3], self.in_features, self.words.shape[-1])

    @property
    def nbytes(self) -> int:
        """Exact bytes that a kernel reads."""
        return nbytes((self.words, self.scales, self.zeros))

    @property
    def group(self) -> int:
        """How many inputs share a scale; all of them, rounded up to whole units, for channels."""
        count = unit(self.format.bits)[0]
        whole = -(-self.in_features // count) * count
        return min(self.format.group or whole, whole)


def refusal(q: QTensor) -> str | None:
    """Why a weight has no such layout, or None."""
    if q.format.is_float:
        return f"{q.format} is a cast and holds no codes"
    if not q.format.has_whole_zeros:
        return f"{q.format} has {'minima' if q.format.has_minima else 'real zero points'}, kernels read whole ones"
    return uneven(q, unit(q.format.bits)[0], "words")


def refusal_int8(weight: KernelWeight) -> str | None:
    """Why int8 inputs cannot be multiplied with a weight in integers, or None."""
    fits = weight.format.grid == "int8" and weight.format.symmetric and len(weight.scales) == 1
    return None if fits else f"int8 inputs go with symmetric int8 weights of one scale per channel, got {weight.format}"


def uneven(q: QTensor, count: int, units: str) -> str | None:
    """Why the groups of a weight are not whole units of `count` codes in one output channel, or None."""
    fmt = q.format
    if fmt.crosses_columns(q.in_features):
        return f"blocks of {fmt} cross output channels where {fmt.group} does not divide the {q.in_features} inputs"
    if fmt.granularity in ("group", "flat") and fmt.group % count and fmt.group < q.in_features:
        return f"groups of {fmt.group} are not whole {units} of {fmt.bits}-bit codes: a multiple of {count} is"
    return None


@jax.jit
def prepare(q: QTensor) -> KernelWeight:
    """The layout of a quantized (..., in, out) weight. Raises QjaxError where it has none, see `refusal`."""
    if not isinstance(q, QTensor):
        raise QjaxError(f"prepare: expected a QTensor, or a Linear of one, got {type(q).__name__}")
    if reason := refusal(q):
        raise QjaxError(f"kernels: {reason}")
    if q.shape[:-2]:
        return jax.vmap(prepare)(q)
    count, width = unit(q.format.bits)
    units = -(-q.in_features // count)
    packed = jnp.pad(q.codes, ((0, 4 * units * width - len(q.codes)), (0, 0)))
    octets = packed.reshape(units, width, 4, -1).transpose(1, 0, 3, 2)
    words = jax.lax.bitcast_convert_type(octets, jnp.int32)
    scale, zero = unpack_parameters(q)
    dtype = getattr(q.scales, "dtype", jnp.float32)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
    columns = q.shape[-1]
    scales = jnp.broadcast_to(scale.astype(dtype), (len(scale), columns))
    zeros = None if zero is None else jnp.broadcast_to(zero.astype(jnp.uint8), scales.shape)
    return KernelWeight(words, scales, zeros, q.format, q.in_features)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(weight: KernelWeight, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (..., in, out) weight in floating point, as `qjax.dequantize` of what it was made from."""
    if weight.words.ndim > 3:
        return jax.vmap(functools.partial(dequantize, dtype=dtype))(weight)
    count, _ = unit(weight.format.bits)
    codes = jnp.stack([code(weight.words, weight.format.bits, index) for index in range(count)], axis=1)
    codes = codes.reshape(-1, codes.shape[-1])[: weight.in_features].astype(jnp.uint8)
    scale, zero = (None if array is None else array.astype(jnp.float32)[:, None] for array in (weight.scales, weight.zeros))
    groups = jnp.pad(codes, ((0, -len(codes) % weight.group), (0, 0))).reshape(len(weight.scales), -1, codes.shape[1])
    values = grid.decode(groups, scale, zero, weight.format).reshape(-1, codes.shape[1])[: weight.in_features]
    return values.astype(dtype)


def code(words: Int32[Array, "width units out"], bits: int, index: int) -> Int32[Array, "units out"]:
    """Code `index` of every unit, 0 <= index < count; plain shifts and masks, for use inside kernels too."""
    word, offset = divmod(index * bits, 32)
    found = jax.lax.shift_right_logical(words[word], jnp.full_like(words[word], offset))
    if offset + bits > 32:
        found |= words[word + 1] << (32 - offset)
    return found & (2**bits - 1)


def result(shape: tuple[int, ...], dtype: DTypeLike, operands: PyTree) -> jax.ShapeDtypeStruct:
    """What a kernel returns; under shard_map it differs along every mesh axis that an operand differs along."""
    varying = frozenset().union(*map(varying_axes, jax.tree.leaves(operands)))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))


def varying_axes(array: Array) -> frozenset[str]:
    """Mesh axes that a value inside shard_map differs along."""
    return jax.typeof(array).manual_axis_type.varying


def split_inputs(x: Float[Array, "rows in"], bits: int) -> Float[Array, "count rows units"]:
    """x[:, c::count] for every c, its inputs padded with zeros to whole units."""
    count, _ = unit(bits)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count)))
    return x.reshape(len(x), -1, count).transpose(2, 0, 1)


def join_inputs(parts: Float[Array, "count rows units"], inputs: int) -> Float[Array, "rows in"]:
    """The inverse of `split_inputs`, without the padding."""
    return parts.transpose(1, 2, 0).reshape(parts.shape[1], -1)[:, :inputs]
