"""A sweep of any JAX function of parameters: its recipes measured by a loss of its own, in rows, tables and figures like those
of decoders, with claims and resuming as in any sweep (`worker.py`).

    nll = mean over counted tokens of losses(fn(params, *args), *args)        perplexity = exp(nll)

Sequences are taken as independent, each a document of its own. A row's key holds the parameters, the batches, and the program
of function and loss as traced, so that another function is another cell.
"""

import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import Batch, distinct_calls, merge_arguments, split_arguments
from qjax.driver.layer import LayerRecord, problem_of
from qjax.driver.placement import one_order, parsed
from qjax.driver.traced import apply_function, checked_batches, planned, quantize_traced, tried, with_weights
from qjax.errors import QjaxError
from qjax.evaluate.perplexity import PerplexityResult, summarise
from qjax.evaluate.windows import Windows
from qjax.folders import prepare_results_folder
from qjax.linear import dense, is_quantized
from qjax.numbers import as_json, require_finite
from qjax.recipe import UNQUANTIZED
from qjax.sweep.claims import STALE_SECONDS, Claims
from qjax.sweep.columns import Cell, measurements
from qjax.sweep.measurements import perplexity, provenance, sizes
from qjax.sweep.record import digest
from qjax.sweep.request import OWN_LOSS
from qjax.sweep.runner import AS_IT_IS, Treatment, Watcher, treatments_of
from qjax.sweep.worker import Job, Worker
from qjax.tracing.kernel import Kernel
from qjax.tracing.trace import Leaves, closed_over, leaves_of

ASKS = ("cell", "perplexity", "provenance")  # measurements whose columns say what was asked, besides calibration


class Subject(NamedTuple):
    """The function in a cell, where a decoder has a Model."""

    name: str
    recipe: str = UNQUANTIZED
    compute: str | None = None


class Data(NamedTuple):
    """Batches in a cell, where a decoder has a text."""

    name: str
    fingerprint: str


class FunctionSweep(NamedTuple):
    """What `sweep_function` was asked for, with the names that cells of a sweep know."""

    fn: Callable
    leaves: Leaves
    losses: Callable
    batches: list[tuple]
    drawn: Mapping[int, list[Batch]]  # calibration by seed
    source: str  # of them all
    recipes: tuple[str, ...]
    rules: tuple[str, ...]
    order: str | None
    seed: int
    tasks: tuple = ()
    measures: tuple[str, ...] = ()
    max_windows: int | None = None
    one_block: bool = False
    compute: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """All that drew."""
        return tuple(self.drawn)

    @property
    def calibration(self) -> list[Batch]:
        """What this seed drew."""
        return self.drawn[self.seed]


def sweep_function(
    fn: Callable,
    params: PyTree,
    recipes: Sequence[str],
    folder: str | Path,
    *,
    losses: Callable[..., Array],
    batches: Iterable[tuple],
    calibration: Iterable[tuple] | Mapping[int, Iterable[tuple]] | None = None,
    weights: Iterable[Array] | None = None,
    rules: Sequence[str] = (),
    order: str | None = None,
    name: str = "function",
    data: str = "batches",
    watcher: Watcher | None = None,
    workers: int = 1,
    stale_seconds: float = STALE_SECONDS,
) -> list[dict[str, object]]:
    """Measures fn(params, *args) under every recipe; returns rows, the unquantized function's first, and keeps them in
    folder/rows.jsonl, for `write_reports`. What is there already is not measured again.

    losses(output, *args): -ln p in nats, an array whose first axis is the sequences, not averaged; or a pair of it and an array
    of its shape that says which of them count. batches: arguments after params, each a tuple, that are measured; calibration,
    weights, rules, order: as in `quantize_function`. calibration: also by seed, {0: [(x,)], 1: [(y,)]}, draws from one source;
    recipes that read it have a row for each, and tables show their mean, with the error of draws and documents. weights: of
    every draw. name, data: of the function and the batches, in rows. watcher, workers, stale_seconds: as in `run_sweep`.

    Raises QjaxError before anything is computed for recipes and rules that the function cannot have, for recipes that read
    calibration data where there is none, and for calibration batches that are measured too; NotFiniteError, in the end, for
    losses that are not finite.
    """
    if isinstance(recipes, str):
        raise QjaxError(f"sweep_function: recipes is {recipes!r}, expected several in a tuple; give ({recipes!r},)")
    leaves, batches = leaves_of(params), checked_batches("sweep_function", batches)
    drawn = _drawn(calibration, None if weights is None else list(weights))
    source, first = "by seed" if isinstance(calibration, Mapping) else "", next(iter(drawn))
    sweep = FunctionSweep(fn, leaves, losses, batches, drawn, source, tuple(recipes), tuple(rules), order, first)
    asks, jobs = [*(measurements()[each].asks for each in ASKS), _asks_calibration], []
    for cell in _cells(sweep, name, data):
        columns = {column: value for each in asks for column, value in each(cell).items()}
        columns["compute_dtype"] = "its own"  # a function says what it computes in
        jobs.append(Job(cell, {"key": digest(columns)} | columns))
    folder, watcher = prepare_results_folder(folder), watcher or Watcher()
    claims = Claims(folder, stale_seconds=stale_seconds)
    try:
        measure = functools.partial(_measured, run=_compiled(sweep))
        return Worker(folder, jobs, measure, watcher, claims, workers, _Quantizer(watcher.layer)).run()
    finally:
        claims.release()


def _cells(sweep: FunctionSweep, name: str, data: str) -> list[Cell]:
    """The cells, not measured yet. Raises what can be wrong with the request."""
    treatments = treatments_of(sweep, 0)
    orders = {treatment: _order(sweep, treatment) for treatment in treatments}
    measured = {_digest(args) for args in sweep.batches}
    drawn = ((f"{i} of seed {seed}", batch) for seed, batches in sweep.drawn.items() for i, batch in enumerate(batches))
    if twice := [told for told, batch in drawn if _digest(batch.args) in measured]:
        raise QjaxError(
            f"sweep_function: calibration batch {twice[0]} is measured too, which makes calibrated methods look better than "
            "they are; give other batches"
        )
    shapes = [_shape(sweep, args) for args in sweep.batches]
    programs = sorted({program for program, _ in shapes})
    sizes = (sum(shape[0] for _, shape in shapes), max(int(np.prod(shape[1:])) for _, shape in shapes))
    corpus = Data(data, digest(_digest(sweep.batches), programs))
    windows = Windows(np.zeros(sizes, np.int32), np.zeros(sizes, bool), np.zeros(sizes[0], np.int32), np.arange(sizes[0]))
    subject, mark = Subject(name), _digest(sweep.leaves.arrays)
    return [
        Cell(sweep._replace(seed=seed), subject, mark, treatment, orders[treatment], corpus, windows, OWN_LOSS, subject, mark)
        for number, seed in enumerate(sweep.seeds)
        for treatment in treatments
        if number == 0 or orders[treatment] is not None
    ]


def _drawn(calibration, weights: list[Array] | None) -> dict[int, list[Batch]]:
    """Calibration batches by seed; none, of seed 0, where there is no calibration."""
    if calibration is None:
        return {0: with_weights("sweep_function", [], weights)}
    by_seed = calibration if isinstance(calibration, Mapping) else {0: calibration}
    if not by_seed or any(type(seed) is not int for seed in by_seed):
        raise QjaxError(
            f"sweep_function: calibration by seed has {list(by_seed)}, expected numbers; give {{0: [(x,)], 1: [(y,)]}}"
        )
    checked = {seed: checked_batches("sweep_function", batches) for seed, batches in by_seed.items()}
    return {seed: with_weights("sweep_function", batches, weights) for seed, batches in checked.items()}


def _order(sweep: FunctionSweep, treatment: Treatment) -> object:
    """The order in which a treatment reads calibration data. Raises QjaxError for what the function cannot have."""
    recipe, rules = parsed(treatment.recipe, treatment.rules, None)
    found, plan = planned(sweep.fn, sweep.leaves, recipe, rules, sweep.batches)
    for path, chosen in plan.items():
        problem = chosen and not chosen.is_cast and problem_of(chosen, found.sites[path].view.matrix_shape)
        if problem:
            raise QjaxError(f"{path}: {problem}")
    order = one_order(plan)
    if order is not None and not sweep.calibration:
        raise QjaxError(
            f"sweep_function: {treatment} needs calibration data; give calibration=[(x,)], other batches than are measured"
        )
    return order


def _shape(sweep: FunctionSweep, args: tuple) -> tuple[str, tuple[int, ...]]:
    """The program of function and loss on a batch, as a digest, and the shape of its losses."""
    run = lambda params, *args: _losses(sweep, params, args)  # noqa: E731
    traced = tried("sweep_function: the function with its losses", run, sweep.leaves, args)
    shape = traced.jaxpr.out_avals[0].shape
    if not shape or shape != traced.jaxpr.out_avals[1].shape:
        raise QjaxError(
            f"sweep_function: losses of shape {shape}, counted {traced.jaxpr.out_avals[1].shape}: expected (sequences, ...) of "
            "losses that are not averaged, and as many counted"
        )
    return _digest((re.sub(" at 0x[0-9a-f]+", "", str(traced.jaxpr)), closed_over(traced.jaxpr))), shape


def _losses(sweep: FunctionSweep, params: PyTree, args: tuple) -> tuple[Array, Array]:
    """Losses of a batch, and which of them count."""
    found = sweep.losses(apply_function(sweep.fn, params, *args), *args)
    values, counted = found if isinstance(found, tuple) else (found, jnp.ones(jnp.shape(found), bool))
    return jnp.asarray(values), jnp.asarray(counted)


class _Quantizer:
    """Makes a cell's parameters, as they run, and the report."""

    def __init__(self, on_layer: Callable[[LayerRecord], None]):
        self._on_layer = on_layer

    def prepare(self, cell: Cell, later: Sequence[Cell] = ()) -> Cell:
        """The cell with its parameters and report."""
        sweep, treatment = cell.sweep, cell.treatment
        read = sweep.calibration if cell.order is not None else [Batch(args) for args in sweep.batches]
        weights = [batch.weights for batch in read]
        params, report = quantize_traced(
            sweep.fn,
            sweep.leaves.rebuilt(sweep.leaves.arrays.values()),
            None if treatment == AS_IT_IS else treatment.recipe,
            [batch.args for batch in read],
            None if all(each is None for each in weights) else weights,
            treatment.rules,
            None,
            self._on_layer,
        )
        return cell._replace(model=leaves_of(jax.tree.map(_running, params, is_leaf=is_quantized)), report=report)


def _running(leaf: object) -> object:
    """A leaf with its weight decoded, as an array where the layer is one product."""
    if not isinstance(leaf, Kernel):
        return leaf
    made = dense(leaf)
    return made if isinstance(made, Kernel) else leaf.array()


def _asks_calibration(cell: Cell) -> dict[str, object]:
    """The columns of the calibration that a cell's recipe reads."""
    read = cell.sweep.calibration if cell.order is not None else None
    return {
        "order": read and str(cell.order),
        "calibration": read and "given batches",
        "calibration_source": read and cell.sweep.source,
        "calibration_fingerprint": read and _digest([tuple(batch) for batch in read]),
        "calibration_windows": read and len(read),
        "calibration_window_tokens": None,
        "calibration_compute": None,
    }


def _measured(cell: Cell, head: dict[str, object], *, run: Callable) -> dict[str, object]:
    """The row of a cell."""
    found = perplexity.figures(_perplexity(cell, run), cell.before)
    del found["bits_per_byte"]  # of texts
    return as_json({**head, **found, **sizes.figures(cell.report, UNQUANTIZED), **provenance.measure(cell)})


def _compiled(sweep: FunctionSweep) -> Callable:
    """(parameters, arguments) -> losses, and which of them count."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(static, values, arrays):
        return _losses(sweep, sweep.leaves.rebuilt(values), merge_arguments(static, arrays))

    def losses(values, args):
        static, arrays = split_arguments(args)
        return jax.block_until_ready(run(static, values, arrays))

    return losses


def _perplexity(cell: Cell, run: Callable) -> PerplexityResult:
    """Of the measured batches; a batch's losses are rows, padded to the longest."""
    batches, values = cell.sweep.batches, list(cell.model.arrays.values())
    for args in distinct_calls(batches):
        run(values, args)  # compiles
    started, found = time.perf_counter(), []
    for number, args in enumerate(batches):
        found.append(run(values, args))
        cell.on_batch(number + 1, len(batches))
    seconds = time.perf_counter() - started
    size = cell.windows.tokens.shape[1]
    flat = lambda part: np.asarray(part).reshape(len(part), -1)  # noqa: E731
    padded = lambda part: np.pad(flat(part), ((0, 0), (0, size - flat(part).shape[1])))  # noqa: E731
    losses, counted = (np.concatenate([padded(batch[i]) for batch in found]) for i in range(2))
    scored = counted > 0
    require_finite(losses[scored], f"losses on {cell.corpus.name}", model=f"{cell.subject.name} ({cell.treatment})")
    return summarise(losses, cell.windows._replace(scored=scored), cell.convention, cell.corpus, seconds)


def _digest(value: object) -> str:
    """Digest of a tree of arrays and what else it holds, by path."""
    total = hashlib.sha256()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
        total.update(jax.tree_util.keystr(keys).encode())
        if not isinstance(leaf, jax.Array | np.ndarray):
            total.update(re.sub(" at 0x[0-9a-f]+", "", repr(leaf)).encode())
            continue
        array = np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        total.update(f"{leaf.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()[:16]
