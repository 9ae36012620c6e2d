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
from collections.abc import Callable, Iterable, Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import Batch, sharing
from qjax.calibrate.order import Order
from qjax.calibrate.tokens import Calibration, as_calibration
from qjax.driver.flow import Quantized, quantize_part
from qjax.driver.layer import LayerRecord
from qjax.driver.part import Part
from qjax.driver.placement import Plan, Rule, one_order, parsed, placement
from qjax.driver.report import Report, cast_others, make_report, warn_of_few_tokens
from qjax.errors import QjaxError
from qjax.interception.contraction import KernelView
from qjax.linear import is_quantized
from qjax.methods import UNQUANTIZED, Stage
from qjax.models.decoder import HALVES, Block, Head
from qjax.models.folding import folds
from qjax.models.model import Model, compiled, compute_dtype, embedding_table, stages
from qjax.recipe import Recipe

BATCH_TOKENS = {"cpu": 2048, "gpu": 16384, "tpu": 16384}  # calibration tokens run at a time


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
    asked = [parsed(recipe, rules, order) for recipe, rules in requests]
    placed = [placement(model, *request) for request in asked]
    chosen = {one_order(plan) for plan in placed} - {None}
    if len(chosen) > 1 or (len(requests) > 1 and chosen - {Stage("parallel")}):
        raise QjaxError(f"recipes of the orders {', '.join(sorted(map(str, chosen)))} cannot be quantized together")
    if chosen and calibration is None:
        needing = [
            str(recipe) for recipe in dict.fromkeys(r for plan in placed for r in plan.values()) if recipe and recipe.reads_data
        ]
        raise QjaxError(
            f"{', '.join(needing)} needs calibration data; give calibration= tokens (--calibration on the command line)"
        )
    stage = chosen.pop() if chosen else Stage("parallel")
    tokens = as_calibration(model, calibration) if calibration is not None else None
    parts = list(_quantize_decoder(model, placed, stage(), tokens, on_layer))
    results = []
    for number, (recipe, rules) in enumerate(asked):
        leaves = flatten_dict(model.params, sep="/")
        for prefix, found in parts:
            leaves |= {prefix + path: leaf for path, leaf in found[number].leaves.items()}
        leaves |= cast_others(leaves, recipe, placed[number])
        by_path = {record.path: record for _, found in parts for record in found[number].records}
        records = [by_path[path] for path in placed[number]]
        warn_of_few_tokens(records)
        name = "; ".join([str(recipe or UNQUANTIZED), *map(str, rules)])
        result = model._replace(params=unflatten_dict(leaves, sep="/"), recipe=name)
        results.append((result, records))
    seconds = (time.perf_counter() - started) / len(requests)
    return [(result, make_report(result.params, records, seconds)) for result, records in results]


def _quantize_decoder(
    model: Model, plans: Sequence[Plan], order: Order, calibration: Calibration | None, on_layer: Callable[[LayerRecord], None]
) -> Iterator[tuple[str, list[Quantized]]]:
    """The parts of a decoder, block by block and the head, each with its path prefix and what each plan makes of it."""
    config, dtype = model.config, compute_dtype()
    reads_data = any(map(_reads_data, plans))
    pieces = list(_batches(calibration)) if reads_data else []
    weights = [weight for _, weight in pieces]
    current = [stages(config, dtype).embed(model.params["embed"], tokens) for tokens, _ in pieces]
    compares = order.alpha or (order.prefix and _refines_blocks(plans))
    exact = list(current) if compares else []  # hidden states of the unquantized model
    parts, shared = list(_parts(model, plans, order, dtype)), {}
    last = max((i for i, (_, inside) in enumerate(parts) if any(map(_reads_data, inside))), default=-1)
    for number, (bare, inside) in enumerate(parts):
        module, params, later = bare.module, bare.params, number < last
        further = (embedding_table(model),) if isinstance(module, Head) else ()
        batches = [Batch((x, *further), w) for x, w in zip(current, weights, strict=True)]
        references = [Batch((x, *further), w) for x, w in zip(exact, weights, strict=False)]
        if batches and module not in shared:  # equal blocks are traced once
            shared[module] = sharing(module, params, batches[0].args)
        part = dataclasses.replace(bare, shared=shared.get(module, {}))
        found = quantize_part(part, inside, order, batches, references, on_layer, keep_outputs=later)
        yield part.prefix, [each._replace(floating={}, outputs=[]) for each in found]
        del batches, references  # what holds hidden states, so that each makes room for the next
        if later:
            if found[0].outputs:
                current = found[0].outputs
            else:
                _advance(module, found[0].floating if order.prefix else params, current)
            _advance(module, params, exact)
        del found  # floating kernels live no longer than their part


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
    split = order.inside and not config.parallel_residual and not _refines_blocks(plans)
    halves = [Block(config, dtype, half) for half in (HALVES if split else (None,))]
    blocks = [(f"block_{i}", module, HALVES.get(module.half)) for i in range(config.layers) for module in halves]
    for name, module, modules in [*blocks, ("head", Head(config, dtype), None)]:
        prefix, params = f"{name}/", {child: model.params[name][child] for child in modules or model.params[name]}
        flat = flatten_dict(params, sep="/")
        inside = [{path: plan[prefix + path] for path in flat if prefix + path in plan} for plan in plans]
        views = {path: KernelView(flat[path].shape, (0,), (1,)) for path in inside[0]}
        allowed = tuple(fold for fold in folds(config) if fold.source.split("/")[0] in params)
        yield Part(module, prefix, params, views, {}, allowed), inside


def _reads_data(plan: Plan) -> bool:
    return any(recipe and recipe.reads_data for recipe in plan.values())


def _refines_blocks(plans: Sequence[Plan]) -> bool:
    return any(recipe and recipe.block_refiners for plan in plans for recipe in plan.values())


def _batches(calibration: Calibration) -> Iterable[tuple[Array, Array]]:
    """(tokens, weights), all of one shape: the last is filled up with windows that do not count."""
    tokens, weights = calibration.tokens, calibration.weights
    weights = np.ones(tokens.shape, np.float32) if weights is None else weights
    size = min(len(tokens), max(1, BATCH_TOKENS[jax.default_backend()] // tokens.shape[1]))
    padding = ((0, -len(tokens) % size), (0, 0))
    tokens, weights = np.pad(tokens, padding), np.pad(weights, padding)
    for start in range(0, len(tokens), size):
        yield jnp.asarray(tokens[start : start + size]), jnp.asarray(weights[start : start + size])


def kernel_shapes(model: Model) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(in, out) of the kernels that are quantized, or would be by default, and (elements, bytes of one) of every other leaf."""
    flat = flatten_dict(model.params, sep="/")
    in_block = re.compile("block_.*/kernel")
    linear = {path for path, leaf in flat.items() if is_quantized(leaf) or in_block.fullmatch(path)}
    others = [(leaf.size, leaf.dtype.itemsize) for path, leaf in flat.items() if path not in linear]
    return [flat[path].shape for path in flat if path in linear], others
