"""Causal self-attention of a decoder in Flax Linen.

Vaswani et al. 2017 (arXiv 1706.03762); grouped queries: Ainslie et al. 2023 (2305.13245); normalised queries and keys: Henry
et al. 2020 (2010.04245); soft caps of scores: Gemma 2 (2408.00118); sinks: Xiao et al. 2023 (2309.17453), learned as in gpt-oss
(2508.10925). Where the configuration names a cache format, keys and
values are seen as such a cache gives them back (`kv_cache.py`), in generation and elsewhere alike.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from qjax.hadamard import hadamard_transform
from qjax.models import kv_cache
from qjax.models.config import DecoderConfig
from qjax.models.kv_cache import PackedCache, Seen
from qjax.models.layout import Cache, Layout
from qjax.models.norms import make_head_norm, make_norm
from qjax.models.rope import alibi, cos_sin, fixed_cos_sin, rotate, rotate_neighbours

QUERY_PIECES = 4  # of a sequence: a piece leaves out the keys after it, five eighths of all scores are left
SMALLEST_PIECE = 64  # queries


def softcapped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap tanh(x / cap): nothing is beyond the cap; x itself without one."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Float[Array, "batch kv_heads group time dim"],
    k: Float[Array, "batch kv_heads keys dim"],
    v: Float[Array, "batch kv_heads keys dim"],
    visible: Bool[Array, "..."],
    softcap: float | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, "kv_heads group 1 1"] | None = None,
) -> Float[Array, "batch kv_heads group time dim"]:
    """Mixtures of v for scaled queries; visible and the bias, which is added to scores, broadcast against (batch, kv_heads,
    group, time, keys). sinks: a logit of each head that joins the softmax and mixes in no value. Softmax and sums in float32.

    Queries that share a key head stand in one matrix: XLA's CPU matmul is twice as fast on (group * time, dim).
    """
    return _mixed(_weights(_scores(q, k), visible, softcap, bias, sinks, v.dtype), v)


def attend_kept(
    q: Float[Array, "batch kv_heads group time dim"],
    keys: Seen,
    values: Seen,
    visible: Bool[Array, "..."],
    softcap: float | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, "kv_heads group 1 1"] | None = None,
) -> Float[Array, "batch kv_heads group time dim"]:
    """`attend` over keys and values of a quantized cache, each as its query sees it."""
    scores = _scores(q, keys.rounded)
    if keys.exact is not None:
        scores = jnp.where(keys.old, scores, _scores(q, keys.exact))
    weights = _weights(scores, visible, softcap, bias, sinks, values.rounded.dtype)
    if values.exact is None:
        return _mixed(weights, values.rounded)
    parts = (jnp.where(values.old, weights, 0), values.rounded), (jnp.where(values.old, 0, weights), values.exact)
    return sum(_mixed(*part) for part in parts)


def _scores(q, k) -> Float[Array, "batch kv_heads group time keys"]:
    batch, kv_heads, group, time, dim = q.shape
    scores = jnp.einsum("bkqd,bksd->bkqs", q.reshape(batch, kv_heads, -1, dim), k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, kv_heads, group, time, -1)


def _weights(scores, visible, softcap, bias, sinks, dtype) -> Float[Array, "batch kv_heads group time keys"]:
    if softcap is None and bias is None:  # a sum: XLA's CPU backend makes scores, mask, maximum and exp in one pass
        scores = scores + jnp.where(visible, 0, -jnp.inf)
    else:  # there, a sum's last bits differ
        scores = softcapped(scores, softcap)
        scores = jnp.where(visible, scores if bias is None else scores + bias, -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1).astype(dtype)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    weights = jnp.exp(scores - largest)
    return (weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - largest))).astype(dtype)


def _mixed(weights, v) -> Float[Array, "batch kv_heads group time dim"]:
    batch, kv_heads, group, time, keys = weights.shape
    weights = weights.reshape(batch, kv_heads, group * time, keys)
    mixed = jnp.einsum("bkqs,bksd->bkqd", weights, v, preferred_element_type=jnp.float32)
    return mixed.reshape(batch, kv_heads, group, time, -1)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads.

    layout: what stands where, if not one sequence a row. cache: keys and values of earlier positions, to which those of x are
    added, a PackedCache where the configuration names a cache format; the result is then (hidden states, cache). products: of
    queries, keys, values and weights where they are multiplied, if not `dtype`.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    products: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time hidden"], layout: Layout | None = None, cache: Cache | PackedCache | None = None
    ) -> Float[Array, "batch time hidden"] | tuple[Float[Array, "batch time hidden"], Cache | PackedCache]:
        c = self.config
        batch, time, _ = x.shape
        q, k, v = self.project(x, c.heads, "q"), self.project(x, c.kv_heads, "k"), self.project(x, c.kv_heads, "v")
        position = jnp.arange(time) if layout is None else layout.positions
        q, k = self.turned(q, layout), k if self.turns_late else self.turned(k, layout)

        if c.cache is not None and c.cache.hadamard:
            q, k = hadamard_transform(q), hadamard_transform(k)
        if layout is None:
            distance = position[:, None] - position[None, :]  # (query, key)
            visible = distance >= 0
            if c.sliding_window is not None:
                visible &= distance < c.sliding_window
        else:
            visible = layout.seen(c.sliding_window)[:, None, None]  # (batch, 1, 1, query, key)
        keys = position if layout is None else layout.keys
        bias = alibi(c, position, keys) if c.positions in ("alibi", "alibi_scaled") else None
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        q = (q * scale).reshape(batch, time, c.kv_heads, c.heads // c.kv_heads, c.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (batch, kv_heads, time, dim)
        if c.cache is not None:
            k, v, cache = self.seen(k, v, position, keys, layout, cache)
        elif cache is not None:
            k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
            cache = Cache(_write(cache.keys, k, position[:, 0]), _write(cache.values, v, position[:, 0]))
            k, v = cache.keys, cache.values
        q, k, v = self.to_multiply((q, k, v))
        mix, sinks = attend if c.cache is None else attend_kept, self.sink_logits()
        if layout is None:  # no key after the last query of a piece is visible in it
            size = max(-(-time // QUERY_PIECES), SMALLEST_PIECE)
            pieces = [(start, min(start + size, time)) for start in range(0, time, size)]
            biases = [None if bias is None else bias[..., a:b, :b] for a, b in pieces]
            piece = (lambda each, a, b: each[:, :, :b]) if c.cache is None else Seen.piece
            parts = [
                mix(q[..., a:b, :], piece(k, a, b), piece(v, a, b), visible[a:b, :b], c.attention_softcap, each, sinks)
                for (a, b), each in zip(pieces, biases, strict=True)
            ]
            mixed = jnp.concatenate(parts, axis=3)
        else:
            mixed = mix(q, k, v, visible, c.attention_softcap, bias, sinks)
        mixed = mixed.astype(self.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, time, -1)
        mixed = nn.Dense(c.hidden_size, use_bias=c.attention_output_bias, dtype=self.dtype, name="o")(mixed)
        return mixed if cache is None else (mixed, cache)

    def sink_logits(self) -> Float[Array, "kv_heads group 1 1"] | None:
        """The logits of heads that mix in no value, where the family has them."""
        c = self.config
        if not c.attention_sinks:
            return None
        logits = self.param("sinks", nn.initializers.zeros_init(), (c.heads,))
        return logits.astype(jnp.float32).reshape(c.kv_heads, -1, 1, 1)

    def to_multiply(self, arrays: PyTree) -> PyTree:
        """Numbers in the type of products; masks as they are."""
        numbers = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(self.products or x.dtype) if numbers(x) else x, arrays)

    @property
    def turns_late(self) -> bool:
        """Whether keys are kept as they are before the rotary map."""
        return self.config.cache is not None and self.config.cache.keys == "before"

    def turned(
        self, x: Float[Array, "batch time heads dim"], layout: Layout | None, *, places: bool = False
    ) -> Float[Array, "batch time heads dim"]:
        """Queries or keys through the rotary map of their positions, where the family has one; places: x is what is kept."""
        c = self.config
        if c.positions != "rope":
            return x
        tables = fixed_cos_sin(c, x.shape[1]) if layout is None else cos_sin(c, layout.keys if places else layout.positions)
        cos, sin = (each.astype(self.dtype) for each in tables)
        return (rotate_neighbours if c.rope_interleaved else rotate)(x, cos, sin)

    def seen(self, k, v, position, places, layout: Layout | None, cache: PackedCache | None):
        """Keys and values (batch, kv_heads, time, dim) as a quantized cache gives them back, at `places`, and the cache."""
        fmt = self.config.cache
        if cache is None:
            k, v = (kv_cache.simulated(x, fmt, by_channel=by) for x, by in ((k, fmt.group is not None), (v, False)))
        else:
            ends = position[:, -1] + 1 if layout.ends is None else layout.ends
            cache, k, v = kv_cache.add(cache, k, v, position[:, 0], ends)
            k, v = (tuple(x if x is None else x[:, :, : places.shape[1]] for x in both) for both in (k, v))
        if self.turns_late:
            turn = lambda x: self.turned(x.transpose(0, 2, 1, 3), layout, places=True).transpose(0, 2, 1, 3)  # noqa: E731
            k = tuple(x if x is None else turn(x) for x in k)
        if not fmt.residual:
            return Seen(k[0]), Seen(v[0]), cache
        olds = (kv_cache.old(position, places, fmt, by_channel=by) for by in (fmt.group is not None, False))
        olds = olds if layout is None else (each[:, None, None] for each in olds)
        return *(Seen(*each, mask) for each, mask in zip((k, v), olds, strict=True)), cache

    def project(self, x: Float[Array, "batch time hidden"], heads: int, name: str) -> Float[Array, "batch time heads dim"]:
        """Queries, keys or values by head; queries and keys normalised where the family does so."""
        c = self.config
        y = nn.Dense(heads * c.head_dim, use_bias=c.qkv_bias, dtype=self.dtype, name=name)(x)
        norm = "none" if name == "v" else c.qk_norm
        if norm == "width":
            y = make_norm(c, self.dtype, f"{name}_norm")(y)
        y = y.reshape(*x.shape[:2], heads, c.head_dim)
        if norm in ("head", "each_head"):
            y = (make_norm if norm == "head" else make_head_norm)(c, self.dtype, f"{name}_norm")(y)
        return y


def _write(
    cache: Float[Array, "batch heads capacity dim"], new: Float[Array, "batch heads time dim"], starts: Int[Array, " batch"]
):
    """The cache with new keys or values from each sequence's start on."""
    return jax.vmap(lambda kept, added, start: jax.lax.dynamic_update_slice(kept, added, (0, start, 0)))(cache, new, starts)
