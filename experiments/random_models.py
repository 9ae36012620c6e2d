"""Llamas with random weights, by their number of parameters: for what costs the same whatever the weights are."""

import functools

import jax
import jax.numpy as jnp

import qjax
from qjax.models.parameters import parameter_shapes, unflatten

SIZES = {  # name: hidden, mlp, layers, heads, key/value heads, vocabulary
    "1M": (128, 384, 6, 4, 2, 1024),
    "15M": (288, 768, 6, 6, 6, 32000),
    "1B": (2048, 8192, 16, 32, 8, 32768),
}


def configuration(name: str, context: int = 1024) -> qjax.DecoderConfig:
    """A tied Llama of one of the sizes."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[name]
    return qjax.DecoderConfig(
        "llama", vocabulary, hidden, mlp, layers, heads, kv_heads, hidden // heads, context, tied=True, eos_id=0
    )


def random_model(config: qjax.DecoderConfig, name: str, dtype=jnp.float32) -> qjax.Model:
    """Kernels that keep the size of what they are given, norms of one; made on the device, a leaf at a time."""
    shapes = parameter_shapes(config)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    leaves = {path: _leaf(path, key, shape, dtype) for key, (path, shape) in zip(keys, shapes.items(), strict=True)}
    return qjax.Model(config, unflatten(leaves), None, f"random-{name}")


def _leaf(path: str, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    if path.endswith("scale"):
        return jnp.ones(shape, dtype)
    return _normal(key, shape, jnp.dtype(dtype), shape[-2] ** -0.5 if path.endswith("kernel") else 0.02)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, dtype, size):
    return (jax.random.normal(key, shape) * size).astype(dtype)
