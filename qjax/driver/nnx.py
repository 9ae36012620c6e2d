"""Flax NNX: a module whose parameters are quantized by tracing its call, and that runs so when it is called."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from itertools import zip_longest

import jax
from flax import nnx
from jaxtyping import Array

from qjax.driver.layer import LayerRecord
from qjax.driver.placement import Rule
from qjax.driver.report import Report, warn_of_few_tokens
from qjax.driver.traced import NO_KERNELS, apply_function, checked_batches, quantize_traced
from qjax.errors import QjaxError
from qjax.recipe import Recipe
from qjax.tracing.coverage import Coverage, coverage


@dataclasses.dataclass(frozen=True)
class NnxCall:
    """A module's call as a function of its parameters and the rest of its state, which it returns with the output."""

    graph: nnx.GraphDef

    def __call__(self, params: nnx.State, rest: nnx.State, *args: object, **kwargs: object) -> tuple[object, nnx.State]:
        model = nnx.merge(self.graph, params, rest)
        output = _float_class(type(model)).__call__(model, *args, **kwargs)
        return output, nnx.split(model, nnx.Param, ...)[2]


def quantize_nnx(
    model: nnx.Module,
    recipe: str | Recipe | None,
    *,
    batches: Iterable[tuple],
    weights: Iterable[Array] | None = None,
    rules: Iterable[str | Rule] = (),
    order: str | None = None,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> tuple[nnx.Module, Report]:
    """A module like this one, of the same class, that runs quantized when it is called; and a report.

    batches: arguments of the call, each a tuple; weights, rules and order as in `quantize_function`, which says what can be
    quantized and raises QjaxError for the rest: each nnx.Param of two or more axes that no rule leaves out, but for what is
    named bias, scale or embedding, which stays as it is. The call alone runs
    quantized: other methods see a `Kernel` where an array was. The given model is left as it is; `nnx.state` of the new one is
    kept by Orbax.
    """
    _require("quantize_nnx", model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    batches = [(rest, *args) for args in checked_batches("quantize_nnx", batches)]
    params, report = quantize_traced(NnxCall(graph), params, recipe, batches, weights, rules, order, on_layer, left=NO_KERNELS)
    warn_of_few_tokens(report.layers, 2)
    result = nnx.clone(nnx.merge(graph, params, rest))
    object.__setattr__(result, "__class__", _quantized_class(_float_class(type(model))))
    return result, report


def coverage_nnx(model: nnx.Module, *args: object, **kwargs: object) -> Coverage:
    """`qjax.coverage` of a module's call."""
    _require("coverage_nnx", model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return coverage(NnxCall(graph), params, rest, *args, **kwargs)


@functools.cache
def _quantized_class(cls: type) -> type:
    """The class with a call that runs what stands in its parameters' places."""

    def call(self, *args, **kwargs):
        graph, params, rest = nnx.split(self, nnx.Param, ...)
        output, after = apply_function(NnxCall(graph), params, rest, *args, **kwargs)
        if any(new is not old for new, old in zip_longest(*map(jax.tree.leaves, (after, rest)))):
            nnx.update(self, after)  # what did not change may be of another trace, as running means under jax.grad
        return output

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {"__call__": call, "_qjax_float_class": cls, **names})


def _float_class(cls: type) -> type:
    return getattr(cls, "_qjax_float_class", cls)


def _require(function: str, model: object) -> None:
    if not isinstance(model, nnx.Module):
        raise QjaxError(
            f"{function}: expected a module of flax.nnx, got {type(model).__name__}; a Linen module goes to "
            "qjax.quantize_flax, any function to qjax.quantize_function"
        )
