"""QTensor: a quantized weight as a pytree, and its way back to floating point.

    codes   uint8 (bytes, out): codes packed along the input axis (`packing.py`); the weight itself for fp32, bf16, fp16
    scales  as the format's codec stores them (`scales.py`): mostly (groups, out), flat for flat formats; or None
    zeros   uint8 (groups, bytes): zero points packed along the output axis; real ones and minima (groups, out), flat for flat
            formats; or None
    format, in_features   static

Every field may carry leading axes (a stack of layers under vmap or scan); no full shape is kept, so none goes stale.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, UInt8

from qjax import flax_state, grid, packing
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.scales import laid

FLOAT_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


@flax_state.registered
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "zeros"),
    meta_fields=("format", "in_features"),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized (in, out) weight. Build it with a rounding method, or from codes with `from_codes`."""

    codes: jax.Array
    scales: grid.StoredScales | None
    zeros: jax.Array | None
    format: Format
    in_features: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., in, out) of the weight that this stands for."""
        return (*self.codes.shape[:-2], self.in_features, self.codes.shape[-1])

    @property
    def nbytes(self) -> int:
        """Exact bytes of codes, scales and zero points."""
        return nbytes((self.codes, self.scales, self.zeros))

    @property
    def bits_per_weight(self) -> float:
        """Exact bits per weight, everything included."""
        weights = self.in_features * self.codes.size // self.codes.shape[-2]
        return 8 * self.nbytes / weights


def from_codes(codes: UInt8[Array, "in out"], parameters: grid.Parameters, fmt: Format) -> QTensor:
    """Packs unpacked codes with the parameters of their groups."""
    zeros = None
    if fmt.is_affine:
        zeros = fmt.zero_codec.store(parameters.zero, fmt.bits, fmt.is_flat)
    return QTensor(packing.pack(codes, fmt.bits), parameters.stored, zeros, fmt, codes.shape[0])


def unpack_codes(q: QTensor) -> UInt8[Array, "in out"]:
    """Codes, one per byte."""
    return packing.unpack(q.codes, q.format.bits, q.in_features)


def unpack_parameters(q: QTensor) -> tuple[Float[Array, "groups channels"], Float[Array, "groups channels"] | None]:
    """float32 scales and zero points, or minima, (or None) of shape fmt.parameter_shape(in, out)."""
    shape = q.format.parameter_shape(*q.shape)
    scale = grid.load_scales(q.scales, q.format, shape)
    if not q.format.is_affine:
        return scale, None
    return scale, q.format.zero_codec.load(q.zeros, q.format.bits, shape, q.format.is_flat)


def columns(q: QTensor, index: np.ndarray) -> QTensor:
    """The weight of some output columns: the same codes, and the same scales where each belongs to one column; where what is
    stored of scales spans several, the float32 numbers that they stand for.

    Raises QjaxError where groups go over the ends of columns, and for minima that are stored together.
    """
    fmt, (rows, width) = q.format, q.shape
    if fmt.is_float:
        return dataclasses.replace(q, codes=q.codes[:, index])
    if fmt.crosses_columns(rows):
        raise QjaxError(f"blocks of {fmt.group} go over the ends of columns of {rows} weights, which cannot be taken apart")
    if fmt.is_read_only:
        raise QjaxError(f"a weight in {fmt} cannot be taken apart: its minima are stored together")
    shape = fmt.parameter_shape(rows, width)
    if fmt.granularity == "tensor":
        return dataclasses.replace(q, codes=q.codes[:, index])
    scales = fmt.scale_codec.columns(q.scales, shape, index, fmt.is_flat)
    if scales is None:
        scales = laid(grid.load_scales(q.scales, fmt, shape)[:, index], fmt.is_flat)
        fmt = dataclasses.replace(fmt, scales="fp32")
    zeros = q.zeros
    if fmt.is_affine:
        zero = fmt.zero_codec.load(zeros, fmt.bits, shape, fmt.is_flat)[:, index]
        zeros = fmt.zero_codec.store(zero, fmt.bits, fmt.is_flat)
    return QTensor(q.codes[:, index], scales, zeros, fmt, rows)


def times_power(q: QTensor, exponent: int | Int[Array, ""]) -> QTensor:
    """2^exponent times a quantized weight: the same codes, and scales and minima as far as their type holds them
    (`scales.Floats.times`).

    Not for casts, which have no scales.
    """
    zeros = q.format.zero_codec.times(q.zeros, exponent) if q.format.is_affine else None
    return dataclasses.replace(q, scales=q.format.scale_codec.times(q.scales, exponent), zeros=zeros)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (..., in, out) weight in floating point; values are computed in float32, then cast to `dtype`."""
    if q.codes.ndim > 2:
        return jax.vmap(functools.partial(dequantize, dtype=dtype))(q)
    if q.format.is_float:
        return q.codes.astype(dtype)
    scale, zero = unpack_parameters(q)
    codes = grid.to_groups(unpack_codes(q), q.format)
    values = grid.decode(codes, scale[:, None], None if zero is None else zero[:, None], q.format)
    return grid.from_groups(values, q.format, *q.shape).astype(dtype)


def nbytes(tree: PyTree) -> int:
    """Exact bytes of all arrays in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
