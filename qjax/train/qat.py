"""Quantization-aware training: weights, scales and zero points of all layers, end to end.

    minimise   next-token loss of the fake-quantized model, or its KL divergence from a float one (distillation)

Weights are quantized as they are used, with straight-through gradients; steps and zero points are learned as in LSQ and LSQ+
(`refining/fake.py`). What layers do to their inputs (an activation format) is in the model that is trained. The start is a
quantized model, by whatever recipe: rtn for training from the float model, gptq and block_ap for its result. With `learns` =
("scales",) this is EfficientQAT's second phase (Chen et al. 2024, arXiv 2407.11062), with all it is what LLM-QAT and ParetoQ do
(Liu et al. 2023, 2305.17888; 2025, 2502.02631).

The result has true QTensors whose values are those of the last fake-quantized model, bit for bit.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from qjax import maps
from qjax.errors import QjaxError
from qjax.files import listing
from qjax.lazy import materialised
from qjax.linear import Linear, dequantize, is_quantized
from qjax.models.model import Model
from qjax.models.parameters import flatten, unflatten
from qjax.qtensor import QTensor
from qjax.refining.fake import FakeWeight, begin, finished
from qjax.train import forward
from qjax.train.loop import train
from qjax.train.lora import Problem
from qjax.train.settings import LEARNS, QatConfig, TrainConfig

OF_FAKE = re.compile(r"/kernel(/weight)?/(weight|scale|zero)")  # a FakeWeight's arrays in a stack's tree


def faked(model: Model, original: Model | None = None, *, normalised: bool = True) -> Model:
    """The quantized model with FakeWeights in place of its QTensors. original: the model before it was quantized, whose weights
    say where within a code's range a weight starts.

    Raises QjaxError for a model that is not quantized, and lists layers in formats that have no grid, experts, and layers of
    other sizes in `original`.
    """
    leaves = flatten(materialised(model.params))
    floats = {} if original is None else flatten(original.params)
    problems, found = [], {}
    for path, leaf in leaves.items():
        weight = leaf.weight if isinstance(leaf, Linear) else leaf
        if not isinstance(weight, QTensor):
            continue
        given = floats.get(path)
        if len(weight.shape) > 2:
            problems.append(f"{path} holds experts, which are not trained; leave them as they are with a rule, {path}=none")
            continue
        if given is not None and tuple(given.shape) != weight.shape:
            problems.append(f"{path} is {weight.shape}, in {original.name} {tuple(given.shape)}; give the model before")
            continue
        inputs = leaf.inputs if isinstance(leaf, Linear) else ()
        start = dequantize(weight) if given is None or is_quantized(given) else _mapped(inputs, materialised(given))
        try:
            fake = begin(weight, start, normalised=normalised)
        except QjaxError as error:
            problems.append(f"{path}: {error}")
            continue
        found[path] = dataclasses.replace(leaf, weight=fake) if isinstance(leaf, Linear) else fake
    if problems or not found:
        raise QjaxError(listing(problems) if problems else f"{model.name} is not quantized; name a recipe to start from")
    return model._replace(params=unflatten(leaves | found))


def _mapped(inputs: tuple[maps.InputMap, ...], weight: Array) -> Array:
    return maps.on_weight(inputs, jnp.asarray(weight, jnp.float32))


def finish(model: Model) -> Model:
    """The model with true QTensors, of bit for bit the same values, in place of FakeWeights."""
    return model._replace(params=each_fake(model.params, jax.jit(finished)))


def as_used(model: Model) -> Model:
    """The model with the values that FakeWeights have as they are used, as arrays."""
    return model._replace(params=each_fake(model.params, jax.jit(lambda fake: fake.values())))


def each_fake(params: PyTree, function: Callable[[FakeWeight], object]) -> PyTree:
    """A model's parameters with function(weight) in place of every FakeWeight."""

    def convert(leaf):
        if isinstance(leaf, FakeWeight):
            return function(leaf)
        inner = isinstance(leaf, Linear) and isinstance(leaf.weight, FakeWeight)
        return dataclasses.replace(leaf, weight=function(leaf.weight)) if inner else leaf

    return unflatten({path: convert(leaf) for path, leaf in flatten(params).items()})


def problem(model: Model, config: QatConfig, teacher: Model | None = None) -> Problem:
    """What the loop trains of a model with FakeWeights. teacher: the model that a KL divergence is from. finished: the model
    with FakeWeights.

    Raises QjaxError for a KL divergence without a teacher, and from one of another vocabulary.
    """
    stack = forward.stack(model)
    ends = tuple(LEARNS[name] for name in config.learns)
    wanted = lambda key: (found := OF_FAKE.search(key)) is not None and found.end() == len(key) and found[2] in ends  # noqa: E731
    trained, frozen, joined = forward.split(stack.tree, wanted)
    result = lambda trained: model._replace(params=forward.unstack(stack.runs, joined(trained, frozen)))  # noqa: E731
    if config.loss == "next-token":
        return Problem(lambda t, f, tokens: forward.next_token_loss(stack, joined(t, f), tokens), trained, frozen, result)
    if teacher is None:
        raise QjaxError("quantization-aware training: the loss kl is from a float model; give one")
    if teacher.config.vocabulary_size != model.config.vocabulary_size:
        sizes = f"{teacher.config.vocabulary_size}, {model.name} {model.config.vocabulary_size}"
        raise QjaxError(f"quantization-aware training: {teacher.name} has a vocabulary of {sizes}; give the model before")
    theirs = forward.stack(teacher)

    def loss(trained, frozen, tokens):
        own, right = frozen
        return forward.divergence_loss(stack, joined(trained, own), theirs, right, tokens)

    return Problem(loss, trained, (frozen, theirs.tree), result)


def train_quantized(
    model: Model,
    tokens: Int[np.ndarray, " length"],
    config: TrainConfig,
    qat: QatConfig | None = None,
    *,
    original: Model | None = None,
    **options: object,
) -> Model:
    """The quantized model after training on a text's tokens (`loop.packed_tokens`), its kernels true QTensors.

    original: the model before it was quantized: where weights start, what a KL divergence is from. options: of `loop.train`.
    """
    qat = qat or QatConfig()
    asked = problem(faked(model, original, normalised=qat.normalised), qat, original)
    rates: Mapping[str, float] = {"kernel/scale": qat.rate, "weight/scale": qat.rate, "/zero": qat.rate}
    after = asked.finished(train(asked.loss, asked.trained, asked.frozen, tokens, config, rates=rates, **options))
    return finish(after)._replace(recipe=f"{model.recipe}, trained")
