"""Piece by piece: one module (a decoder's block, a half of it, or a whole Flax model) with calibration batches -> its quantized
kernels.

    capture -> statistics -> transforms (maps, folded where a table says how) -> rounding, refining -> block refiners

What the layers' inputs are is the order's business (`calibrate/order.py`). Several plans, which say what each kernel gets,
can share one capture and one factor of each Hessian where the order is `parallel`: that is what makes a sweep cheap.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import Batch, Captured, Known
from qjax.calibrate.order import Order
from qjax.driver.layer import LayerRecord, Mapped, Rounded, checked_block, make_record, placed, prepare_kernel, round_kernels
from qjax.driver.piece import Piece
from qjax.driver.placement import Plan
from qjax.driver.transform import transform
from qjax.linear import Linear, dense
from qjax.methods import Memo, Site, Stage
from qjax.models.stacks import together
from qjax.qtensor import QTensor
from qjax.refining.block import Block, BlockSite


class Quantized(NamedTuple):
    """A piece's leaves by path within it: as they are stored, and as they are evaluated, for a run of the module.

    outputs: of the unquantized module for each batch, where capturing gave them (order `parallel`), else empty. known, exact:
    what layers return for each batch, in the evaluated and in the unquantized module, where capturing left it.
    """

    leaves: dict[str, object]
    records: list[LayerRecord]
    floating: PyTree
    outputs: list[object]
    known: Sequence[Known] = ()
    exact: Sequence[Known] = ()


@dataclasses.dataclass(frozen=True)
class _Run:
    """A piece with its inputs as the order has them, and exact: its inputs in the unquantized model."""

    piece: Piece
    order: Order
    batches: Sequence[Batch]
    exact: Sequence[Batch]
    on_layer: Callable[[LayerRecord], None]

    def capture(self, plans: Sequence[Plan], paths, floating, *, reference=None, keep_outputs=False, settled=()) -> Captured:
        """Statistics of the layers at `paths`, by the path of the layer that stands for those with its input. reference:
        parameters of the run that the order compares with. settled: layers before, whose results are to be kept; the
        exact run's are known as soon as it runs.
        """
        piece, compared = self.piece, () if reference is None else self.order.captures
        read = [(path, plan[path]) for plan in plans for path in paths if path in plan]
        statistics = {name for _, recipe in read for name in recipe.statistics} | set(compared)
        needed = {piece.kernel_of(piece.shared[path]): piece.views[path].matrix_shape[0] for path, _ in read}
        if not needed:
            return Captured({}, [])
        exact = (reference, self.exact) if compared else None
        kept = {"keep_outputs": keep_outputs, "keep_results": settled, "keep_exact": paths}
        return piece.capture(floating, self.batches, needed, sorted(statistics), exact, **kept)

    def of_mapped(self, plan: Plan, paths: Sequence[str], found: Mapping[str, Mapped], floating) -> dict[str, dict[str, Array]]:
        """What activation formats read of calibration, by path: statistics of inputs through maps that `floating` lacks."""
        piece, through, names = self.piece, {}, set()
        for path in paths:
            asked = plan[path].activation.statistics if plan[path] and plan[path].activation else ()
            if asked and path in found and not (found[path].folded and self.order.inside):
                through[path] = found[path].inputs
                names |= set(asked)
        needed = {piece.kernel_of(path): piece.views[path].matrix_shape[0] for path in through}
        return piece.capture(floating, self.batches, needed, sorted(names), through=through).statistics if through else {}

    def after(self, captured: Captured) -> "_Run":
        """The run that goes on from what capturing left of each batch."""
        if not captured.results:
            return self

        def known(batches, which):
            pairs = zip(batches, captured.results, strict=True)
            return [batch._replace(known={**batch.known, **found[which]}) for batch, found in pairs]

        exact = known(self.exact, 1) if self.order.captures else self.exact
        return dataclasses.replace(self, batches=known(self.batches, 0), exact=exact)

    def known(self, base: Mapping[str, Array], flat: Mapping[str, Array]) -> tuple[list[Known], list[Known]]:
        """What is known of each batch of the run, and of the exact run: nothing where transforms made other leaves, base, of
        those that it goes on with.
        """
        same = all(base[path] is flat[path] for path in flat)
        return [batch.known for batch in self.batches], [batch.known if same else {} for batch in self.exact]


def quantize_piece(
    piece: Piece,
    plans: Sequence[Plan],
    order: Order,
    batches: Sequence[Batch] = (),
    exact: Sequence[Batch] = (),
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
    *,
    keep_outputs: bool = False,
) -> list[Quantized]:
    """The piece's kernels by each plan. Plans may be several where the order takes no input from quantized layers.

    batches: the piece's inputs, as the order has them; none are needed by plans that read no calibration data. exact: its
    inputs in the unquantized model, for orders with a correction and block refiners. keep_outputs: return those of the
    unquantized module, where the order gives them. Raises QjaxError for inputs that are not finite and layers that cannot be
    captured.
    """
    run = _Run(piece, order, batches, exact, on_layer)
    reading = [{path: recipe for path, recipe in plan.items() if recipe and recipe.reads_data} for plan in plans]
    before = Captured({}, [])
    if any(reading) and (not order.inside or any(recipe.transforms for plan in reading for recipe in plan.values())):
        before = run.capture(reading, list(piece.views), piece.params, keep_outputs=keep_outputs and not order.prefix)
    memo, flat = Memo(), piece.leaves()
    return [_by_plan(run, *each, flat, before, memo, len(plans) > 1) for each in zip(plans, reading, strict=True)]


def _by_plan(run: _Run, plan: Plan, reading: Plan, flat, before: Captured, shared_memo: Memo, several: bool) -> Quantized:
    """several: whether others ask `shared_memo` too."""
    piece, order = run.piece, run.order
    base, found = transform(piece, flat, plan, before.statistics, run.batches, shared_memo if several else None)
    current, rounded, records = dict(base), {}, {}

    def settle(path: str, started: float) -> None:
        shape = piece.views[path].matrix_shape
        records[path] = make_record(piece.prefix + path, shape, base[path], rounded.get(path), started)
        run.on_layer(records[path])

    begun, settled, refined = run, [], [path for path, recipe in reading.items() if recipe.block_refiners]
    for group in _in_call_order(plan, piece) if order.inside else [list(plan)]:
        statistics = before.statistics
        memo = Memo() if order.inside else shared_memo  # inside, nothing is shared beyond a group
        if order.inside and any(path in reading for path in group):
            floating, reference = (piece.tree(leaves) for leaves in (current, base))
            captured = run.capture([reading], group, floating, reference=reference, settled=settled)
            statistics, run = captured.statistics, run.after(captured)
            settled = [path for path in group if path in reading and not refined]
        of_mapped = run.of_mapped(plan, group, found, piece.tree(current) if order.inside else piece.params)
        started = time.perf_counter()
        prepared = {}
        for path in (path for path in group if plan[path] is not None):
            weight = piece.matrix(path, base[path], memo)
            known = statistics.get(piece.shared.get(path), {}) if path in reading else {}
            prepared[path] = prepare_kernel(weight, plan[path], known, found.get(path), order, memo, of_mapped.get(path, {}))
        rounded |= round_kernels(prepared, order, memo)
        for path in group:
            if path not in refined:
                settle(path, started)
                started = time.perf_counter()
            if path in rounded and order.prefix:
                current[path] = _evaluated(piece, path, rounded[path])
    started = time.perf_counter()
    rounded |= _refine(begun, reading, base, rounded)
    for path in refined:
        settle(path, started)
        started = time.perf_counter()
        if order.prefix:
            current[path] = _evaluated(piece, path, rounded[path])
    leaves = {path: _leaf(piece, path, each) for path, each in rounded.items()}
    kept = before.outputs if not order.prefix else []
    stored = together(base | leaves, piece.stacks)
    return Quantized(stored, [records[path] for path in plan], piece.tree(current), kept, *run.known(base, flat))


def _leaf(piece: Piece, path: str, rounded: Rounded) -> object:
    return piece.views[path].to_kernel(rounded.leaf.codes) if rounded.recipe.is_cast else rounded.leaf


def _evaluated(piece: Piece, path: str, rounded: Rounded) -> object:
    """The leaf as evaluation has it, in its kernel's shape where it is an array."""
    leaf = dense(rounded.leaf) if rounded.decoded is None or _rounds_inputs(rounded.leaf) else rounded.decoded
    return leaf if isinstance(leaf, Linear) else piece.views[path].to_kernel(leaf)


def _rounds_inputs(leaf: QTensor | Linear) -> bool:
    return isinstance(leaf, Linear) and leaf.activation is not None


def _refine(run: _Run, plan: Plan, base: Mapping[str, Array], rounded: Mapping[str, Rounded]) -> dict[str, Rounded]:
    """What block refiners make of the kernels whose recipe names them; kernels of one chain of refiners together."""
    result = {}
    for chain in dict.fromkeys(recipe.block_refiners for recipe in plan.values() if recipe.block_refiners):
        paths = [path for path, recipe in plan.items() if recipe.block_refiners == chain]
        for stage in chain:
            result |= _refine_by(run, stage, paths, base, {**rounded, **result})
    return result


def _refine_by(run: _Run, stage: Stage, paths: Sequence[str], base: Mapping, rounded: Mapping[str, Rounded]) -> dict:
    piece = run.piece
    held = {**base, **{path: _leaf(piece, path, each) for path, each in rounded.items()}}

    def apply(weights: Mapping[str, QTensor | Array], *args: object) -> object:
        new = {path: rounded[path].leaf_of(weight) for path, weight in weights.items()}
        output = piece.apply(piece.tree({**held, **new}), *args)
        return jax.tree.leaves(output)[0]  # as the targets have it

    sites = {path: BlockSite(rounded[path].weight, rounded[path].recipe.format, rounded[path].statistics) for path in paths}
    exact = run.exact if run.order.prefix else run.batches
    targets = piece.outputs(exact)
    block = Block(apply, sites, [batch.args for batch in run.batches], targets, [batch.weights for batch in run.batches])
    start = {path: _codes(rounded[path].leaf) for path in paths}
    memo = Memo()
    given = {path: Site((site.weight,), site.statistics, memo) for path, site in sites.items()}
    found, told = checked_block(stage, stage(block, start, site=given), start)
    infos = {path: rounded[path].info._replace(proxy_loss=None, output_error=None, clipped=None) for path in paths}
    return {path: placed(rounded[path]._replace(block=told), found[path], infos[path], Memo()) for path in paths}


def _codes(leaf: QTensor | Linear) -> QTensor:
    return leaf.weight if isinstance(leaf, Linear) else leaf


def _in_call_order(plan: Plan, piece: Piece) -> list[list[str]]:
    """Kernels in the order in which the module calls them, those with the same input together, and those of a stack; uncalled
    ones first.
    """
    groups: dict[str | None, list[str]] = {None: [path for path in plan if path not in piece.shared]}
    for path, leader in piece.shared.items():
        if path in plan:
            groups.setdefault(piece.kernel_of(leader), []).append(path)
    return [group for group in groups.values() if group]
