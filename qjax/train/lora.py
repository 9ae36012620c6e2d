"""Low-rank adapters trained on a frozen base: LoRA (Hu et al. 2021, arXiv 2106.09685), QLoRA where the base is quantized
(Dettmers et al. 2023, 2305.14314).

    y = x W + s (x A) B,   s = alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, 2312.03732)

Only A (in, rank) and B (rank, out) are trained, in float32. Starts, with R_t = U S V^T of W - W'_t cut to `rank`:

    gaussian   A uniform in +-1/sqrt(in), B = 0: as PEFT's default
    loftq      W'_t+1 = quantize(W - s A_t B_t), s A_t B_t = R_t (Li et al. 2023, 2310.08659)
    qera       argmin over A, B of E ||x (W - W' - s A B)||^2, x the layer's inputs in calibration (QERA's "exact", Zhang et al.
               2024, 2410.06040; CLoQ, Deng et al. 2025, 2501.18475, where W' is GPTQ's)
    pissa      A, B of W itself, W' = quantize(W - s A B) (Meng et al. 2024, 2404.02948)

so that with the last three W' + s A B is nearer to W than W' alone. loftq and pissa change the base, which is returned with
the adapters.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.calibrate.inputs import input_statistics
from qjax.driver import patterns
from qjax.driver.decoder import quantize
from qjax.driver.placement import abridge, kernels_of, placement
from qjax.errors import QjaxError
from qjax.files import listing
from qjax.linear import LowRank, dequantize, is_quantized
from qjax.models.adapters import adapters_of, attach
from qjax.models.families import module_names
from qjax.models.model import Model
from qjax.models.parameters import flatten, unflatten
from qjax.models.walk import in_blocks
from qjax.train import forward
from qjax.train.loop import Loss, train
from qjax.train.settings import LoraConfig, TrainConfig

DAMP = 0.01  # of a hessian, relative to its mean diagonal


def targets_of(model: Model, config: LoraConfig) -> list[str]:
    """Paths of the kernels that get an adapter. Raises QjaxError for patterns that find none, or experts."""
    kernels = kernels_of(model)
    leaves = flatten(model.params)
    experts = {path for path in kernels if len(leaves[path].shape) > 2}
    if not config.targets:
        return [path for path in kernels if in_blocks(path) and path not in experts]
    theirs = module_names(model.config.family, kernels)
    meant = {pattern: patterns.meant(pattern, kernels, theirs) for pattern in config.targets}
    if idle := [given for given, pattern in meant.items() if not any(re.search(pattern, path) for path in kernels)]:
        raise QjaxError(
            f"adapters: {', '.join(map(repr, idle))} names no kernel{patterns.nothing_found(idle, kernels, theirs)}; the "
            f"kernels are {abridge(kernels)}"
        )
    found = [path for path in kernels if any(re.search(pattern, path) for pattern in meant.values())]
    if stacked := [path for path in found if path in experts]:
        raise QjaxError(f"adapters: {abridge(stacked)} hold experts, which take none; name other layers, as attention")
    return found


def product(adapter: LowRank) -> Float[Array, "in out"]:
    """s A B in float32."""
    return adapter.scaling * jnp.matmul(adapter.a, adapter.b, precision=jax.lax.Precision.HIGHEST)


def factors(weight: Float[Array, "in out"], config: LoraConfig) -> LowRank:
    """The adapter whose s A B is the nearest to a float32 weight that its rank allows."""
    u, values, v = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(values[: config.rank] / config.scaling)
    return LowRank(u[:, : config.rank] * root, root[:, None] * v[: config.rank], config.scaling)


@functools.partial(jax.jit, static_argnums=2)
def factors_for_inputs(weight: Float[Array, "in out"], hessian: Float[Array, "in in"], config: LoraConfig) -> LowRank:
    """The adapter with the least E ||x (weight - s A B)||^2, where hessian is E x x^T, damped: of R weight, with R^T R the
    hessian, it is the nearest.
    """
    diagonal = jnp.diagonal(hessian)
    mean = jnp.where(jnp.any(diagonal > 0), jnp.mean(diagonal), 1.0)
    values, vectors = jnp.linalg.eigh(hessian + DAMP * mean * jnp.eye(len(hessian)))
    root = jnp.sqrt(jnp.maximum(values, DAMP * mean))[:, None]  # eigh's rounding may leave less than the damping
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    found = factors(root * product(vectors.T, weight), config)
    return dataclasses.replace(found, a=product(vectors, found.a / root))


def start(
    model: Model, config: LoraConfig, key: jax.Array, *, recipe: str | None = None, **options: object
) -> tuple[Model, dict[str, LowRank]]:
    """The frozen base and the adapters before training. recipe: what the model, unquantized then, is quantized with; None: the
    base is the model as it is. options: of `quantize`. A kernel that the recipe leaves as it is begins as gaussian.

    Raises QjaxError for starts that need the unquantized weights where there are none, for recipes that a start does not go
    with, and for qera without calibration data.
    """
    paths = targets_of(model, config)
    shapes = {path: flatten(model.params)[path].shape for path in paths}
    if small := [f"{path} {tuple(shape)}" for path, shape in shapes.items() if min(shape) < config.rank]:
        raise QjaxError(f"adapters: a rank of {config.rank} is more than {listing(small)} have; take a lower one")
    quantized = functools.partial(_quantized, recipe=recipe, options=options)
    adapters = _gaussian(model, paths, config, key)
    if config.start == "gaussian":
        return quantized(model), adapters
    _require_fit(model, config.start, paths, recipe, options)
    leaves = flatten(model.params)
    weights = {path: jnp.asarray(np.asarray(leaves[path]), jnp.float32) for path in paths}
    if config.start == "pissa":
        adapters = {path: factors(weight, config) for path, weight in weights.items()}
        return quantized(_less(model, weights, adapters)), adapters
    base = quantized(model)
    if config.start == "qera":
        return base, adapters | _for_inputs(model, weights, base, config, options["calibration"])
    for turn in range(config.rounds):
        base = quantized(_less(model, weights, adapters)) if turn else base
        lacking = _lacking(weights, base)
        adapters |= {path: factors(change, config) for path, change in lacking.items()}
    return base, adapters


def _require_fit(model: Model, name: str, paths: list[str], recipe: str | None, options: Mapping[str, object]) -> None:
    """Raises QjaxError for a start by weights that the model or the recipe has no room for."""
    leaves = flatten(model.params)
    if any(is_quantized(leaves[path]) for path in paths):
        raise QjaxError(f"adapters: the start {name} needs weights that are not quantized; {model.name} is {model.recipe}")
    placed = placement(model, recipe, options.get("rules", ()))
    if name in ("loftq", "qera") and not any(placed[path] for path in paths):
        raise QjaxError(
            f"adapters: the start {name} makes up for what a recipe takes of these kernels, {recipe} takes nothing; give "
            "another recipe, or another start"
        )
    if moved := [path for path, chosen in placed.items() if chosen and chosen.transforms]:
        raise QjaxError(
            f"adapters: {placed[moved[0]]} transforms {abridge(moved)}, and other layers may take that in; the start {name} "
            "knows kernels one by one: leave transforms out, or start gaussian"
        )
    if name == "qera" and options.get("calibration") is None:
        raise QjaxError("adapters: the start qera needs calibration data; give calibration tokens (--calibration TEXT)")
    if name == "qera" and (outside := [path for path in paths if not in_blocks(path)]):
        raise QjaxError(f"adapters: the start qera is for layers of blocks; {listing(outside)} is none, name others")


def _lacking(weights: Mapping[str, Array], base: Model) -> dict[str, Array]:
    """What the base's kernels lack of the weights, of those that lack anything."""
    held = flatten(base.params)
    changes = {path: weight - _float(held[path]) for path, weight in weights.items()}
    return {path: change for path, change in changes.items() if jnp.any(change)}


def _for_inputs(
    model: Model, weights: Mapping[str, Array], base: Model, config: LoraConfig, calibration: object
) -> dict[str, LowRank]:
    """What brings the base's layers nearest to the model's, on the inputs that they have in the model."""
    lacking, found = _lacking(weights, base), {}
    for given in input_statistics(model, calibration, ("hessian",)):
        for path in (path for path in given.readers if path in lacking):
            found[path] = factors_for_inputs(lacking[path], given.statistics["hessian"], config)
    return found


def _quantized(model: Model, recipe: str | None, options: Mapping[str, object]) -> Model:
    return model if recipe is None else quantize(model, recipe, **options)[0]


def _float(leaf: object) -> Array:
    return dequantize(leaf) if is_quantized(leaf) else jnp.asarray(leaf, jnp.float32)


def _gaussian(model: Model, paths: list[str], config: LoraConfig, key: jax.Array) -> dict[str, LowRank]:
    leaves, found = flatten(model.params), {}
    for path, each in zip(paths, jax.random.split(key, len(paths)), strict=True):
        rows, columns = leaves[path].shape
        a = jax.random.uniform(each, (rows, config.rank), minval=-1.0, maxval=1.0) / math.sqrt(rows)
        found[path] = LowRank(a, jnp.zeros((config.rank, columns)), config.scaling)
    return found


def _less(model: Model, weights: Mapping[str, Array], adapters: Mapping[str, LowRank]) -> Model:
    """The model with float32 kernels less their adapters."""
    new = {path: weight - product(adapters[path]) for path, weight in weights.items() if path in adapters}
    return model._replace(params=unflatten({**flatten(model.params), **new}))


class Problem(NamedTuple):
    """What the loop trains: loss(trained, frozen, tokens); finished(trained) is what comes of it."""

    loss: Loss
    trained: dict[str, Array]
    frozen: dict[str, Array]
    finished: Any


def problem(base: Model, adapters: Mapping[str, LowRank]) -> Problem:
    """Next-token training of adapters on a base, whose codes stay as they are. finished: adapters by path."""
    stack = forward.stack(attach(base, adapters))
    trained, frozen, joined = forward.split(stack.tree, lambda key: key.endswith(("/adapter/a", "/adapter/b")))
    trained = {key: leaf.astype(jnp.float32) for key, leaf in trained.items()}

    def loss(trained, frozen, tokens):
        return forward.next_token_loss(stack, joined(trained, frozen), tokens)

    return Problem(loss, trained, frozen, lambda trained: adapters_of(forward.unstack(stack.runs, joined(trained, frozen))))


def train_adapters(
    base: Model, adapters: Mapping[str, LowRank], tokens: Int[np.ndarray, " length"], config: TrainConfig, **options: object
) -> dict[str, LowRank]:
    """The adapters after training on a text's tokens (`loop.packed_tokens`). options: of `loop.train`."""
    asked = problem(base, adapters)
    return asked.finished(train(asked.loss, asked.trained, asked.frozen, tokens, config, **options))
