"""Next-token pretraining of a decoder: pure functions around one jitted step.

    minimise  -mean_t log p(token_t+1 | tokens_<=t)

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), decay on matrices only, gradients clipped by their global norm; the
learning rate warms up linearly and then falls linearly to zero, the best schedule at 20 and more tokens per parameter
(Bergsma et al. 2025, arXiv 2502.15938); an undecayed model hides what rounding does.

A batch is a function of (seed, step) alone, and the state holds everything else, so a run resumed from a checkpoint
continues bit for bit. A step splits its batch over the given devices and, within a device, over micro-batches: on 2 cores
two one-thread devices with small micro-batches are 1.2 times as fast as one two-thread device, and that is 3 times as fast
as no micro-batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qjax.errors import QjaxError
from qjax.models.config import DecoderConfig
from qjax.models.walk import Decoder, block_name
from qjax.train.loop import TrainState, checkpoints, gradient_over, mesh_of, save
from qjax.train.loop import restore_latest as restore_state

__all__ = ["TrainState", "checkpoints", "save"]  # used with what is here


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a run, given its tokens."""

    model: DecoderConfig
    steps: int
    batch: int = 32  # sequences a step, each of the model's context
    micro_batch: int = 2  # sequences in memory at a time, per device
    peak_learning_rate: float = 4e-3
    warmup_fraction: float = 0.02
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or self.batch % self.micro_batch:
            raise QjaxError(
                f"training: got steps={self.steps}, batch={self.batch}, micro_batch={self.micro_batch}; "
                "expected steps >= 1 and a batch that micro_batch divides"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.model.context


def learning_rate(config: PretrainConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Linear warm-up over `warmup_fraction` of the steps, then linear decay that would reach zero one step after the last."""
    warmup = max(1, round(config.warmup_fraction * config.steps))
    rising = (step + 1) / warmup
    falling = (config.steps - step) / max(1, config.steps - warmup)
    return config.peak_learning_rate * jnp.minimum(1.0, jnp.minimum(rising, falling))


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW whose weight decay leaves norms and biases alone."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: learning_rate(config, count),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def init_state(config: PretrainConfig) -> TrainState:
    """Random parameters (float32) and a fresh optimizer state.

    Flax's initial kernels, but the embedding table is normal with deviation 0.05 (it is the tied head too: logits start small)
    and the two layers of a block that write to the residual stream are divided by sqrt(2 layers) (GPT-2).
    """
    model = config.model
    key, table_key = jax.random.split(jax.random.key(config.seed))
    params = Decoder(model).init(key, jnp.zeros((1, 2), jnp.int32))["params"]
    table = params["embed"]["tokens"]["embedding"]
    params["embed"]["tokens"]["embedding"] = 0.05 * jax.random.normal(table_key, table.shape, table.dtype)
    for i in range(model.layers):
        for layer in (params[block_name(i)]["attention"]["o"], params[block_name(i)]["mlp"]["down"]):
            layer["kernel"] = layer["kernel"] / math.sqrt(2 * model.layers)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params))


def loss(model: DecoderConfig, params: Any, tokens: Int[Array, "batch time_plus_1"]) -> Float[Array, ""]:
    """Mean negative log-likelihood of tokens[:, 1:], in nats per token."""
    logits = Decoder(model).apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_step(
    config: PretrainConfig, devices: int = 1
) -> Callable[[TrainState, Int[Array, "batch time_plus_1"]], tuple[TrainState, Float[Array, ""]]]:
    """The jitted step (state, tokens) -> (state, loss); the state's buffers are donated.

    Raises QjaxError when `devices` do not exist or do not divide the batch into whole micro-batches.
    """
    mesh = mesh_of(devices, config.batch, config.micro_batch)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    optimizer = make_optimizer(config)
    gradient = gradient_over(mesh, lambda params, _, part: loss(config.model, params, part), config.micro_batch)

    def step(state: TrainState, tokens: Array) -> tuple[TrainState, Array]:
        value, gradients = gradient(state.params, None, tokens)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), value

    return jax.jit(step, donate_argnums=0, in_shardings=(whole, split), out_shardings=whole)


def batch_at(tokens: Int[np.ndarray, " length"], config: PretrainConfig, step: int) -> Int[np.ndarray, "batch time_plus_1"]:
    """The batch of one step: windows at random places of the token stream, decided by (seed, step)."""
    width = config.model.context + 1
    if len(tokens) < width:
        raise QjaxError(f"training text: got {len(tokens)} tokens, expected at least the context + 1 = {width}")
    starts = np.random.default_rng([config.seed, step]).integers(0, len(tokens) - width + 1, config.batch)
    return tokens[starts[:, None] + np.arange(width)].astype(np.int32)


def restore_latest(manager: Any, config: PretrainConfig) -> TrainState:
    """The latest state, bit for bit, or a fresh one where there is no checkpoint."""
    return restore_state(manager, init_state(config))
