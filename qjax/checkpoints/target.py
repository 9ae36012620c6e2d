"""What every other library's files ask of a layer: the layer as it is stored, what a target says of itself, and integers.

A target is a pure function of codes: reading what it wrote gives the same codes, scales and zero points.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from qjax.checkpoints.modules import pack
from qjax.errors import QjaxError
from qjax.formats import INTEGERS, Format
from qjax.linear import Linear
from qjax.maps import Permute
from qjax.scales import QuantizedScales

GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that kernels know
LEFT_OUT = "the layer does more to its input: {}"
Formats = Mapping[str, tuple[Format, bool]]  # by module: the format, and whether inputs are in another order


class RefusedError(QjaxError):
    """What a model has and a target's files cannot hold."""


class Codes(NamedTuple):
    """A layer as a target stores it: codes (in, out), scales as stored, (groups, out) of most formats, zero points
    (groups, out) uint8 or None, the order of inputs in which groups are runs, or None. dtype: of the model's plain weights.
    """

    codes: np.ndarray
    scales: np.ndarray | QuantizedScales
    zeros: np.ndarray | None
    format: Format
    order: np.ndarray | None
    dtype: str


class Target(NamedTuple):
    """refusal: (format, (in, out), whether inputs are in another order) -> why not, or None; nearest: a format that fits.

    store: a layer's tensors by what follows its name. settings: quantization_config, of the formats (and orders) by module, the
    names of modules that are left as they are, and the type of the model's plain weights; raises RefusedError for what it
    cannot say of several layers.
    """

    refusal: Callable[[Format, tuple[int, int], bool], str | None]
    nearest: Callable[[Format, tuple[int, int]], Format]
    store: Callable[[Codes], dict[str, np.ndarray]]
    settings: Callable[[Formats, list[str], str], dict]


def besides(layer: Linear, *, order: bool) -> list[str]:
    """What a layer does besides multiplying, by name. order: whether an order of its inputs is let pass."""
    more = [type(each).__name__ for each in layer.inputs if not (order and isinstance(each, Permute))]
    return more + [name for name in ("activation", "outliers", "adapter") if getattr(layer, name) is not None]


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis as int32 words of their bit stream."""
    stream = pack(codes, bits)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 4)])
    return np.ascontiguousarray(stream).view("<i4")


def group_of(fmt: Format) -> int:
    """Inputs of a group; -1 for all of them."""
    return fmt.group if fmt.granularity == "group" else -1


def integers_refusal(fmt: Format, shape: tuple[int, int], bits: tuple[int, ...]) -> str | None:
    """What no library's integers hold."""
    if fmt.grid not in INTEGERS or fmt.bits not in bits or fmt.granularity not in ("group", "channel"):
        return f"{fmt} is not of integers of {', '.join(map(str, bits))} bits in groups or channels"
    if not fmt.has_whole_zeros or fmt.scales not in ("fp16", "bf16", "fp32"):
        return f"{fmt} stores scales or zero points that the files have no place for"
    if fmt.granularity == "group" and (fmt.group not in GROUPS or shape[0] % fmt.group):
        return f"groups of {fmt.group} of {shape[0]} inputs; a power of two from 16 to 1024 that divides them is expected"
    return None


def nearest_integers(fmt: Format, shape: tuple[int, int], bits: tuple[int, ...], scales: tuple[str, ...]) -> Format:
    """Integers of one of these bits, with scales of one of these types, that are nearest to a format and fit the shape."""
    fits = [group for group in GROUPS if shape[0] % group == 0 and fmt.granularity != "channel"]
    size = min(fits, key=lambda group: abs(group - (fmt.group or 128)), default=0)
    chosen = min(bits, key=lambda each: (abs(each - fmt.bits), -each))
    integer = fmt.grid in INTEGERS and fmt.bits > 1
    return dataclasses.replace(
        fmt,
        grid=f"int{chosen}",
        granularity="group" if size else "channel",
        group=size,
        bound=fmt.bound if integer else "",
        scales=fmt.scales if fmt.scales in scales else scales[0],
        zeros="none" if integer and fmt.symmetric else "codes",
    )
