"""A module of a checkpoint that another library quantized: its tensors in the file, and the leaf that they become.

A codec (`gptq.py` and its neighbours, one for each library's files) looks at a module's headers and says how it is stored:
which tensors, of which shapes and types, and what is made of them. Nothing is allocated before they agree. Codes stay as they
are; only their order in memory changes. Arrays here are NumPy's.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.activations import Activation
from qjax.checkpoints.tensors import Header, read_tensor
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.grid import StoredScales
from qjax.linear import Linear
from qjax.maps import Permute, permute
from qjax.qtensor import QTensor
from qjax.untrusted import quoted

SCALE_TYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}  # safetensors' names -> ours
WITHOUT = "; `qjax dequantize` writes the weights without it"  # of what a file says besides weights
PATTERN_LENGTH, PATTERN_REPEATS = 256, 4  # of a pattern in somebody else's file: no name takes it long to match

Expected = Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]  # what follows the module's name -> (shape, types)
Arrays = Mapping[str, np.ndarray]


class Module(NamedTuple):
    """A linear layer: its name in the file, (in, out) of its weight, (experts, in, out) of a stack, and the headers of its
    tensors, its bias' left out, by what follows the name: "qweight", "weight.absmax".
    """

    name: str
    shape: tuple[int, ...]
    headers: Mapping[str, Header]


class Stored(NamedTuple):
    """How a module is stored. leaf: what it becomes, with ShapeDtypeStructs for arrays that are not read yet; make: the same
    from the arrays. optional: further tensors that may be there and are not read. raw: those of codes in a type of floats.
    """

    expected: Expected
    leaf: Linear | QTensor
    make: Callable[[Arrays], Linear | QTensor]
    optional: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()


Codec = Callable[[Module], Stored | None]  # None: the module is stored as it is


# --- codes in memory -----------------------------------------------------------------------------------------------------


def unpack(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes, one a byte, of little-endian bit streams (uint8) along the last axis."""
    if 8 % bits == 0:
        codes = stream[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    else:
        digits = np.unpackbits(stream, axis=-1, bitorder="little")
        whole = digits.shape[-1] // bits
        digits = digits[..., : whole * bits].reshape(*digits.shape[:-1], whole, bits)
        codes = np.packbits(digits, axis=-1, bitorder="little")
    return codes.reshape(*stream.shape[:-1], -1)[..., :count]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (uint8) along the last axis as bytes: the layout of `packing.pack`, whose whole units they fill."""
    unit = 8 // np.gcd(8, bits)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % unit)])
    if 8 % bits == 0:
        shifted = codes.reshape(*codes.shape[:-1], -1, unit) << np.arange(0, 8, bits, dtype=np.uint8)
        return np.bitwise_or.reduce(shifted, axis=-1)
    digits = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(digits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def bytes_of(words: np.ndarray) -> np.ndarray:
    """int32 words along the last axis as the bytes of their bit stream."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8)


def from_bits(stream: np.ndarray, bits: int, in_features: int) -> np.ndarray:
    """A QTensor's packed codes (bytes, out) of bit streams (out, bytes) along the inputs."""
    unit = 8 // int(np.gcd(8, bits))
    size = -(-in_features // unit) * unit * bits // 8
    stream = np.pad(stream, ((0, 0), (0, max(0, size - stream.shape[1]))))[:, :size]
    return np.ascontiguousarray(stream.T)


# --- leaves --------------------------------------------------------------------------------------------------------------


def leaf_of(
    codes: np.ndarray,
    scales: StoredScales,
    zeros: np.ndarray | None,
    fmt: Format,
    in_features: int,
    order: np.ndarray | None = None,
    activation: Activation | None = None,
    activation_scale: np.ndarray | None = None,
) -> Linear | QTensor:
    """The leaf of packed codes (bytes, out), stored scales, and zero points (groups, out), one a byte; inputs in `order`."""
    zeros = None if zeros is None else pack(zeros, fmt.bits)
    codes, scales, zeros = jax.tree.map(jnp.asarray, (codes, scales, zeros))
    weight = QTensor(codes, scales, zeros, fmt, in_features)
    return layer_of(weight, order, activation, None if activation_scale is None else jnp.asarray(activation_scale))


def layer_of(
    weight: QTensor,
    order: np.ndarray | None = None,
    activation: Activation | None = None,
    activation_scale: jax.Array | jax.ShapeDtypeStruct | None = None,
) -> Linear | QTensor:
    """The weight alone, or a Linear where the layer does more to its input."""
    if order is None and activation is None:
        return weight
    inputs: tuple[Permute, ...] = () if order is None else (permute(order),)
    return Linear(weight, inputs, activation, activation_scale)


def order_of_groups(g_idx: np.ndarray, group: int) -> np.ndarray | None:
    """The order of inputs in which groups are runs of `group` inputs, of the group of every input; None where they are already.

    Raises QjaxError where no order makes them so.
    """
    runs = np.arange(g_idx.size) // min(group, max(g_idx.size, 1))  # a file may say any number
    if np.array_equal(g_idx, runs):
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], runs):
        counts = np.unique(g_idx, return_counts=True)[1]
        raise QjaxError(
            f"g_idx puts {counts.min()} to {counts.max()} inputs in a group, expected {group} in each of {runs[-1] + 1}"
        )
    return order


def positive(name: str, number: np.ndarray) -> np.ndarray:
    """A scale of the file, shape (). Raises QjaxError unless it is above 0, and so far that float32 holds its inverse."""
    if not number >= np.finfo(np.float32).tiny:
        raise QjaxError(f"{name} is {number}, expected a number above 0; get an intact checkpoint")
    return number


def scaled(fmt: Format, scales: Header | None) -> Format:
    """The format with scales of a tensor's type, where it is one of floats."""
    return dataclasses.replace(fmt, scales=SCALE_TYPES.get(scales.dtype, fmt.scales)) if scales else fmt


# --- what a configuration says -------------------------------------------------------------------------------------------


def fits(module: Module, suffix: str, expected: Expected) -> bool:
    """Whether one of the module's tensors is there, of the shape and a type expected, and may be read."""
    header = module.headers.get(suffix)
    return header is not None and header.shape == expected[suffix][0] and header.dtype in expected[suffix][1]


def read_early(module: Module, suffix: str, expected: Expected) -> np.ndarray | None:
    """A small tensor that decides what the leaf is; None where it is not there, or not as expected, which is told later."""
    return read_tensor(module.headers[suffix]) if fits(module, suffix, expected) else None


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """re.match (anywhere: re.search) of a pattern of somebody else's file. Raises QjaxError for one that is none, or may take
    long.
    """
    compiled = _compiled(pattern)
    return (compiled.search(name) if anywhere else compiled.match(name)) is not None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern:
    repeats = len(re.findall(r"[*+{?]", re.sub(r"\\.|\(\?", "", pattern)))
    if len(pattern) > PATTERN_LENGTH or repeats > PATTERN_REPEATS or re.search(r"\)[*+{?]|\\\d", pattern):
        raise QjaxError(f"the pattern {quoted(pattern)} is longer or more intricate than qjax tries; name the modules instead")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise QjaxError(f"the pattern {quoted(pattern)} is no regular expression ({error})") from None
