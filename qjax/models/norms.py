"""The normalisations of a decoder, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qjax.models.config import DecoderConfig


class OffsetRMSNorm(nn.Module):
    """x / rms(x) * (1 + offset) in float32. The offset is a parameter as checkpoints hold it: 1 + offset, rounded to their
    type, would not give it back (Gemma, arXiv 2403.08295).
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
    """The family's normalisation of the last axis."""
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)
    if config.norm == "rms_offset":
        return OffsetRMSNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)
    bias = config.norm == "layer"
    return nn.LayerNorm(epsilon=config.norm_epsilon, use_bias=bias, use_fast_variance=False, dtype=dtype, name=name)


def make_head_norm(config: DecoderConfig, dtype: DTypeLike, name: str) -> nn.Module:
    """The same of each head (..., heads, dim), with a scale for each of them; of layer norms alone."""
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        use_bias=False,
        feature_axes=(-2, -1),
        reduction_axes=-1,
        use_fast_variance=False,
        dtype=dtype,
        name=name,
    )
