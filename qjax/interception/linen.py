"""The one place that touches Flax modules: linear layers run with quantized kernels, the model's code unchanged.

`flax.linen.intercept_methods` shows us every layer's call. Where the layer's kernel is a QTensor we multiply with it in the
layer's place; every other layer runs as written. The same hook shows calibration what goes into each layer (`recorded`).
Kernels with several input or output axes (DenseGeneral, Einsum) are seen as one (in, out) matrix: `KernelView` says how, and
is all that a quantizer needs to know of a layer.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeCollectionNotFound
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, PyTree

from qjax.errors import QjaxError
from qjax.kernels.layout import KernelWeight
from qjax.kernels.matmul import matmul
from qjax.qtensor import is_quantized

SERVED = (nn.Dense, nn.DenseGeneral, nn.Einsum)


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


class _Contraction(NamedTuple):
    """One call of a linear layer: which axes of its input are summed with the kernel's, and what the output is."""

    view: KernelView
    input_axes: tuple[int, ...]  # in the order of view.in_axes
    output_order: tuple[int, ...]  # transpose of (*kept input axes, *out axes of the kernel) to the layer's output
    bias_shape: tuple[int, ...]


class Linears(NamedTuple):
    """Linear layers of a model by the path of their kernel, for example "encoder/mlp/up/kernel"."""

    views: dict[str, KernelView]
    refused: dict[str, str]  # layers that cannot run with a quantized kernel, and why


def quantized_kernels():
    """Context in which linear layers whose kernel is a QTensor multiply with it.

    Raises QjaxError, naming the layer, for a quantized leaf in a layer that is not exactly nn.Dense, nn.DenseGeneral without
    batch axes or nn.Einsum without axes shared by input, kernel and output.
    """
    return nn.intercept_methods(_run_quantized)


@dataclasses.dataclass
class Recording:
    """What one run of a module showed, under the paths of its layers' kernels.

    inputs: (*kept, in) arrays, one a call, the input axes of the kernel flattened in its order. sources: the arrays as the
    layer was given them, to see which layers share an input. outputs: what the module at `watched` returned, one a call.
    """

    watched: tuple[str, ...] | None = None
    inputs: dict[str, list[jax.Array]] = dataclasses.field(default_factory=dict)
    sources: dict[str, list[tuple[jax.Array, tuple[int, ...]]]] = dataclasses.field(default_factory=dict)
    outputs: list[object] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def recorded(watched: tuple[str, ...] | None = None) -> Iterator[Recording]:
    """`quantized_kernels` that also records the input of every linear layer, and the output of the module at path `watched`."""
    recording = Recording(watched)

    def record(call, args, kwargs, context):
        layer = context.module
        if context.method_name == "__call__" and type(layer) in SERVED:
            with contextlib.suppress(QjaxError):  # a layer that is not served is refused where it is to be quantized
                plan = _contraction(layer, args, kwargs)
                x = args[0] if args else kwargs["inputs"]
                path = "/".join((*layer.path, "kernel"))
                recording.inputs.setdefault(path, []).append(_input_matrix(x, plan))
                recording.sources.setdefault(path, []).append((x, plan.input_axes))
        result = _run_quantized(call, args, kwargs, context)
        if context.method_name == "__call__" and layer.scope is not None and tuple(layer.path) == watched:
            recording.outputs.append(result)
        return result

    with nn.intercept_methods(record):
        yield recording


def linear_layers(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> Linears:
    """Every linear layer that module.apply({"params": params}, *args, **kwargs) calls; nothing is computed.

    Raises QjaxError for a module that reads other collections.
    """
    views, refused = {}, {}

    def record(call, call_args, call_kwargs, context):
        layer = context.module
        if context.method_name == "__call__":
            path = "/".join((*layer.path, "kernel"))
            try:
                if type(layer) in SERVED:
                    views[path] = _contraction(layer, call_args, call_kwargs).view
                elif layer.has_variable("params", "kernel"):
                    raise QjaxError(_cannot(layer, "kernel"))
            except QjaxError as error:
                refused[path] = str(error)
        return _run_quantized(call, call_args, call_kwargs, context)

    try:
        with nn.intercept_methods(record):
            jax.eval_shape(lambda p: module.apply({"params": p}, *args, **kwargs), params)
    except ScopeCollectionNotFound as error:
        collection = re.search('collection "(.*?)"', str(error)).group(1)
        raise QjaxError(
            f"{type(module).__name__} reads the collection {collection!r}; modules with further collections than params "
            "cannot be captured yet: round its kernels with qjax.rtn or qjax.gptq and run it under qjax.quantized_kernels()"
        ) from None
    return Linears(views, refused)


def _run_quantized(call, args, kwargs, context):
    layer = context.module
    if layer.scope is None or not layer.has_variable("params", "kernel"):
        _refuse_other_quantized(layer)
        return call(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not _is_packed(kernel):
        return call(*args, **kwargs)
    if context.method_name != "__call__" and type(layer) in SERVED:
        return call(*args, **kwargs)  # a function lifted over the layer, as by nn.scan: the layer's own call comes inside
    if type(layer) not in SERVED:
        raise QjaxError(_cannot(layer, "kernel"))
    plan = _contraction(layer, args, kwargs)
    x = args[0] if args else kwargs["inputs"]
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    x, bias = promote_dtype(x, bias, dtype=layer.dtype or jnp.result_type(x, layer.param_dtype))

    y = matmul(_input_matrix(x, plan), kernel, precision=layer.precision)
    y = y.reshape(*y.shape[:-1], *(plan.view.shape[axis] for axis in plan.view.out_axes)).transpose(plan.output_order)
    return y if bias is None else y + bias.reshape(plan.bias_shape)


def _is_packed(leaf: object) -> bool:
    return is_quantized(leaf) or isinstance(leaf, KernelWeight)


def _input_matrix(x: Float[Array, "..."], plan: _Contraction) -> Float[Array, "*kept in"]:
    kept = [axis for axis in range(x.ndim) if axis not in plan.input_axes]
    x = x.transpose(*kept, *plan.input_axes)
    return x.reshape(*x.shape[: len(kept)], -1)


def _refuse_other_quantized(layer: nn.Module) -> None:
    held = layer.variables.get("params", {}) if layer.scope is not None else {}
    bad = [name for name, leaf in held.items() if _is_packed(leaf)]
    if bad:
        raise QjaxError(_cannot(layer, ", ".join(bad)))


def _cannot(layer: nn.Module, leaf: str) -> str:
    return (
        f"layer {_name(layer)}: a {type(layer).__name__} cannot run with a quantized {leaf}; "
        "only kernels of Dense, DenseGeneral and Einsum (not of classes derived from them) can be quantized"
    )


def _contraction(layer: nn.Module, args: tuple, kwargs: dict) -> _Contraction:
    """The plan of one call of a served layer; raises QjaxError where the layer is used in a way that is not served."""
    x = args[0] if args else kwargs["inputs"]
    if isinstance(layer, nn.Einsum):
        return _einsum_contraction(layer, x.ndim, args[1] if len(args) > 1 else kwargs.get("einsum_str"))
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        raise QjaxError(f"layer {_name(layer)}: it brings its own dot_general, which a quantized kernel would bypass")
    if isinstance(layer, nn.Dense):
        axes, features = (x.ndim - 1,), (layer.features,)
    else:
        if layer.batch_dims:
            raise QjaxError(f"layer {_name(layer)}: DenseGeneral with batch_dims cannot run with a quantized kernel")
        axes = tuple(sorted(axis % x.ndim for axis in _as_tuple(layer.axis)))  # Flax sorts them too
        features = _as_tuple(layer.features)
    shape = (*(x.shape[axis] for axis in axes), *features)
    view = KernelView(shape, tuple(range(len(axes))), tuple(range(len(axes), len(shape))))
    outputs = x.ndim - len(axes) + len(features)
    return _Contraction(view, axes, tuple(range(outputs)), features)


def _einsum_contraction(layer: nn.Einsum, ndim: int, equation: str | None) -> _Contraction:
    equation = (equation or layer.einsum_str).replace(" ", "")
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
            f"layer {_name(layer)}: the einsum {equation!r} is not a matrix product of input and kernel "
            "(every kernel axis must be summed with the input or appear in the output alone)"
        )
    view = KernelView(
        tuple(layer.shape), tuple(right.index(axis) for axis in summed), tuple(right.index(axis) for axis in outputs)
    )
    order = tuple((kept + outputs).index(letter) for letter in result)
    bias_shape = tuple(layer.shape[right.index(letter)] if letter in right else 1 for letter in result)
    return _Contraction(view, tuple(left.index(letter) for letter in summed), order, bias_shape)


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _name(layer: nn.Module) -> str:
    return "/".join(layer.path) or type(layer).__name__
