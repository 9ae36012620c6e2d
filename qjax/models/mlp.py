"""The MLP of a decoder's block, and the functions between its layers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qjax.models.config import DecoderConfig

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}
LIMIT, SLOPE = 7.0, 1.702  # of swiglu_oai


def gated(activation: str, gate: Float[Array, "*batch mlp"], up: Float[Array, "*batch mlp"]) -> Float[Array, "*batch mlp"]:
    """What a gated MLP gives its last layer: activation(gate) * up. swiglu_oai is g sigmoid(1.702 g) (u + 1) with g = min(gate,
    7) and u = up within -7 and 7 (gpt-oss: OpenAI 2025, arXiv 2508.10925).
    """
    if activation != "swiglu_oai":
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    return gate * nn.sigmoid(SLOPE * gate) * (up + 1)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where the family has no gate."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        c = self.config
        up = nn.Dense(c.mlp_size, use_bias=c.mlp_bias, dtype=self.dtype, name="up")(x)
        if c.gated:
            inner = gated(c.activation, nn.Dense(c.mlp_size, use_bias=c.mlp_bias, dtype=self.dtype, name="gate")(x), up)
        else:
            inner = ACTIVATIONS[c.activation](up)
        return nn.Dense(c.hidden_size, use_bias=c.mlp_bias, dtype=self.dtype, name="down")(inner)
