"""AWQ's search of input scales in float64 NumPy, one candidate after another (Lin et al. 2023, arXiv 2306.00978).

    s(r) = max(m^r, 1e-4) / sqrt(max * min),   m = mean |x|                                (the paper's code, auto_scale.py)
    s(r) = max(m^r / (v^(1 - r) + 1e-4), 1e-4) / sqrt(max * min),   v = mean over outputs of |W| / max of its group  (AutoAWQ)

The error is that of the outputs on the tokens themselves, ||x (W - Q(s W) / s)||^2, summed over the layers that share x; no
Hessian. Rounding is `nearest.rtn` of this folder.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qjax.formats import Format
from tests.oracles import nearest


class Candidate(NamedTuple):
    """kind: "one", "reference" or "duo"; ratio; scale (in,); error: the mean squared output, summed over layers and outputs."""

    kind: str
    ratio: float
    scale: np.ndarray
    error: float


def search(weights: Sequence[np.ndarray], x: np.ndarray, fmt: Format, scaling: str, ratios: int = 20) -> list[Candidate]:
    """Every candidate with its error. weights: (in, out_k). x: (tokens, in)."""
    weights, x = [weight.astype(np.float64) for weight in weights], x.astype(np.float64)
    mean = np.mean(np.abs(x), axis=0)
    scales = [("one", 0.0, np.ones(len(mean)))]
    for i in range(ratios):
        ratio = i / ratios
        if scaling in ("reference", "both"):
            scales.append(("reference", ratio, normalised(mean**ratio)))
        if scaling in ("duo", "both"):
            scales.append(("duo", ratio, normalised(mean**ratio / (magnitude(weights, fmt) ** (1 - ratio) + 1e-4))))
    return [Candidate(*each, sum(output_error(weight, each[2], x, fmt) for weight in weights)) for each in scales]


def normalised(scale: np.ndarray) -> np.ndarray:
    """Scales whose largest and smallest are each other's inverse."""
    scale = np.maximum(scale, 1e-4)
    return scale / np.sqrt(np.max(scale) * np.min(scale))


def magnitude(weights: Sequence[np.ndarray], fmt: Format) -> np.ndarray:
    """Mean over all outputs of |W| over the largest of its group along the inputs."""
    joined = np.abs(np.concatenate(weights, axis=1))
    size = fmt.group or len(joined)
    for start in range(0, len(joined), size):
        joined[start : start + size] /= np.max(joined[start : start + size], axis=0) + 1e-6
    return np.mean(joined, axis=1)


def rounded(weight: np.ndarray, scale: np.ndarray, fmt: Format) -> np.ndarray:
    """Q(s W) / s."""
    return nearest.rtn((weight * scale[:, None]).astype(np.float32), fmt).values / scale[:, None]


def output_error(weight: np.ndarray, scale: np.ndarray, x: np.ndarray, fmt: Format) -> float:
    """Mean over tokens of the squared error of the outputs, summed over outputs."""
    return float(np.sum((x @ (rounded(weight, scale, fmt) - weight)) ** 2) / len(x))
