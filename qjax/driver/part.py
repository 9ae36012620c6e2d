"""Layer by layer: one module (a decoder's block, or a whole Flax model) with calibration batches -> its quantized kernels.

    capture -> statistics -> transforms (scales, folded where a table says how) -> rounding

What the layers' inputs are is the order's business (`calibrate/order.py`). Several plans, which say what each kernel gets,
can share one capture and one factor of each Hessian where the order is `parallel`: that is what makes a sweep cheap.
Diagnostics are taken here, for all methods alike: proxy loss and output error of the weight that ends up in the layer against
the one it stands for.
"""

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from qjax.calibrate.capture import Batch, Captured, capture_statistics, parent_outputs
from qjax.calibrate.order import Order, correct
from qjax.calibrate.statistics import rescale
from qjax.errors import QjaxError
from qjax.interception.contraction import KernelView
from qjax.linear import Linear, dequantize
from qjax.maps import Divide, InputMap
from qjax.models.folding import Fold, fold_map, is_linear
from qjax.qtensor import QTensor
from qjax.recipe import UNQUANTIZED, Recipe, method, options_of, statistics_of
from qjax.rounding.parts.factor import factorize
from qjax.rounding.parts.info import Info, output_loss, relative

Plan = Mapping[str, Recipe | None]  # what each kernel gets, by path within the module


class LayerRecord(NamedTuple):
    """What happened to one kernel; see `Info` for the figures. `recipe` is "none" for a kernel that was left alone.

    tokens: calibration tokens its statistics are from; None where it needed none.
    """

    path: str
    recipe: str
    in_features: int
    out_features: int
    bits_per_weight: float
    weight_error: float | None = None
    clipped: float | None = None
    proxy_loss: float | None = None
    output_error: float | None = None
    damp: float | None = None
    tokens: int | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Part:
    """A module to quantize. prefix: of its kernels' paths in the whole model. shared: for every linear layer, in the order of
    the calls, the first with the same input (`calibrate.capture.sharing`); may be empty where nothing is calibrated. folds:
    which layers' input scale goes where.
    """

    module: nn.Module
    prefix: str
    params: PyTree
    views: Mapping[str, KernelView]
    shared: Mapping[str, str]
    folds: tuple[Fold, ...] = ()


class Quantized(NamedTuple):
    """A part's leaves by path within it: as they are stored, and as floating point for a run of the module.

    outputs: of the unquantized module for each batch, where capturing gave them (order `parallel`), else empty.
    """

    leaves: dict[str, object]
    records: list[LayerRecord]
    floating: PyTree
    outputs: list[object]


def quantize_part(
    part: Part,
    plans: Sequence[Plan],
    order: Order,
    batches: Sequence[Batch] = (),
    exact: Sequence[Batch] = (),
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
    *,
    keep_outputs: bool = False,
) -> list[Quantized]:
    """The part's kernels by each plan. Plans may be several where the order takes no input from quantized layers.

    batches: the part's inputs, as the order has them; none are needed by plans that read no calibration data. exact: its
    inputs in the unquantized model, for orders with a correction. keep_outputs: return those of the unquantized module, where
    the order gives them. Raises QjaxError for inputs that are not finite and layers
    that cannot be captured.
    """
    flat = flatten_dict(part.params, sep="/")
    needing = [{path: recipe for path, recipe in plan.items() if recipe and recipe.statistics} for plan in plans]
    shared = part.shared

    def capture(paths, floating, *, drift=False, reference=None):
        """Statistics of the layers at `paths`, by the path of the layer that stands for those with its input."""
        recipes = [plan[path] for plan in needing for path in paths if path in plan]
        names = {name for recipe in recipes for name in recipe.statistics} | ({"drift"} if drift else set())
        if names & {"drift", "module"}:  # what is computed from them needs the Hessian too
            names = names - {"module"} | {"hessian"}
        needed = {shared[path]: part.views[path].matrix_shape[0] for plan in needing for path in paths if path in plan}
        if not needed:
            return Captured({}, [])
        return capture_statistics(
            part.module,
            floating,
            batches,
            needed,
            sorted(names),
            (reference, exact) if drift else None,
            prefix=part.prefix,
            keep_outputs=keep_outputs and not order.prefix,
        )

    reads_before = not order.inside or any(recipe.transforms for plan in needing for recipe in plan.values())
    before, outputs = capture(list(part.views), part.params) if reads_before and any(needing) else Captured({}, [])
    shared_memo, results = Memo(), []
    for plan, calibrated in zip(plans, needing, strict=True):
        base, scales = _transform(part, flat, calibrated, shared, before, batches, shared_memo)
        current, leaves, records = dict(base), {}, {}
        for group in _in_call_order(plan, shared) if order.inside else [list(plan)]:
            statistics = before
            memo = Memo() if order.inside else shared_memo  # inside, nothing is shared beyond a group
            if order.inside and any(path in calibrated for path in group):
                statistics = capture(
                    group, unflatten_dict(current, sep="/"), drift=order.alpha > 0, reference=unflatten_dict(base, sep="/")
                ).statistics
            started = time.perf_counter()
            rounded = {}  # all are on their way before the first is waited for
            for path in (path for path in group if plan[path] is not None):
                weight = memo.get(_to_float_matrix, base[path], view=part.views[path])
                known = statistics.get(shared.get(path), {}) if path in calibrated else {}
                rounded[path] = _round_kernel(weight, plan[path], known, scales.get(path), order, memo)
            for path in group:
                record = _record(part, path, plan[path], base[path], rounded.get(path), started)
                started = time.perf_counter()
                if path in rounded:
                    leaves[path] = (
                        part.views[path].to_kernel(rounded[path].leaf.codes) if plan[path].is_cast else rounded[path].leaf
                    )
                    if order.prefix:
                        current[path] = part.views[path].to_kernel(dequantize(rounded[path].leaf))
                records[path] = record
                on_layer(record)
        kept = outputs if not order.prefix else []
        results.append(Quantized(base | leaves, [records[path] for path in plan], unflatten_dict(current, sep="/"), kept))
    return results


class Scale(NamedTuple):
    """A kernel's input scale: `scale` (in,) multiplies its rows; folded into the layer before, or a map of the leaf."""

    scale: Array
    stored: InputMap | None = None

    @property
    def folded(self) -> bool:
        """Whether the layer before makes up for it."""
        return self.stored is None


class Rounded(NamedTuple):
    """A kernel's new leaf and diagnostics, not waited for."""

    leaf: QTensor | Linear
    info: Info
    tokens: Array | None


class Memo:
    """What the kernels and plans of a part share: factors of Hessians, rescaled statistics, tr(W^T H W)."""

    def __init__(self):
        self._known = {}

    def get(self, compute: Callable, *arrays: object, **options: object) -> object:
        """compute(*arrays, **options), once for the same objects and options."""
        key = (compute, *map(id, arrays), *sorted(options.items()))
        if key not in self._known:
            self._known[key] = (compute(*arrays, **options), arrays)  # the arrays are held, so that no id is used again
        return self._known[key][0]


def _to_float_matrix(kernel: Array, *, view: KernelView) -> Float[Array, "in out"]:
    return view.to_matrix(kernel).astype(jnp.float32)


def _in_call_order(plan: Plan, shared: Mapping[str, str]) -> list[list[str]]:
    """Kernels in the order in which the module calls them, those with the same input together; uncalled ones first."""
    groups: dict[str | None, list[str]] = {None: [path for path in plan if path not in shared]}
    for path, leader in shared.items():
        if path in plan:
            groups.setdefault(leader, []).append(path)
    return [group for group in groups.values() if group]


def _transform(
    part: Part,
    flat: Mapping[str, Array],
    plan: Mapping[str, Recipe],
    shared: Mapping[str, str],
    statistics: Mapping[str, Mapping[str, Array]],
    batches: Sequence[Batch],
    memo: Memo,
) -> tuple[Mapping[str, Array], dict[str, Scale]]:
    """The float leaves after all transforms, and the scale of each kernel that got one; what the module computes is
    unchanged.
    """
    todo = {path: recipe for path, recipe in plan.items() if recipe.transforms}
    base, scales = dict(flat), {}
    for fold in part.folds:
        paths = [f"{layer}/kernel" for layer in fold.layers]
        recipes = {todo.get(path) for path in paths}
        if None in recipes or len(recipes) > 1 or (is_linear(fold, flat) and f"{fold.source}/kernel" not in plan):
            continue  # they cannot share a scale, or what would have to change is to be left as it is
        scale = _find_scale(part, paths, flat, recipes.pop(), statistics[shared[paths[0]]], batches, memo)
        base |= fold_map(base, fold, Divide(scale))
        scales |= dict.fromkeys(paths, Scale(scale))
    for path, recipe in todo.items():
        if path not in scales:
            scale = _find_scale(part, [path], flat, recipe, statistics[shared[path]], batches, memo)
            stored = Divide(scale).stored()  # the weight makes up for what is stored
            scales[path] = Scale(1 / stored.scale.astype(jnp.float32), stored)
    return base, scales


def _find_scale(part, paths, flat, recipe, statistics, batches, memo) -> Float[Array, " in"]:
    """The scale that the recipe's transforms, one after the other, give the kernels at `paths`."""
    weights = [_to_float_matrix(flat[path], view=part.views[path]) for path in paths]
    total = jnp.ones(len(weights[0]))
    for stage in recipe.transforms:
        module = _module_error(part, paths, flat, total, statistics, batches)
        taken = {name: module if name == "module" else statistics[name] for name in statistics_of(stage)}
        if "rounded" in inspect.signature(method(stage.name)).parameters:
            taken["rounded"] = functools.partial(_rounded_by_recipe, tuple(weights), recipe, statistics, memo)
        scale = method(stage.name)(weights, recipe.format, **taken, **dict(stage.options)).scale
        if not bool(jnp.all(jnp.isfinite(scale))):
            raise QjaxError(
                f"{stage.name} finds no finite scale for {', '.join(part.prefix + path for path in paths)}: the weights, or "
                "the output of the module they are in, are not finite; start from an intact model and calibration data"
            )
        total = total * scale
        weights = [weight * scale[:, None] for weight in weights]
        statistics = rescale(statistics, scale)
    return total


def _rounded_by_recipe(weights, recipe, statistics, memo, divide) -> list[Float[Array, "in out"]]:
    """What weights that share an input become by the recipe's rounding; scaled before it and scaled back, where a map is
    given.
    """
    if divide is None:
        return [dequantize(round_weight(weight, recipe, statistics, memo)[0]) for weight in weights]
    scale = divide.scale
    known, memo = rescale(statistics, scale), Memo()
    scaled = [weight * scale[:, None] for weight in weights]
    return [dequantize(round_weight(weight, recipe, known, memo)[0]) / scale[:, None] for weight in scaled]


def _module_error(part, paths, flat, scale, statistics, batches) -> Callable[[Sequence[Array]], Array]:
    """The squared error of the parent module's output when the kernels at `paths` are replaced, for their input divided by
    `scale`.

    The parent of a single layer is the layer itself, as in AWQ's code, and the Hessian has its error.
    """
    matrices = [_to_float_matrix(flat[path], view=part.views[path]) for path in paths]
    if len(paths) == 1:
        return lambda weights: output_loss(weights[0] - matrices[0] * scale[:, None], statistics["hessian"])
    parent = tuple(paths[0].split("/")[:-2])
    wanted = []

    def error(weights):
        wanted.extend([] if wanted else parent_outputs(part.module, part.params, batches, parent))
        replaced = {path: part.views[path].to_kernel(w / scale[:, None]) for path, w in zip(paths, weights, strict=True)}
        got = parent_outputs(part.module, unflatten_dict({**flat, **replaced}, sep="/"), batches, parent)
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(got, wanted, strict=True))

    return error


def _round_kernel(weight, recipe, statistics, scale, order, memo) -> Rounded:
    """Corrects, scales and rounds one (in, out) weight; statistics are of its input as captured."""
    known, original = {name: value for name, value in statistics.items() if name != "drift"}, weight
    if "drift" in statistics:
        weight = correct(weight, statistics["hessian"], statistics["drift"], order.alpha, order.damp)
    if scale is not None:
        if not scale.folded:
            weight = weight * scale.scale[:, None]
        if not scale.folded or not order.inside:  # else the input was captured with the scale folded into it
            known = {name: memo.get(_rescale_one(name), value, scale.scale) for name, value in known.items()}
    q, info = round_weight(weight, recipe, known, memo)
    if "hessian" in known:
        loss = output_loss(dequantize(q) - weight, known["hessian"]) if info.proxy_loss is None else info.proxy_loss
        whole = memo.get(output_loss, weight, known["hessian"])
        info = info._replace(proxy_loss=loss, output_error=relative(loss, whole))
    leaf = q if scale is None or scale.folded else Linear(q, (scale.stored,))
    if "drift" in statistics or scale is not None:  # of the weight as it came, for every method alike
        rows = scale.scale[:, None] if scale is not None and scale.folded else 1.0
        change, before = (jnp.sum(jnp.square(w / rows)) for w in (dequantize(leaf) - original, original))
        info = info._replace(weight_error=relative(change, before))
    return Rounded(leaf, info, statistics.get("tokens"))


@functools.cache
def _rescale_one(name: str) -> Callable[[Array, Array], Array]:
    return lambda value, scale: rescale({name: value}, scale)[name]


def round_weight(
    weight: Float[Array, "in out"],
    recipe: Recipe,
    statistics: Mapping[str, Array] = MappingProxyType({}),
    memo: Memo | None = None,
) -> tuple[QTensor, Info]:
    """Applies a recipe's rounding to one (in, out) weight. Raises QjaxError for statistics that it needs and that are not
    there.
    """
    stage = recipe.rounding
    function, options = method(stage.name), dict(stage.options)
    needed = statistics_of(stage)
    missing = [name for name in needed if name not in statistics]
    if missing:
        raise QjaxError(f"{recipe}: {stage.name} needs {', '.join(missing)} of the layer's input; give calibration data")
    taken = {name: statistics[name] for name in needed}
    if "factor" in inspect.signature(function).parameters:
        chosen = {name: options.get(name, option.default) for name, option in options_of(stage.name).items()}
        shared = {name: chosen[name] for name in ("damp", "act_order")}
        taken["factor"] = (memo or Memo()).get(factorize, taken["hessian"], **shared)
    return function(weight, recipe.format, **taken, **options)


def problem_of(recipe: Recipe, shape: tuple[int, int]) -> str | None:
    """What is wrong with a recipe's options, alone or for a kernel of this shape; None if nothing is. Computes nothing.

    A method of one's own that JAX cannot trace is not looked into.
    """
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    statistics = {"hessian": array((shape[0],) * 2), "abs_mean": array(shape[:1]), "abs_max": array(shape[:1])}

    def run(weight, known):
        for stage in recipe.transforms:
            given = known | {"module": lambda weights: jnp.sum(weights[0])}
            taken = {name: given[name] for name in statistics_of(stage)}
            if "rounded" in inspect.signature(method(stage.name)).parameters:
                taken["rounded"] = lambda divide: [weight]
            method(stage.name)([weight], recipe.format, **taken, **dict(stage.options))
        return round_weight(weight, recipe, known)[0].codes

    try:
        jax.eval_shape(run, array(shape), statistics)
    except QjaxError as error:
        return str(error)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        return None
    return None


def _record(part, path, recipe, kernel, rounded, started) -> LayerRecord:
    """Waits for a kernel's result; raises QjaxError for weights that are not finite."""
    view, name = part.views[path], part.prefix + path
    if rounded is None:
        return LayerRecord(name, UNQUANTIZED, *view.matrix_shape, 8.0 * kernel.dtype.itemsize)
    figures = {key: None if value is None else float(value) for key, value in rounded.info._asdict().items()}
    if not all(math.isfinite(figures[key] or 0.0) for key in ("weight_error", "proxy_loss")):
        raise QjaxError(f"weights that are not finite cannot be quantized: {name}; start from an intact model")
    tokens = None if rounded.tokens is None else int(rounded.tokens)
    seconds = time.perf_counter() - started
    return LayerRecord(
        name, str(recipe), *view.matrix_shape, rounded.leaf.bits_per_weight, **figures, tokens=tokens, seconds=seconds
    )
