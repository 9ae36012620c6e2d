"""Where tokens stand and what they see, for sequences that are not simply positions 0, 1, 2, ... of their own.

Two uses, one idea (a position and a row of visible keys for every token):

    tree    several sequences with a common beginning in one row: the beginning stands there once, the branches one after the
            other behind it; each branch sees the beginning and itself, and its positions go on from the beginning's end
    cache   new tokens of sequences whose earlier keys and values are kept: they see every key at or before their position

A window w hides keys w or more positions before a token (`sliding_window`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Layout(NamedTuple):
    """Positions of tokens and the keys each sees; keys are the tokens of the row, or those of the cache."""

    positions: Int[Array, "batch time"]
    visible: Bool[Array, "batch time keys"]


class Cache(NamedTuple):
    """Keys and values of one block by position; what is behind a sequence's last token is never visible."""

    keys: Float[Array, "batch kv_heads capacity dim"]
    values: Float[Array, "batch kv_heads capacity dim"]


def tree_layout(positions: Int[Array, "batch time"], branches: Int[Array, "batch time"], window: int | None = None) -> Layout:
    """Rows of a common beginning (branch 0) and branches 1, 2, ...; tokens of a branch stand in order."""
    order = jnp.arange(positions.shape[1])
    seen = order[:, None] >= order[None, :]
    seen = seen & ((branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None]))
    return Layout(positions, seen & _near(positions, positions, window))


def cache_layout(starts: Int[Array, " batch"], time: int, capacity: int, window: int | None = None) -> Layout:
    """`time` new tokens of each sequence, from its own start on, before a cache of `capacity` positions."""
    positions = starts[:, None] + jnp.arange(time)
    keys = jnp.broadcast_to(jnp.arange(capacity), (len(starts), capacity))
    return Layout(positions, (keys[:, None, :] <= positions[:, :, None]) & _near(positions, keys, window))


def _near(queries: Int[Array, "batch time"], keys: Int[Array, "batch keys"], window: int | None) -> Bool[Array, "..."]:
    if window is None:
        return jnp.bool_(True)
    return queries[:, :, None] - keys[:, None, :] < window
