"""A mixture of experts in the MLP's place: each token goes through the few experts that a router chooses for it.

    p = softmax(x R);   y = sum over the k largest p_e of p_e MLP_e(x)     (divided by the sum of these p_e, where the family
                                                                            does so: a softmax of the chosen alone)

Shazeer et al. 2017 (arXiv 1701.06538); Mixtral: Jiang et al. 2024 (2401.04088). The experts' kernels are stacked, (experts,
in, out), and quantized like any other; the router is a small matrix that decides much, and stays as it is. Every expert
computes all tokens, of which those that are not its own are left out: that wastes time where experts are many.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from qjax.interception.stacked import StackedDense
from qjax.models.config import DecoderConfig
from qjax.models.mlp import gated


class Router(nn.Module):
    """(which tokens each expert is for, the share of its output in each token's), float32; 0 for the others."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens hidden"]) -> tuple[Bool[Array, "experts ..."], Float[Array, "experts ..."]]:
        c = self.config
        matrix = self.param("matrix", nn.initializers.lecun_normal(), (c.hidden_size, c.experts))
        logits = jnp.matmul(x, matrix.astype(self.dtype), preferred_element_type=jnp.float32)
        if c.mlp_bias:
            logits += self.param("bias", nn.initializers.zeros_init(), (c.experts,)).astype(jnp.float32)
        shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), c.experts_per_token)  # (*tokens, k)
        if c.normalised_shares:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        one_hot = chosen[..., None] == jnp.arange(c.experts)  # (*tokens, k, experts)
        of_experts = functools.partial(jnp.moveaxis, source=-1, destination=0)
        return of_experts(jnp.any(one_hot, axis=-2)), of_experts(jnp.sum(shares[..., None] * one_hot, axis=-2))


class Mixture(nn.Module):
    """The sum of the chosen experts' outputs, each a gated MLP."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    products: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        c = self.config
        routed, shares = Router(c, self.dtype, name="router")(x)
        layers = functools.partial(StackedDense, c.experts, use_bias=c.mlp_bias, dtype=self.dtype, products=self.products)
        up = layers(c.mlp_size, name="up")(x, routed)
        inner = gated(c.activation, layers(c.mlp_size, name="gate")(x, routed), up)
        y = layers(c.hidden_size, name="down")(inner, routed)
        return jnp.sum(jnp.where(routed[..., None], shares[..., None].astype(y.dtype) * y, 0), axis=0)
