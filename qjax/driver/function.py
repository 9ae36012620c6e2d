"""Any Linen model: its linear layers are found by tracing it, quantized, and run in its own code."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import Batch, distinct_calls, sharing
from qjax.calibrate.tokens import as_weights
from qjax.driver.flow import quantize_piece
from qjax.driver.layer import LayerRecord
from qjax.driver.piece import Piece
from qjax.driver.placement import Plan, Rule, one_order, parsed, place
from qjax.driver.report import Report, cast_others, make_report, warn_of_few_tokens
from qjax.errors import QjaxError
from qjax.interception.contraction import KernelView
from qjax.interception.linen import linear_layers, quantized_kernels, unboxed
from qjax.linear import dequantize, is_quantized
from qjax.methods import Stage
from qjax.recipe import Recipe


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
    """Quantizes the kernels of any Linen model: nn.Dense, nn.DenseGeneral and nn.Einsum layers, found by tracing it.

    params: the "params" collection. batches: arguments of module.apply, each a tuple; between them they reach every layer that
    is quantized, and recipes that read calibration data see them all. weights: per batch, how much each token counts (0 leaves
    it out), an array whose axes are the first axes of every layer's input. order: as in `quantize`; the module counts as one
    block, so that "block" is "parallel", and "sequential" and "qep" run it once for each set of layers with the same input.
    Run the result with `apply_flax`. Raises QjaxError for weights that are negative or not finite, modules that
    read collections besides "params", when no layer can be quantized or a rule names none, and lists layers
    that no batch reaches, that cannot run with a quantized kernel, or cannot be captured, unless a rule "PATTERN=none" leaves
    them out. Parameters with boxes of Flax (nn.with_partitioning) keep them, but for quantized kernels, whose arrays have other
    shapes than the names in the box are for.
    """
    _require_linen("quantize_flax", module)
    recipe, rules = parsed(recipe, rules, order)
    if recipe is not None and recipe.cache is not None:
        raise QjaxError(f"quantize_flax: {recipe}: a module of your own has no cache that is known here; leave kv: out")
    batches = list(batches)
    boxed = flatten_dict(params, sep="/") if isinstance(params, Mapping) else {}
    params = unboxed(params)
    _check(batches, params)
    started = time.perf_counter()
    views, placed = _placed(module, params, batches, recipe, rules)
    plan = {path: placed[path] for path in views}
    weights = [None] * len(batches) if weights is None else as_weights(weights)
    if len(weights) != len(batches):
        raise QjaxError(f"quantize_flax: {len(batches)} batches but {len(weights)} arrays of weights")
    calibration = [Batch(tuple(args), w) for args, w in zip(batches, weights, strict=True)]
    stage = one_order(plan)
    shared = sharing(module, params, *distinct_calls(batches)) if stage else {}
    piece = Piece(module, "", params, views, shared)
    (found,) = quantize_piece(piece, [plan], (stage or Stage("parallel"))(), calibration, calibration, on_layer)
    warn_of_few_tokens(found.records, 2)
    done = [path for path in placed if path in views or placed[path] is None]
    leaves = found.leaves | cast_others(found.leaves, recipe, done)
    result = unflatten_dict({path: _boxed_again(boxed.get(path), leaf) for path, leaf in leaves.items()}, sep="/")
    return result, make_report(result, found.records, time.perf_counter() - started)


def _boxed_again(before: object, leaf: object) -> object:
    return before.replace_boxed(leaf) if isinstance(before, nn.meta.AxisMetadata) and not is_quantized(leaf) else leaf


def _require_linen(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        kind = "an NNX module" if type(module).__module__.startswith("flax.nnx") or hasattr(module, "iter_modules") else ""
        raise QjaxError(
            f"{function}: expected a Linen module (flax.linen), got {type(module).__name__}{kind and f', {kind}, '}"
            f"{'which cannot be taken yet; quantize its kernels one by one with qjax.rtn or qjax.gptq' if kind else ''}"
        )


def _check(batches: Sequence[object], params: PyTree) -> None:
    """Raises QjaxError for what cannot be arguments and a collection."""
    if not batches:
        raise QjaxError("quantize_flax: batches is empty; give at least one tuple of arguments of module.apply")
    if wrong := [
        f"batches[{i}] is {type(args).__name__}" for i, args in enumerate(batches) if not isinstance(args, tuple | list)
    ]:
        raise QjaxError(f"quantize_flax: {', '.join(wrong)}; give tuples of arguments of module.apply, [(x,)] for one array")
    if isinstance(params.get("params"), Mapping):
        raise QjaxError("quantize_flax: params holds a collection 'params'; give that collection, variables['params']")
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
        if views.keys() | refused.keys() >= set(kernels):
            break
    unreached = [path for path in kernels if path not in views and path not in refused]
    refused |= {path: f"{path}: no batch reaches it by the __call__ of a layer" for path in unreached}
    placed = place([*views, *refused], recipe, rules)
    cast = recipe if recipe is not None and recipe.is_cast else None  # of every leaf, which needs no view
    blocked = [why for path, why in refused.items() if placed[path] not in (None, cast)]
    if blocked:
        raise QjaxError(f"{'; '.join(blocked)}. A rule 'PATTERN=none' leaves such a layer as it is")
    if not views:
        raise QjaxError(f"{type(module).__name__}: no Dense, DenseGeneral or Einsum layer found to quantize")
    for path, view in views.items():
        if placed[path] is not None and flat[path].shape != view.shape:
            raise QjaxError(
                f"{path} has shape {flat[path].shape} where its layer multiplies with {view.shape}: a layer under nn.scan or "
                "nn.vmap; quantize such kernels with jax.vmap(qjax.rtn, ...), a rule 'PATTERN=none' leaves them as they are"
            )
    return views, placed


def apply_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> object:
    """module.apply({"params": params}, *args, **kwargs) with quantized kernels; works under jit, grad and vmap."""
    _require_linen("apply_flax", module)
    with quantized_kernels():
        return module.apply({"params": params}, *args, **kwargs)


def dequantize_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> PyTree:
    """The inverse of `quantize_flax`: every quantized kernel as a float32 array of the shape module's layer expects;
    activation formats, which are no part of a weight, are left out.

    args: arguments of module.apply, to find the layers by tracing. Raises QjaxError that lists kernels they do not reach.
    """
    _require_linen("dequantize_flax", module)
    views, _ = linear_layers(module, params, *args, **kwargs)
    flat = flatten_dict(params, sep="/")
    quantized = {path: leaf for path, leaf in flat.items() if is_quantized(leaf)}
    if unreached := quantized.keys() - views.keys():
        raise QjaxError(f"dequantize_flax: these arguments do not reach {', '.join(sorted(unreached))}; give some that do")
    decoded = {path: views[path].to_kernel(dequantize(leaf)) for path, leaf in quantized.items()}
    return unflatten_dict(flat | decoded, sep="/")
