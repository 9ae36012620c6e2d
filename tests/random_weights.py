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
