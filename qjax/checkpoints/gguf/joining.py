"""Blocks of GGUF files of what they hold: the inverse of `blocks.py`, and which type of block holds a format of ours.

The formats of the table there are written as they were read, byte for byte. Symmetric integers of 4, 5 and 8 bits with float16
scales of longer groups, or of whole channels, are Q4_0, Q5_0 and Q8_0 whose blocks repeat the scale, and those of 4 and 5 bits
with minima (`m16`) Q4_1 and Q5_1 that repeat both: the same weights, in more bytes. Integers with zero points are not written:
a block holds the float16 product of zero point and scale, which mostly is another number.
"""

import jax
import numpy as np

from qjax.checkpoints.gguf.blocks import KINDS, MXFP4_CODES, Kind, Parts
from qjax.checkpoints.modules import unpack
from qjax.file_scales import SCALES, SuperBlocks
from qjax.formats import INTEGERS, Format, parse_format
from qjax.qtensor import QTensor

EXACT = {kind.format: number for number, kind in KINDS.items()}
EXACT |= dict.fromkeys(("mxfp4_even", "mxfp4_ceil"), EXACT["mxfp4"])  # other rules of rounding, the same codes
REPEATED = {("none", 4): 2, ("none", 5): 6, ("none", 8): 8, ("m16", 4): 3, ("m16", 5): 7}  # of Q4_0, Q5_0, Q8_0, Q4_1, Q5_1
BLOCK = 32  # of these
MXFP4_PLACES = np.array([np.argmax(code == MXFP4_CODES) for code in range(15)], np.uint8)


def kind_of(fmt: Format, in_features: int) -> int | str:
    """The number of the type of blocks that holds rows of so many weights, or why none does."""
    number = EXACT.get(str(fmt))
    repeats = fmt.scales == "fp16" and fmt.granularity in ("group", "channel") and fmt.group % BLOCK == 0
    if number is None and repeats and fmt.grid in INTEGERS:
        number = REPEATED.get((fmt.zeros, fmt.bits))
    if number is None:
        return f"{fmt} is no type of blocks"
    if in_features % KINDS[number].weights:
        return f"rows of {in_features} weights, no whole blocks of {KINDS[number].name}, of {KINDS[number].weights}"
    return number


def nearest(fmt: Format, in_features: int) -> Format | None:
    """A format that fits, and that weights can be rounded to; None where rows are no whole blocks."""
    if in_features % BLOCK:
        return None
    bits = next((bits for bits in (4, 5, 8) if bits >= fmt.bits), 8)
    if fmt.is_affine and ("m16", bits) in REPEATED:
        return parse_format(f"int{bits}-g{BLOCK}-m16")
    size = fmt.group if fmt.granularity == "group" and fmt.group % BLOCK == 0 else BLOCK
    bound = f"-{fmt.bound}" if fmt.bound in ("max", "full") else ""
    return parse_format(f"int{bits}-g{size}-sym{bound}")


def rows_of(number: int, q: QTensor) -> np.ndarray:
    """uint8 (out, bytes): the weight as rows of blocks of a type that `kind_of` tells, the members of a stack one after the
    other.
    """
    if q.codes.ndim > 2:
        parts, tree = jax.tree.flatten(q)
        return np.concatenate([rows_of(number, tree.unflatten(each)) for each in zip(*map(np.asarray, parts), strict=True)])
    kind, (inputs, rows) = KINDS[number], q.shape
    codes = unpack(np.ascontiguousarray(np.asarray(q.codes).T), q.format.bits, inputs)
    scales = _numbers(q.scales, q, kind)
    minima = None if q.zeros is None else _numbers(q.zeros, q, kind)
    parts = Parts(codes.reshape(rows, -1, kind.weights), scales, minima)
    return JOINED[kind.name](parts).reshape(rows, -1)


def _numbers(stored: np.ndarray | SuperBlocks, q: QTensor, kind: Kind):
    """Scales or minima by blocks, as `Parts` has them."""
    (inputs, rows), fmt = q.shape, q.format
    if isinstance(stored, SuperBlocks):
        groups = inputs // fmt.group
        codes = unpack(np.asarray(stored.codes)[None], SCALES[fmt.scales].code_bits, rows * groups)
        blocks = inputs // kind.weights
        return codes.reshape(rows, blocks, -1), np.asarray(stored.scales).reshape(rows, blocks, 1)
    by_group = np.asarray(stored).T
    times = (fmt.group or inputs) // kind.weights
    return np.repeat(by_group, times, axis=1)[:, : inputs // kind.weights, None]


def _shift(codes: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Bytes of codes of 4, 2 or 1 bits, of every `run` bytes the lowest bits first, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = codes.reshape(*codes.shape[:-1], -1, 8 // bits, run)
    return np.bitwise_or.reduce(runs << shifts, axis=-2).reshape(*codes.shape[:-1], -1)


def _bytes(number: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(number, "<f2").view(np.uint8)


def _joined(*fields: np.ndarray) -> np.ndarray:
    return np.concatenate(fields, axis=-1)


def _low(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes & np.uint8(2**bits - 1)


def _four_bits(parts: Parts) -> np.ndarray:
    minima = [] if parts.minima is None else [_bytes(parts.minima)]
    return _joined(_bytes(parts.scales), *minima, _shift(parts.codes, 16, 4))


def _five_bits(parts: Parts) -> np.ndarray:
    minima = [] if parts.minima is None else [_bytes(parts.minima)]
    high = np.packbits(parts.codes >> 4, axis=-1, bitorder="little")
    return _joined(_bytes(parts.scales), *minima, high, _shift(_low(parts.codes, 4), 16, 4))


def _q8_0(parts: Parts) -> np.ndarray:
    return _joined(_bytes(parts.scales), parts.codes ^ np.uint8(128))


def _mxfp4(parts: Parts) -> np.ndarray:
    return _joined(parts.scales, _shift(MXFP4_PLACES[parts.codes], 16, 4))


def _q2_k(parts: Parts) -> np.ndarray:
    (scales, d), (minima, dmin) = parts.scales, parts.minima
    return _joined(scales | minima << np.uint8(4), _shift(parts.codes, 32, 2), _bytes(d), _bytes(dmin))


def _q3_k(parts: Parts) -> np.ndarray:
    scales, d = parts.scales
    fields = (_shift(_low(scales, 4), 8, 4), _shift(scales >> 4, 4, 2))
    return _joined(_shift(parts.codes >> 2, 32, 1), _shift(_low(parts.codes, 2), 32, 2), *fields, _bytes(d))


def _six_bits(parts: Parts) -> np.ndarray:
    """d, dmin, and scales and minima as Q4_K and Q5_K have them."""
    (scales, d), (minima, dmin) = parts.scales, parts.minima
    first = [each[..., :4] | each[..., 4:] >> 4 << np.uint8(6) for each in (scales, minima)]
    rest = _low(scales[..., 4:], 4) | _low(minima[..., 4:], 4) << np.uint8(4)
    return _joined(_bytes(d), _bytes(dmin), *first, rest)


def _q4_k(parts: Parts) -> np.ndarray:
    return _joined(_six_bits(parts), _shift(parts.codes, 32, 4))


def _q5_k(parts: Parts) -> np.ndarray:
    return _joined(_six_bits(parts), _shift(parts.codes >> 4, 32, 1), _shift(_low(parts.codes, 4), 32, 4))


def _q6_k(parts: Parts) -> np.ndarray:
    scales, d = parts.scales
    low, high = _shift(_low(parts.codes, 4), 64, 4), _shift(parts.codes >> 4, 32, 2)
    return _joined(low, high, scales ^ np.uint8(128), _bytes(d))


JOINED = {
    **dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL"), _four_bits),
    **dict.fromkeys(("Q5_0", "Q5_1"), _five_bits),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}
