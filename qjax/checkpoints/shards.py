"""Weights of a checkpoint in one file, or in shards with an index where they are larger than a limit."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qjax.checkpoints.tensors import write_tensors
from qjax.files import write_atomically

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as transformers cuts them


def write_shards(
    folder: Path, sizes: Mapping[str, int], make: Callable[[str], Mapping[str, np.ndarray]], limit: int = SHARD_BYTES
) -> None:
    """Writes tensors, of which `make` makes some by the name of a unit, a shard in memory at a time.

    sizes: bytes of every unit, in the order of the file. limit: of a shard, which a unit alone may exceed. Raises QjaxError
    where a file cannot be written.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for unit, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(unit)
        held += size
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    places, total = {}, 0
    for file, units in zip(names, shards, strict=True):
        tensors = {name: array for unit in units for name, array in make(unit).items()}
        write_tensors(folder / file, tensors)
        places |= dict.fromkeys(tensors, file)
        total += sum(array.nbytes for array in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
