"""A linear layer's call as the product of two matrices; no module framework is known here.

Kernels with several input or output axes are seen as one (in, out) matrix: `KernelView` says how, and is all that a quantizer
needs to know of a layer. A `Contraction` also says which axes of the layer's input are summed and what its output is.
"""

import math
from typing import NamedTuple

from jaxtyping import Array, Float

from qjax.errors import QjaxError


class KernelView(NamedTuple):
    """How a kernel of `shape` is an (in, out) matrix: its axes in the order (*in_axes, *out_axes), the two runs flattened."""

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out) of the matrix."""
        return math.prod(self.shape[axis] for axis in self.in_axes), math.prod(self.shape[axis] for axis in self.out_axes)

    def to_matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "in out"]:
        """The kernel as an (in, out) matrix."""
        return kernel.transpose(*self.in_axes, *self.out_axes).reshape(self.matrix_shape)

    def to_kernel(self, matrix: Float[Array, "in out"]) -> Float[Array, "..."]:
        """The inverse of `to_matrix`."""
        order = (*self.in_axes, *self.out_axes)
        inverse = [order.index(axis) for axis in range(len(order))]
        return matrix.reshape([self.shape[axis] for axis in order]).transpose(inverse)


class Contraction(NamedTuple):
    """One call of a linear layer: which axes of its input are summed with the kernel's, and what the output is."""

    view: KernelView
    input_axes: tuple[int, ...]  # in the order of view.in_axes
    output_order: tuple[int, ...]  # transpose of (*kept input axes, *out axes of the kernel) to the layer's output
    bias_shape: tuple[int, ...]

    def to_matrix(self, x: Float[Array, "..."]) -> Float[Array, "*kept in"]:
        """The layer's input as what the (in, out) matrix multiplies."""
        kept = [axis for axis in range(x.ndim) if axis not in self.input_axes]
        x = x.transpose(*kept, *self.input_axes)
        return x.reshape(*x.shape[: len(kept)], -1)

    def to_output(self, y: Float[Array, "*kept out"]) -> Float[Array, "..."]:
        """The layer's output, without its bias, from the product of matrices."""
        return y.reshape(*y.shape[:-1], *(self.view.shape[axis] for axis in self.view.out_axes)).transpose(self.output_order)


def general_contraction(input_shape: tuple[int, ...], axes: tuple[int, ...], features: tuple[int, ...]) -> Contraction:
    """The sum over `axes` (sorted) of the input with the first axes of a kernel, whose last ones are `features`."""
    shape = (*(input_shape[axis] for axis in axes), *features)
    view = KernelView(shape, tuple(range(len(axes))), tuple(range(len(axes), len(shape))))
    return Contraction(view, axes, tuple(range(len(input_shape) - len(axes) + len(features))), features)


def einsum_contraction(equation: str, ndim: int, shape: tuple[int, ...]) -> Contraction:
    """The einsum of an input of `ndim` axes with a kernel of `shape`. Raises QjaxError where it is no matrix product."""
    equation = equation.replace(" ", "")
    operands, result = equation.split("->")
    left, right = operands.split(",")
    free = [letter for letter in map(chr, range(ord("A"), ord("Z") + 1)) if letter not in equation]
    dots = "".join(free[: ndim - len(left.replace("...", ""))])
    left, result = left.replace("...", dots), result.replace("...", dots)
    summed = [letter for letter in right if letter in left and letter not in result]
    outputs = [letter for letter in right if letter in result and letter not in left]
    kept = [letter for letter in left if letter not in summed]
    if "..." in right or len(summed) + len(outputs) != len(right) or sorted(kept + outputs) != sorted(result):
        raise QjaxError(
            f"the einsum {equation!r} is not a matrix product of input and kernel "
            "(every kernel axis must be summed with the input or appear in the output alone)"
        )
    view = KernelView(shape, tuple(right.index(axis) for axis in summed), tuple(right.index(axis) for axis in outputs))
    order = tuple((kept + outputs).index(letter) for letter in result)
    bias_shape = tuple(shape[right.index(letter)] if letter in right else 1 for letter in result)
    return Contraction(view, tuple(left.index(letter) for letter in summed), order, bias_shape)
