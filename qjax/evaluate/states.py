"""Hidden states before the head, which several measurements of one model on the same windows read: computed once, and kept
while there is room.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator

import jax

from qjax.models.model import HELD_STATES, Model

Batch = tuple[Model, jax.Array]  # a model whose head is in memory, and hidden states (batch, time, hidden) before it
Through = Callable[[Iterable[Batch]], Iterable[Batch]]


class States:
    """Batches by the name of what they are of. most: elements of all that are kept; others are computed again."""

    def __init__(self, most: int = HELD_STATES // 4):
        self._most, self._kept, self._sizes = most, {}, {}

    def through(self, name: Hashable, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Those kept under a name; without such these, which are kept on the way where they fit."""
        if name in self._kept:
            yield from self._kept[name]
            return
        found, size, fits = [], 0, True
        for batch in batches:
            size += batch[1].size
            fits = fits and self._fits(size)
            if fits:
                found.append(batch)
            else:
                found.clear()
            yield batch
        if fits and self._fits(size):  # others may have come meanwhile
            self._kept[name], self._sizes[name] = found, size

    def drop(self, name: Hashable) -> None:
        """Forgets what is kept under a name."""
        self._kept.pop(name, None)
        self._sizes.pop(name, None)

    def _fits(self, size: int) -> bool:
        return size + sum(self._sizes.values()) <= self._most
