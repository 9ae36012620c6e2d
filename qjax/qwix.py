"""Between QTensor and qwix's QArray: the same codes, scales and zero points, where both have the format.

    QArray: qvalue (in, out), scale, zero_point (groups, out), in a multiple of groups; value = (qvalue - zero_point) scale

qwix keeps integers signed, a byte or half one each, and scales as they are to be multiplied: `to_qwix` gives float32 ones, and
`from_qwix` stores them in float32, so that both ways are exact. qwix: google/qwix, its `_src/core/qarray.py`.
"""

import importlib

import jax.numpy as jnp

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.qtensor import QTensor, from_codes, unpack_codes, unpack_parameters

TYPES = {4: "int4", 8: "int8"}  # codes of so many bits are what qwix calls


def to_qwix(q: QTensor) -> object:
    """A quantized (in, out) weight as qwix's QArray.

    Raises QjaxError where qwix is not installed, and for formats that it has not: other than integers of 4 or 8 bits, groups
    that do not divide the inputs or go over the ends of columns, and zero points that are no codes.
    """
    make, fmt = _qarray("to_qwix"), q.format
    rows = q.codes.ndim == 2 and not fmt.is_flat and not fmt.is_float and fmt.parameter_shape(*q.shape)
    fits = rows and fmt.bits in TYPES and fmt.codebook is None and not fmt.has_minima and q.in_features % rows[0] == 0
    if not fits or (fmt.is_affine and fmt.zeros != "codes"):
        raise QjaxError(f"to_qwix: qwix has no {fmt} of {q.shape}; it has int4 and int8 with groups that divide the inputs")
    middle = 2 ** (fmt.bits - 1)
    scale, zero = unpack_parameters(q)
    codes = (unpack_codes(q).astype(jnp.int16) - middle).astype(TYPES[fmt.bits])
    zero = None if zero is None else (zero - middle).astype(TYPES[fmt.bits])
    return make(codes, scale, zero)


def from_qwix(array: object) -> QTensor:
    """qwix's QArray of a (in, out) weight as a QTensor in int4 or int8, with float32 scales.

    Raises QjaxError where it is none of these, or its scales change along the outputs in tiles.
    """
    name = jnp.dtype(getattr(array, "qtype", None) or "float32").name
    shapes = [getattr(part, "shape", None) for part in (array.qvalue, array.scale, array.zero_point) if part is not None]
    (rows, columns), groups = shapes[0] if len(shapes[0]) == 2 else (0, 0), shapes[1]
    same = all(shape == groups for shape in shapes[1:]) and len(groups) == 2 and groups[1] in (1, columns)
    if name not in TYPES.values() or not rows or not same or rows % groups[0]:
        told = ", ".join(map(str, shapes))
        raise QjaxError(f"from_qwix: expected int4 or int8 (in, out) with scales (groups, out or 1), got {name} {told}")
    bits = next(bits for bits, known in TYPES.items() if known == name)
    kind = "" if array.zero_point is not None else "-sym"
    fmt = parse_format(f"{name}-g{rows // groups[0]}{kind}-fp32")
    middle = 2 ** (bits - 1)
    spread = lambda part: jnp.broadcast_to(part.astype(jnp.float32), (groups[0], columns))  # noqa: E731
    scale, zero = spread(array.scale), None if array.zero_point is None else spread(array.zero_point) + middle
    codes = (array.qvalue.astype(jnp.int16) + middle).astype(jnp.uint8)
    return from_codes(codes, grid.Parameters(scale, scale, zero, scale), fmt)


def _qarray(function: str) -> type:
    try:
        return importlib.import_module("qwix").QArray
    except ImportError:
        raise QjaxError(f"{function} needs qwix; pip install 'qjax[qwix]'") from None
