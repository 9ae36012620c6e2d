"""The driver: a model and a recipe -> the same model with quantized kernels, and a report of every layer.

hadamard rotates the residual stream before anything else is done. A cache format (kv:) is noted in the configuration, for
whoever runs the model: calibration sees keys and values as they are.

By default the linear layers inside the blocks are quantized; embeddings, norms and the head stay as they are, unless a
rule names an untied head or the table of embeddings. The casts fp32, bf16 and fp16 are storage types of the whole model: every
floating-point leaf is cast.

A decoder is quantized block by block. Beyond the model and its result this holds the float32 weights, Hessians and factors of
one block, one batch of its activations, and hidden states of all calibration tokens: a block's inputs in the orders `block`
and `sequential`; these and the unquantized model's in `qep`; a block's inputs and its outputs in `parallel`. `sequential` and
`qep` add up to `capture.KEPT_BYTES` of what a half's layers returned, which then need not run again. awq(loss=module) adds
outputs of the attention or MLP whose scale it looks for: the right ones and those with the candidate being tried.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from qjax.calibrate.capture import Batch, Known, advance, sharing
from qjax.calibrate.order import Order
from qjax.calibrate.tokens import Calibration, as_calibration, weighted_batches
from qjax.checkpoints.companions import read_companions
from qjax.checkpoints.packed import load_packed
from qjax.checkpoints.parts import PartWriter
from qjax.driver.flow import Quantized, quantize_piece
from qjax.driver.layer import LayerRecord
from qjax.driver.piece import Piece
from qjax.driver.placement import (
    Plan,
    Rule,
    in_our_words,
    one_order,
    parsed,
    placement,
    rotation_of,
    with_cache,
    without_cache,
)
from qjax.driver.report import Report, cast_others, make_report, rows_of, warn_of_few_tokens
from qjax.errors import QjaxError
from qjax.folders import refuse_inputs
from qjax.interception.contraction import KernelView
from qjax.lazy import is_lazy, materialised
from qjax.linear import Table, dense, is_quantized
from qjax.methods import UNQUANTIZED, Stage
from qjax.models import walk
from qjax.models.compute import compute_name, compute_of
from qjax.models.fingerprint import model_fingerprint
from qjax.models.folding import fold_members, folds
from qjax.models.model import Model, require_model
from qjax.models.rotation import STREAM, rotate
from qjax.models.stacks import member, spread, stack_of, with_biases
from qjax.qtensor import QTensor
from qjax.recipe import Recipe


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

    calibration: tokens (windows, time) int32, samples of any lengths or texts (`calibrate/samples.py`), a `Corpus`, or a
    `Calibration` (`load_calibration`); needed by recipes that read data.
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
    require_model("quantize", model)
    started = time.perf_counter()
    asked = [_parsed(model, recipe, rules, order) for recipe, rules in requests]
    rotations = [rotation_of(*request) for request in asked]
    found = {}
    for seed in dict.fromkeys(rotations):  # each is a model of its own
        members = [number for number, each in enumerate(rotations) if each == seed]
        done = _together(model, seed, [asked[number] for number in members], calibration, on_layer)
        found |= dict(zip(members, done, strict=True))
    seconds = (time.perf_counter() - started) / len(requests)
    return [(result, make_report(result.params, records, seconds)) for result, records in map(found.get, range(len(asked)))]


def _together(model: Model, seed: int | None, asked, calibration, on_layer) -> list[tuple[Model, list[LayerRecord]]]:
    """The models that requests ask for, of one rotation of the residual stream or none, with their records."""
    model = _rotated(model, seed)
    work = _work(model, asked, calibration, on_layer, rotated=seed is not None)
    made = list(_parts(model, work))
    results = []
    for number, request in enumerate(asked):
        leaves = flatten_dict(model.params, sep="/")
        for part, found in made:
            leaves |= {part.prefix + path: leaf for path, leaf in found[number].leaves.items()}
        leaves |= cast_others(leaves, request[0], work.plans[number])
        records = _records(work.plans[number], [found[number] for _, found in made])
        warn_of_few_tokens(records, 4)
        config, params = with_cache(model, request[0]), unflatten_dict(leaves, sep="/")
        results.append((model._replace(config=config, params=params, recipe=_name(model, *request)), records))
    return results


def _rotated(model: Model, seed: int | None) -> Model:
    return model if seed is None else rotate(model, seed=seed)


def quantize_to(
    folder: str | Path,
    model: Model,
    recipe: str | Recipe | None,
    *,
    calibration: Calibration | Array | None = None,
    rules: Iterable[str | Rule] = (),
    order: str | None = None,
    overwrite: bool = False,
    beside: Path | None = None,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> tuple[Model, Report]:
    """`quantize` into a packed folder, part by part: no more than one part is held, of a lazy model (`load(name, lazy=True)`)
    not even the weights of another. Returns the model in the folder, lazy, and the report.

    What is done is on disk in .NAME.partial, from where the same call goes on after a kill, to the same bits; the folder
    appears when it is whole, with layers.jsonl, a row of all that is quantized. beside: a folder whose files of tokenizer and
    generation are copied as they are. Raises what `quantize` and `save` raise, and QjaxError for the folder that a lazy model
    is read from.
    """
    require_model("quantize_to", model)
    read_companions(beside)  # what cannot be read is an error before anything is computed
    started = time.perf_counter()
    refuse_inputs(folder, {leaf.file.parent for leaf in jax.tree.leaves(model.params) if is_lazy(leaf) and leaf.file})
    request = _parsed(model, recipe, rules, order)
    seed, before = rotation_of(*request), model
    model = _rotated(model, seed)
    work = _work(model, [request], calibration, on_layer, rotated=seed is not None)
    identity = {
        "model": model_fingerprint(before),
        "name": _name(model, *request),
        "order": str(work.order),
        "calibration": work.calibration and work.calibration.fingerprint,
        "methods": {name: source for each in set(work.plans[0].values()) if each for name, source in each.sources().items()},
        "compute": compute_name(work.compute),
    }
    config = with_cache(model, request[0])
    with PartWriter(folder, config, identity, overwrite=overwrite) as writer:

        def held(part: walk.Part) -> tuple[dict[str, object], list[LayerRecord]] | None:
            if (name := _file_of(part)) not in writer.complete:
                return None
            leaves = {path.removeprefix(part.prefix): leaf for path, leaf in writer.read(name).items()}
            return materialised(leaves), [LayerRecord(**record) for record in writer.complete[name]]

        made = []
        for part, (found,) in _parts(model, work, held):
            leaves = {part.prefix + path: leaf for path, leaf in found.leaves.items()}
            leaves |= cast_others(leaves, request[0], work.plans[0])
            if _file_of(part) not in writer.complete:
                writer.write(_file_of(part), leaves, [record._asdict() for record in found.records])
            made.append(found._replace(leaves={}))
        records = _records(work.plans[0], made)
        layers = "".join(json.dumps(row) + "\n" for row in rows_of(records))
        writer.finish(model._replace(recipe=_name(model, *request)), layers, beside)
    result = load_packed(folder, lazy=True)
    warn_of_few_tokens(records, 2)
    return result, make_report(result.params, records, time.perf_counter() - started)


def _file_of(part: walk.Part) -> str:
    half = getattr(part.module, "half", None)
    return f"{part.name}-{half}" if half else part.name


def _parsed(model: Model, recipe, rules, order) -> tuple[Recipe | None, tuple[Rule, ...]]:
    recipe, rules = parsed(recipe, rules, order)
    return recipe, in_our_words(model, rules)


def _name(model: Model, recipe: Recipe | None, rules: Sequence[Rule]) -> str:
    """What the model is then quantized with; of one that is so already, both."""
    name = "; ".join([str(recipe or UNQUANTIZED), *map(str, rules)])
    if model.recipe == UNQUANTIZED:
        return name
    return model.recipe if name == UNQUANTIZED else f"{name}, after {model.recipe}"


def _records(plan: Plan, made: Iterable[Quantized]) -> list[LayerRecord]:
    """Every layer's record, in the plan's order of kernels."""
    by_kernel: dict[str, list[LayerRecord]] = {}
    for record in (record for found in made for record in found.records):
        by_kernel.setdefault(record.path if record.path in plan else stack_of(record.path), []).append(record)
    return [record for path in plan for record in by_kernel[path]]


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is to be done to a decoder, checked. order: how it is calibrated; calibration: None where nothing reads any;
    rotated: whether its residual stream is.
    """

    plans: Sequence[Plan]
    order: Order
    calibration: Calibration | None
    on_layer: Callable[[LayerRecord], None]
    rotated: bool = False

    @property
    def compute(self) -> str | None:
        """What the model runs in to be calibrated; None: the device's own."""
        return self.calibration and self.calibration.compute

    @property
    def refines_blocks(self) -> bool:
        """Whether whole blocks are refined, which are not to be split then."""
        return any(recipe and recipe.block_refiners for plan in self.plans for recipe in plan.values())


def _work(
    model: Model, asked: Sequence[tuple[Recipe | None, Sequence[Rule]]], calibration, on_layer, *, rotated: bool
) -> _Work:
    plans = [placement(model, *request) for request in asked]
    chosen = {one_order(plan) for plan in plans} - {None}
    if len(chosen) > 1 or (len(asked) > 1 and chosen - {Stage("parallel")}):
        raise QjaxError(f"recipes of the orders {', '.join(sorted(map(str, chosen)))} cannot be quantized together")
    if chosen and calibration is None:
        reading = [recipe for plan in plans for recipe in plan.values() if recipe and recipe.reads_data]
        raise QjaxError(
            f"{', '.join(dict.fromkeys(map(str, reading)))} needs calibration data; give calibration= tokens (--calibration on "
            "the command line)"
        )
    tokens = as_calibration(model, calibration) if calibration is not None else None
    stage = chosen.pop() if chosen else Stage("parallel")
    return _Work(plans, stage(), tokens if any(map(_reads_data, plans)) else None, on_layer, rotated)


def _parts(
    model: Model, work: _Work, held: Callable[[walk.Part], tuple | None] = lambda part: None
) -> Iterator[tuple[walk.Part, list[Quantized]]]:
    """The parts of a decoder, in order, and what each plan makes of them. held(part): leaves and records of a part that is done
    already. Blocks come in halves where layers see what becomes of those before them in their block, so that none runs twice.
    """
    config, order = without_cache(model.config), work.order
    weighted = list(weighted_batches(work.calibration)) if work.calibration else []
    weights = [weight for _, weight in weighted]
    current = [tokens for tokens, _ in weighted]
    compares = order.alpha or (order.prefix and work.refines_blocks)
    exact = list(current) if compares else []  # states of the unquantized model
    parts = walk.parts(config, *compute_of(work.compute), halves=order.inside and not work.refines_blocks)
    inside = [[_within(part, plan) for plan in work.plans] for part in parts]
    last = max((i for i, plans in enumerate(inside) if any(map(_reads_data, plans))), default=-1)
    shared = {}
    for number, (part, plans) in enumerate(zip(parts, inside, strict=True)):
        params, further, later = walk.params_of(part, model.params), walk.further_arguments(part, model.params), number < last
        batches = [Batch((x, *further), w) for x, w in zip(current, weights, strict=True)]
        references = [Batch((x, *further), w) for x, w in zip(exact, weights, strict=False)]
        done = held(part)
        if done:
            found = [_as_done(*done, work.on_layer)]
        else:
            keep = later or part.module in shared  # the last block's outputs too, so that it is no program of its own
            if batches and any(plans) and part.module not in shared:  # equal blocks are traced once
                shared[part.module] = sharing(part.module, params, batches[0].args)
            piece = _piece(part, params, plans, shared.get(part.module, {}), STREAM if work.rotated else frozenset())
            layers = [spread(plan, piece.stacks) for plan in plans]
            found = quantize_piece(piece, layers, order, batches, references, work.on_layer, keep_outputs=keep)
        yield (
            part,
            [each._replace(leaves=_stored(part, each.leaves), floating={}, outputs=[], known=(), exact=()) for each in found],
        )
        del batches, references  # what holds hidden states, so that each makes room for the next
        if later:
            if found[0].outputs:
                current = found[0].outputs
            else:
                _advance(part.module, found[0].floating if order.prefix else params, current, found[0].known)
            _advance(part.module, params, exact, found[0].exact)
        del found  # floating kernels live no longer than their part


def _stored(part: walk.Part, leaves: dict[str, object]) -> dict[str, object]:
    """A part's leaves with codes of a table as the table."""
    codes = {path: leaf for path, leaf in leaves.items() if part.prefix + path == walk.TABLE and isinstance(leaf, QTensor)}
    return leaves | {path: Table(leaf) for path, leaf in codes.items()}


def _advance(module, params, states: list[Array], known: Sequence[Known]) -> None:
    """Replaces each batch of states by what a part makes of it, from what its layers are known to return."""
    advance(module, params, states, known) if any(known) else walk.advance(module, params, states)


def _within(part: walk.Part, plan: Plan) -> Plan:
    """A plan for the kernels of a part, by path within it."""
    own = tuple(part.prefix + child + "/" for child in part.children)
    return {path.removeprefix(part.prefix): recipe for path, recipe in plan.items() if path.startswith(own)}


def _piece(part: walk.Part, params, plans: Sequence[Plan], shared, stream: frozenset[str]) -> Piece:
    flat = flatten_dict(params, sep="/")
    paths = dict.fromkeys(path for plan in plans for path in plan)
    stacks = {path: flat[path].shape[0] for path in paths if len(flat[path].shape) > 2}
    axes = {path: walk.matrix_axes(part.prefix + path) for path in paths}
    views = {path: KernelView(flat[path].shape[-2:], (given,), (made,)) for path, (given, made) in axes.items()}
    views = spread(views, stacks)
    leaders = spread(shared, stacks)
    alike = {member(path, n): member(shared[path], n) for path in stacks if path in shared for n in range(stacks[path])}
    allowed = folds(part.module.config) if part.kind == "block" else ()
    allowed = [fold for fold in allowed if fold.source.split("/")[0] in params]
    allowed = tuple(each for fold in allowed for each in fold_members(fold, stacks))
    stacks = with_biases(stacks, flat)  # which folds change too
    return Piece(part.module, part.prefix, params, views, leaders | alike, allowed, stacks, stream)


def _as_done(leaves: dict[str, object], records: Sequence[LayerRecord], on_layer) -> Quantized:
    for record in records:
        on_layer(record)
    floating = {path: dense(leaf) if is_quantized(leaf) else leaf for path, leaf in leaves.items()}
    return Quantized(leaves, list(records), unflatten_dict(floating, sep="/"), [])


def _reads_data(plan: Plan) -> bool:
    return any(recipe and recipe.reads_data for recipe in plan.values())


def kernel_shapes(model: Model) -> tuple[list[tuple[int, int]], list[tuple[int, float]]]:
    """(in, out) of the kernels that are quantized, or would be by default, and (elements, bytes of one) of every other leaf."""
    flat = flatten_dict(model.params, sep="/")
    linear = {path for path, leaf in flat.items() if path.endswith("/kernel") and (is_quantized(leaf) or walk.in_blocks(path))}
    stacks = {path: flat[path].shape[0] for path in linear if len(flat[path].shape) > 2}
    shapes = spread({path: leaf.shape[-2:] for path, leaf in flat.items() if path in linear}, stacks)
    counts = [(math.prod(leaf.shape), leaf.nbytes) for path, leaf in flat.items() if path not in linear]
    return list(shapes.values()), [(count, size / count) for count, size in counts]
