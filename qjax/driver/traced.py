"""Any JAX function of parameters: its contractions are found by tracing it, quantized, and run in its own code."""

import dataclasses
import operator
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import Batch, Captured, distinct_calls
from qjax.calibrate.statistics import STATISTICS
from qjax.calibrate.tokens import as_weights
from qjax.driver.flow import quantize_piece
from qjax.driver.layer import LayerRecord
from qjax.driver.piece import NO_MAPS, Piece
from qjax.driver.placement import Plan, Rule, one_order, parsed, place
from qjax.driver.report import Report, cast_others, make_report, warn_of_few_tokens
from qjax.errors import QjaxError, code_of_others
from qjax.interception.contraction import KernelView
from qjax.linear import is_quantized
from qjax.methods import Stage
from qjax.recipe import Recipe
from qjax.tracing.capture import Runs, members
from qjax.tracing.coverage import Found, found_in, refuse
from qjax.tracing.interpreter import APPLIED, plain, run, tracked
from qjax.tracing.kernel import as_kernel
from qjax.tracing.trace import Leaves, Traced, leaves_of, trace
from qjax.tracing.walk import Site

NO_KERNELS = ("bias", "scale", "embedding")  # Flax's names of parameters that are no kernels


def quantize_function(
    fn: Callable,
    params: PyTree,
    recipe: str | Recipe | None,
    *,
    batches: Iterable[tuple],
    weights: Iterable[Array] | None = None,
    rules: Iterable[str | Rule] = (),
    order: str | None = None,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> tuple[PyTree, Report]:
    """Quantizes the parameters that contractions of fn(params, *args) consume, found by tracing it (`qjax.coverage`).

    params: any tree of arrays; leaves that are no arrays stay. batches: arguments after params, each a tuple; between them they
    reach every parameter, and recipes that read calibration data see them all. weights: per batch, how much each token counts
    (0 leaves it out), an array whose axes are the first axes of every contraction's input. rules: "PATTERN=RECIPE" by path,
    the first that matches decides. order: as in `quantize`; the function counts as one block, so that "block" is "parallel".
    Returns the same tree with `Kernel`s in quantized places, for `apply_function`, and a report with a
    record of every matrix: "layers/kernel[2]" of a stack that is scanned, indexed or held by experts.

    Raises QjaxError that lists parameters of two or more axes which cannot be quantized, with the reason, unless a rule
    "PATTERN=none" leaves them out; for rules that name none; and for unfit batches and weights, among them batches on which fn
    fails.
    """
    result, report = quantize_traced(fn, params, recipe, batches, weights, rules, order, on_layer)
    warn_of_few_tokens(report.layers, 2)
    return result, report


def quantize_traced(
    fn, params, recipe, batches, weights, rules, order, on_layer, *, left: Collection[str] = ()
) -> tuple[PyTree, Report]:
    """`quantize_function` without its warning. left: last names of parameters that need no rule to be left as they are."""
    recipe, rules = parsed(recipe, rules, order)
    if recipe is not None and recipe.cache is not None:
        raise QjaxError(f"quantize_function: {recipe}: a function has no cache that is known here; leave kv: out")
    batches = checked_batches("quantize_function", batches)
    leaves = leaves_of(params)
    started = time.perf_counter()
    found, plan = planned(fn, leaves, recipe, rules, batches, left)
    stage = one_order(plan)
    chosen = (stage or Stage("parallel"))()
    piece = TracedPiece.of(fn, leaves, found)
    plans = {name: plan[path] for path, site in found.sites.items() for name in members(site)}
    calibration = with_weights("quantize_function", batches, weights)
    (done,) = quantize_piece(piece, [plans], chosen, calibration, calibration, on_layer)
    result = piece.whole(done.leaves)
    result |= cast_others(result, recipe, [path for path in plan if path in found.sites or plan[path] is None])
    return leaves.rebuilt(result.values()), make_report(result, done.records, time.perf_counter() - started)


def apply_function(fn: Callable, params: PyTree, *args: object, **kwargs: object) -> object:
    """fn(params, *args, **kwargs) with parameters quantized by `quantize_function`; works under jit, grad, vmap and scan.

    fn is traced once for each shape of its arguments. Under jit nothing of this is left at run time; called without, equations
    run one by one, as those of fn do. A custom derivative rule around a quantized parameter gives way to JAX's own; products
    with quantized parameters have no forward-mode derivative (jvp). Inside shard_map parameters are whole on every device.
    """
    leaves = leaves_of(params)
    if not any(map(is_quantized, leaves.arrays.values())):
        return fn(params, *args, **kwargs)
    traced, arrays = trace(fn, leaves, args, kwargs)
    values = [*tracked(traced.paths, list(leaves.arrays.values()), {}), *arrays]
    (outputs,), _ = run(APPLIED, traced.jaxpr.jaxpr, traced.jaxpr.consts, [values], {})
    return jax.tree.unflatten(traced.output, [plain(output, "the output") for output in outputs])


def capture_function(
    fn: Callable,
    params: PyTree,
    *,
    batches: Iterable[tuple],
    statistics: Sequence[str] = ("hessian", "abs_mean"),
    weights: Iterable[Array] | None = None,
) -> dict[str, dict[str, Array]]:
    """Statistics of what goes into the contraction with each parameter, over all batches: path -> name -> value.

    Values have the leading axes of the parameter's stack: layers, experts. Raises QjaxError for unknown statistics and as
    `quantize_function` does for batches; parameters that cannot be quantized are left out.
    """
    if unknown := [name for name in statistics if name not in STATISTICS]:
        raise QjaxError(f"capture_function: unknown statistic {', '.join(unknown)}; known are {', '.join(STATISTICS)}")
    batches, leaves = checked_batches("capture_function", batches), leaves_of(params)
    found = _found("capture_function", fn, leaves, batches)
    needed = {name: site.view.matrix_shape[0] for site in found.sites.values() for name in members(site)}
    calibration = with_weights("capture_function", batches, weights)
    values = Runs(fn, found.sites).capture(leaves, calibration, needed, statistics)
    return {path: _stack([values[name] for name in members(site)], site) for path, site in found.sites.items()}


def checked_batches(function: str, batches: Iterable[tuple]) -> list[tuple]:
    """The batches as tuples; raises QjaxError for none, and for what is no tuple of arguments."""
    batches = list(batches)
    if not batches:
        raise QjaxError(f"{function}: batches is empty; give at least one tuple of arguments, [(x,)] for one array")
    if wrong := [
        f"batches[{i}] is {type(args).__name__}" for i, args in enumerate(batches) if not isinstance(args, tuple | list)
    ]:
        raise QjaxError(f"{function}: {', '.join(wrong)}; give tuples of arguments, [(x,)] for one array")
    return [tuple(args) for args in batches]


def with_weights(function: str, batches: Sequence[tuple], weights: Iterable[Array] | None) -> list[Batch]:
    """Batches with how much each of their tokens counts; raises QjaxError unless there are weights for each."""
    weights = [None] * len(batches) if weights is None else as_weights(weights)
    if len(weights) != len(batches):
        raise QjaxError(f"{function}: {len(batches)} batches but {len(weights)} arrays of weights")
    return [Batch(tuple(args), w) for args, w in zip(batches, weights, strict=True)]


def planned(fn, leaves: Leaves, recipe, rules, batches, left: Collection[str] = ()) -> tuple[Found, Plan]:
    """What the function does with its parameters, and what each gets; nothing is computed. Raises QjaxError as
    `quantize_function`.
    """
    if again := [path for path, leaf in leaves.arrays.items() if is_quantized(leaf)]:
        raise QjaxError(f"quantize_function: {', '.join(again[:5])} is quantized already; start from the float parameters")
    found = _found("quantize_function", fn, leaves, batches)
    return found, _plan(found, recipe, rules, left)


def _found(function: str, fn: Callable, leaves: Leaves, batches: Sequence[tuple]) -> Found:
    """What the function does with its parameters; raises QjaxError where it fails on a batch."""
    return found_in(leaves, [tried(f"{function}: the function itself", fn, leaves, args) for args in distinct_calls(batches)])


def tried(what: str, fn: Callable, leaves: Leaves, args: tuple) -> Traced:
    """The trace of code that is not ours; raises QjaxError where it fails."""
    with code_of_others(what, "batches are tuples of the arguments after the parameters"):
        return trace(fn, leaves, args, {})[0]


def _plan(found: Found, recipe: Recipe | None, rules: Sequence[Rule], left: Collection[str]) -> Plan:
    """What each parameter gets, by path; raises QjaxError for those that cannot have it."""
    plan = place([*found.sites, *found.refused], recipe, rules)
    cast = recipe if recipe is not None and recipe.is_cast else None  # of every leaf, which needs no view
    for path in (path for path in found.refused if path.split("/")[-1] in left and plan[path] == recipe != cast):
        plan[path] = None
    if blocked := {path: why for path, why in found.refused.items() if plan[path] not in (None, cast)}:
        raise refuse(blocked)
    if not found.sites:
        raise QjaxError("no contraction with a parameter of two or more axes was found to quantize")
    return {path: plan[path] for path in found.sites} | {path: None for path in found.refused if plan[path] is None}


@dataclasses.dataclass(frozen=True)
class TracedPiece(Piece):
    """A traced function as what is quantized at once: its parameters are the matrices of all sites, by name."""

    fn: Callable | None = None
    source: Leaves | None = None
    sites: Mapping[str, Site] = dataclasses.field(default_factory=dict)
    runs: Runs | None = None
    made: dict[object, tuple] = dataclasses.field(default_factory=dict)  # (path, run) -> matrices, and the leaf that they are

    @classmethod
    def of(cls, fn: Callable, leaves: Leaves, found: Found) -> "TracedPiece":
        """A function with float parameters."""
        matrices, views, shared = {}, {}, {}
        for path, site in found.sites.items():
            stack = site.view.to_matrices(jnp.asarray(leaves.arrays[path]))
            first = members(found.sites[found.shared[path]])
            for (name, index), other in zip(members(site).items(), first, strict=True):
                matrices[name] = stack[index] if index else stack
                views[name] = KernelView(site.view.matrix_shape, (0,), (1,))
                shared[name] = other
        own = {"fn": fn, "source": leaves, "sites": found.sites, "runs": Runs(fn, found.sites)}
        return cls(None, "", matrices, views, shared, **own)

    def whole(self, flat: Mapping[str, object], *, run: bool = False) -> dict[str, object]:
        """The function's parameters by path, with these matrices and Linears in the sites' places. run: matrices in the
        parameters' own types, with which the function runs as it did.
        """
        result = dict(self.source.arrays)
        for path, site in self.sites.items():
            parts = [flat[name] for name in members(site)]
            if _are(parts, [self.params[name] for name in members(site)]):
                continue
            before, leaf = self.made.get((path, run), ((), None))
            if not _are(parts, before):
                leaf = self._leaf(site, parts)
                leaf = leaf.astype(self.source.arrays[path].dtype) if run and not is_quantized(leaf) else leaf
                if not any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(leaf)):
                    self.made[path, run] = (parts, leaf)
            result[path] = leaf
        return result

    def _leaf(self, site: Site, parts: Sequence[object]) -> object:
        stacked = _stack(parts, site)
        dtype = self.source.arrays[site.path].dtype
        return as_kernel(stacked, site.view, dtype) if is_quantized(stacked) else site.view.to_kernel(stacked)

    def tree(self, leaves: Mapping[str, object]) -> dict[str, object]:
        """Matrices by name are what the function runs with."""
        return dict(leaves)

    def _leaves(self, params: Mapping[str, object]) -> Leaves:
        return self.source._replace(arrays=self.whole(params, run=True))

    def capture(
        self, params, batches, needed, names, exact=None, *, keep_outputs=False, keep_results=(), keep_exact=(), through=NO_MAPS
    ) -> Captured:
        """`tracing.capture` of the function with these matrices; it keeps results of the exact run as of the run."""
        compared = None if exact is None else self._leaves(exact[0])
        sites = {self.runs.holders[name].path: self.runs.holders[name] for name in through}
        stacked = {path: _stack([through.get(name, ()) for name in members(site)], site) for path, site in sites.items()}
        return Captured(self.runs.capture(self._leaves(params), batches, needed, names, compared, keep_results, stacked), [])

    def apply(self, params: PyTree, *args: object) -> object:
        """What the function makes of the arguments with these matrices."""
        leaves = self._leaves(params)
        return apply_function(self.fn, leaves.rebuilt(leaves.arrays.values()), *args)

    def outputs(self, batches: Iterable[Batch]) -> list[Array]:
        """The function's outputs, the first array of each."""
        params = self.source.rebuilt(self.source.arrays.values())
        return [jax.tree.leaves(self.fn(params, *batch.args))[0] for batch in batches]


def _are(parts: Sequence[object], others: Sequence[object]) -> bool:
    """Whether these are the very same objects."""
    return len(parts) == len(others) and all(map(operator.is_, parts, others))


def _stack(parts: Sequence[object], site: Site) -> object:
    """What a site's matrices hold, as one; raises QjaxError where they are not alike."""
    if not site.view.stack:
        return parts[0]
    kinds = [(jax.tree.structure(part), *(leaf.shape for leaf in jax.tree.leaves(part))) for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise QjaxError(
            f"{site.path}: its matrices would be stored differently, and one stack is read by one program; activation formats "
            "in a stack go with order='parallel', outliers that calibration finds do not go with a stack"
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return jax.tree.map(lambda leaf: leaf.reshape(*site.view.stack_shape, *leaf.shape[1:]), stacked)
