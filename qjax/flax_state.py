"""Quantized leaves for `flax.serialization`: what `to_bytes` writes of one, and `from_bytes` puts into another of its kind.

A state is the leaf's arrays by their place in it, and under STRUCTURE, as bytes, what JAX tells of all that is no array
(format, maps, activation), so that codes are never read in another format's words. It is of one version of JAX and qjax:
folders that `qjax.save` writes are read by later ones.
"""

from typing import TypeVar

import jax
import numpy as np
from flax import serialization
from jax.tree_util import keystr
from jaxtyping import Array

from qjax.errors import QjaxError

T = TypeVar("T", bound=type)
STRUCTURE = "structure"


def registered(kind: T) -> T:
    """The class of a leaf, a pytree, which Flax then knows how to keep: a decorator."""
    serialization.register_serialization_state(kind, _to_state, _from_state)
    return kind


def _to_state(leaf: object) -> dict[str, Array]:
    found, structure = jax.tree_util.tree_flatten_with_path(leaf)
    return {keystr(path): array for path, array in found} | {STRUCTURE: np.frombuffer(str(structure).encode(), np.uint8)}


def _from_state(like: object, state: object) -> object:
    """Raises QjaxError for the state of another leaf than this one."""
    expected = _to_state(like)
    if not isinstance(state, dict) or _kind(state) != _kind(expected) or bytes(state[STRUCTURE]) != bytes(expected[STRUCTURE]):
        raise QjaxError(
            f"flax.serialization: what was kept is another leaf than the target (a {type(like).__name__}); give one that the "
            "same recipe quantized"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in expected if name != STRUCTURE])


def _kind(state: dict) -> dict[str, object]:
    return {name: (getattr(part, "shape", None), getattr(part, "dtype", None)) for name, part in state.items()}
