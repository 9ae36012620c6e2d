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
