"""Round to nearest in float64 NumPy, one group after another, as the formulas in qjax.grid say and without its code.

Values are decided in float64 with the scale as it is stored, so a code may differ from float32 arithmetic's only where
`margin`, the distance to the next decision in units of the scale, is of the order of float32's rounding.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from qjax.codebooks import codebooks
from qjax.formats import Format
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
        case "flat":
            return (column * rows + row) // fmt.group


def rtn(weight: np.ndarray, fmt: Format, shrink: float | np.ndarray = 1.0) -> Rounded:
    """Nearest rounding of weight (in, out); shrink: a factor of every group's range, or one per group."""
    weight = weight.astype(np.float64)
    index = group_index(weight.shape, fmt)
    count = index.max() + 1
    shrink = np.broadcast_to(shrink, (count,))
    low, high = (np.array([least(weight[index == g]) for g in range(count)]) for least in (np.min, np.max))
    if fmt.zeros != "m16":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    level = np.abs(largest(low, high, fmt)).max() / bound(fmt) / 448  # of all scales, for e4m3
    still = (low + high) / 2 if fmt.zeros == "m16" else 0
    low, high = still + (low - still) * shrink, still + (high - still) * shrink
    exact = find(largest(low, high, fmt), fmt)
    stored = store(exact, fmt, level, weight.shape[1])
    used = exact if fmt.scales == "dq" and fmt.granularity == "flat" else stored
    values, margin = np.zeros_like(weight), np.zeros_like(weight)
    for g in range(count):
        inside = index == g
        minimum = float(np.float16(low[g])) if fmt.zeros == "m16" else 0.0
        scaled = (weight[inside] - minimum) / used[g] if used[g] else np.zeros(inside.sum())
        levels = grid_levels(fmt, low[g], used[g])
        distance = np.abs(scaled[:, None] - levels)
        values[inside] = levels[distance.argmin(axis=1)] * stored[g] + minimum
        two = np.sort(np.pad(distance, ((0, 0), (0, 1)), constant_values=np.inf), axis=1)[:, :2]
        margin[inside] = two[:, 1] - two[:, 0]
    return Rounded(values, stored[index], margin)


def largest(low: np.ndarray, high: np.ndarray, fmt: Format) -> np.ndarray:
    """What is scaled to `bound`: the whole range, the largest magnitude, or minus the weight of the largest magnitude."""
    if fmt.is_affine:
        return high - low
    return np.where(high >= -low, -high, -low) if fmt.bound == "full" else np.maximum(high, -low)


def find(largest: np.ndarray, fmt: Format) -> np.ndarray:
    """Scales before they are stored: a division but for powers of two, which have their rules."""
    if not fmt.scales.startswith("e8m0"):
        return largest / bound(fmt)
    if fmt.scales == "e8m0_ceil":
        return np.exp2(np.ceil(np.log2(largest / bound(fmt))))
    digits = {"fp4_e2m1": 1, "fp8_e4m3": 3, "fp8_e5m2": 2}.get(fmt.grid, fmt.bits - 2)
    unit = np.exp2(np.floor(np.log2(largest)) - digits)
    rounded = np.floor(largest / unit + 0.5) * unit if fmt.scales == "e8m0_even" else largest
    return np.exp2(np.floor(np.log2(rounded)) - np.floor(np.log2(bound(fmt))))


def bound(fmt: Format) -> float:
    """What the largest magnitude of a group is scaled to, or its range."""
    if fmt.is_affine:
        return 2**fmt.bits - 1
    if fmt.grid in codebooks():
        return codebooks()[fmt.grid].values[-1]
    if fmt.bits == 1 and fmt.bound != "full":
        return {"max": 1.0, "edge": 2.0}[fmt.bound]
    return 2 ** (fmt.bits - 1) - {"max": 1.0, "edge": 0.5, "full": 0.0}[fmt.bound]


def grid_levels(fmt: Format, low: float, scale: float) -> np.ndarray:
    """The values that codes stand for, in units of the scale, above any minimum."""
    if fmt.grid in codebooks():
        return np.array(codebooks()[fmt.grid].values)
    if fmt.bits == 1 and fmt.bound in ("max", "edge"):
        return np.array([-1.0, 1.0])
    codes = np.arange(2**fmt.bits)
    if not fmt.is_affine:
        return codes - 2.0 ** (fmt.bits - 1)
    if fmt.zeros == "m16":
        return codes
    zero = -low / scale if scale else 0
    if fmt.zeros == "codes":
        return codes - np.clip(np.round(zero), 0, 2**fmt.bits - 1)
    zero = np.float64({"z16": np.float16, "z32": np.float32}[fmt.zeros](zero))
    return codes - zero


SUPER_BLOCKS = {"k4": (4, 16, 0), "k6": (6, 8, 0), "k6s": (6, 16, 32), "k8s": (8, 16, 128)}  # bits, groups, offset


def in_super_blocks(scales: np.ndarray, bits: int, groups: int, offset: int) -> np.ndarray:
    """Whole multiples of a float16 that so many groups share."""
    stored, highest = np.zeros_like(scales), 2**bits - 1 - offset
    for start in range(0, len(scales), groups):
        block = scales[start : start + groups]
        shared = float(np.float16(np.float32(np.abs(block).max() / highest)))
        stored[start : start + groups] = np.clip(np.round(block / (shared or 1)), -offset, highest) * shared
    return stored


def store(scales: np.ndarray, fmt: Format, level: float, columns: int) -> np.ndarray:
    """Scales after the rounding that storing them brings; scales are numbered like `group_index`. level: the unit of e4m3.

    columns: of the weight, at most 128, which tiles are wide.
    """
    if fmt.scales.startswith("e8m0"):
        return scales
    if fmt.scales == "e4m3":
        level = np.float64(np.float32(level))
        return (scales / level).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * level
    if fmt.scales in SUPER_BLOCKS:
        return in_super_blocks(scales, *SUPER_BLOCKS[fmt.scales])
    if fmt.scales.endswith("x128"):
        tiles = scales.reshape(columns, -1)
        largest = np.take_along_axis(tiles, np.abs(tiles).argmax(axis=0)[None], axis=0)
        scales = np.broadcast_to(largest, tiles.shape).reshape(-1)
    if fmt.scales != "dq":
        dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[fmt.scales.removesuffix("x128")]
        return scales.astype(np.float32).astype(dtype).astype(np.float64)
    table, offset = dynamic_map().astype(np.float64), scales.mean()
    stored = np.zeros_like(scales)
    for start in range(0, len(scales), 256):
        block = scales[start : start + 256] - offset
        largest = np.abs(block).max()
        scaled = block / (largest or 1)
        if fmt.granularity == "flat":  # bitsandbytes' CPU library looks codes up in 2^16 equal steps
            scaled = np.floor((scaled + 1) / 2 * 65535 + 0.5) / 65535 * 2 - 1
        nearest = np.abs(scaled[:, None] - table).argmin(axis=1)
        stored[start : start + 256] = table[nearest] * largest + offset
    return stored
