"""One layer: its weight corrected, mapped, rounded and refined, and what came of it.

Diagnostics are taken here, for all methods alike: proxy loss and output error of the weight that ends up in the layer against
the one it stands for.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax import maps
from qjax.activations import ACTIVATIONS, Activation, calibrated, parse_activation
from qjax.calibrate.experts import ROUTED
from qjax.calibrate.order import Order, correct
from qjax.calibrate.statistics import COUNT, STATISTICS, given_to, mapped_value, read_by
from qjax.driver.scale_range import check_scales
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.linear import Linear, Outliers, dequantize, is_quantized
from qjax.maps import InputMap
from qjax.methods import UNQUANTIZED, Memo, Site, Stage, added_methods, captures_of
from qjax.numbers import NotFiniteError
from qjax.qtensor import QTensor
from qjax.recipe import Recipe
from qjax.refining.block import BlockInfo
from qjax.rounding.parts.info import Info, change_loss, output_loss, relative
from qjax.rounding.parts.unit import exponent_of, sizes
from qjax.scales import times_power_of_two

SMALLEST = np.finfo(np.float32).tiny  # smaller numbers are 0 where XLA computes


class LayerRecord(NamedTuple):
    """What happened to one kernel; see `Info` for the figures. `recipe` is "none" for a kernel that was left alone.

    tokens: calibration tokens its statistics are from; None where it needed none. routed: of an expert, those that were routed
    to it; where they are too few its statistics are from all (`calibrate/experts.py`). block_loss_before, block_loss_after:
    mean squared error of its block's output, where a block refiner told.
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
    block_loss_before: float | None = None
    block_loss_after: float | None = None
    routed: int | None = None


class Mapped(NamedTuple):
    """The maps of a kernel's input; folded into the layer before (one `maps.Divide` then), or to be held by the leaf."""

    inputs: tuple[InputMap, ...]
    folded: bool


class Rounded(NamedTuple):
    """A kernel's new leaf and diagnostics, not waited for. original: the (in, out) weight as it came; weight: what was rounded,
    after correction and maps; statistics: of its mapped input. exponent: proxy_loss is that of 2^-exponent times the weight.
    decoded: `linear.dequantize` of the leaf, where it was looked at.
    """

    leaf: QTensor | Linear
    info: Info
    original: Array
    weight: Array
    statistics: Mapping[str, Array]
    recipe: Recipe
    mapped: Mapped | None = None
    tokens: Array | None = None
    block: BlockInfo = BlockInfo()
    exponent: int = 0
    routed: Array | None = None
    decoded: Array | None = None

    def leaf_of(self, weight: QTensor | Array) -> Linear:
        """The layer with this weight: a QTensor, or an array in its place."""
        inputs = () if self.mapped is None or self.mapped.folded else self.mapped.inputs
        return activated(weight, inputs, self.recipe.activation, self.statistics, self.weight)


def activated(
    weight: QTensor | Array,
    inputs: tuple[InputMap, ...],
    activation: Activation | None,
    statistics: Mapping[str, Array],
    exact: Float[Array, "in out"],
) -> Linear:
    """The layer of a weight, rounded, whose mapped input is rounded by an activation format. statistics: of that input. exact:
    the weight before rounding, of which outliers that calibration finds keep their rows in float16.
    """
    if activation is None or not activation.fixed:
        return Linear(weight, inputs, activation, calibrated(activation, statistics))
    index = jnp.flatnonzero(statistics["abs_max"] >= activation.threshold).astype(jnp.int32)
    kept = Outliers(index, exact[index].astype(jnp.float16)) if index.size else None
    return Linear(weight, inputs, parse_activation(ACTIVATIONS), None, kept)


class Prepared(NamedTuple):
    """A weight as it is to be rounded, corrected and mapped, and as it came; statistics: of its mapped input, and all that were
    captured.
    """

    weight: Float[Array, "in out"]
    original: Float[Array, "in out"]
    recipe: Recipe
    statistics: Mapping[str, Array]
    captured: Mapping[str, Array]
    mapped: Mapped | None


def prepare_kernel(
    weight: Float[Array, "in out"],
    recipe: Recipe,
    statistics: Mapping[str, Array],
    mapped: Mapped | None,
    order: Order,
    memo: Memo,
    of_mapped: Mapping[str, Array] = MappingProxyType({}),
) -> Prepared:
    """Corrects and maps one weight; statistics are of its input as captured, of_mapped of the mapped input."""
    later, original = dataclasses.replace(recipe, transforms=()), weight  # what transforms read need not be known behind them
    needed = (*later.statistics, *read_by(output_loss))  # its loss is told of every layer
    known = {name: value for name, value in statistics.items() if name in needed}
    drifted = given_to(correct, statistics)
    if drifted:
        weight = correct(weight, *drifted, order.alpha, order.damp)
    if mapped is not None:
        if not mapped.folded:
            weight = maps.on_weight(mapped.inputs, weight)
        if not mapped.folded or not order.inside:  # else the input was captured with the scale folded into it
            known = {name: memo.get(_mapped, v, mapped.inputs, name=name) for name, v in known.items() if name not in of_mapped}
            known |= of_mapped
    return Prepared(weight, original, recipe, known, statistics, mapped)


def round_kernels(prepared: Mapping[str, Prepared], order: Order, memo: Memo) -> dict[str, Rounded]:
    """Rounds kernels. All are on their way before the first is waited for, but for the sizes of their weights."""
    sizes([each.weight for each in prepared.values()])
    return {path: _round_kernel(each, order, memo) for path, each in prepared.items()}


def _round_kernel(given: Prepared, order: Order, memo: Memo) -> Rounded:
    q, info = round_weight(given.weight, given.recipe, given.statistics, memo)
    corrected = given.weight is not given.original or given.mapped is not None
    tokens, routed = (given.captured.get(name) for name in (COUNT, ROUTED))
    begun = Rounded(q, info, given.original, given.weight, given.statistics, given.recipe, given.mapped, tokens, routed=routed)
    done = placed(begun, q, info, memo, corrected=corrected)
    return done if order.prefix else done._replace(decoded=None)


def placed(done: Rounded, q: QTensor, info: Info, memo: Memo, *, corrected: bool = True) -> Rounded:
    """The kernel with these codes. corrected: what was rounded is not the weight as it came."""
    mapped, known, exponent = done.mapped, done.statistics, 0 if q.format.is_float else exponent_of(done.weight)
    unit, moments = functools.partial(times_power_of_two, exponent=-exponent), given_to(output_loss, known)
    leaf = done.leaf_of(q)
    kept = q if leaf.outliers is None else Linear(q, outliers=leaf.outliers)
    if exponent or kept is not q:  # all diagnostics are taken here
        info, corrected = info._replace(proxy_loss=None), True
    if moments:
        loss = info.proxy_loss
        if loss is None:
            loss = change_loss(dequantize(kept, jnp.float32), done.weight, *moments, exponent=exponent)
        whole = memo.get(output_loss, unit(done.weight), *moments)
        info = info._replace(proxy_loss=loss, output_error=relative(loss, whole))
    leaf = leaf if leaf.inputs or leaf.activation else q
    if corrected:  # for every method alike
        rows = mapped.inputs[0].scale if mapped is not None and mapped.folded else None
        decoded = dequantize(leaf, jnp.float32)
        info = info._replace(weight_error=_weight_error(decoded, done.original, rows, exponent=exponent))
        done = done._replace(decoded=decoded)
    return done._replace(leaf=leaf, info=info, exponent=exponent)


@functools.partial(jax.jit, static_argnames="exponent")
def _weight_error(new: Array, original: Array, rows: Float[Array, " in"] | None, *, exponent: int) -> Float[Array, ""]:
    """||new - original||^2 / ||original||^2, where the rows of both were multiplied by `rows`."""
    rows = 1.0 if rows is None else rows[:, None]
    change, before = (jnp.sum(jnp.square(times_power_of_two(w, -exponent) / rows)) for w in (new - original, original))
    return relative(change, before)


def _mapped(value: Array, inputs: tuple[InputMap, ...], *, name: str) -> Array:
    return mapped_value(name, value, inputs)


def round_weight(
    weight: Float[Array, "in out"],
    recipe: Recipe,
    statistics: Mapping[str, Array] = MappingProxyType({}),
    memo: Memo | None = None,
) -> tuple[QTensor, Info]:
    """Applies a recipe's rounding and refiners to one (in, out) weight. Raises QjaxError for statistics that they need and
    that are not there.
    """
    stages = (recipe.rounding, *recipe.refiners)
    missing = [name for name in captures_of(stages) if name not in statistics]
    if missing:
        names = "+".join(stage.name for stage in stages)
        raise QjaxError(f"{recipe}: {names} needs {', '.join(missing)} of the layer's input; give calibration data")
    site = Site((weight,), statistics, memo or Memo())
    expected = weight.shape, recipe.format
    q, info = _checked(recipe.rounding, recipe.rounding(weight, recipe.format, site=site), *expected)
    for stage in recipe.refiners:
        q, info = _checked(stage, stage(weight, q, site=site), *expected)
    return q, info


def _checked(stage: Stage, result: object, shape: tuple[int, ...], fmt: Format) -> tuple[QTensor, Info]:
    """A method's result; raises QjaxError where it is not (a QTensor of this shape and format, Info)."""
    q, info = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not _is_such(q, shape, fmt) or not isinstance(info, Info):
        raise QjaxError(f"{stage.name} returned {_told(result)}; expected a QTensor {shape} in {fmt} and a qjax.Info")
    return q, info


def checked_block(stage: Stage, result: object, start: Mapping[str, QTensor]) -> tuple[dict[str, QTensor], BlockInfo]:
    """A block refiner's result; raises QjaxError where it is not (QTensors like those it started from, by path, BlockInfo)."""
    found, info = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    fits = isinstance(found, Mapping) and all(_is_such(found.get(path), q.shape, q.format) for path, q in start.items())
    if not fits or not isinstance(info, BlockInfo):
        raise QjaxError(
            f"{stage.name} returned {_told(result)}; expected a QTensor for every path of `start`, of the same shape and "
            "format, and a qjax.BlockInfo"
        )
    return found, info


def _is_such(q: object, shape: tuple[int, ...], fmt: Format) -> bool:
    return isinstance(q, QTensor) and q.format == fmt and q.shape == shape


def _told(result: object) -> str:
    parts = result if isinstance(result, tuple) and not hasattr(result, "_fields") else (result,)
    return ", ".join(
        f"QTensor {part.shape} in {part.format}" if isinstance(part, QTensor) else type(part).__name__ for part in parts
    )


def problem_of(recipe: Recipe, shape: tuple[int, int]) -> str | None:
    """What is wrong with a recipe's options, alone or for a kernel of this shape; None if nothing is. Computes nothing.

    A method of one's own that JAX cannot trace is not looked into.
    """

    def run(weight):
        known = {name: STATISTICS[name].finalize(STATISTICS[name].init(shape[0])) for name in recipe.statistics}
        error = jnp.sum(weight)
        site = Site((weight,), known, Memo(), lambda weights: error, lambda by=None: [weight], lambda by: error)
        for number, stage in enumerate(recipe.transforms, start=1):
            by = stage([weight], recipe.format, site=site)
            if hasattr(by, "on_statistic") and not isinstance(by, type):
                for name in captures_of((*recipe.transforms[number:], recipe.rounding, *recipe.refiners)):
                    by.on_statistic(known[name], STATISTICS[name].axes or 0)
        return round_weight(weight, recipe, known)[0].codes

    try:
        jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))
    except QjaxError as error:
        return str(error)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        return None
    except Exception as error:
        if own := [stage.name for stage in recipe.stages if stage.name in added_methods()]:
            return f"{', '.join(own)} fails on a weight {shape}: {type(error).__name__}: {error}"
        raise
    return None


def make_record(path: str, shape: tuple[int, int], kernel: object, rounded: Rounded | None, started: float) -> LayerRecord:
    """Waits for a kernel's result; raises QjaxError for weights that are not finite. kernel: the leaf before."""
    if rounded is None:
        bits = kernel.bits_per_weight if is_quantized(kernel) else 8.0 * kernel.dtype.itemsize
        return LayerRecord(path, UNQUANTIZED, *shape, bits)
    figures = {key: None if value is None else float(value) for key, value in rounded.info._asdict().items()}
    losses = {f"block_{key}": None if value is None else float(value) for key, value in rounded.block._asdict().items()}
    if not all(math.isfinite(figures[key] or 0.0) for key in ("weight_error", "proxy_loss")):
        raise NotFiniteError(f"weights that are not finite cannot be quantized: {path}; start from an intact model")
    if broken := [key for key, value in (figures | losses).items() if not math.isfinite(value or 0.0)]:
        raise NotFiniteError(f"{path}: {', '.join(broken)} of {rounded.recipe} not finite; choose another recipe for it")
    if figures["weight_error"] == 0 and 0 < (largest := np.abs(np.asarray(kernel, np.float32)).max()) < SMALLEST:
        raise NotFiniteError(f"{path}: its largest |weight| is {largest:.1e}, with which XLA computes as 0; scale the layer")
    if figures["proxy_loss"]:
        figures["proxy_loss"] *= 4.0**rounded.exponent  # a Python number: float32 may not hold it
    check_scales(path, rounded.weight, rounded.leaf.weight if isinstance(rounded.leaf, Linear) else rounded.leaf)
    tokens, routed = (None if each is None else int(each) for each in (rounded.tokens, rounded.routed))
    seconds = time.perf_counter() - started
    bits = rounded.leaf.bits_per_weight
    spent = {"tokens": tokens, "seconds": seconds, "routed": routed}
    return LayerRecord(path, str(rounded.recipe), *shape, bits, **figures, **spent, **losses)
