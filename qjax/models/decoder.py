"""The stages of a config-driven decoder in Flax Linen: embed -> block (repeated) -> head; `walk.py` puts them together.

The three stages are separate modules so that each can be compiled once and reused: all blocks have equal shapes, so a
model of any depth costs one block's compilation, and quantization holds one block in memory at a time.

    block:  x <- x + o(attention(q(n), k(n), v(n))),  n = norm(x)
            x <- x + down(activation(gate(m)) * up(m)),  m = norm(x)        (gated; else down(activation(up(m))))
    or, with a parallel residual, both at once: m = norm(x) of the x before attention

Vaswani et al. 2017 (arXiv 1706.03762); Llama: Touvron et al. 2023 (2302.13971); rotary positions: Su et al. 2021
(2104.09864), in Hugging Face's half-split order; grouped queries: Ainslie et al. 2023 (2305.13245); parallel residual and
partly rotated heads: GPT-NeoX, Black et al. 2022 (2204.06745); norms by 1 + offset: Gemma (2403.08295).
Every linear layer is an `nn.Dense` whose kernel is (in, out), so `interception/` serves it as it does any user's model.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qjax.models.config import DecoderConfig, LinearScaling, Llama3Scaling
from qjax.models.layout import Cache, Layout

QUERY_PIECES = 4  # of a sequence: a piece leaves out the keys after it, five eighths of all scores are left
SMALLEST_PIECE = 64  # queries
ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}


def rope_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Angular frequency of each rotated pair, radians per position, after the config's scaling; float32.

    A constant of the model, found in float64 on the host: accelerators approximate powers, and positions multiply the error.
    """
    return _scaled_frequencies(config).astype(np.float32)


def _scaled_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    half = config.rotary_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling(factor, low, high, original):
            turns = original * frequencies / (2 * math.pi)  # full turns within the original context
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: fast pairs stay; 0: slow pairs are stretched
            return frequencies * (keep + (1 - keep) / factor)


def rotate(
    x: Float[Array, "batch time heads dim"], cos: Float[Array, "*batch time half"], sin: Float[Array, "*batch time half"]
) -> Float[Array, "batch time heads dim"]:
    """Rotates pairs (x[i], x[i + half]) by each position's angles, which all sequences share or each has its own; features
    behind the pairs stay.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class OffsetRMSNorm(nn.Module):
    """x / rms(x) * (1 + offset) in float32. The offset is a parameter as checkpoints hold it: 1 + offset, rounded to their
    type, would not give it back.
    """

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        offset = self.param("offset", nn.initializers.zeros_init(), x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (1 + offset.astype(jnp.float32))).astype(self.dtype)


def make_norm(config: DecoderConfig, dtype: DTypeLike, name: str) -> nn.Module:
    """The family's normalisation, computed in float32."""
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)
    if config.norm == "rms_offset":
        return OffsetRMSNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)
    return nn.LayerNorm(epsilon=config.norm_epsilon, use_fast_variance=False, dtype=dtype, name=name)


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
        if c.positions == "learned":
            positions = jnp.arange(tokens.shape[1]) if layout is None else layout.positions
            rows = c.context + c.position_offset
            x = x + nn.Embed(rows, c.hidden_size, dtype=self.dtype, name="positions")(positions + c.position_offset)
        return x


def attend(
    q: Float[Array, "batch kv_heads group time dim"],
    k: Float[Array, "batch kv_heads keys dim"],
    v: Float[Array, "batch kv_heads keys dim"],
    visible: Bool[Array, "..."],
) -> Float[Array, "batch kv_heads group time dim"]:
    """Mixtures of v for scaled queries; visible broadcasts against (batch, kv_heads, group, time, keys). Softmax in float32.

    Queries that share a key head stand in one matrix: XLA's CPU matmul is twice as fast on (group * time, dim).
    """
    batch, kv_heads, group, time, dim = q.shape
    scores = jnp.einsum("bkqd,bksd->bkqs", q.reshape(batch, kv_heads, -1, dim), k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores.reshape(batch, kv_heads, group, time, -1), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv_heads, group * time, -1)
    return jnp.einsum("bkqs,bksd->bkqd", weights, v).reshape(q.shape)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads.

    layout: what stands where, if not one sequence a row. cache: keys and values of earlier positions, to which those of x are
    added; the result is then (hidden states, cache).
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time hidden"], layout: Layout | None = None, cache: Cache | None = None
    ) -> Float[Array, "batch time hidden"] | tuple[Float[Array, "batch time hidden"], Cache]:
        c = self.config
        batch, time, _ = x.shape

        def project(heads: int, name: str) -> Float[Array, "batch time heads dim"]:
            y = nn.Dense(heads * c.head_dim, use_bias=c.qkv_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(batch, time, heads, c.head_dim)

        q, k, v = project(c.heads, "q"), project(c.kv_heads, "k"), project(c.kv_heads, "v")
        position = jnp.arange(time) if layout is None else layout.positions
        if c.positions == "rope":
            angles = position[..., None] * rope_frequencies(c)  # (time, half) or (batch, time, half)
            cos, sin = jnp.cos(angles).astype(self.dtype), jnp.sin(angles).astype(self.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        if layout is None:
            distance = position[:, None] - position[None, :]  # (query, key)
            visible = distance >= 0
            if c.sliding_window is not None:
                visible &= distance < c.sliding_window
        else:
            visible = layout.visible[:, None, None]  # (batch, 1, 1, query, key)
        q = (q * c.head_dim**-0.5).reshape(batch, time, c.kv_heads, c.heads // c.kv_heads, c.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (batch, kv_heads, time, dim)
        if cache is not None:
            cache = Cache(_write(cache.keys, k, position[:, 0]), _write(cache.values, v, position[:, 0]))
            k, v = cache.keys, cache.values
        if layout is None:  # no key after the last query of a piece is visible in it
            size = max(-(-time // QUERY_PIECES), SMALLEST_PIECE)
            pieces = [(start, min(start + size, time)) for start in range(0, time, size)]
            parts = [attend(q[..., a:b, :], k[:, :, :b], v[:, :, :b], visible[a:b, :b]) for a, b in pieces]
            mixed = jnp.concatenate(parts, axis=3)
        else:
            mixed = attend(q, k, v, visible)
        mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, -1)
        mixed = nn.Dense(c.hidden_size, use_bias=c.attention_output_bias, dtype=self.dtype, name="o")(mixed)
        return mixed if cache is None else (mixed, cache)


def _write(
    cache: Float[Array, "batch heads capacity dim"], new: Float[Array, "batch heads time dim"], starts: Int[Array, " batch"]
):
    """The cache with new keys or values from each sequence's start on."""
    return jax.vmap(lambda kept, added, start: jax.lax.dynamic_update_slice(kept, added, (0, start, 0)))(cache, new, starts)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where the family has no gate."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        up = nn.Dense(c.mlp_size, use_bias=c.mlp_bias, dtype=self.dtype, name="up")(x)
        if c.gated:
            inner = activation(nn.Dense(c.mlp_size, use_bias=c.mlp_bias, dtype=self.dtype, name="gate")(x)) * up
        else:
            inner = activation(up)
        return nn.Dense(c.hidden_size, use_bias=c.mlp_bias, dtype=self.dtype, name="down")(inner)


HALVES = {"attention": ("attention_norm", "attention"), "mlp": ("mlp_norm", "mlp")}  # of a block, and their modules


class Block(nn.Module):
    """One transformer block on hidden states (batch, time, hidden); layout and cache as in `Attention`.

    half: of HALVES, one residual branch alone; the second after the first is the block, with the same parameters,
    unless the branches are parallel.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    half: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time hidden"], layout: Layout | None = None, cache: Cache | None = None
    ) -> Float[Array, "batch time hidden"] | tuple[Float[Array, "batch time hidden"], Cache]:
        c = self.config
        before = x
        if self.half != "mlp":
            mixed = Attention(c, self.dtype, name="attention")(make_norm(c, self.dtype, "attention_norm")(x), layout, cache)
            mixed, cache = mixed if cache is not None else (mixed, None)
            x = x + mixed
        if self.half != "attention":
            inner = before if c.parallel_residual else x
            x = x + MLP(c, self.dtype, name="mlp")(make_norm(c, self.dtype, "mlp_norm")(inner))
        return x if cache is None else (x, cache)


class Head(nn.Module):
    """Hidden states -> float32 logits (batch, time, vocabulary); `table` is the embedding (vocabulary, hidden) when tied."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time hidden"], table: Float[Array, "vocabulary hidden"] | None = None
    ) -> Float[Array, "batch time vocabulary"]:
        c = self.config
        x = make_norm(c, self.dtype, "norm")(x)
        if c.tied:
            return jnp.einsum("btd,vd->btv", x, table.astype(self.dtype), preferred_element_type=jnp.float32)
        output = nn.Dense(c.vocabulary_size, use_bias=False, dtype=self.dtype, name="output")
        return output(x).astype(jnp.float32)
