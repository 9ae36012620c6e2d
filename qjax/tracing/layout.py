"""How a traced value is a rearranged parameter, and how a parameter is a stack of (in, out) matrices.

A parameter of shape (D, N H) that is reshaped to (D, N, H) and transposed to (N, D, H) is, in fine axes (D, N, H),

    Layout(shape=(D, N, H), axes=((1,), (0,), (2,)))

Fine axes are the parameter's own, split where a reshape splits them, in the parameter's order. An axis of the value is a run of
them: none for an axis of size 1 that is not the parameter's. `layers` are fine axes that were taken apart: by scans, or by
indices w[i].
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Axes = tuple[tuple[int, ...], ...]
MARKS = ("copy", "copy_p", "name", "stop_gradient", "optimization_barrier")  # equations that leave a value as it is,
PLACES = ("sharding_constraint", "reshard", "pvary", "pcast")  # and such that say where it lies


class Layout(NamedTuple):
    """shape: of the parameter in fine axes; axes: of the value, each a run of these; layers: those taken apart, in order."""

    shape: tuple[int, ...]
    axes: Axes
    layers: tuple[int, ...] = ()

    def transposed(self, permutation: tuple[int, ...]) -> "Layout":
        """The layout after a transpose."""
        return self._replace(axes=tuple(self.axes[axis] for axis in permutation))

    def reshaped(self, shape: tuple[int, ...]) -> "Layout | None":
        """The layout after a reshape; None where axes are cut so that no fine axes fit."""
        if 0 in (*shape, *self.shape):
            return None
        found, queue, axes = self, [fine for axis in self.axes for fine in axis], []
        for wanted in shape:
            run, size = [], 1
            while queue and (size < wanted or (wanted == 1 and not run and found.shape[queue[0]] == 1)):
                have = found.shape[queue[0]]
                if size * have > wanted:
                    first = wanted // size
                    if first * size != wanted or have % first:
                        return None
                    fine = queue[0]
                    found = found._replace(
                        shape=(*found.shape[:fine], first, have // first, *found.shape[fine + 1 :]),
                        layers=_renumbered((found.layers,), fine)[0],
                    )
                    queue, run = (list(_renumbered((each,), fine)[0]) for each in (queue, run))
                    axes = list(_renumbered(axes, fine))
                    have = first
                run.append(queue.pop(0))
                size *= have
            if size != wanted:
                return None
            axes.append(tuple(run))
        return found._replace(axes=tuple(axes))

    def widened(self, shape: tuple[int, ...], dimensions: tuple[int, ...], sizes: tuple[int, ...]) -> "Layout | None":
        """The layout after broadcast_in_dim of a value of these sizes; None where it repeats anything."""
        new = [shape[axis] for axis in range(len(shape)) if axis not in dimensions]
        if any(size != 1 for size in new) or tuple(shape[axis] for axis in dimensions) != sizes:
            return None
        placed = dict(zip(dimensions, self.axes, strict=True))
        return self._replace(axes=tuple(placed.get(axis, ()) for axis in range(len(shape))))

    def taken(self, axis: int) -> "Layout | None":
        """The layout of one slice along an axis that is one of the parameter's; the axis is gone."""
        if len(self.axes[axis]) != 1:
            return None
        rest = self.axes[:axis] + self.axes[axis + 1 :]
        return self._replace(axes=rest, layers=(*self.layers, *self.axes[axis]))


@functools.lru_cache(maxsize=256)
def whole(shape: tuple[int, ...]) -> Layout:
    """The layout of a parameter as it is."""
    return Layout(shape, tuple((axis,) for axis in range(len(shape))))


def _renumbered(axes: Axes, split: int) -> Axes:
    """Runs of fine axes after one of these became two."""
    pair = lambda fine: (fine, fine + 1) if fine == split else (fine + (fine > split),)  # noqa: E731
    return tuple(tuple(new for fine in axis for new in pair(fine)) for axis in axes)


class View(NamedTuple):
    """How a parameter of `shape` is a stack of matrices (*stack, in, out).

    parts: its shape, with axes split and neighbours of one role merged. stack: those of `parts` that tell matrices apart:
    layers first, as scans take them, then experts. in_axes, out_axes: in the parameter's order.
    """

    shape: tuple[int, ...]
    parts: tuple[int, ...]
    stack: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out) of each matrix."""
        return math.prod(self.parts[axis] for axis in self.in_axes), math.prod(self.parts[axis] for axis in self.out_axes)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """How many matrices there are, by axis of the stack."""
        return tuple(self.parts[axis] for axis in self.stack)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.stack, *self.in_axes, *self.out_axes)

    def to_matrices(self, kernel: Float[Array, "..."]) -> Float[Array, "*stack in out"]:
        """The parameter as matrices; itself where it is one already."""
        if kernel.shape == (*self.stack_shape, *self.matrix_shape) and self._order == tuple(range(len(self.parts))):
            return kernel
        return kernel.reshape(self.parts).transpose(self._order).reshape(*self.stack_shape, *self.matrix_shape)

    def to_kernel(self, matrices: Float[Array, "*stack in out"]) -> Float[Array, "..."]:
        """The inverse of `to_matrices`."""
        if matrices.shape == self.shape and self._order == tuple(range(len(self.parts))):
            return matrices
        inverse = [self._order.index(axis) for axis in range(len(self.parts))]
        return matrices.reshape([self.parts[axis] for axis in self._order]).transpose(inverse).reshape(self.shape)


def view_of(shape: tuple[int, ...], layout: Layout, batch: tuple[int, ...], summed: tuple[int, ...]) -> View:
    """The view by which a contraction sees a parameter of `shape`: fine axes in `batch` and `summed`, and its outputs."""
    role = dict.fromkeys(summed, "in") | {fine: ("stack", fine) for fine in (*layout.layers, *batch)}
    parts, roles, place = [], [], {}
    for fine, size in enumerate(layout.shape):
        mine = role.get(fine, "out")
        if roles and mine == roles[-1]:
            parts[-1] *= size
        else:
            parts.append(size)
            roles.append(mine)
        place[fine] = len(parts) - 1
    stack = tuple(place[fine] for fine in (*layout.layers, *batch))
    in_axes, out_axes = (tuple(axis for axis, each in enumerate(roles) if each == name) for name in ("in", "out"))
    return View(tuple(shape), tuple(parts), stack, in_axes, out_axes)


def rearranged(name: str, params: Mapping, shape: tuple[int, ...], layout: Layout) -> tuple[Layout, tuple[int, ...]] | None:
    """A parameter's layout after an equation that rearranges it, and the indices where one slice of a stack is taken."""
    match name:
        case "transpose":
            found = layout.transposed(params["permutation"])
        case "reshape" if params["dimensions"] is None:
            found = layout.reshaped(tuple(params["new_sizes"]))
        case "squeeze":
            gone = {axis % len(shape) for axis in params["dimensions"]}
            found = layout._replace(axes=tuple(run for axis, run in enumerate(layout.axes) if axis not in gone))
        case "broadcast_in_dim":
            found = layout.widened(tuple(params["shape"]), tuple(params["broadcast_dimensions"]), shape)
        case "convert_element_type":
            found = layout if jnp.issubdtype(params["new_dtype"], jnp.floating) else None
        case _ if name in MARKS + PLACES:
            found = layout
        case "slice":
            return _sliced(params, shape, layout)
        case _:
            return None
    return None if found is None else (found, ())


def _sliced(params: Mapping, shape: tuple[int, ...], layout: Layout) -> tuple[Layout, tuple[int, ...]] | None:
    """Of a slice that is one of a stack, kept with axes of size 1."""
    begin, end = params["start_indices"], params["limit_indices"]
    cut = [axis for axis, size in enumerate(shape) if end[axis] - begin[axis] != size]
    if set(params["strides"] or ()) - {1} or any(end[i] - begin[i] != 1 or len(layout.axes[i]) != 1 for i in cut):
        return None
    axes = tuple(() if axis in cut else run for axis, run in enumerate(layout.axes))
    layers = (*layout.layers, *(layout.axes[axis][0] for axis in cut))
    return layout._replace(axes=axes, layers=layers), tuple(int(begin[axis]) for axis in cut)
