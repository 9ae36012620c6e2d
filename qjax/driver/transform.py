"""The transforms of a piece's recipes: maps of layer inputs, found, and folded into the layer before where a table says how."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax import maps
from qjax.calibrate.capture import Batch, module_outputs
from qjax.calibrate.statistics import STATISTICS, given_to, mapped
from qjax.driver.layer import Mapped, activated, round_weight
from qjax.driver.piece import Piece
from qjax.errors import QjaxError
from qjax.linear import dequantize
from qjax.maps import InputMap
from qjax.methods import Memo, Site, Stage, captures_of
from qjax.models.folding import fold_map, is_linear
from qjax.recipe import Recipe
from qjax.rounding.nearest import rtn
from qjax.rounding.parts.info import output_loss
from qjax.rounding.parts.unit import exponent_of
from qjax.scales import times_power_of_two


def transform(
    piece: Piece,
    flat: Mapping[str, Array],
    plan: Mapping[str, Recipe | None],
    statistics: Mapping[str, Mapping[str, Array]],
    batches: Sequence[Batch],
    memo: Memo | None,
) -> tuple[dict[str, Array], dict[str, Mapped]]:
    """A piece's float leaves after all transforms of a plan, and the maps of each kernel that got any; what the module computes
    is unchanged. memo: what plans share; None where there is one.
    """
    todo = {path: recipe for path, recipe in plan.items() if recipe and recipe.transforms}
    changed = {path for path, recipe in plan.items() if recipe and (recipe.transforms or recipe.reads_data)}
    base, found, done = dict(flat), {}, set()
    for fold in piece.folds:
        paths = [f"{layer}/kernel" for layer in fold.layers]
        recipes = {todo.get(path) for path in paths}
        if None in recipes or len(recipes) > 1 or (is_linear(fold, flat) and f"{fold.source}/kernel" not in changed):
            continue  # they cannot share a map, or what would have to change is to be left as it is
        known = statistics.get(piece.shared.get(paths[0]), {})
        inputs = _find_maps(piece, paths, flat, recipes.pop(), known, batches, memo)
        if [type(each) for each in inputs] == [maps.Divide]:
            base |= fold_map(base, fold, inputs[0])
            found |= dict.fromkeys(paths, Mapped(inputs, folded=True))
        elif inputs:
            found |= dict.fromkeys(paths, _stored(inputs))
        done |= set(paths)
    for path, recipe in todo.items():
        if path not in done:
            inputs = _find_maps(piece, [path], flat, recipe, statistics.get(piece.shared.get(path), {}), batches, memo)
            found |= {path: _stored(inputs)} if inputs else {}
    return base, found


def _stored(inputs: Sequence[InputMap]) -> Mapped:
    """As the leaf holds them; the weight makes up for what storing changed."""
    return Mapped(tuple(each.stored() for each in inputs), folded=False)


def _find_maps(piece, paths, flat, recipe, statistics, batches, memo) -> tuple[InputMap, ...]:
    """The maps that the recipe's transforms, one after the other, give the kernels at `paths`."""
    memo = memo or Memo()
    weights, found = [piece.matrix(path, flat[path], memo) for path in paths], ()
    for number, stage in enumerate(recipe.transforms):
        site = Site(
            tuple(weights),
            statistics,
            memo,
            _module_error(piece, paths, flat, found, statistics, batches),
            _rounder(tuple(weights), recipe, statistics, memo),
            _trial(piece, paths, flat, tuple(weights), found, recipe, statistics, batches),
            stream=piece.kernel_of(paths[0]) in piece.stream,
        )
        by = stage(weights, recipe.format, site=site)
        if by is None:
            continue
        _check_map(stage, by, weights[0])
        if not all(bool(jnp.all(jnp.isfinite(array))) for array in jax.tree.leaves(by)):
            raise QjaxError(
                f"{stage.name} finds no finite scale for {', '.join(piece.prefix + path for path in paths)}: the weights, or "
                "the output of the module they are in, are not finite; start from an intact model and calibration data"
            )
        found = maps.composed([*found, by])
        weights = [by.on_weight(weight) for weight in weights]
        later = (*recipe.transforms[number + 1 :], recipe.rounding, *recipe.refiners)
        rest = captures_of(later)
        statistics = mapped({name: value for name, value in statistics.items() if name in rest}, by)
    return found


def _check_map(stage: Stage, by: object, weight: Array) -> None:
    """Raises QjaxError for what is no map of these inputs."""
    expected = "expected a map of the input, as qjax.maps.Divide(scale)"
    if isinstance(by, type) or not hasattr(by, "on_weight"):
        raise QjaxError(f"{stage.name} returned {by if isinstance(by, type) else type(by).__name__}, {expected}")
    try:
        fits = jax.eval_shape(by.on_weight, weight).shape == weight.shape
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise QjaxError(f"{stage.name} returned a {type(by).__name__} that does not fit weights {weight.shape}; {expected}")


def _rounder(weights, recipe, statistics, memo) -> Callable[..., list[Array]]:
    """rounded(map): what weights that share an input become by the recipe's rounding; mapped before it and mapped back, where
    a map is given.
    """

    def rounded(by: InputMap | None = None) -> list[Array]:
        if by is None:
            return [dequantize(round_weight(weight, recipe, statistics, memo)[0]) for weight in weights]
        needed = captures_of((recipe.rounding, *recipe.refiners))
        known, own = mapped({name: value for name, value in statistics.items() if name in needed}, by), Memo()
        return [maps.merged((by,), dequantize(round_weight(by.on_weight(weight), recipe, known, own)[0])) for weight in weights]

    return rounded


def _module_error(piece, paths, flat, found, statistics, batches) -> Callable[[Sequence[Array]], Array]:
    """The squared error of the parent module's output when the kernels at `paths` are replaced, for their input through the
    maps found so far.

    The parent of a single layer is the layer itself, as in AWQ's code, and the Hessian has its error.
    """
    matrices = [piece.matrix(path, flat[path]) for path in paths]
    if len(paths) == 1:
        exact = maps.on_weight(found, matrices[0])
        unit = functools.partial(times_power_of_two, exponent=-exponent_of(exact))
        return lambda weights: output_loss(unit(weights[0] - exact), *given_to(output_loss, statistics))
    parent = tuple(paths[0].split("/")[:-2])

    @functools.cache
    def wanted() -> list[Array]:
        return module_outputs(piece.module, piece.params, batches, parent)

    def error(weights):
        new = {path: piece.views[path].to_kernel(maps.merged(found, w)) for path, w in zip(paths, weights, strict=True)}
        got = module_outputs(piece.module, piece.tree({**flat, **new}), batches, parent)
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(got, wanted(), strict=True))

    return error


def _trial(piece, paths, flat, weights, found, recipe, statistics, batches) -> Callable[[InputMap], Array]:
    """The squared error of the parent module's output when `weights`, which are for inputs through the maps found so far, are
    mapped once more and rounded to nearest, and their input is rounded by the recipe's activation format.
    """
    parent = tuple(paths[0].split("/")[:-2])

    @functools.cache
    def wanted() -> list[Array]:
        return module_outputs(piece.module, piece.params, batches, parent)

    def error(by):
        if piece.kernel_of(paths[0]) != paths[0]:
            raise QjaxError(
                f"{piece.prefix + paths[0]}: no map is tried on one expert of a mixture; leave search out for these layers"
            )
        needed = recipe.activation.statistics if recipe.activation else ()
        if missing := [name for name in needed if STATISTICS[name].axes is None or name not in statistics]:
            raise QjaxError(
                f"{recipe}: a search of maps does not know {', '.join(missing)} of the inputs behind them; search first of the "
                "transforms, with a static scale by the largest value (/int8-tensor) or a dynamic format, or leave search out"
            )
        known = mapped({name: statistics[name] for name in needed}, by)
        leaves = {}
        for path, weight in zip(paths, map(by.on_weight, weights), strict=True):
            decoded = dequantize(rtn(weight, recipe.format)[0])
            if recipe.activation is None:
                leaves[path] = piece.views[path].to_kernel(maps.merged((*found, by), decoded))
            else:
                leaves[path] = activated(decoded, (*found, by), recipe.activation, known, weight)
        got = module_outputs(piece.module, piece.tree({**flat, **leaves}), batches, parent)
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(got, wanted(), strict=True))

    return error
