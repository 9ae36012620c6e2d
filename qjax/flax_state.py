"""Quantized leaves for `flax.serialization`: what `to_bytes` writes of one, and `from_bytes` puts into another of its kind.

A state is the leaf's arrays by their place in it, and under STRUCTURE all that is not an array (format, maps, activation), so
that codes are never read in another format's words.
"""

from typing import TypeVar

import jax
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


def _to_state(leaf: object) -> dict[str, Array | str]:
    found, structure = jax.tree_util.tree_flatten_with_path(leaf)
    return {keystr(path): array for path, array in found} | {STRUCTURE: str(structure)}


def _from_state(like: object, state: object) -> object:
    """Raises QjaxError for the state of another leaf than this one."""
    expected = _to_state(like)
    if not isinstance(state, dict) or _kind(state) != _kind(expected):
        raise QjaxError(
            f"flax.serialization: what was kept is another leaf than the target (a {type(like).__name__}); give one that the "
            "same recipe quantized"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in expected if name != STRUCTURE])


def _kind(state: dict) -> dict[str, object]:
    return {name: (part.shape, part.dtype) if hasattr(part, "dtype") else part for name, part in state.items()}
