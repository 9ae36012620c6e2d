"""The one place that intercepts layers: linear ones run with what stands for their kernels, the model's code unchanged.

`flax.linen.intercept_methods` shows us every layer's call. Where the layer's kernel is a Linear, QTensor or KernelWeight we
apply it in the layer's place; every other layer runs as written. The same hook shows calibration what goes into each layer
(`recorded`), as the layer is given it.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeCollectionNotFound
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from jaxtyping import PyTree

from qjax.errors import QjaxError, code_of_others
from qjax.interception.contraction import Contraction, KernelView, einsum_contraction, general_contraction
from qjax.interception.stacked import StackedDense
from qjax.linear import Table, apply_linear, decode, is_quantized

SERVED = (nn.Dense, nn.DenseGeneral, nn.Einsum)
ADVICE = (
    "batches are tuples of the arguments of module.apply after the variables; a module that needs more, as rngs, goes to "
    "qjax.quantize_function: lambda params, x: module.apply({'params': params}, x, rngs=...)"
)


class Linears(NamedTuple):
    """Linear layers of a model by the path of their kernel, for example "encoder/mlp/up/kernel"."""

    views: dict[str, KernelView]
    refused: dict[str, str]  # layers that cannot run with a quantized kernel, and why
    moved: set[str]  # kernels that layers are given by a transformation, changed (nn.map_variables) or not (nn.remat)


def quantized_kernels(products: DTypeLike | None = None):
    """Context in which linear layers whose kernel is a Linear, QTensor or KernelWeight apply it, and an nn.Embed reads a Table.
    products: a type that what is multiplied is cast to, as in `apply_linear`, also of an nn.Dense whose kernel is an array.

    Raises QjaxError, naming the layer, for a quantized leaf in a layer that is not exactly nn.Dense, nn.DenseGeneral without
    batch axes or nn.Einsum without axes shared by input, kernel and output.
    """
    return nn.intercept_methods(functools.partial(_run_quantized, products=products))


@dataclasses.dataclass
class Recording:
    """What one run of a module showed, under the paths of its layers' kernels.

    inputs: (*kept, in) arrays, one a call, the input axes of the kernel flattened in its order, before any map of the leaf that
    stands in the kernel's place. sources: the arrays as the layer was given them, to see which layers share an input. outputs:
    what the module at `watched` returned, one a call. routed: of a `StackedDense`, whose inputs are as it was given them, which
    tokens each of its layers is for, one a call. results: what every other layer returned, one a call.
    """

    watched: tuple[str, ...] | None = None
    inputs: dict[str, list[jax.Array]] = dataclasses.field(default_factory=dict)
    sources: dict[str, list[tuple[jax.Array, tuple[int, ...]]]] = dataclasses.field(default_factory=dict)
    outputs: list[object] = dataclasses.field(default_factory=list)
    routed: dict[str, list[jax.Array]] = dataclasses.field(default_factory=dict)
    results: dict[str, list[jax.Array]] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def recorded(
    watched: tuple[str, ...] | None = None,
    known: Mapping[str, jax.Array] = MappingProxyType({}),
    products: DTypeLike | None = None,
) -> Iterator[Recording]:
    """`quantized_kernels` that also records the input of every linear layer, and the output of the module at path `watched`.

    known: what layers return, by the path of the kernel, instead of running: XLA drops what is then unused. products: as in
    `quantized_kernels`; inputs of layers that it applies to are recorded in it, as they are multiplied.
    """
    recording = Recording(watched)

    def record(call, args, kwargs, context):
        layer = context.module
        if context.method_name == "__call__" and type(layer) in SERVED:
            path = "/".join((*layer.path, "kernel"))
            with contextlib.suppress(QjaxError):  # a layer that is not served is refused where it is to be quantized
                plan = _contraction(layer, args, kwargs)
                x = args[0] if args else kwargs["inputs"]
                recording.inputs.setdefault(path, []).append(_as_multiplied(layer, plan.to_matrix(x), products))
                recording.sources.setdefault(path, []).append((x, plan.input_axes))
        if context.method_name == "__call__" and type(layer) is StackedDense:
            x, routed = args
            path = "/".join((*layer.path, "kernel"))
            recording.inputs.setdefault(path, []).append(_as_multiplied(layer, x, products))
            recording.sources.setdefault(path, []).append((x, ()))
            recording.routed.setdefault(path, []).append(routed)
        if context.method_name == "__call__" and type(layer) in SERVED:
            result = known[path] if path in known else _run_quantized(call, args, kwargs, context, products)
            recording.results.setdefault(path, []).append(result)
        else:
            result = _run_quantized(call, args, kwargs, context, products)
        if context.method_name == "__call__" and layer.scope is not None and tuple(layer.path) == watched:
            recording.outputs.append(result)
        return result

    with nn.intercept_methods(record):
        yield recording


def _as_multiplied(layer: nn.Module, x: jax.Array, products: DTypeLike | None) -> jax.Array:
    """A layer's input in the type in which it meets an array; where a leaf may map or round it, as it comes."""
    lowered = _is_lowered(layer, products) or (products is not None and type(layer) is StackedDense)
    return x.astype(products) if lowered and not is_quantized(layer.get_variable("params", "kernel")) else x


def _is_lowered(layer: nn.Module, products: DTypeLike | None) -> bool:
    """Whether a layer's input and kernel are cast to `products` in its place; a StackedDense does so itself."""
    return products is not None and type(layer) is nn.Dense


def unboxed(params: PyTree) -> PyTree:
    """Parameters without the boxes that hold the names of their axes (nn.with_partitioning), unconstrained."""
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf.value if is_box(leaf) else leaf, params, is_leaf=lambda x: is_box(x) or is_quantized(x)
    )


def linear_layers(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> Linears:
    """Every linear layer that module.apply({"params": params}, *args, **kwargs) calls; nothing is computed.

    Raises QjaxError for a module that reads other collections, and where it fails on the arguments.
    """
    views, refused, moved, given = {}, {}, set(), {}

    def record(call, call_args, call_kwargs, context):
        layer = context.module
        if context.method_name == "__call__":
            path = "/".join((*layer.path, "kernel"))
            try:
                if type(layer) in SERVED:
                    views[path] = _contraction(layer, call_args, call_kwargs).view
                    if unboxed(layer.get_variable("params", "kernel")) is not given.get(path):
                        moved.add(path)
                elif layer.has_variable("params", "kernel"):
                    raise QjaxError(_cannot(layer, "kernel"))
            except QjaxError as error:
                refused[path] = str(error)
        return _run_quantized(call, call_args, call_kwargs, context)

    def run(params):
        given.update(flatten_dict(unboxed(params), sep="/"))
        return module.apply({"params": params}, *args, **kwargs)

    with code_of_others(f"{type(module).__name__} itself", ADVICE), nn.intercept_methods(record):
        try:
            jax.eval_shape(run, params)
        except ScopeCollectionNotFound as error:
            collection = re.search('collection "(.*?)"', str(error)).group(1)
            raise QjaxError(
                f"{type(module).__name__} reads the collection {collection!r}, which interceptors do not see: "
                f"give quantize_flax all variables, {{'params': ..., {collection!r}: ...}}"
            ) from None
    return Linears(views, refused, moved)


def _run_quantized(call, args, kwargs, context, products=None):
    layer = context.module
    if layer.scope is None or not layer.has_variable("params", "kernel"):
        held = layer.variables.get("params", {}) if layer.scope is not None else {}
        if (
            type(layer) is nn.Embed
            and isinstance(held.get("embedding"), Table)
            and context.method_name in ("setup", "__call__")
        ):
            return _embedded(layer, held["embedding"], *args, **kwargs)
        _refuse_other_quantized(layer, held)
        return call(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    lowered = _is_lowered(layer, products) and context.method_name == "__call__"
    if not is_quantized(kernel) and not lowered:
        return call(*args, **kwargs)
    if type(layer) is StackedDense:
        return call(*args, **kwargs)  # which takes what stands in its kernel's place
    if context.method_name != "__call__" and type(layer) in SERVED:
        return call(*args, **kwargs)  # a function lifted over the layer, as by nn.scan: the layer's own call comes inside
    if type(layer) not in SERVED:
        raise QjaxError(_cannot(layer, "kernel"))
    plan = _contraction(layer, args, kwargs)
    x = args[0] if args else kwargs["inputs"]
    bias = unboxed(layer.get_variable("params", "bias")) if layer.use_bias else None
    x, bias = promote_dtype(x, bias, dtype=layer.dtype or jnp.result_type(x, layer.param_dtype))

    y = plan.to_output(apply_linear(plan.to_matrix(x), kernel, precision=layer.precision, products=products))
    return y if bias is None else y + bias.reshape(plan.bias_shape)


def _embedded(layer: nn.Embed, table: Table, inputs: jax.Array | None = None) -> jax.Array | None:
    """The rows of a table for tokens; None in the layer's own setup, which would take the table for an array."""
    return None if inputs is None else jnp.take(decode(table, layer.dtype or layer.param_dtype), inputs, axis=0)


def _refuse_other_quantized(layer: nn.Module, held: Mapping[str, object]) -> None:
    bad = [name for name, leaf in held.items() if is_quantized(leaf)]
    if bad:
        raise QjaxError(_cannot(layer, ", ".join(bad)))


def _cannot(layer: nn.Module, leaf: str) -> str:
    return (
        f"layer {_name(layer)}: {type(layer).__name__} cannot run with a quantized {leaf}; "
        "its own code knows kernels of Dense, DenseGeneral and Einsum; leave it out with a rule 'PATTERN=none'"
    )


def _contraction(layer: nn.Module, args: tuple, kwargs: dict) -> Contraction:
    """The plan of one call of a served layer; raises QjaxError where the layer is used in a way that is not served."""
    x = args[0] if args else kwargs["inputs"]
    if getattr(layer, "promote_dtype", promote_dtype) is not promote_dtype:
        raise QjaxError(f"layer {_name(layer)}: it brings its own promote_dtype, which a quantized kernel would bypass")
    if isinstance(layer, nn.Einsum):
        equation = (args[1] if len(args) > 1 else kwargs.get("einsum_str")) or layer.einsum_str
        try:
            return einsum_contraction(equation, x.ndim, tuple(layer.shape))
        except QjaxError as error:
            raise QjaxError(f"layer {_name(layer)}: {error}") from None
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        raise QjaxError(f"layer {_name(layer)}: it brings its own dot_general, which a quantized kernel would bypass")
    if isinstance(layer, nn.Dense):
        return general_contraction(x.shape, (x.ndim - 1,), (layer.features,))
    if layer.batch_dims:
        raise QjaxError(f"layer {_name(layer)}: DenseGeneral with batch_dims cannot run with a quantized kernel")
    axes = tuple(sorted(axis % x.ndim for axis in _as_tuple(layer.axis)))  # Flax sorts them too
    return general_contraction(x.shape, axes, _as_tuple(layer.features))


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _name(layer: nn.Module) -> str:
    return "/".join(layer.path) or type(layer).__name__
