"""Rotary positions: the angles of a configuration, and the rotation (Su et al. 2021, arXiv 2104.09864)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.models.config import DecoderConfig
from qjax.models.scalings import LinearScaling, Llama3Scaling


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
