"""Training of all parameters of a block: EfficientQAT's first phase (Chen et al. 2024, arXiv 2407.11062).

    minimise over weights W, scales s, zeros z of the block   mean || block(inputs; fake_quantize(W, s, z)) - targets ||^2

by AdamW with straight-through gradients, a batch of inputs a step. The start is what the rounding gave, with W as near to the
float weight as its codes allow (`fake.begin`). Departures: the result is what the rounding gave where that is better on all
inputs; there is no validation set. Rates are theirs: scales and zeros 1e-4, weights 1e-5 (they take 2e-5 at 2 bits); the rate
falls linearly.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from qjax.qtensor import QTensor
from qjax.refining.block import Block, BlockInfo
from qjax.refining.fake import FakeWeight, begin, finished


def block_ap(
    block: Block, start: Mapping[str, QTensor], *, steps: int = 200, rate: float = 1e-4, weight_rate: float = 1e-5
) -> tuple[dict[str, QTensor], BlockInfo]:
    """The block's QTensors after training, and its loss before and after.

    steps: of a batch each. rate: of scales and zeros; weight_rate: of weights. Raises QjaxError for formats without a grid.
    """
    trained = {path: begin(q, block.sites[path].weight) for path, q in start.items()}
    optimizer = optax.adamw(lambda count: 1.0 - count / steps, b2=0.999, weight_decay=0.0)
    state = optimizer.init(trained)

    @jax.jit
    def step(trained, state, args, target, weights):
        gradient = jax.grad(lambda trained: _loss(block, _values(trained), args, target, weights))(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, _at_rates(updates, rate, weight_rate)), state

    measure = jax.jit(lambda weights, *batch: _loss(block, weights, *batch))
    batches = list(zip(block.inputs, block.targets, block.token_weights, strict=True))
    for number in range(steps):
        trained, state = step(trained, state, *batches[number % len(batches)])
    result = {path: finished(fake) for path, fake in trained.items()}
    before, after = (sum(measure(weights, *batch) for batch in batches) / len(batches) for weights in (dict(start), result))
    return (result, BlockInfo(before, after)) if after < before else (dict(start), BlockInfo(before, before))


def _values(trained: Mapping[str, FakeWeight]) -> dict[str, Array]:
    return {path: fake.values() for path, fake in trained.items()}


def _at_rates(updates: Mapping[str, FakeWeight], rate: float, weight_rate: float) -> dict[str, FakeWeight]:
    """AdamW's updates at a rate of 1, times those of weights and of scales and zeros."""
    return {
        path: FakeWeight(
            each.weight * weight_rate,
            each.scale * rate,
            None if each.zero is None else each.zero * rate,
            each.format,
            each.normalised,
        )
        for path, each in updates.items()
    }


def _loss(block: Block, weights: Mapping[str, object], args: tuple, target: Array, counted: Array | None) -> Array:
    """Mean squared error over the tokens that count."""
    errors = jnp.mean(jnp.square(block.apply(weights, *args) - target), axis=-1)
    return errors.mean() if counted is None else jnp.sum(errors * counted) / jnp.maximum(jnp.sum(counted), 1)
