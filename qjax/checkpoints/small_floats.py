"""FP8 and FP4 weights, which several libraries store alike: bytes of floats (out, in), two a byte for FP4, the first one low.

Our codes of a codebook are numbers in the order of its values, so the one zero stands for 0 and -0.
"""

import dataclasses

import numpy as np

from qjax.checkpoints.modules import SCALE_TYPES, from_bits
from qjax.checkpoints.tensors import Header
from qjax.errors import QjaxError
from qjax.file_scales import Tiles
from qjax.formats import Format, parse_format

TILE = Tiles("float32").width
PLACES = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0], np.uint8)  # of E2M1's codes, in the order of values
PAIRS = (PLACES[:, None] << 4 | PLACES).reshape(-1)  # the same, two a byte


def fp8_codes(stored: np.ndarray) -> np.ndarray:
    """Packed codes (in, out) of E4M3 bytes (out, in). Raises QjaxError for NaN."""
    magnitude = stored & np.uint8(127)
    if (magnitude == 127).any():
        raise QjaxError("NaN among the FP8 weights; get an intact checkpoint")
    codes = np.where(stored > 127, 126 - magnitude, 126 + magnitude).astype(np.uint8)
    return np.ascontiguousarray(codes.T)


def fp4_codes(stored: np.ndarray, in_features: int) -> np.ndarray:
    """Packed codes (bytes, out) of E2M1 pairs (out, in / 2)."""
    codes = PAIRS[stored]
    if in_features % 2:
        codes[:, -1] &= 15
    return from_bits(codes, 4, in_features)


def e8m0(stored: np.ndarray) -> np.ndarray:
    """Scales (groups, out) of bytes (out, groups). Raises QjaxError for NaN, 2^126 and 2^127, by which E2M1's 4 and 6 are no
    float32 numbers.
    """
    if (stored > 252).any():
        raise QjaxError("NaN or 2^126 and more among the scales, with which weights overflow; get an intact checkpoint")
    return np.ascontiguousarray(stored.T)


def e4m3(stored: np.ndarray) -> np.ndarray:
    """Scales (groups, out) of E4M3 bytes (out, groups). Raises QjaxError for NaN."""
    if ((stored & 127) == 127).any():
        raise QjaxError("NaN among the scales; get an intact checkpoint")
    return np.ascontiguousarray(stored.T)


def tiled(block: object, scales: Header | None) -> Format:
    """FP8 in tiles of `block` (outputs, inputs), with scales of a tensor's type. Raises QjaxError for other tiles than ours."""
    if list(block) != [TILE, TILE] if isinstance(block, list | tuple) else True:
        raise QjaxError(f"FP8 in tiles of {block}; supported: [{TILE}, {TILE}]")
    kind = SCALE_TYPES.get(scales.dtype, "fp32") if scales else "fp32"
    if kind == "fp16":
        raise QjaxError("FP8 in tiles with float16 scales; supported: float32 and bfloat16")
    return dataclasses.replace(parse_format(f"fp8_e4m3-g{TILE}"), scales=f"{kind}x{TILE}")
