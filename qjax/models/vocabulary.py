"""Likelihoods of target tokens and distances of two models, of which all logits are never held: the vocabulary goes by a piece
at a time.

    ln p(t) = l_t - L,   L = m + ln(sum over pieces of sum_v exp(l_v - m)),   m the largest logit so far

The running sums are scaled as m grows (Milakov and Gimelshein 2018, arXiv 1805.02867). A piece is the head of a model of fewer
words.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from qjax.interception.linen import quantized_kernels
from qjax.linear import Table, is_quantized
from qjax.models.decoder import Head, products_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "table"), meta_fields=("module",))
@dataclasses.dataclass(frozen=True)
class BoundHead:
    """A head with its parameters and, where it is tied, the table of embeddings (vocabulary, hidden)."""

    module: Head
    params: PyTree
    table: Float[Array, "vocabulary hidden"] | Table | None

    @property
    def words(self) -> int:
        """Of the vocabulary."""
        return self.module.config.vocabulary_size

    @property
    def in_pieces(self) -> bool:
        """Whether its words can be taken a piece at a time: not of what stands for a kernel."""
        return not any(map(is_quantized, jax.tree.leaves((self.params, self.table), is_leaf=is_quantized)))


class Found(NamedTuple):
    """Of each token, in the words so far: the largest logit, the first word that has it (0 where nobody asks), the sum of
    exp(logit - largest), and the target's logit.
    """

    largest: Float[Array, " tokens"]
    likeliest: Int[Array, " tokens"]
    total: Float[Array, " tokens"]
    logit: Float[Array, " tokens"]

    @property
    def log_sum(self) -> Float[Array, " tokens"]:
        """The log-sum-exp of the logits."""
        return self.largest + jnp.log(self.total)


def words_at_once(head: BoundHead, tokens: int, elements: int) -> int:
    """So many words that their logits are about `elements`, in pieces of one size but the last; all where it has no pieces."""
    pieces = -(-head.words // max(1, elements // tokens)) if head.in_pieces else 1
    return -(-head.words // pieces)


def over_pieces(
    head: BoundHead,
    x: Float[Array, "tokens hidden"],
    targets: Int[Array, " tokens"],
    *,
    words: int,
    likeliest: bool = False,
) -> Found:
    """What is found in all words, by logits of `words` words at a time, which are finite or -inf."""

    def step(found, start, count):
        return _with(found, _logits(head, x, start, count), targets, start, likeliest)

    return _fold(step, _nothing(targets), head.words, words)


@functools.partial(jax.jit, static_argnames="words")
def distances(
    heads: tuple[BoundHead, BoundHead],
    states: tuple[Float[Array, "tokens hidden"], Float[Array, "tokens hidden"]],
    targets: Int[Array, " tokens"],
    *,
    words: int,
) -> Float[Array, "3 tokens"]:
    """KL(P || Q) in nats, whether the likeliest words agree (1 or 0) and Q(target) - P(target), each pair being Q's and P's.

        KL = S / Z_p - ln Z_p + ln Z_q,   S = sum_v exp(p_v') (p_v' - q_v'),   Z_p = sum_v exp(p_v'),   l' = l - its largest

    by logits of `words` words at a time, which are finite or -inf; where P's is -inf a word adds nothing.
    """

    def step(carry, start, count):
        before, gap = carry
        logits = [_logits(head, x, start, count) for head, x in zip(heads, states, strict=True)]
        after = tuple(_with(found, ours, targets, start, True) for found, ours in zip(before, logits, strict=True))
        q, p = (ours - found.largest[:, None] for ours, found in zip(logits, after, strict=True))
        fall_q, fall_p = (old.largest - new.largest for old, new in zip(before, after, strict=True))
        gap = jnp.exp(fall_p) * (gap + before[1].total * (fall_p - fall_q))  # the sum so far, from the new largest logits
        weight = jnp.exp(p)
        return after, gap + jnp.sum(jnp.where(weight > 0, weight * (p - q), 0.0), axis=-1)

    nothing = _nothing(targets)
    (q, p), gap = _fold(step, ((nothing, nothing), nothing.total), heads[0].words, words)
    kl = gap / p.total + jnp.log(q.total) - jnp.log(p.total)
    of_q, of_p = (jnp.exp(found.logit - found.largest) / found.total for found in (q, p))
    return jnp.stack([kl, (q.likeliest == p.likeliest).astype(kl.dtype), of_q - of_p])


def _nothing(targets: Int[Array, " tokens"]) -> Found:
    """Before the first piece."""
    zeros = jnp.zeros(len(targets), jnp.float32)
    return Found(jnp.full_like(zeros, jnp.finfo(jnp.float32).min), jnp.zeros_like(targets), zeros, zeros)


def _with(found: Found, logits: Float[Array, "tokens count"], targets, start, likeliest: bool) -> Found:
    """What is found with a piece more, the logits of words from `start` on."""
    top, count = jnp.max(logits, axis=-1), logits.shape[-1]
    largest = jnp.maximum(found.largest, top)
    total = found.total * jnp.exp(found.largest - largest) + jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
    place = targets - start
    logit = jnp.take_along_axis(logits, jnp.clip(place, 0, count - 1)[:, None], axis=-1)[:, 0]
    best = found.likeliest
    if likeliest:  # XLA's argmax alone takes longer on a CPU than all else
        words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        first = jnp.min(jnp.where(logits == top[:, None], words, count), axis=-1)
        best = jnp.where(largest > found.largest, start + first, best)
    return Found(largest, best, total, jnp.where((place >= 0) & (place < count), logit, found.logit))


def _fold(step: Callable[[PyTree, Int[Array, ""], int], PyTree], carry: PyTree, vocabulary: int, words: int) -> PyTree:
    """carry through step(carry, start, count) for every piece of a vocabulary, of `words` words but for the last."""
    whole, rest = divmod(vocabulary, words)
    carry = jax.lax.fori_loop(0, whole, lambda number, carry: step(carry, number * words, words), carry)
    return step(carry, whole * words, rest) if rest else carry


def _logits(head: BoundHead, x: Float[Array, "tokens hidden"], start, count: int) -> Float[Array, "tokens count"]:
    """Logits of the words from `start` on; where these are all words, of any head."""

    def piece(array, axis):
        return array if count == head.words else jax.lax.dynamic_slice_in_dim(array, start, count, axis)

    module = head.module
    output = {name: piece(array, -1) for name, array in head.params.get("output", {}).items()}
    held = {**head.params, **({"output": output} if output else {})}
    with quantized_kernels(products_of(module)):
        part = Head(dataclasses.replace(module.config, vocabulary_size=count), module.dtype, module.products)
        return part.apply({"params": held}, x[None], None if head.table is None else piece(head.table, 0))[0]
