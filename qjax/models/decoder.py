"""The stages of a config-driven decoder in Flax Linen: embed -> block (repeated) -> head; `walk.py` puts them together.

The three stages are separate modules so that each can be compiled once and reused: all blocks of one kind have equal shapes,
so a model of any depth costs a block's compilation for each kind, and quantization holds one block in memory at a time.

    block:  x <- x + o(attention(q(n), k(n), v(n))),  n = norm(x)
            x <- x + down(activation(gate(m)) * up(m)),  m = norm(x)        (gated; else down(activation(up(m))))
    or, with a parallel residual, both at once: m = norm(x) of the x before attention, or m = n. A norm may also stand behind
    a branch, with the one before it or instead of it, and a mixture of experts in the MLP's place (`mixture.py`).

Vaswani et al. 2017 (arXiv 1706.03762); Llama: Touvron et al. 2023 (2302.13971); parallel residual and partly rotated heads:
GPT-NeoX, Black et al. 2022 (2204.06745); norms on both sides, soft caps: Gemma 2 (2408.00118); norms behind: OLMo 2
(2501.00656).
Every linear layer is an `nn.Dense` whose kernel is (in, out), so `interception/` serves it as it does any user's model.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax.linear import Table, apply_linear
from qjax.models.attention import Attention, softcapped
from qjax.models.config import DecoderConfig
from qjax.models.layout import Cache, Layout
from qjax.models.mixture import Mixture
from qjax.models.mlp import MLP
from qjax.models.norms import make_norm


class Embed(nn.Module):
    """Tokens (batch, time) -> hidden states (batch, time, hidden), with learned positions where the family has them."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch time"], layout: Layout | None = None) -> Float[Array, "batch time hidden"]:
        c = self.config
        x = nn.Embed(c.vocabulary_size, c.hidden_size, dtype=self.dtype, name="tokens")(tokens)
        if c.scaled_embeddings:
            x = x * jnp.asarray(math.sqrt(c.hidden_size), self.dtype)
        if c.embedding_scale != 1:
            x = x * c.embedding_scale
        if c.positions == "learned":
            positions = jnp.arange(tokens.shape[1]) if layout is None else layout.positions
            rows = c.context + c.position_offset
            x = x + nn.Embed(rows, c.hidden_size, dtype=self.dtype, name="positions")(positions + c.position_offset)
        return make_norm(c, self.dtype, "norm")(x) if c.embedding_norm else x


def branches(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The residual branches of a block, its halves, and the modules of each."""
    before = {"attention": ("attention_norm",), "mlp": () if config.shared_norm else ("mlp_norm",)}
    places = config.norm_places
    return {
        name: (*(before[name] if places != "after" else ()), name, *((f"{name}_post_norm",) if places != "before" else ()))
        for name in before
    }


class Block(nn.Module):
    """One transformer block on hidden states (batch, time, hidden); layout and cache as in `Attention`.

    half: of `branches`, one residual branch alone; the second after the first is the block, with the same parameters,
    unless the branches are parallel. products: of what goes into products, where that is not `dtype` (`compute.py`).
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    half: str | None = None
    products: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time hidden"], layout: Layout | None = None, cache: Cache | None = None
    ) -> Float[Array, "batch time hidden"] | tuple[Float[Array, "batch time hidden"], Cache]:
        c = self.config
        before = x
        if self.half != "mlp":
            read = self.normed(x, "attention_norm")
            mixed = Attention(c, self.dtype, self.products, name="attention")(read, layout, cache)
            mixed, cache = mixed if cache is not None else (mixed, None)
            x = x + self.added(mixed, "attention")
        if self.half != "attention":
            if not c.shared_norm:
                read = self.normed(before if c.parallel_residual else x, "mlp_norm")
            mlp = Mixture(c, self.dtype, self.products, name="mlp") if c.experts else MLP(c, self.dtype, name="mlp")
            x = x + self.added(mlp(read), "mlp")
        return x if cache is None else (x, cache)

    def normed(self, x: Float[Array, "batch time hidden"], name: str) -> Float[Array, "batch time hidden"]:
        """What a branch reads."""
        return x if self.config.norm_places == "after" else make_norm(self.config, self.dtype, name)(x)

    def added(self, branch: Float[Array, "batch time hidden"], name: str) -> Float[Array, "batch time hidden"]:
        """What the block adds to its input, of a branch's output."""
        c = self.config
        if c.norm_places != "before":
            branch = make_norm(c, self.dtype, f"{name}_post_norm")(branch)
        return branch if c.residual_scale == 1 else branch * c.residual_scale


class Head(nn.Module):
    """Hidden states -> float32 logits (batch, time, vocabulary); `table` is the embedding (vocabulary, hidden) when tied, which
    may be quantized.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    products: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time hidden"], table: Float[Array, "vocabulary hidden"] | Table | None = None
    ) -> Float[Array, "batch time vocabulary"]:
        c = self.config
        x = make_norm(c, self.dtype, "norm")(x)
        if isinstance(table, Table):
            logits = apply_linear(x, table.weight).astype(jnp.float32)
        elif c.tied:
            x, table = (each.astype(self.products or self.dtype) for each in (x, table))
            logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        else:
            output = nn.Dense(c.vocabulary_size, use_bias=c.head_bias, dtype=self.dtype, name="output")
            logits = output(x).astype(jnp.float32)
        return softcapped(logits if c.logit_scale == 1 else logits * c.logit_scale, c.logit_softcap)


def products_of(module: nn.Module) -> DTypeLike | None:
    """What a part of a decoder casts to before it multiplies; None for others, which may have a field of that name."""
    return module.products if isinstance(module, Block | Head) else None
