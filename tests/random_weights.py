"""Models with random parameters, made without compiling anything: for tests that move weights rather than run them."""

import jax.numpy as jnp
import numpy as np

from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.models.parameters import parameter_shapes, unflatten


def weights_model(config: DecoderConfig, tokenizer=None, seed: int = 0, dtype=jnp.float32) -> Model:
    """A model whose parameters are normal random numbers of the given type."""
    generator = np.random.default_rng(seed)
    shapes = parameter_shapes(config)
    leaves = {path: jnp.asarray(generator.standard_normal(shape, np.float32), dtype) for path, shape in shapes.items()}
    return Model(config, unflatten(leaves), tokenizer, "random")


def small_model(config: DecoderConfig, tokenizer=None, seed: int = 0, dtype=jnp.float32) -> Model:
    """A model that computes something sensible: kernels that keep the size of what they are given, biases of 0.1, and norms
    whose channels differ as much as those of trained models.
    """
    generator = np.random.default_rng(seed)
    leaves = {}
    for path, shape in parameter_shapes(config).items():
        values = generator.standard_normal(shape)
        size = shape[-2] ** -0.5 if path.endswith("kernel") else 1.0 if path.endswith("embedding") else 0.1
        scales = np.exp(0.7 * values)
        found = scales if path.endswith("scale") else scales - 1 if path.endswith("offset") else values * size
        leaves[path] = jnp.asarray(found, dtype)
    return Model(config, unflatten(leaves), tokenizer, "random")
