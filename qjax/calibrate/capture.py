"""Capture: a module runs on batches, and the input of each of its linear layers feeds that layer's statistics.

The statistics are updated inside the compiled run, so activations never leave it. Layers that are given the same array (q, k
and v; gate and up) share one set of statistics, under the path of the first of them: `sharing` finds out by tracing, in any
Linen module.

A run can hand back what layers return, and a later run on the same batch take it in their place (`Batch.known`): what comes
before is then dropped by XLA, so that each product runs once though a module is captured group by group. Results of products
are in memory anyway: asking for inputs would change how XLA fuses what makes them with statistics, and so last digits.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from qjax.calibrate import experts
from qjax.calibrate.experts import ROUTED
from qjax.calibrate.statistics import COUNT, STATISTICS, Statistic, added, first_through, through_maps
from qjax.errors import QjaxError
from qjax.interception.linen import recorded
from qjax.maps import InputMap
from qjax.models.decoder import products_of
from qjax.models.stacks import member, stack_of
from qjax.numbers import NotFiniteError

LARGEST_SQUARE = 2.0**70  # mean squares of inputs up to here, and down to its inverse, times squares of weights are float32
KEPT_BYTES = 2**30  # of results that are kept for later runs, of all batches together; further batches run again

Known = Mapping[str, Array]  # what layers return, by the path of the kernel
NOTHING: Known = MappingProxyType({})


class Batch(NamedTuple):
    """Arguments of module.apply, and how much each token counts: an array whose axes are the first axes of every layer's
    input. known: what layers return, where an earlier run found it.
    """

    args: tuple
    weights: Float[Array, "..."] | None = None
    known: Known = NOTHING


def sharing(module: nn.Module, params: PyTree, *calls: tuple) -> dict[str, str]:
    """For every linear layer's kernel path, in the order of the calls, the path of the first layer with the same input.

    calls: arguments of module.apply, each a tuple. Layers share an input that is the same in every one of them; a layer that
    only a later one reaches stands after the layer called before it there.
    """
    found = {}

    def run(params):
        inputs, order, recordings = {}, [], []  # the recordings are held, so that no id is used again
        for number, args in enumerate(calls):
            with recorded() as recording:
                module.apply({"params": params}, *args)
            recordings.append(recording)
            place = 0
            for path, sources in recording.sources.items():
                if path not in order:
                    order.insert(place, path)
                place = order.index(path) + 1
                inputs.setdefault(path, []).extend((number, id(x), axes) for x, axes in sources)
        first = {}
        found.update((path, first.setdefault(tuple(inputs[path]), path)) for path in order)

    jax.eval_shape(run, params)
    return found


def distinct_calls(calls: Iterable[tuple]) -> Iterator[tuple]:
    """The calls that differ from those before them in more than the values of arrays: what a trace can tell apart."""
    seen = []
    for args in calls:
        static, arrays = split_arguments(args)
        kind = static, [(array.shape, array.dtype) for array in arrays]
        if kind not in seen:
            seen.append(kind)
            yield args


class Wanted(NamedTuple):
    """Statistics by name, of the inputs of layers; everyone: tokens count for all experts, whichever they are routed to."""

    statistics: tuple[tuple[str, Statistic], ...]
    paths: tuple[str, ...]
    everyone: bool = False


class Programs(NamedTuple):
    """Compiled runs of a module; `static` holds the arguments that are no arrays."""

    capture: Callable  # (wanted, static, keep, states, run, exact run or None, weights) -> states, Keep
    output: Callable  # (static, watched, params, arrays, known) -> what the module at path `watched` returns


class Keep(NamedTuple):
    """What of a run is kept: its output; what layers return, in it and in the exact run: as asked the paths of their kernels,
    as returned the arrays by path.
    """

    output: object = False
    results: object = ()
    exact: object = ()


NOTHING_KEPT = Keep()


@functools.lru_cache(maxsize=16)
def programs(module: nn.Module) -> Programs:
    """The compiled runs of a module, shared by all layers of a model that have equal modules."""

    def record(params, static, arrays, known, watched=None):
        with recorded(watched, known, products_of(module)) as recording:
            output = module.apply({"params": params}, *merge_arguments(static, arrays))
        return recording, output

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def capture(wanted, static, keep, states, run, exact_run, weights):  # a run: (params, arrays, known)
        statistics, paths, everyone = wanted
        recording, output = record(run[0], static, *run[1:])
        inputs = recording.inputs
        reference = recording if exact_run is None else record(exact_run[0], static, *exact_run[1:])[0]
        exact, runs = reference.inputs, (recording, reference)
        new, hidden = dict(states), []
        for path in paths:
            try:
                calls = list(zip(inputs.get(path, ()), exact.get(path, ()), strict=True))  # a batch need not reach every layer
                for number, routed in enumerate(recording.routed.get(path, ())):  # of a stack
                    given, counts = experts.Inputs(*calls[number], routed), token_weights(path, weights, routed.shape[1:])
                    new[path] = experts.update(statistics, new[path], given, counts, everyone=everyone)
                for x, y in () if path in recording.routed else calls:
                    counts = token_weights(path, weights, x.shape[:-1])
                    flat, other = (a.reshape(-1, a.shape[-1]) for a in (x, y))
                    new[path] = {name: added(each, new[path][name], flat, other, counts) for name, each in statistics}
            except jax.errors.UnexpectedTracerError:
                hidden.append(path)
        if hidden:
            raise _hidden(hidden)
        kept = [
            {path: each.results[path][0] for path in asked if len(each.results.get(path, ())) == 1}
            for each, asked in zip(runs, (keep.results, keep.exact), strict=True)
        ]
        return new, Keep(output if keep.output else None, *kept)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def output(static, watched, params, arrays, known):
        return record(params, static, arrays, known, watched)[0].outputs

    return Programs(capture, output)


def programs_of(module: nn.Module) -> Programs:
    """`programs`, made anew for a module that cannot be hashed."""
    try:
        return programs(module)
    except TypeError:
        return programs.__wrapped__(module)


def split_arguments(args: tuple) -> tuple[tuple, list]:
    """(static, arrays): arguments with arrays taken out, and the arrays, so that flags such as train=False stay Python
    values. static tells 1, 1.0 and True apart, which are equal.
    """
    leaves, tree = jax.tree.flatten(args, is_leaf=lambda leaf: leaf is None)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    others = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    return (tree, tuple(is_array), others, tuple(map(type, others))), arrays


def merge_arguments(static: tuple, arrays: Sequence[Array]) -> tuple:
    """The inverse of `split_arguments`."""
    tree, is_array, others, _ = static
    arrays = iter(arrays)
    return jax.tree.unflatten(tree, [next(arrays) if array else other for array, other in zip(is_array, others, strict=True)])


class Captured(NamedTuple):
    """statistics: path -> name -> value. outputs: what the module returned for each batch; None unless asked for. results: of
    each batch, what layers return in the run and in the exact run; none unless asked for.
    """

    statistics: dict[str, dict[str, Array]]
    outputs: list[object]
    results: Sequence[tuple[Known, Known]] = ()


def capture_statistics(
    module: nn.Module,
    params: PyTree,
    batches: Sequence[Batch],
    needed: Mapping[str, int],
    names: Iterable[str],
    exact: tuple[PyTree, Iterable[Batch]] | None = None,
    *,
    prefix: str = "",
    keep_outputs: bool = False,
    keep_results: Sequence[str] = (),
    keep_exact: Sequence[str] = (),
    stacks: Mapping[str, int] = MappingProxyType({}),
    through: Mapping[str, tuple[InputMap, ...]] = MappingProxyType({}),
) -> Captured:
    """Statistics `names` of the inputs of the layers at the paths in `needed` (path -> in_features), over all batches.

    exact: parameters and batches of the run without quantization, for statistics that compare with it. prefix: of paths in
    messages. keep_results: layers, by path, of which to hand back what they return, for as many batches as KEPT_BYTES has room
    for; keep_exact: those of the exact run. stacks: those of the paths that hold several layers, and how many; the statistics
    are then of each, under its own path (`models/stacks.py`), from the tokens that are routed to it, or from all
    (`experts.py`). through: maps of all the paths' inputs, which the statistics are of; arrays of a stack's have a leading
    axis. Raises QjaxError that names layers whose input is not finite, was not seen, or cannot be captured.
    """
    known = {name: STATISTICS[name] for name in dict.fromkeys([*names, COUNT])}
    wanted = Wanted(tuple((name, through_maps(each) if through else each) for name, each in known.items()), tuple(needed))
    first = {path: {name: each.init(size) for name, each in known.items()} for path, size in needed.items()}
    first |= {path: experts.stacked(first[path], count) for path, count in stacks.items() if path in needed}
    first |= {path: first_through(maps, first[path]) for path, maps in through.items()}
    given = (module, params, batches, first, exact, prefix)
    states, kept = _states(wanted, *given, keep=Keep(keep_outputs, tuple(keep_results), tuple(keep_exact if exact else ())))
    values = _values(wanted, states, stacks)
    hardly = {path: experts.hardly_reached(state) for path, state in states.items() if path in stacks}
    if again := tuple(path for path, numbers in hardly.items() if len(numbers)):
        states, _ = _states(wanted._replace(paths=again, everyone=True), *given)
        for path in again:
            for number in hardly[path]:
                values[member(path, number)] |= experts.finish(wanted.statistics, states[path], number)
    same = {"prefix": prefix, "stacks": stacks}
    check_statistics(values, needed, prefix, lambda few: capture_statistics(module, params, batches, few, ["abs_max"], **same))
    return Captured(values, [each.output for each in kept], [each[1:] for each in kept])


def _states(
    wanted: Wanted, module, params, batches, first, exact, prefix, *, keep=NOTHING_KEPT
) -> tuple[dict[str, dict], list[Keep]]:
    """States of the statistics after all batches, from their first ones, and what is kept of each batch."""
    run = programs_of(module).capture
    references = batches if exact is None else list(exact[1])
    states = {path: first[path] for path in wanted.paths}
    kept, room = [], KEPT_BYTES - _size([batch.known for batch in (*batches, *references)])
    for batch, other in zip(batches, references, strict=True):
        static, arrays = split_arguments(batch.args)
        exact_run = None if exact is None else (exact[0], split_arguments(other.args)[1], dict(other.known))
        this = params, arrays, dict(batch.known)
        try:
            now = keep if room > 0 else keep._replace(results=(), exact=())
            states, found = run(wanted, static, now, states, this, exact_run, batch.weights)
        except jax.errors.UnexpectedTracerError:
            hidden = [path for path in wanted.paths if is_hidden(module, params, batch, path)] or wanted.paths
            raise _hidden(prefix + path for path in hidden) from None
        kept.append(found)
        room -= _size(found[1:])
    return states, kept


def _size(known: Iterable[Known]) -> int:
    return sum(array.nbytes for each in known for array in each.values())


def _values(wanted: Wanted, states: Mapping[str, dict], stacks: Mapping[str, int]) -> dict[str, dict[str, Array]]:
    """Values of every layer by its path, as they are wanted; of one of a stack also how many tokens were routed to it."""
    values = {}
    for path in wanted.paths:
        if path not in stacks:
            values[path] = {name: each.finalize(states[path][name]) for name, each in wanted.statistics}
            continue
        for number in range(stacks[path]):
            found = experts.finish(wanted.statistics, states[path], number)
            values[member(path, number)] = found | {ROUTED: found[COUNT]}
    return values


def check_statistics(values: Mapping[str, dict], needed: Mapping[str, int], prefix: str, largest_of: Callable) -> None:
    """Raises QjaxError for layers that no token reached, and values that are not finite or too large or small to go on with.

    largest_of(in_features by path): abs_max of layers, captured.
    """
    checks = jax.device_get({path: _looked_at(value) for path, value in values.items()})  # one wait for all
    empty = [path for path in values if not checks[path].count]
    if empty:
        raise QjaxError(f"no calibration token of weight above 0 reached {', '.join(prefix + path for path in empty)}")
    broken = [path for path in values if not checks[path].finite]
    if broken:
        raise NotFiniteError(
            f"calibration: the input of {', '.join(prefix + path for path in broken)} is not finite; the model's weights or "
            "the calibration data are broken, or its activations overflow"
        )
    sizes = {path: float(check.largest) for path, check in checks.items() if check.largest is not None}
    if zero := [path for path, size in sizes.items() if size == 0]:  # by inputs of 0, or by squares below float32
        kernels = {path if path in needed else stack_of(path) for path in zero}
        largest = largest_of({path: needed[path] for path in needed if path in kernels}).statistics
        sizes |= {path: math.nan for path in zero if float(jnp.max(largest[path]["abs_max"])) > 0}
    if extreme := [path for path, size in sizes.items() if not (size == 0 or 1 / LARGEST_SQUARE < size < LARGEST_SQUARE)]:
        raise NotFiniteError(
            f"calibration: squares of the input of {', '.join(prefix + path for path in extreme)} are beyond "
            f"{1 / LARGEST_SQUARE:.0e} to {LARGEST_SQUARE:.0e}, where float32 loses what is made of them; scale its layer"
        )


class _Checks(NamedTuple):
    """Of a layer's statistics: tokens, whether all is finite, and the largest mean square of an input."""

    count: Array
    finite: Array
    largest: Array | None


@jax.jit
def _looked_at(values: Mapping[str, Array]) -> _Checks:
    finite = [jnp.all(jnp.isfinite(value)) for value in values.values()]
    largest = jnp.max(jnp.diagonal(values["hessian"])) if "hessian" in values else None
    return _Checks(values[COUNT], jnp.all(jnp.stack(finite)), largest)


class HiddenError(QjaxError):
    """The inputs of some layers exist only inside a transformed function."""


def _hidden(paths: Iterable[str]) -> HiddenError:
    return HiddenError(
        f"the inputs of {', '.join(paths)} cannot be captured: the layers run inside nn.scan, nn.remat, nn.vmap or nn.jit; "
        "calibrate a module built without it, or leave the layers out with a rule 'PATTERN=none'"
    )


def is_hidden(module: nn.Module, params: PyTree, batch: Batch, path: str | None = None) -> bool:
    """Whether a layer's input exists only inside a transformed function; any layer's, where no path is given."""

    def run(params):
        with recorded() as recording:
            module.apply({"params": params}, *batch.args)
        return [jnp.sum(x) for name, inputs in recording.inputs.items() if path in (None, name) for x in inputs]

    try:
        jax.jit(run).lower(params)  # eval_shape does not notice
    except jax.errors.UnexpectedTracerError:
        return True
    return False


def outputs_of(
    module: nn.Module, params: PyTree, batches: Iterable[Batch], watched: tuple[str, ...] = ()
) -> list[Float[Array, "..."]]:
    """What the submodule at path `watched` (the module itself) returns, for every batch and call; its first array where it
    returns several.
    """
    run = programs_of(module).output
    split = ((*split_arguments(batch.args), dict(batch.known)) for batch in batches)
    return [
        jax.tree.leaves(found)[0] for static, arrays, known in split for found in run(static, watched, params, arrays, known)
    ]


def advance(module: nn.Module, params: PyTree, states: list[Array], known: Sequence[Known]) -> None:
    """`walk.advance` of a module that takes hidden states alone, from what is known of each batch."""
    for number, inputs in enumerate(known):
        (states[number],) = jax.block_until_ready(outputs_of(module, params, [Batch((states[number],), known=inputs)]))


def module_outputs(module: nn.Module, params: PyTree, batches: Sequence[Batch], watched: tuple[str, ...]) -> list[Array]:
    """`outputs_of` in float32, each multiplied by the root of its token's weight, so that squared differences are weighted."""
    outputs = []
    for batch in batches:
        for found in outputs_of(module, params, [batch], watched):
            output = found.astype(jnp.float32)
            if batch.weights is not None:
                weights = token_weights("/".join(watched), batch.weights, output.shape[:-1]).reshape(*output.shape[:-1], 1)
                output = jnp.where(weights > 0, output * jnp.sqrt(weights), 0)  # 0 times nan would be nan
            outputs.append(output)
    return outputs


def token_weights(path: str, weights: Float[Array, "..."] | None, shape: tuple[int, ...]) -> Float[Array, " tokens"]:
    """How much each of a layer's tokens counts."""
    if weights is None:
        return jnp.ones(int(np.prod(shape)), jnp.float32)
    if weights.shape != shape[: weights.ndim]:
        raise QjaxError(
            f"calibration weights of shape {weights.shape} do not fit the input of {path}, whose tokens have shape {shape}: "
            "the weights' axes must be its first axes"
        )
    spread = weights.reshape(*weights.shape, *[1] * (len(shape) - weights.ndim))
    return jnp.broadcast_to(spread, shape).reshape(-1).astype(jnp.float32)
