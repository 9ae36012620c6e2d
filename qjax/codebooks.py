"""Codebooks: the values that codes of a grid stand for, and where one ends and the next begins.

NF4: Dettmers et al. 2023 (arXiv 2305.14314); FP8: Micikevicius et al. 2022 (2209.05433); FP4-E2M1: OCP MX specification 1.0.

NumPy is imported where values are made: formats have names and sizes without.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Normal quantiles: 8 positive and 7 negative ones evenly spaced in probability, and zero (QLoRA, appendix E).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # llama.cpp's kvalues_iq4nl
FP4_BNB_MAGNITUDES = (0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Sorted values; a weight divided by its scale gets the code = number of thresholds strictly below it.

    `bound` is the value that the largest magnitude of a group is scaled to.
    """

    values: tuple[float, ...]
    thresholds: tuple[float, ...]
    bound: float


def middle_codebook(values: tuple[float, ...]) -> Codebook:
    """Sorted `values` up to 1; thresholds are their middles, computed in float32 as bitsandbytes does."""
    import numpy as np

    array = np.array(values, np.float32)
    return Codebook(_floats(array), _floats((array[:-1] + array[1:]) / np.float32(2)), 1.0)


def _integer_codebook(values: tuple[int, ...]) -> Codebook:
    """Sorted integers that no weight exceeds: the smaller end of the two stands for the largest magnitude."""
    import numpy as np

    array = np.array(values, np.float32)
    return Codebook(_floats(array), _floats((array[:-1] + array[1:]) / 2), float(min(-array[0], array[-1])))


def _even_code_codebook(magnitudes: "np.ndarray") -> Codebook:
    """Mirror of `magnitudes` (sorted, from 0, in code order) whose ties go to the magnitude with the even code."""
    import numpy as np

    middles = ((magnitudes[:-1] + magnitudes[1:]) / 2).astype(np.float32)  # exact for few-bit floats
    # The tie between magnitudes k and k + 1 belongs to k + 1 when k is odd. As a value must exceed a threshold to pass it,
    # a threshold whose tie belongs to the upper side moves one float down.
    odd = np.arange(len(middles)) % 2 == 1
    positive = np.where(odd, np.nextafter(middles, np.float32(0)), middles)
    negative = np.where(odd, -middles, np.nextafter(-middles, np.float32(-np.inf)))
    values = np.concatenate([-magnitudes[:0:-1], magnitudes])
    return Codebook(_floats(values), _floats(np.concatenate([negative[::-1], positive])), float(magnitudes[-1]))


def _floats(array: "np.ndarray") -> tuple[float, ...]:
    return tuple(float(value) for value in array)


def _fp_magnitudes(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> "np.ndarray":
    """All non-negative values of a small float in code order, up to `largest`."""
    import numpy as np

    steps = 2**mantissa_bits
    codes = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = codes // steps, codes % steps
    subnormal = exponent == 0
    values = np.where(subnormal, mantissa, steps + mantissa) / steps * 2.0 ** (np.maximum(exponent, 1) - bias)
    return values[values <= largest]


@functools.cache
def codebooks() -> dict[str, Codebook]:
    """Every codebook by its grid name."""
    return {
        "nf4": middle_codebook(NF4_VALUES),
        "fp4_e2m1": _even_code_codebook(_fp_magnitudes(2, 1, bias=1, largest=6.0)),
        "fp4_bnb": middle_codebook((*(-m for m in FP4_BNB_MAGNITUDES[:0:-1]), *FP4_BNB_MAGNITUDES)),
        "iq4_nl": _integer_codebook(IQ4_NL_VALUES),
        "fp8_e4m3": _even_code_codebook(_fp_magnitudes(4, 3, bias=7, largest=448.0)),
        "fp8_e5m2": _even_code_codebook(_fp_magnitudes(5, 2, bias=15, largest=57344.0)),
    }


@functools.cache
def dynamic_map() -> "np.ndarray":
    """The 256 values in [-1, 1] that quantize scales when they are doubly quantized.

    Seven decades, decade i with 2^i values per sign at the middles of equal parts of [0.1, 1], then 0 and 1
    (dynamic tree quantization; Dettmers 2015, arXiv 1511.04561). float32 at each step, to be bitsandbytes' map bit for bit.
    """
    import numpy as np

    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade
        index = np.arange(parts + 1)
        low, high, step = np.float32(0.1), np.float32(1), np.float32(np.float32(0.9) / np.float32(parts))
        # torch.linspace: from the nearer end, multiply and add rounded once.
        edges = np.where(2 * index < parts, float(low) + float(step) * index, float(high) - float(step) * (parts - index))
        edges = edges.astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))
