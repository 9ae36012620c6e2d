"""What positions do in attention: rotary angles of a configuration and the rotation (Su et al. 2021, arXiv 2104.09864), and
linear biases of scores (ALiBi, Press et al. 2021, 2108.12409).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.config import DecoderConfig
from qjax.models.scalings import DynamicScaling, LinearScaling, Llama3Scaling, LongScaling, YarnScaling


def rope_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Angular frequency of each rotated pair, radians per position, after the config's scaling; float32.

    A constant of the model, found in float64 on the host: accelerators approximate powers, and positions multiply the error.
    """
    return _scaled_frequencies(config).astype(np.float32)


def _scaled_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    half = config.rotary_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    match config.rope_scaling:
        case None | DynamicScaling():  # the latter stretches nothing within the model's context
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling(factor, low, high, original):
            turns = original * frequencies / (2 * math.pi)  # full turns within the original context
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: fast pairs stay; 0: slow pairs are stretched
            return frequencies * (keep + (1 - keep) / factor)
        case YarnScaling(factor=factor) as yarn:
            keep = _kept_by_yarn(yarn, config.rope_theta, half)
            return frequencies * (keep + (1 - keep) / factor)
        case LongScaling(short=factors):
            return frequencies / np.asarray(factors, np.float64)


def _kept_by_yarn(yarn: YarnScaling, theta: float, half: int) -> Float[np.ndarray, " half"]:
    """How much of each pair's own frequency stays: a ramp between the pairs that make so many turns in the original context."""

    def pair(turns: float) -> float:
        return half * math.log(yarn.original_context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair(yarn.fast_turns), pair(yarn.slow_turns)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    return 1 - np.clip((np.arange(half) - low) / (high - low if high != low else 0.001), 0.0, 1.0)


def rope_amplitude(config: DecoderConfig) -> float:
    """What cosines and sines are multiplied by."""
    scaling = config.rope_scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling | LongScaling) else 1.0


def cos_sin(config: DecoderConfig, positions: Int[Array, "*batch time"]) -> tuple[Array, Array]:
    """Cosines and sines (*batch, time, half) of positions, float32."""
    angles = positions[..., None] * rope_frequencies(config)
    cos, sin, amplitude = jnp.cos(angles), jnp.sin(angles), rope_amplitude(config)
    return (cos, sin) if amplitude == 1 else (cos * amplitude, sin * amplitude)


def fixed_cos_sin(config: DecoderConfig, time: int) -> tuple[Array, Array]:
    """`cos_sin` of positions 0, 1, ..., constants of a program: XLA's CPU backend would compute them again for every head."""
    with jax.ensure_compile_time_eval():
        return _tables(config, jnp.arange(time))


_tables = jax.jit(cos_sin, static_argnums=0)


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


def rotate_neighbours(
    x: Float[Array, "batch time heads dim"], cos: Float[Array, "*batch time half"], sin: Float[Array, "*batch time half"]
) -> Float[Array, "batch time heads dim"]:
    """`rotate` of pairs (x[2 i], x[2 i + 1])."""
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    pairs = turned.reshape(*turned.shape[:-1], -1, 2)
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = pairs[..., 0], pairs[..., 1]
    pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(turned.shape), rest], axis=-1)


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """2 ** (-8 i / n) of heads i = 1 ... n, n a power of two; heads beyond it have every other slope of twice as many."""
    power = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    further = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power) + 1, 2))
    return np.concatenate([first, further]).astype(np.float32)


def alibi(
    config: DecoderConfig, queries: Int[Array, "*batch time"], keys: Int[Array, "*batch keys"]
) -> Float[Array, "*batch kv_heads group time keys"]:
    """What is added to scores: the slope of each head times how far a key stands behind the query, negative.

    As Falcon has it ("alibi_scaled"), slope and the key's position are rounded to bfloat16, as is their product, which is added
    before scores are scaled; a query's own position, which softmax does not see, is left out.
    """
    slopes = jnp.asarray(alibi_slopes(config.heads)).reshape(config.kv_heads, -1, 1, 1)
    if config.positions == "alibi":
        return slopes * (keys[..., None, :] - queries[..., None])[..., None, None, :, :]
    rounded = _bfloat16(_bfloat16(slopes) * _bfloat16(keys.astype(jnp.float32))[..., None, None, None, :])
    return jnp.broadcast_to(rounded * config.head_dim**-0.5, (*rounded.shape[:-2], queries.shape[-1], keys.shape[-1]))


def _bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounded to bfloat16, in float32; a compiler may skip a cast there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
