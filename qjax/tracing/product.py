"""A traced contraction with a parameter, as a product of rows with a stack of (in, out) matrices.

dot_general with any axes (matmul, einsum), ragged_dot (experts: rows sorted by expert), and convolutions without groups, whose
patches are rows. Axes of the input and of the output are told by labels: fine axes of the parameter (>= 0), or -1 - i for
the input's own axis i.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.tracing.layout import Axes, Layout


class Product(NamedTuple):
    """One contraction. x, out: labels of the axes of the input (its patches, where `window` is given) and of the output.
    batch, summed: fine axes of the parameter. ragged: rows belong to the experts along `batch`, in runs of given sizes.
    """

    layout: Layout
    x: Axes
    out: Axes
    batch: tuple[int, ...]
    summed: tuple[int, ...]
    ragged: bool = False
    window: tuple[tuple[str, object], ...] | None = None  # arguments of conv_general_dilated_patches

    def _sizes(self, x_shape: tuple[int, ...]) -> dict[int, int]:
        return {**dict(enumerate(self.layout.shape)), **{-1 - axis: size for axis, size in enumerate(x_shape)}}

    def _arrangement(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Labels of the input's rows: (batch, kept, summed)."""
        labels = [label for axis in self.x for label in axis]
        return () if self.ragged else self.batch, tuple(label for label in labels if label < 0), self.summed

    def spread(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The input, or its patches."""
        return x if self.window is None else lax.conv_general_dilated_patches(x, **dict(self.window))

    def to_rows(self, x: Float[Array, "..."]) -> Float[Array, "*rows in"]:
        """The spread input as what the matrices multiply; ragged products have no batch axes here."""
        sizes, arranged = self._sizes(x.shape), self._arrangement()
        labels = [label for axis in self.x for label in axis]
        x = x.reshape([sizes[label] for label in labels])
        batch, kept, summed = ([sizes[label] for label in run] for run in arranged)
        order = [labels.index(label) for run in arranged for label in run]
        return x.transpose(order).reshape(*batch, *kept, math.prod(summed))

    def to_output(self, y: Float[Array, "*rows out"], x_shape: tuple[int, ...]) -> Float[Array, "..."]:
        """The contraction's output from the product of matrices; x_shape: of the spread input."""
        sizes, (batch, kept, _) = self._sizes(x_shape), self._arrangement()
        wanted = [label for axis in self.out for label in axis]
        outputs = sorted(label for label in wanted if label >= 0 and label not in batch)
        labels = [*batch, *kept, *outputs]
        y = y.reshape([sizes[label] for label in labels]).transpose([labels.index(label) for label in wanted])
        return y.reshape([math.prod(sizes[label] for label in axis) for axis in self.out])


def product_of(name: str, params: dict, avals: list, layouts: list[Layout | None]) -> Product | str | None:
    """The product that an equation computes with its one operand that has a layout, or why it is none; None for primitives
    that are no contractions.
    """
    made = {"dot_general": _dot_general, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}.get(name)
    if made is None:
        return None
    if sum(layout is not None for layout in layouts) != 1:
        return "multiplied with another parameter"
    side = next(i for i, layout in enumerate(layouts) if layout is not None)
    if side < 2 and not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals[:2]):
        return f"multiplied with {avals[1 - side].dtype}"
    return made(params, avals, layouts[side], side)


def _dot_general(params, avals, layout, side) -> Product | str:
    (*contracted,), (*batch,) = params["dimension_numbers"]
    summed, batched = (tuple(f for axis in axes[side] for f in layout.axes[axis]) for axes in (contracted, batch))
    if not contracted[0]:
        return "multiplied elementwise"
    x = [(-1 - axis,) for axis in range(len(avals[1 - side].shape))]
    for axes in (contracted, batch):
        for own, other in zip(axes[side], axes[1 - side], strict=True):
            x[other] = layout.axes[own]
    free = [
        [axis for axis in range(len(aval.shape)) if axis not in (*contracted[i], *batch[i])] for i, aval in enumerate(avals)
    ]
    kept, outputs = [x[axis] for axis in free[1 - side]], [layout.axes[axis] for axis in free[side]]
    out = [*(layout.axes[axis] for axis in batch[side]), *([*kept, *outputs] if side else [*outputs, *kept])]
    return Product(layout, tuple(x), tuple(out), tuple(sorted(batched)), tuple(sorted(summed)))


def _ragged_dot(params, avals, layout, side) -> Product | str:
    numbers = params["ragged_dot_dimension_numbers"]
    plain = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ())) and params["group_offset"] is None
    if side != 1 or not plain or tuple(numbers.rhs_group_dimensions) != (0,) or tuple(numbers.lhs_ragged_dimensions) != (0,):
        return "in a ragged product other than rows (m, k) with experts (g, k, n)"
    experts, summed, outputs = layout.axes
    if len(experts) != 1:
        return "in a ragged product with experts along several axes"
    return Product(layout, ((-1,), summed), ((-1,), outputs), experts, tuple(sorted(summed)), ragged=True)


def _convolution(params, avals, layout, side) -> Product | str:
    if side != 1 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return "in a convolution with groups"
    numbers = params["dimension_numbers"]
    outputs, inputs, *space = (layout.axes[axis] for axis in numbers.rhs_spec)
    summed = (*inputs, *(fine for axis in space for fine in axis))
    x = [(-1 - axis,) for axis in range(len(avals[0].shape))]
    out = list(x)
    x[numbers.lhs_spec[1]] = summed  # patches have their channels first, then their places
    for there, here in zip(numbers.out_spec, numbers.lhs_spec, strict=True):
        out[there] = (-1 - here,)
    out[numbers.out_spec[1]] = outputs
    sizes = tuple(avals[1].shape[axis] for axis in numbers.rhs_spec[2:])
    window = {name: params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    pointwise = all(size == 1 for size in sizes) and all(
        step == 1 for step in (*window["window_strides"], *window["lhs_dilation"])
    )
    if pointwise and not any(end for ends in window["padding"] for end in ends):
        window = None
    else:
        numbers = lax.ConvDimensionNumbers(numbers.lhs_spec, numbers.rhs_spec, numbers.lhs_spec)
        window |= {"filter_shape": sizes, "dimension_numbers": numbers, "precision": jax.lax.Precision.HIGHEST}
        window = tuple(window.items())
    return Product(layout, tuple(x), tuple(out), (), tuple(sorted(summed)), window=window)
