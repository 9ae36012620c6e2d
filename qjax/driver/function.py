"""Any Linen model: its linear layers are quantized, and run in its own code.

Interceptors serve Dense, DenseGeneral and Einsum as they are. Whatever they refuse, the trace of `module.apply` serves: classes
of one's own, layers under scan and remat, convolutions, further collections.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import Batch, HiddenError, distinct_calls, is_hidden, sharing
from qjax.driver.flow import quantize_piece
from qjax.driver.layer import LayerRecord
from qjax.driver.piece import Piece
from qjax.driver.placement import Plan, Rule, one_order, parsed, place
from qjax.driver.report import Report, cast_others, make_report, warn_of_few_tokens
from qjax.driver.traced import NO_KERNELS, apply_function, quantize_traced, with_weights
from qjax.errors import QjaxError
from qjax.interception.contraction import KernelView
from qjax.interception.linen import linear_layers, quantized_kernels, unboxed
from qjax.linear import dequantize, is_quantized
from qjax.methods import Stage
from qjax.recipe import Recipe
from qjax.tracing.coverage import coverage
from qjax.tracing.kernel import Kernel, dequantize_function


def quantize_flax(
    module: nn.Module,
    params: PyTree,
    recipe: str | Recipe | None,
    *,
    batches: Iterable[tuple],
    weights: Iterable[Array] | None = None,
    rules: Iterable[str | Rule] = (),
    order: str | None = None,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> tuple[PyTree, Report]:
    """Quantizes the kernels of any Linen model: nn.Dense, nn.DenseGeneral and nn.Einsum layers, or, where a model has others or
    runs them under nn.scan or nn.remat, all that `quantize_function` finds in its trace.

    params: the "params" collection, or all variables where the module reads further ones, such as batch_stats. batches:
    arguments of module.apply, each a tuple; between them they reach every layer that is quantized, and recipes that read
    calibration data see them all. weights: per batch, how much each token counts (0 leaves
    it out), an array whose axes are the first axes of every layer's input. order: as in `quantize`; the module counts as one
    block, so that "block" is "parallel", and "sequential" and "qep" run it once for each set of layers with the same input.
    Run the result with `apply_flax`. Raises QjaxError for weights that are negative or not finite, when no layer can be
    quantized or a rule names none, and lists layers that no batch reaches and parameters that cannot be quantized, unless a
    rule "PATTERN=none" leaves them out. Parameters with boxes of Flax (nn.with_partitioning) keep them, but for quantized
    kernels, whose arrays have other shapes than the names in the box are for.
    """
    _require_linen("quantize_flax", module)
    recipe, rules = parsed(recipe, rules, order)
    batches = list(batches)
    if _is_whole(params) and len(params) == 1:
        options = {"batches": batches, "weights": weights, "rules": rules, "on_layer": on_layer}
        inner, report = quantize_flax(module, params["params"], recipe, **options)
        return {"params": inner}, report
    boxed = flatten_dict(params, sep="/") if isinstance(params, Mapping) else {}
    params = unboxed(params)
    _check(batches, params)
    calibration = with_weights("quantize_flax", batches, weights)
    try:
        if _is_whole(params):
            raise HiddenError("further collections are not seen by interceptors")
        leaves, report = _by_layers(module, params, recipe, rules, calibration, on_layer)
    except HiddenError:
        fn = _Apply(module, _is_whole(params))
        weights = None if weights is None else [batch.weights for batch in calibration]
        made, report = quantize_traced(fn, params, recipe, batches, weights, rules, None, on_layer, left=NO_KERNELS)
        leaves = flatten_dict(made, sep="/")
    warn_of_few_tokens(report.layers, 2)
    return unflatten_dict({path: _boxed_again(boxed.get(path), leaf) for path, leaf in leaves.items()}, sep="/"), report


def _by_layers(module, params, recipe, rules, batches: Sequence[Batch], on_layer) -> tuple[dict[str, object], Report]:
    """Leaves by path and the report, by interceptors; raises HiddenError where they do not see or run what is asked for."""
    started = time.perf_counter()
    calls = [batch.args for batch in batches]
    views, placed = _placed(module, params, calls, recipe, rules)
    plan = {path: placed[path] for path in views}
    stage = one_order(plan)
    chosen = (stage or Stage("parallel"))()
    if stage and chosen.inside and any(is_hidden(module, params, Batch(args)) for args in distinct_calls(calls)):
        raise HiddenError("layers inside a transformed function")  # before on_layer is told of any
    shared = sharing(module, params, *distinct_calls(calls)) if stage else {}
    piece = Piece(module, "", params, views, shared)
    (found,) = quantize_piece(piece, [plan], chosen, batches, batches, on_layer)
    done = [path for path in placed if path in views or placed[path] is None]
    leaves = found.leaves | cast_others(found.leaves, recipe, done)
    return leaves, make_report(unflatten_dict(leaves, sep="/"), found.records, time.perf_counter() - started)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """module.apply as a function of the "params" collection, or of all variables."""

    module: nn.Module
    whole: bool

    def __call__(self, params: PyTree, *args: object, **kwargs: object) -> object:
        return self.module.apply(params if self.whole else {"params": params}, *args, **kwargs)


def _is_whole(params: PyTree) -> bool:
    """Whether these are all variables, not the "params" collection."""
    return isinstance(params, Mapping) and isinstance(params.get("params"), Mapping)


def _has_kernels(params: PyTree) -> bool:
    return any(isinstance(leaf, Kernel) for leaf in jax.tree.leaves(params, is_leaf=is_quantized))


def _boxed_again(before: object, leaf: object) -> object:
    return before.replace_boxed(leaf) if isinstance(before, nn.meta.AxisMetadata) and not is_quantized(leaf) else leaf


def _require_linen(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        kind = "an NNX module" if type(module).__module__.startswith("flax.nnx") or hasattr(module, "iter_modules") else ""
        raise QjaxError(
            f"{function}: expected a Linen module (flax.linen), got {type(module).__name__}{kind and f', {kind}, '}"
            f"{'which qjax.quantize_nnx takes' if kind else ''}"
        )


def _check(batches: Sequence[object], params: PyTree) -> None:
    """Raises QjaxError for what cannot be arguments and a collection."""
    if not batches:
        raise QjaxError("quantize_flax: batches is empty; give at least one tuple of arguments of module.apply")
    if wrong := [
        f"batches[{i}] is {type(args).__name__}" for i, args in enumerate(batches) if not isinstance(args, tuple | list)
    ]:
        raise QjaxError(f"quantize_flax: {', '.join(wrong)}; give tuples of arguments of module.apply, [(x,)] for one array")
    flat = flatten_dict(params, sep="/")
    if not flat:
        raise QjaxError("quantize_flax: params is empty; give the collection 'params' that module.init made")
    if any(map(is_quantized, flat.values())):
        raise QjaxError("quantize_flax: the parameters are quantized already; start from the unquantized ones")


def _placed(
    module: nn.Module, params: PyTree, batches: Sequence[tuple], recipe: Recipe | None, rules: Sequence[Rule]
) -> tuple[dict[str, KernelView], Plan]:
    """How each linear layer's kernel is a matrix, and what each kernel gets; raises QjaxError for those that cannot have it."""
    flat = flatten_dict(params, sep="/")
    kernels = [path for path in flat if path.split("/")[-1] == "kernel" and np.ndim(flat[path]) > 1]
    views, refused = {}, {}
    for args in distinct_calls(batches):
        found = linear_layers(module, params, *args)
        views |= found.views
        refused |= found.refused
        if found.moved:  # whether the kernel, as the module has it, is what they multiply with, its trace tells
            told = coverage(_Apply(module, whole=False), params, *args).parameters
            refused |= {each.path: f"{each.path} is {each.why}" for each in told if each.path in found.moved and each.why}
        if views.keys() | refused.keys() >= set(kernels):
            break
    unreached = [path for path in kernels if path not in views and path not in refused]
    refused |= {path: f"{path}: no batch reaches it by the __call__ of a layer" for path in unreached}
    views = {path: view for path, view in views.items() if path not in refused}
    try:
        placed = place([*views, *refused], recipe, rules)
    except QjaxError as error:  # what rules name may be seen in the trace
        raise HiddenError(str(error)) from None
    cast = recipe if recipe is not None and recipe.is_cast else None  # of every leaf, which needs no view
    blocked = {path: why for path, why in refused.items() if placed[path] not in (None, cast)}
    if blocked:
        error = QjaxError if blocked.keys() <= set(unreached) else HiddenError
        raise error(f"{'; '.join(blocked.values())}. A rule 'PATTERN=none' leaves such a layer as it is")
    if not views:
        raise HiddenError(f"{type(module).__name__}: no Dense, DenseGeneral or Einsum layer found to quantize")
    if any(placed[path] is not None and flat[path].shape != view.shape for path, view in views.items()):
        raise HiddenError("a layer under nn.scan or nn.vmap")
    return views, placed


def apply_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> object:
    """module.apply({"params": params}, *args, **kwargs) with quantized kernels; works under jit, grad and vmap.

    params: as `quantize_flax` returned them: the collection, or all variables.
    """
    _require_linen("apply_flax", module)
    run = _Apply(module, _is_whole(params))
    if _has_kernels(params):
        return apply_function(run, unboxed(params), *args, **kwargs)
    with quantized_kernels():
        return run(params, *args, **kwargs)


def dequantize_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> PyTree:
    """The inverse of `quantize_flax`: every quantized kernel as a float32 array of the shape module's layer expects;
    activation formats, which are no part of a weight, are left out.

    args: arguments of module.apply, to find the layers by tracing. Raises QjaxError that lists kernels they do not reach.
    """
    _require_linen("dequantize_flax", module)
    if _has_kernels(params):
        return dequantize_function(params)
    if _is_whole(params):
        return params | {"params": dequantize_flax(module, params["params"], *args, **kwargs)}
    views = linear_layers(module, params, *args, **kwargs).views
    flat = flatten_dict(params, sep="/")
    quantized = {path: leaf for path, leaf in flat.items() if is_quantized(leaf)}
    if unreached := quantized.keys() - views.keys():
        raise QjaxError(f"dequantize_flax: these arguments do not reach {', '.join(sorted(unreached))}; give some that do")
    decoded = {path: views[path].to_kernel(dequantize(leaf)) for path, leaf in quantized.items()}
    return unflatten_dict(flat | decoded, sep="/")
