"""The types of tensors in GGUF files: how many weights a block has, where its codes and scales lie, and our format of the same.

    type     bytes   weights   a value                          ours
    Q4_0        18        32   d (q - 8)                        int4-g32-sym-full
    Q4_1        20        32   d q + m                          int4-g32-m16
    Q5_0        22        32   d (q - 16)                       int5-g32-sym-full
    Q5_1        24        32   d q + m                          int5-g32-m16
    Q8_0        34        32   d q                              int8-g32-sym-max
    Q2_K        84       256   (d s) q - dmin m, 16 groups      int2-g16-k4m-k4
    Q3_K       110       256   (d (s - 32)) (q - 4)             int3-g16-sym-full-k6s
    Q4_K       144       256   (d s) q - dmin m, 8 groups       int4-g32-k6m-k6
    Q5_K       176       256   (d s) q - dmin m, 8 groups       int5-g32-k6m-k6
    Q6_K       210       256   (d s) (q - 32), s of 8 bits      int6-g16-sym-full-k8s
    IQ4_NL      18        32   d v[q]                           iq4_nl-g32-fp16
    MXFP4       17        32   2^(e - 127) v[q]                 mxfp4

d, dmin, m: float16. Layouts: ggml's ggml-common.h and ggml-quants.c. Codes, scales and minima stay what they are and only
change places: each row of a file is an output channel, whose codes stand along the input axis here, packed by `packing.py`.
Products of d, s and q have at most 24 binary digits, so values are those of ggml's own float32 arithmetic, bit for bit.
Exceptions: FP4's -0 becomes 0, and a scale of 2^-127 reads as 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax import packing
from qjax.checkpoints.gguf.container import TensorInfo
from qjax.errors import QjaxError
from qjax.file_scales import SCALES, SuperBlocks
from qjax.formats import parse_format
from qjax.qtensor import QTensor

FLOATS = {0: ("F32", np.dtype(np.float32)), 1: ("F16", np.dtype(np.float16)), 30: ("BF16", np.dtype(ml_dtypes.bfloat16))}
OTHERS = {  # which are not read
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4"},
}
MXFP4_CODES = np.array([*range(7, 15), *range(7, -1, -1)], np.uint8)  # of sign and magnitude: our codes are sorted
NAN_BYTE = 255  # of E8M0


class Parts(NamedTuple):
    """What (..., bytes) blocks hold: codes (..., weights) uint8; scales and minima (..., groups) float16 or bytes, or
    (codes, scales) of a super-block: (..., groups) uint8 and (..., 1) float16.
    """

    codes: np.ndarray
    scales: np.ndarray | tuple[np.ndarray, np.ndarray]
    minima: np.ndarray | tuple[np.ndarray, np.ndarray] | None = None


class Kind(NamedTuple):
    """A type of blocks. format: of the same codes here. split: what a block holds."""

    name: str
    weights: int
    nbytes: int
    format: str
    split: Callable[[np.ndarray], Parts]


def _cut(blocks: np.ndarray, *widths: int) -> list[np.ndarray]:
    return np.split(blocks, np.cumsum(widths)[:-1], axis=-1)


def _half(field: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(field).view(np.float16)


def _shifted(field: np.ndarray, run: int, bits: int) -> np.ndarray:
    """(..., codes) of `bits` bits: of every `run` bytes the lowest first, then the next. For one of 4 or 2 in a byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = field.reshape(*field.shape[:-1], -1, 1, run)
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(*field.shape[:-1], -1)


def _bits(field: np.ndarray) -> np.ndarray:
    """(..., codes): bit j of byte i is of weight j times the bytes plus i."""
    return _shifted(field, field.shape[-1], 1)


def _with_high(low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    return low | (high << np.uint8(bits))


def _q4_0(blocks):
    d, qs = _cut(blocks, 2, 16)
    return Parts(_shifted(qs, 16, 4), _half(d))


def _q4_1(blocks):
    d, m, qs = _cut(blocks, 2, 2, 16)
    return Parts(_shifted(qs, 16, 4), _half(d), _half(m))


def _five_bits(high, low):
    return _with_high(_shifted(low, 16, 4), np.unpackbits(high, axis=-1, bitorder="little"), 4)


def _q5_0(blocks):
    d, *codes = _cut(blocks, 2, 4, 16)
    return Parts(_five_bits(*codes), _half(d))


def _q5_1(blocks):
    d, m, *codes = _cut(blocks, 2, 2, 4, 16)
    return Parts(_five_bits(*codes), _half(d), _half(m))


def _q8_0(blocks):
    d, qs = _cut(blocks, 2, 32)
    return Parts(qs ^ np.uint8(128), _half(d))


def _q2_k(blocks):
    scales, qs, d, dmin = _cut(blocks, 16, 64, 2, 2)
    return Parts(_shifted(qs, 32, 2), (scales & np.uint8(15), _half(d)), (scales >> np.uint8(4), _half(dmin)))


def _q3_k(blocks):
    high, qs, scales, d = _cut(blocks, 32, 64, 12, 2)
    low, rest = _cut(scales, 8, 4)
    scales = _with_high(_shifted(low, 8, 4), _shifted(rest, 4, 2), 4)
    return Parts(_with_high(_shifted(qs, 32, 2), _bits(high), 2), (scales, _half(d)))


def _six_bits(field):
    """Scales and minima of Q4_K and Q5_K: four of each with six bits, then four whose upper two are with the first."""
    s, m, low = _cut(field, 4, 4, 4)
    further = [
        _with_high(low_bits, first >> np.uint8(6), 4) for low_bits, first in ((low & np.uint8(15), s), (low >> np.uint8(4), m))
    ]
    return (np.concatenate([first & np.uint8(63), more], axis=-1) for first, more in zip((s, m), further, strict=True))


def _q4_k(blocks):
    d, dmin, field, qs = _cut(blocks, 2, 2, 12, 128)
    scales, minima = _six_bits(field)
    return Parts(_shifted(qs, 32, 4), (scales, _half(d)), (minima, _half(dmin)))


def _q5_k(blocks):
    d, dmin, field, high, qs = _cut(blocks, 2, 2, 12, 32, 128)
    scales, minima = _six_bits(field)
    return Parts(_with_high(_shifted(qs, 32, 4), _bits(high), 4), (scales, _half(d)), (minima, _half(dmin)))


def _q6_k(blocks):
    low, high, scales, d = _cut(blocks, 128, 64, 16, 2)
    return Parts(_with_high(_shifted(low, 64, 4), _shifted(high, 32, 2), 4), (scales ^ np.uint8(128), _half(d)))


def _mxfp4(blocks):
    e, qs = _cut(blocks, 1, 16)
    return Parts(MXFP4_CODES[_shifted(qs, 16, 4)], e)


KINDS = {
    2: Kind("Q4_0", 32, 18, "int4-g32-sym-full", _q4_0),
    3: Kind("Q4_1", 32, 20, "int4-g32-m16", _q4_1),
    6: Kind("Q5_0", 32, 22, "int5-g32-sym-full", _q5_0),
    7: Kind("Q5_1", 32, 24, "int5-g32-m16", _q5_1),
    8: Kind("Q8_0", 32, 34, "int8-g32-sym-max", _q8_0),
    10: Kind("Q2_K", 256, 84, "int2-g16-k4m-k4", _q2_k),
    11: Kind("Q3_K", 256, 110, "int3-g16-sym-full-k6s", _q3_k),
    12: Kind("Q4_K", 256, 144, "int4-g32-k6m-k6", _q4_k),
    13: Kind("Q5_K", 256, 176, "int5-g32-k6m-k6", _q5_k),
    14: Kind("Q6_K", 256, 210, "int6-g16-sym-full-k8s", _q6_k),
    20: Kind("IQ4_NL", 32, 18, "iq4_nl-g32-fp16", _q4_0),
    39: Kind("MXFP4", 32, 17, "mxfp4", _mxfp4),
}


def row_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor's last axis. Raises QjaxError for a type that is not read, or rows that are no whole blocks."""
    inputs = info.shape[-1]
    if info.kind in FLOATS:
        return inputs * FLOATS[info.kind][1].itemsize
    if info.kind not in KINDS:
        names = [name for name, _ in FLOATS.values()] + [kind.name for kind in KINDS.values()]
        what = OTHERS.get(info.kind, f"of the type {info.kind}")
        raise QjaxError(f"{info.name} is {what}, which is not read; read are {', '.join(names)}")
    kind = KINDS[info.kind]
    if inputs % kind.weights:
        raise QjaxError(f"{info.name} has rows of {inputs} weights, no whole blocks of {kind.name}, of {kind.weights}")
    return inputs // kind.weights * kind.nbytes


def quantized(kind: Kind, rows: np.ndarray) -> QTensor:
    """The (in, out) weight of uint8 rows (out, bytes), with their codes and scales, or a stack of them of (count, out, bytes).
    Raises QjaxError for scales that are not finite.
    """
    if rows.ndim > 2:
        return jax.tree.map(lambda *parts: jnp.stack(parts), *[quantized(kind, each) for each in rows])
    fmt = parse_format(kind.format)
    codes, scales, minima = kind.split(rows.reshape(len(rows), -1, kind.nbytes))
    for part in (scales, minima):
        numbers = part[1] if isinstance(part, tuple) else part
        if numbers is not None and not (np.isfinite(numbers) if numbers.dtype == np.float16 else numbers != NAN_BYTE).all():
            raise QjaxError("NaN or infinite scales")
    codes = codes.reshape(len(rows), -1)
    stored, zeros = (_stored(part, len(rows), codec) for part, codec in ((scales, fmt.scales), (minima, fmt.zeros)))
    return QTensor(jnp.asarray(packed(codes, fmt.bits)), stored, zeros, fmt, codes.shape[1])


def _stored(part, rows, codec):
    if part is None:
        return None
    if not isinstance(part, tuple):
        return jnp.asarray(part.reshape(rows, -1).T)
    bits = SCALES[codec.removesuffix("m")].code_bits
    return SuperBlocks(jnp.asarray(packed(part[0].reshape(1, -1), bits)[:, 0]), jnp.asarray(part[1].reshape(-1)))


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes (out, in) as (bytes, out): `packing.pack` of the transpose, on the host."""
    count, width = packing.unit(bits)
    if rest := -codes.shape[1] % count:
        codes = np.pad(codes, ((0, 0), (0, rest)))
    units = codes.reshape(len(codes), -1, count)
    found = np.zeros((*units.shape[:2], width), np.uint8)
    for byte in range(width):
        for code in range(count):
            left = code * bits - 8 * byte  # where a code lands in this byte
            if -bits < left < 8:
                part = units[..., code]
                found[..., byte] |= part << np.uint8(left) if left >= 0 else part >> np.uint8(-left)
    return np.ascontiguousarray(found.reshape(len(codes), -1).T)
