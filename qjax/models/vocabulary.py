"""Likelihoods of target tokens, of which all logits are never held: the vocabulary goes by a piece at a time.

    ln p(t) = l_t - L,   L = m + ln(sum over pieces of sum_v exp(l_v - m)),   m the largest logit so far

The running sum is scaled as m grows (Milakov and Gimelshein 2018, arXiv 1805.02867). A piece is the head of a model of fewer
words.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from qjax.interception.linen import quantized_kernels
from qjax.linear import is_quantized
from qjax.models.decoder import Head


class Targets(NamedTuple):
    """Of target tokens, float32: their logits and the log-sum-exp of all; and the likeliest tokens, 0 where nobody asks."""

    logit: Float[Array, " tokens"]
    total: Float[Array, " tokens"]
    likeliest: Int[Array, " tokens"]


def in_pieces(head: PyTree) -> bool:
    """Whether a head's words can be taken a piece at a time, of its parameters: not of what stands for a kernel."""
    return not any(map(is_quantized, jax.tree.leaves(head, is_leaf=is_quantized)))


def over_pieces(
    head: Head,
    params: PyTree,
    x: Float[Array, "tokens hidden"],
    table: Float[Array, "vocabulary hidden"] | None,
    targets: Int[Array, " tokens"],
    *,
    words: int,
    likeliest: bool = False,
) -> Targets:
    """The targets by logits of `words` words at a time. table: of a tied head. Logits are finite, or -inf."""
    vocabulary = head.config.vocabulary_size

    def step(carry, start, count):
        largest, total, logit, best = carry
        logits = _logits(head, params, x, table, start, count)
        top = jnp.maximum(largest, jnp.max(logits, axis=-1))
        total = total * jnp.exp(largest - top) + jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        place = targets - start
        found = jnp.take_along_axis(logits, jnp.clip(place, 0, count - 1)[:, None], axis=-1)[:, 0]
        logit = jnp.where((place >= 0) & (place < count), found, logit)
        if likeliest:
            best = jnp.where(top > largest, start + jnp.argmax(logits, axis=-1), best)
        return top, total, logit, best

    zeros = jnp.zeros(len(x), jnp.float32)
    carry = (jnp.full_like(zeros, jnp.finfo(jnp.float32).min), zeros, zeros, jnp.zeros_like(targets))
    whole, rest = divmod(vocabulary, words)
    carry = jax.lax.fori_loop(0, whole, lambda number, carry: step(carry, number * words, words), carry)
    largest, total, logit, best = step(carry, whole * words, rest) if rest else carry
    return Targets(logit, largest + jnp.log(total), best)


def _logits(head: Head, params: PyTree, x, table, start, count: int) -> Float[Array, "tokens count"]:
    """Logits of the words from `start` on."""

    def piece(array, axis):
        return jax.lax.dynamic_slice_in_dim(array, start, count, axis)

    config = dataclasses.replace(head.config, vocabulary_size=count)
    output = {name: piece(array, array.ndim - 1) for name, array in params.get("output", {}).items()}
    held = {**params, **({"output": output} if output else {})}
    with quantized_kernels(head.products):
        module = Head(config, head.dtype, head.products)
        return module.apply({"params": held}, x[None], None if table is None else piece(table, 0))[0]
