"""The driver: a model and a recipe -> the same model with quantized kernels, and a report of every layer.

By default the linear layers inside the blocks are quantized; embeddings, norms and the head stay as they are, unless a
rule names an untied head. The casts fp32, bf16 and fp16 are storage types of the whole model: every floating-point leaf is
cast.

A decoder is quantized block by block. Beyond the model and its result this holds the float32 weights, Hessians and factors of
one block, one batch of its activations, and hidden states of all calibration tokens: a block's inputs in the orders `block`
and `sequential`; these and the unquantized model's in `qep`; a block's inputs and its outputs in `parallel`. awq(loss=module)
adds outputs of the attention or MLP whose scale it looks for: the right ones and those with the candidate being tried.
"""

import dataclasses
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import Batch, distinct_calls, sharing
from qjax.calibrate.order import Order
from qjax.calibrate.tokens import Calibration, as_calibration, as_weights
from qjax.driver.part import LayerRecord, Part, Plan, Quantized, quantize_part
from qjax.driver.placement import Rule, parse_rule, place
from qjax.errors import QjaxError, QjaxWarning
from qjax.interception.contraction import KernelView
from qjax.interception.linen import linear_layers, quantized_kernels
from qjax.linear import Leaf, dequantize, is_quantized
from qjax.models.decoder import HALVES, Block, Head
from qjax.models.folding import folds
from qjax.models.model import Model, compiled, compute_dtype, embedding_table, stages
from qjax.qtensor import FLOAT_DTYPES
from qjax.recipe import DEFAULT_ORDER, UNQUANTIZED, Recipe, Stage, method, parse_order, parse_recipe

BATCH_TOKENS = {"cpu": 2048, "gpu": 16384, "tpu": 16384}  # calibration tokens run at a time


class Report(NamedTuple):
    """One record per linear kernel, and exact sizes: bits per weight of the quantized kernels and of the whole model."""

    layers: tuple[LayerRecord, ...]
    bits_per_weight: float
    model_bits_per_weight: float
    size_bytes: int
    seconds: float


def quantize(
    model: Model,
    recipe: str | Recipe | None,
    *,
    calibration: Calibration | Array | None = None,
    rules: Iterable[str | Rule] = (),
    order: str | None = None,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> tuple[Model, Report]:
    """The model with its kernels in the recipe's format, and a report. The given model is left as it is.

    calibration: tokens (windows, time) int32 or a `Calibration` (`load_calibration`); needed by recipes that read data.
    rules: "PATTERN=RECIPE" strings, the first that matches a kernel's path decides (`placement.py`).
    order: whose inputs statistics are from ("parallel", "block", "sequential", "qep"), for recipes that do not say @ORDER.
    on_layer is called with each layer's record as it is done. Raises QjaxError for a bad recipe or rule, a model that is
    quantized already, missing or unfit calibration tokens, and activations that are not finite. Warns (QjaxWarning) of layers
    with fewer calibration tokens than inputs.
    """
    return quantize_together(model, [(recipe, rules)], calibration=calibration, order=order, on_layer=on_layer)[0]


def quantize_together(
    model: Model,
    requests: Sequence[tuple[str | Recipe | None, Iterable[str | Rule]]],
    *,
    calibration: Calibration | Array | None = None,
    order: str | None = None,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> list[tuple[Model, Report]]:
    """`quantize` for several (recipe, rules), all in the order `parallel`, that share captured statistics and factors.

    One request may be in any order. Raises what `quantize` raises. Each report's seconds are its share: all by their number.
    """
    started = time.perf_counter()
    parsed = [_parsed(recipe, rules, order) for recipe, rules in requests]
    placed = [placement(model, *request) for request in parsed]
    chosen = {_one_order(plan) for plan in placed} - {None}
    if len(chosen) > 1 or (len(requests) > 1 and chosen - {Stage("parallel")}):
        raise QjaxError(f"recipes of the orders {', '.join(sorted(map(str, chosen)))} cannot be quantized together")
    if chosen and calibration is None:
        needing = [
            str(recipe) for recipe in dict.fromkeys(r for plan in placed for r in plan.values()) if recipe and recipe.statistics
        ]
        raise QjaxError(
            f"{', '.join(needing)} needs calibration data; give calibration= tokens (--calibration on the command line)"
        )
    stage = chosen.pop() if chosen else Stage("parallel")
    tokens = as_calibration(model, calibration) if calibration is not None else None
    parts = _quantize_decoder(model, placed, method(stage.name)(**dict(stage.options)), tokens, on_layer)
    results = []
    for number, (recipe, rules) in enumerate(parsed):
        leaves = flatten_dict(model.params, sep="/")
        for prefix, found in parts:
            leaves |= {prefix + path: leaf for path, leaf in found[number].leaves.items()}
        leaves |= _cast_others(leaves, recipe, placed[number])
        by_path = {record.path: record for _, found in parts for record in found[number].records}
        records = [by_path[path] for path in placed[number]]
        _warn_of_few_tokens(records)
        name = "; ".join([str(recipe or UNQUANTIZED), *map(str, rules)])
        result = model._replace(params=unflatten_dict(leaves, sep="/"), recipe=name)
        results.append((result, records))
    seconds = (time.perf_counter() - started) / len(requests)
    return [(result, _report(result.params, records, seconds)) for result, records in results]


def calibration_order(model: Model, recipe: str | Recipe | None, rules: Iterable[str | Rule] = ()) -> Stage | None:
    """The order in which `quantize` would read calibration data; None when it would read none. Raises what `quantize`
    raises.
    """
    return _one_order(placement(model, recipe, rules))


def _one_order(plan: Plan) -> Stage | None:
    orders = {recipe.order or Stage(DEFAULT_ORDER) for recipe in plan.values() if recipe and recipe.statistics}
    if len(orders) > 1:
        raise QjaxError(f"rules and recipe ask for the orders {', '.join(sorted(map(str, orders)))}; one run has one order")
    return orders.pop() if orders else None


def _quantize_decoder(
    model: Model, plans: Sequence[Plan], order: Order, calibration: Calibration | None, on_layer: Callable[[LayerRecord], None]
) -> list[tuple[str, list[Quantized]]]:
    """The parts of a decoder, block by block and the head, each with its path prefix."""
    config, dtype = model.config, compute_dtype()
    needed = any(recipe and recipe.statistics for plan in plans for recipe in plan.values())
    pieces = list(_batches(calibration)) if needed else []
    weights = [weight for _, weight in pieces]
    current = [stages(config, dtype).embed(model.params["embed"], tokens) for tokens, _ in pieces]
    exact = list(current) if order.alpha else []  # hidden states of the unquantized model, where an order compares with them
    parts, shared = list(_parts(model, plans, order, dtype)), {}
    last = max((i for i, (_, inside) in enumerate(parts) if any(map(_calibrated, inside))), default=-1)
    results = []
    for number, (bare, inside) in enumerate(parts):
        module, params, later = bare.module, bare.params, number < last
        further = (embedding_table(model),) if isinstance(module, Head) else ()
        batches = [Batch((x, *further), w) for x, w in zip(current, weights, strict=True)]
        references = [Batch((x, *further), w) for x, w in zip(exact, weights, strict=False)]
        if batches and module not in shared:  # equal blocks are traced once
            shared[module] = sharing(module, params, batches[0].args)
        part = dataclasses.replace(bare, shared=shared.get(module, {}))
        found = quantize_part(part, inside, order, batches, references, on_layer, keep_outputs=later)
        results.append((part.prefix, [each._replace(floating={}, outputs=[]) for each in found]))
        del batches, references  # what holds hidden states, so that each makes room for the next
        if later:
            if found[0].outputs:
                current = found[0].outputs
            else:
                _advance(module, found[0].floating if order.prefix else params, current)
            _advance(module, params, exact)
        del found  # floating kernels live no longer than their part
    return results


def _advance(module: nn.Module, params: PyTree, states: list[Array]) -> None:
    """Replaces every batch of hidden states by what the module makes of it, one after the other."""
    run = compiled(module)
    for number, x in enumerate(states):
        states[number] = jax.block_until_ready(run(params, x))  # else inputs whose runs wait are held beside the outputs


def _parts(model: Model, plans: Sequence[Plan], order: Order, dtype: DTypeLike) -> Iterator[tuple[Part, list[Plan]]]:
    """What a decoder is quantized by, with what each plan has for it: blocks, or their halves, where layers see what becomes
    of those before them in their block, so that none runs twice; and the head.
    """
    config = model.config
    split = order.inside and not config.parallel_residual
    halves = [Block(config, dtype, half) for half in (HALVES if split else (None,))]
    blocks = [(f"block_{i}", module, HALVES.get(module.half)) for i in range(config.layers) for module in halves]
    for name, module, modules in [*blocks, ("head", Head(config, dtype), None)]:
        prefix, params = f"{name}/", {child: model.params[name][child] for child in modules or model.params[name]}
        flat = flatten_dict(params, sep="/")
        inside = [{path: plan[prefix + path] for path in flat if prefix + path in plan} for plan in plans]
        views = {path: KernelView(flat[path].shape, (0,), (1,)) for path in inside[0]}
        allowed = tuple(fold for fold in folds(config) if fold.source.split("/")[0] in params)
        yield Part(module, prefix, params, views, {}, allowed), inside


def _calibrated(plan: Plan) -> bool:
    return any(recipe and recipe.statistics for recipe in plan.values())


def _batches(calibration: Calibration) -> Iterable[tuple[Array, Array]]:
    """(tokens, weights), all of one shape: the last is filled up with windows that do not count."""
    tokens, weights = calibration.tokens, calibration.weights
    weights = np.ones(tokens.shape, np.float32) if weights is None else weights
    size = min(len(tokens), max(1, BATCH_TOKENS[jax.default_backend()] // tokens.shape[1]))
    padding = ((0, -len(tokens) % size), (0, 0))
    tokens, weights = np.pad(tokens, padding), np.pad(weights, padding)
    for start in range(0, len(tokens), size):
        yield jnp.asarray(tokens[start : start + size]), jnp.asarray(weights[start : start + size])


def _warn_of_few_tokens(records: Sequence[LayerRecord]) -> None:
    few = [record for record in records if record.tokens is not None and record.tokens < record.in_features]
    if few:
        listed = ", ".join(f"{record.path} ({record.tokens} tokens, {record.in_features} inputs)" for record in few[:5])
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        warnings.warn(
            f"fewer calibration tokens than inputs: {listed}{more}; tokens are the rank of a Hessian at most, damping fills "
            "the rest, more tokens would be better",
            QjaxWarning,
            stacklevel=4,
        )


def placement(model: Model, recipe: str | Recipe | None, rules: Iterable[str | Rule] = ()) -> dict[str, Recipe | None]:
    """What `quantize` would do to every linear kernel, by path; None leaves it. Raises what `quantize` raises."""
    recipe, rules = _parsed(recipe, rules, None)
    flat = flatten_dict(model.params, sep="/")
    if any(is_quantized(leaf) for leaf in flat.values()):
        raise QjaxError(f"{model.name} is quantized already ({model.recipe}); start from the unquantized model")
    kernels = [path for path in flat if path.endswith("/kernel")]
    everywhere = recipe is not None and recipe.is_cast
    return place(kernels, recipe, rules, kernels if everywhere else [path for path in kernels if path.startswith("block_")])


def kernel_shapes(model: Model) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(in, out) of the kernels that are quantized, or would be by default, and (elements, bytes of one) of every other leaf."""
    flat = flatten_dict(model.params, sep="/")
    in_block = re.compile("block_.*/kernel")
    linear = {path for path, leaf in flat.items() if is_quantized(leaf) or in_block.fullmatch(path)}
    others = [(leaf.size, leaf.dtype.itemsize) for path, leaf in flat.items() if path not in linear]
    return [flat[path].shape for path in flat if path in linear], others


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
    them out.
    """
    recipe, rules = _parsed(recipe, rules, order)
    batches = list(batches)
    if not batches:
        raise QjaxError("quantize_flax: batches is empty; give at least one tuple of arguments of module.apply")
    if wrong := [
        f"batches[{i}] is {type(args).__name__}" for i, args in enumerate(batches) if not isinstance(args, tuple | list)
    ]:
        raise QjaxError(f"quantize_flax: {', '.join(wrong)}; give tuples of arguments of module.apply, [(x,)] for one array")
    if isinstance(params.get("params"), Mapping):
        raise QjaxError("quantize_flax: params holds a collection 'params'; give that collection, variables['params']")
    if any(is_quantized(leaf) for leaf in flatten_dict(params, sep="/").values()):
        raise QjaxError("quantize_flax: the parameters are quantized already; start from the unquantized ones")
    flat = flatten_dict(params, sep="/")
    if not flat:
        raise QjaxError("quantize_flax: params is empty; give the collection 'params' that module.init made")
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
    started = time.perf_counter()
    plan = {path: placed[path] for path in views}
    for path, chosen in plan.items():
        if chosen is not None and flat[path].shape != views[path].shape:
            raise QjaxError(
                f"{path} has shape {flat[path].shape} where its layer multiplies with {views[path].shape}: a layer under "
                "nn.scan or nn.vmap; quantize such kernels with jax.vmap(qjax.rtn, ...), a rule 'PATTERN=none' leaves them as "
                "they are"
            )
    weights = [None] * len(batches) if weights is None else as_weights(weights)
    if len(weights) != len(batches):
        raise QjaxError(f"quantize_flax: {len(batches)} batches but {len(weights)} arrays of weights")
    calibration = [Batch(tuple(args), w) for args, w in zip(batches, weights, strict=True)]
    stage = _one_order(plan) or Stage("parallel")
    order = method(stage.name)(**dict(stage.options))
    calibrated = any(chosen and chosen.statistics for chosen in plan.values())
    part = Part(module, "", params, views, sharing(module, params, *distinct_calls(batches)) if calibrated else {})
    (found,) = quantize_part(part, [plan], order, calibration, calibration, on_layer)
    _warn_of_few_tokens(found.records)
    leaves = found.leaves | _cast_others(
        found.leaves, recipe, [path for path in placed if path in views or placed[path] is None]
    )
    result = unflatten_dict(leaves, sep="/")
    return result, _report(result, found.records, time.perf_counter() - started)


def apply_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> object:
    """module.apply({"params": params}, *args, **kwargs) with quantized kernels; works under jit, grad and vmap."""
    with quantized_kernels():
        return module.apply({"params": params}, *args, **kwargs)


def dequantize_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> PyTree:
    """The inverse of `quantize_flax`: every quantized kernel as a float32 array of the shape module's layer expects.

    args: arguments of module.apply, to find the layers by tracing. Raises QjaxError that lists kernels they do not reach.
    """
    views, _ = linear_layers(module, params, *args, **kwargs)
    flat = flatten_dict(params, sep="/")
    quantized = {path: leaf for path, leaf in flat.items() if is_quantized(leaf)}
    if unreached := quantized.keys() - views.keys():
        raise QjaxError(f"dequantize_flax: these arguments do not reach {', '.join(sorted(unreached))}; give some that do")
    decoded = {path: views[path].to_kernel(dequantize(leaf)) for path, leaf in quantized.items()}
    return unflatten_dict(flat | decoded, sep="/")


def _parsed(
    recipe: str | Recipe | None, rules: Iterable[str | Rule], order: str | None
) -> tuple[Recipe | None, tuple[Rule, ...]]:
    order = parse_order(order) if isinstance(order, str) else order
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    rules = (rules,) if isinstance(rules, str) else rules
    rules = (parse_rule(rule) if isinstance(rule, str) else rule for rule in rules)
    return recipe and recipe.in_order(order), tuple(
        rule._replace(recipe=rule.recipe and rule.recipe.in_order(order)) for rule in rules
    )


def _cast_others(flat: Mapping[str, object], recipe: Recipe | None, done: Collection[str]) -> dict[str, Array]:
    """For a cast, the floating-point leaves besides the kernels in `done`, in its type; nothing for other recipes."""
    if recipe is None or not recipe.is_cast:
        return {}
    floating = {
        p: leaf
        for p, leaf in flat.items()
        if p not in done and not is_quantized(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return {path: leaf.astype(FLOAT_DTYPES[recipe.format.grid]) for path, leaf in floating.items()}


def _report(params: PyTree, records: list[LayerRecord], seconds: float) -> Report:
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    weights = sum(_weights(leaf) for leaf in leaves)
    size = sum(leaf.nbytes for leaf in leaves)
    chosen = [record for record in records if record.recipe != UNQUANTIZED] or records
    counts = [record.in_features * record.out_features for record in chosen]
    bits = sum(record.bits_per_weight * count for record, count in zip(chosen, counts, strict=True)) / sum(counts)
    return Report(tuple(records), bits, 8 * size / weights, size, seconds)


def _weights(leaf: Leaf) -> int:
    return jax.eval_shape(dequantize, leaf).size if is_quantized(leaf) else leaf.size
