"""A model family as data: how its config.json reads as a DecoderConfig, and what its checkpoints call our parameters."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from qjax.models.config import DecoderConfig
from qjax.models.stacks import member
from qjax.models.walk import block_of

MEMBER = "{e}"
LEAF_NAMES = {**dict.fromkeys(("kernel", "matrix", "scale", "offset", "embedding"), "weight"), "bias": "bias", "sinks": "sinks"}
WHOLE_NAMES = {"kernel": "", "bias": "_bias"}  # what ends the names of a stack that is stored as it is


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One architecture. `name` is config.json's model_type, unless that is given: of a variant that other names have it for.

    architectures: config.json's class names, the first is the one we write.
    read: config.json -> DecoderConfig; write: its inverse.
    modules: our module path -> theirs, {i} the layer, {e} one of those that we hold as a stack (`stacks.py`). Modules with the
        same name there are stored as one tensor, side by side along the output axis in the table's order. A stack without {e}
        is stored as it is, (experts, in, out), under the name without `.weight`, its biases with `_bias` behind the name; the
        outputs of those with the same name stand by turns.
    prefix: starts all names but the head's; some checkpoints leave it out.
    kernels_in_out: the blocks' kernels are stored (in, out), as ours, rather than (out, in).
    fused_by_head: modules stored as one tensor are so by heads of keys: (head, module, dim) along the output axis, where a
        module has as many rows of dim for a head as queries share it.
    ignored: regular expression of stored tensors that are constants, not weights.
    """

    name: str
    architectures: tuple[str, ...]
    read: Callable[[dict], DecoderConfig]
    write: Callable[[DecoderConfig], dict]
    modules: Mapping[str, str]
    prefix: str
    kernels_in_out: bool = False
    fused_by_head: bool = False
    ignored: str = r"$^"
    model_type: str = ""


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint and the parameters of ours that it holds, (path, shape), side by side on the last axis: in
    `blocks` blocks, each with an equal piece of every part.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool
    blocks: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        first = self.parts[0][1]
        shape = (*first[:-1], sum(shape[-1] for _, shape in self.parts))
        return shape[::-1] if self.transposed else shape

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Our parameters by path, of the stored array."""
        array = array.T if self.transposed else array
        pieces = array.reshape(*array.shape[:-1], self.blocks, -1)
        bounds = np.cumsum([shape[-1] // self.blocks for _, shape in self.parts])[:-1]
        pieces = np.split(pieces, bounds, axis=-1)
        return {path: piece.reshape(shape) for (path, shape), piece in zip(self.parts, pieces, strict=True)}

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `split`; other paths are left aside."""
        pieces = [arrays[path].reshape(*shape[:-1], self.blocks, -1) for path, shape in self.parts]
        array = np.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]  # one piece is not copied
        array = array.reshape(*array.shape[:-2], -1)
        return array.T if self.transposed else array


def stored_tensors(family: Family, shapes: Mapping[str, tuple[int, ...]], heads: int) -> list[StoredTensor]:
    """What a checkpoint of the family must hold for parameters of these shapes (`parameters.parameter_shapes`)."""
    parts, transposed, alternating = collections.defaultdict(list), {}, set()
    for layer, ours, theirs in _modules(family, shapes):
        whole = MEMBER not in ours and len(shapes.get(f"{ours}/kernel", ())) > 2
        for leaf, stored in LEAF_NAMES.items():
            ending = WHOLE_NAMES.get(leaf) if whole else f".{stored}"
            for path, name, shape in _held(f"{ours}/{leaf}", f"{theirs}{ending}", shapes):
                parts[name].append((path, shape))
                stored_in_out = whole or (family.kernels_in_out and layer is not None)
                transposed[name] = leaf in ("kernel", "matrix") and not stored_in_out
                if whole:
                    alternating.add(name)

    def blocks(name: str, held: list[tuple[str, tuple[int, ...]]]) -> int:
        first, last = held[0][1][-1], held[-1][1][-1]
        if name in alternating:
            return first
        return heads * last // first if family.fused_by_head and len(held) > 1 else 1

    return [StoredTensor(name, tuple(held), transposed[name], blocks(name, held)) for name, held in parts.items()]


def stacks_in(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The parameters that a checkpoint of the family holds one by one and we in stacks, and how many each has."""
    paths = (f"{ours}/{leaf}" for _, ours, _ in _modules(family, shapes) if MEMBER in ours for leaf in LEAF_NAMES)
    whole = (path.replace(f"/{MEMBER}", "") for path in paths)
    return {path: shapes[path][0] for path in whole if path in shapes}


def _held(path: str, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our path, their name, shape) of a parameter, or of each member of a stack; nothing where there is none."""
    whole = path.replace(f"/{MEMBER}", "")
    if whole in shapes and whole == path:
        yield path, name, shapes[path]
    elif whole in shapes:
        count, *shape = shapes[whole]
        for number in range(count):
            yield member(whole, number), name.replace(MEMBER, str(number)), tuple(shape)


def _modules(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int | None, str, str]]:
    """(layer or None, our module, their module) for every row of the table and every layer."""
    layers = len({block_of(path) for path in shapes} - {None})
    for ours, theirs in family.modules.items():
        for layer in range(layers) if "{i}" in ours else [None]:
            yield layer, ours.replace("{i}", str(layer)), theirs.replace("{i}", str(layer))


LM_HEAD = "lm_head"  # what transformers calls every head once it runs, whatever files do


def head_name(family: Family) -> str:
    """The stored name of the head's weight, which a tied checkpoint may repeat."""
    return family.modules["head/output"] + ".weight"
