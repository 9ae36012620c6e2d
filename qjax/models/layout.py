"""Where tokens stand and what they see, for sequences that are not simply positions 0, 1, 2, ... of their own.

Two uses, one idea (a position and a row of visible keys for every token):

    tree    several sequences with a common beginning in one row: the beginning stands there once, the branches one after the
            other behind it; each branch sees the beginning and itself, and its positions go on from the beginning's end
    cache   new tokens of sequences whose earlier keys and values are kept: they see every key at or before their position

Layers differ in how far they see: a window w hides keys w or more positions before a token, which `Layout.seen` adds.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Layout(NamedTuple):
    """Positions of tokens and the keys each sees; keys are the tokens of the row, or those of the cache.

    ends: the position behind each sequence's last token, where padding follows it and a quantized cache must know.
    """

    positions: Int[Array, "batch time"]
    keys: Int[Array, "batch keys"]  # positions of the keys
    visible: Bool[Array, "batch time keys"]
    ends: Int[Array, " batch"] | None = None

    def seen(self, window: int | None) -> Bool[Array, "batch time keys"]:
        """What is visible in a layer with this window, or without one."""
        return self.visible if window is None else self.visible & (self.positions[:, :, None] - self.keys[:, None, :] < window)


class Cache(NamedTuple):
    """Keys and values of one block by position; what is behind a sequence's last token is never visible."""

    keys: Float[Array, "batch kv_heads capacity dim"]
    values: Float[Array, "batch kv_heads capacity dim"]


def tree_layout(positions: Int[Array, "batch time"], branches: Int[Array, "batch time"]) -> Layout:
    """Rows of a common beginning (branch 0) and branches 1, 2, ...; tokens of a branch stand in order."""
    order = jnp.arange(positions.shape[1])
    seen = order[:, None] >= order[None, :]
    seen = seen & ((branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None]))
    return Layout(positions, positions, seen)


def cache_layout(starts: Int[Array, " batch"], time: int, capacity: int, ends: Int[Array, " batch"] | None = None) -> Layout:
    """`time` new tokens of each sequence, from its own start on, before a cache of `capacity` positions; of its tokens those
    before its end are no padding.
    """
    positions = starts[:, None] + jnp.arange(time)
    keys = jnp.broadcast_to(jnp.arange(capacity), (len(starts), capacity))
    return Layout(positions, keys, keys[:, None, :] <= positions[:, :, None], ends)
