"""Parameters that are read when they are needed: what stands in the place of an array of a tree until then.

Shapes, types and bytes are known without reading. A quantized leaf whose arrays are lazy is lazy, and is asked for its format
and size like any other. `materialised` reads; nothing keeps what was read but the caller.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """An array of this shape and type, or a leaf that stands for one: `read()` makes it, anew each time, from `file`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], object]
    file: Path | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None):
        """Reads: numpy.asarray(lazy)."""
        return np.asarray(self.read(), dtype)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array, read or not."""
    return isinstance(leaf, jax.Array | np.ndarray | Lazy)


def is_lazy(tree: PyTree) -> bool:
    """Whether anything in a tree, or leaf, waits to be read."""
    return any(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(tree))


def materialised(tree: PyTree) -> PyTree:
    """The tree with every lazy leaf read; what is in memory is the same object as before."""
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, Lazy) else leaf, tree) if is_lazy(tree) else tree


def map_lazily(
    function: Callable[[object], object], tree: PyTree, *, dtype: np.dtype, is_leaf: Callable[[object], bool]
) -> PyTree:
    """function(leaf) in every leaf's place; in a lazy one's, a Lazy of its shape and `dtype` that does so when it is read."""

    def convert(leaf):
        return Lazy(leaf.shape, np.dtype(dtype), lambda: function(materialised(leaf))) if is_lazy(leaf) else function(leaf)

    return jax.tree.map(convert, tree, is_leaf=is_leaf)
