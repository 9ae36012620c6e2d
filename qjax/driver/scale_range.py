"""Whether the type of a format's scales, or of a cast, holds those of a weight: float16 ends at 65504, coarse below 6e-5."""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Array, Float

from qjax import grid
from qjax.errors import QjaxWarning
from qjax.formats import Format
from qjax.numbers import NotFiniteError
from qjax.qtensor import QTensor

PIECE = 2**20  # values looked at at a time
SHARE = 0.01  # of the sum of squares of a weight, in groups whose scales are not held: less than that is let pass


def check_scales(path: str, weight: Float[Array, "in out"], q: QTensor) -> None:
    """Raises NotFiniteError where scales of a rounded weight are lost, 0 or cut off; warns (QjaxWarning) where they are coarse.

    Looks at the scales alone where they are all well.
    """
    if q.format.is_float:
        check_cast(path, weight, q.format)
    found = None if q.scales is None else q.format.scale_codec.strained(q.scales, q.format.bits)
    if found is None or not any(part.any() for part in found):
        return
    groups = np.asarray(grid.to_groups(weight, q.format), np.float64)
    largest = np.abs(groups).max()
    energy = np.square(groups / (largest or 1.0)).sum(axis=1)
    lost, coarse = (_share(part, energy) for part in found)
    if max(lost, coarse) < SHARE:
        return
    fmt, wider = q.format, [str(dataclasses.replace(q.format, scales=name)) for name in ("bf16", "fp32")]
    told = f"the largest |weight| is {largest:.1e}; give scales of more range, {' or '.join(wider)}"
    if lost >= SHARE:
        raise NotFiniteError(f"{path}: {fmt} stores scales as {fmt.scales}, which loses {lost:.0%} of this weight: {told}")
    warnings.warn(
        f"{path}: {fmt} stores scales as {fmt.scales}, which is coarse for {coarse:.0%} of this weight: {told}",
        QjaxWarning,
        stacklevel=2,
    )


def check_cast(path: str, value: Float[Array, "..."], fmt: Format) -> None:
    """Raises NotFiniteError where a cast loses a value: beyond the type's largest, or so small that it becomes 0; warns
    (QjaxWarning) where it is coarse.
    """
    if fmt.grid != "fp16":  # the others have float32's range
        return
    limits, flat = np.finfo(np.float16), np.asarray(value).reshape(-1)
    pieces = [flat[start : start + PIECE] for start in range(0, flat.size, PIECE)]  # an embedding in float64 would be large
    largest = max((float(np.abs(piece).max()) for piece in pieces), default=0.0)
    bounds = (float(limits.smallest_subnormal) / 2, float(limits.tiny), np.inf)
    energy = sum(_energy(piece, largest or 1.0, bounds) for piece in pieces)
    lost, coarse, _ = energy / (energy[-1] or 1.0)
    told = f"the largest of its values is {largest:.1e}; choose bf16 or fp32"
    if largest > float(limits.max) or lost >= SHARE:
        raise NotFiniteError(f"{path}: fp16 cannot hold it, it ends at 65504 and at 6e-8: {told}")
    if coarse >= SHARE:
        warnings.warn(f"{path}: fp16 is coarse for {coarse:.0%} of it, as below 6e-5: {told}", QjaxWarning, stacklevel=2)


def _energy(values: np.ndarray, unit: float, bounds: tuple[float, ...]) -> np.ndarray:
    """Sums of squares, in the unit's square, of the values below each bound."""
    sizes = np.abs(values.astype(np.float64))
    return np.array([np.square(sizes[sizes < bound] / unit).sum() for bound in bounds])


def _share(groups: np.ndarray, energy: np.ndarray) -> float:
    """Of the energy (groups, columns), in the groups named: (groups, channels), or flat with any filling at the end."""
    shaped = groups if groups.ndim == 2 else groups[: energy.size].reshape(energy.shape[::-1]).T
    return float(energy[np.broadcast_to(shaped, energy.shape)].sum() / (energy.sum() or 1.0))
