"""Round to nearest in float64 NumPy, one group after another, as the formulas in qjax.grid say and without its code.

Values are decided in float64 with the scale as it is stored, so a code may differ from float32 arithmetic's only where
`margin`, the distance to the next decision in units of the scale, is of the order of float32's rounding.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from qjax.formats import Format, codebooks
from qjax.scales import dynamic_map


class Rounded(NamedTuple):
    """values (in, out): the dequantized weight; scales (in, out): each weight's scale; margin (in, out)."""

    values: np.ndarray
    scales: np.ndarray
    margin: np.ndarray


def group_index(shape: tuple[int, int], fmt: Format) -> np.ndarray:
    """Which group each weight belongs to, numbered output channel after output channel."""
    rows = shape[0]
    row, column = np.indices(shape)
    match fmt.granularity:
        case "tensor":
            return np.zeros(shape, int)
        case "channel":
            return column
        case "group":
            return column * -(-rows // fmt.group) + row // fmt.group
        case "block":
            return (column * rows + row) // fmt.group


def rtn(weight: np.ndarray, fmt: Format, shrink: float | np.ndarray = 1.0) -> Rounded:
    """Nearest rounding of weight (in, out); shrink: a factor of every group's range, or one per group."""
    weight = weight.astype(np.float64)
    index = group_index(weight.shape, fmt)
    count = index.max() + 1
    shrink = np.broadcast_to(shrink, (count,))
    low = np.array([min(weight[index == g].min(), 0) for g in range(count)]) * shrink
    high = np.array([max(weight[index == g].max(), 0) for g in range(count)]) * shrink
    exact = (high - low) / (2**fmt.bits - 1) if fmt.is_affine else np.maximum(high, -low) / bound(fmt)
    stored = store(exact, fmt)
    used = exact if fmt.scales == "dq" and fmt.granularity == "block" else stored
    values, margin = np.zeros_like(weight), np.zeros_like(weight)
    for g in range(count):
        inside = index == g
        scaled = weight[inside] / used[g] if used[g] else np.zeros(inside.sum())
        levels = grid_levels(fmt, low[g], used[g])
        distance = np.abs(scaled[:, None] - levels)
        values[inside] = levels[distance.argmin(axis=1)] * stored[g]
        two = np.sort(np.pad(distance, ((0, 0), (0, 1)), constant_values=np.inf), axis=1)[:, :2]
        margin[inside] = two[:, 1] - two[:, 0]
    return Rounded(values, stored[index], margin)


def bound(fmt: Format) -> float:
    """What the largest magnitude of a group is scaled to."""
    if fmt.grid in codebooks():
        return codebooks()[fmt.grid].values[-1]
    if fmt.bits == 1:
        return {"max": 1.0, "edge": 2.0}[fmt.bound]
    return 2 ** (fmt.bits - 1) - {"max": 1.0, "edge": 0.5}[fmt.bound]


def grid_levels(fmt: Format, low: float, scale: float) -> np.ndarray:
    """The values that codes stand for, in units of the scale."""
    if fmt.grid in codebooks():
        return np.array(codebooks()[fmt.grid].values)
    if fmt.bits == 1 and not fmt.is_affine:
        return np.array([-1.0, 1.0])
    codes = np.arange(2**fmt.bits)
    if not fmt.is_affine:
        return codes - 2.0 ** (fmt.bits - 1)
    zero = np.clip(np.round(-low / scale), 0, 2**fmt.bits - 1) if scale else 0
    return codes - zero


def store(scales: np.ndarray, fmt: Format) -> np.ndarray:
    """Scales after the rounding that storing them brings; scales are numbered like `group_index`."""
    if fmt.scales != "dq":
        dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[fmt.scales]
        return scales.astype(np.float32).astype(dtype).astype(np.float64)
    table, offset = dynamic_map().astype(np.float64), scales.mean()
    stored = np.zeros_like(scales)
    for start in range(0, len(scales), 256):
        block = scales[start : start + 256] - offset
        largest = np.abs(block).max()
        scaled = block / (largest or 1)
        if fmt.granularity == "block":  # bitsandbytes' CPU library looks codes up in 2^16 equal steps
            scaled = np.floor((scaled + 1) / 2 * 65535 + 0.5) / 65535 * 2 - 1
        nearest = np.abs(scaled[:, None] - table).argmin(axis=1)
        stored[start : start + 256] = table[nearest] * largest + offset
    return stored
