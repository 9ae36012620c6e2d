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
        self._most, self._kept = most, {}

    def through(self, name: Hashable, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Those kept under a name; without such these, which are kept on the way where they fit."""
        if name in self._kept:
            yield from self._kept[name]
            return
        found, room = [], self._most - sum(x.size for held in self._kept.values() for _, x in held)
        for batch in batches:
            room -= batch[1].size
            if room >= 0:
                found.append(batch)
            else:
                found.clear()
            yield batch
        if room >= 0:
            self._kept[name] = found

    def drop(self, name: Hashable) -> None:
        """Forgets what is kept under a name."""
        self._kept.pop(name, None)
