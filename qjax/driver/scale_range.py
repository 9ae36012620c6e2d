"""Whether the type of a format's scales and minima, or of a cast, holds those of a weight: float16 ends at 65504, coarse below
6e-5.
"""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Array, Float

from qjax import grid
from qjax.errors import QjaxWarning
from qjax.formats import Format
from qjax.numbers import NotFiniteError
from qjax.qtensor import QTensor, unpack_parameters

PIECE = 2**20  # values looked at at a time
WIDER = ("bf16", "fp32")
SHARE = 0.01  # of the sum of squares of a weight, in groups whose scales are not held: less than that is let pass


def check_scales(path: str, weight: Float[Array, "in out"], q: QTensor) -> None:
    """Raises NotFiniteError where scales of a rounded weight are lost, 0 or cut off, or minima are cut off; warns (QjaxWarning)
    where scales are coarse. With minima, scales stand for what the weights are above them.

    Looks at what is stored alone where it is all well.
    """
    fmt = q.format
    if fmt.is_float:
        check_cast(path, weight, fmt)
    strained = None if q.scales is None else fmt.scale_codec.strained(q.scales, fmt.bits)
    beyond = fmt.zero_codec.cut_off(q.zeros) if fmt.is_affine else None
    found = *(strained or (None, None)), beyond
    if not any(part is not None and part.any() for part in found):
        return
    groups, present = grid.weight_groups(weight, fmt)
    groups, present = np.asarray(groups, np.float64), True if present is None else np.asarray(present)
    largest = np.abs(groups).max()
    groups /= largest or 1.0
    whole = np.square(groups * present).sum()
    if fmt.has_minima:
        groups -= np.asarray(unpack_parameters(q)[1], np.float64)[:, None] / (largest or 1.0)
    energy = np.square(groups * present).sum(axis=1) / (whole or 1.0)
    lost, coarse, cut = (0.0 if part is None else _share(part, energy) for part in found)
    if max(lost, coarse, cut) < SHARE:
        return
    wider = [str(dataclasses.replace(fmt, scales=name, zeros="codes" if fmt.has_minima else fmt.zeros)) for name in WIDER]
    more = "give scales of more range" if cut < SHARE else "give zero points instead of minima"
    told = f"the largest |weight| is {largest:.1e}; {more}, {' or '.join(wider)}"
    stores = f"{path}: {fmt} stores scales as {fmt.scales}" if cut < SHARE else f"{path}: {fmt} stores minima as {fmt.zeros}"
    if max(lost, cut) >= SHARE:
        raise NotFiniteError(f"{stores}, which loses {min(max(lost, cut), 1):.0%} of this weight: {told}")
    warnings.warn(f"{stores}, which is coarse for {coarse:.0%} of this weight: {told}", QjaxWarning, stacklevel=2)


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
    """The energy (groups, columns) in the groups named: (groups, channels), or flat with any filling at the end."""
    shaped = groups if groups.ndim == 2 else groups[: energy.size].reshape(energy.shape[::-1]).T
    return float(energy[np.broadcast_to(shaped, energy.shape)].sum())
