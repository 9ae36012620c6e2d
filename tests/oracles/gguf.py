"""Values of GGUF's blocks, one weight after another as ggml-quants.c has them, in float64 (then exact but for one rounding)."""

import numpy as np

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def decode(name: str, block: bytes) -> np.ndarray:
    """float32 values of one block."""
    weights = 256 if name.endswith("_K") else 32
    return np.array([VALUES[name](block, i) for i in range(weights)], np.float32)


def _half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], np.float16)[0])


def _nibble(block: bytes, at: int, i: int) -> int:
    """Of 16 bytes whose lower halves are the first 16 codes."""
    return block[at + i % 16] >> 4 * (i // 16) & 15


def _bit(block: bytes, at: int, i: int) -> int:
    return block[at + i // 8] >> i % 8 & 1


def _six_bits(field: bytes, j: int) -> tuple[int, int]:
    """get_scale_min_k4."""
    if j < 4:
        return field[j] & 63, field[j + 4] & 63
    return (field[j + 4] & 15) | (field[j - 4] >> 6) << 4, (field[j + 4] >> 4) | (field[j] >> 6) << 4


def _q2_k(b: bytes, i: int) -> float:
    q = b[16 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    scale = b[i // 16]
    return _half(b, 80) * (scale & 15) * q - _half(b, 82) * (scale >> 4)


def _q3_k(b: bytes, i: int) -> float:
    q = b[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    q -= 0 if b[i % 32] >> i // 32 & 1 else 4
    scales, j = b[96:108], i // 16
    low = scales[j] & 15 if j < 8 else scales[j - 8] >> 4
    return _half(b, 108) * ((low | (scales[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32) * q


def _with_minima(b: bytes, i: int, q: int) -> float:
    scale, minimum = _six_bits(b[4:16], i // 32)
    return _half(b, 0) * scale * q - _half(b, 2) * minimum


def _q4_k(b: bytes, i: int) -> float:
    return _with_minima(b, i, b[16 + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15)


def _q5_k(b: bytes, i: int) -> float:
    q = b[48 + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15
    return _with_minima(b, i, q | (b[16 + i % 32] >> i // 32 & 1) << 4)


def _q6_k(b: bytes, i: int) -> float:
    half, part, lane = i // 128, i % 128 // 32, i % 32
    low = b[64 * half + lane + 32 * (part % 2)] >> 4 * (part // 2) & 15
    high = b[128 + 32 * half + lane] >> 2 * part & 3
    scale = np.frombuffer(b[192:208], np.int8)[i // 16]
    return _half(b, 208) * float(scale) * ((low | high << 4) - 32)


def _mxfp4(b: bytes, i: int) -> float:
    code = _nibble(b, 1, i)
    return 2.0 ** (b[0] - 127) * FP4[code & 7] * (-1 if code & 8 else 1)


VALUES = {
    "Q4_0": lambda b, i: _half(b, 0) * (_nibble(b, 2, i) - 8),
    "Q4_1": lambda b, i: _half(b, 0) * _nibble(b, 4, i) + _half(b, 2),
    "Q5_0": lambda b, i: _half(b, 0) * ((_nibble(b, 6, i) | _bit(b, 2, i) << 4) - 16),
    "Q5_1": lambda b, i: _half(b, 0) * (_nibble(b, 8, i) | _bit(b, 4, i) << 4) + _half(b, 2),
    "Q8_0": lambda b, i: _half(b, 0) * float(np.int8(np.uint8(b[2 + i]))),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": lambda b, i: _half(b, 0) * IQ4_NL[_nibble(b, 2, i)],
    "MXFP4": _mxfp4,
}
