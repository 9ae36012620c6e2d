"""Outliers put into a model that has none: some inputs of its layers become large, and it computes the same.

A norm's scale (and bias) is multiplied by a factor in a few channels, and the rows of the layers that read it are divided by
it, as large models come to have by themselves (Dettmers et al. 2022, arXiv 2208.07339): the same channels in every block. So
a small model shows what rounding the inputs of a large one costs.
"""

from numbers import Integral, Real

import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.lazy import materialised
from qjax.linear import is_quantized
from qjax.maps import LARGEST, Divide
from qjax.models.folding import Fold, fold_map, folds
from qjax.models.model import Model, require_model
from qjax.models.parameters import flatten, unflatten, with_plain_tables
from qjax.models.walk import block_name


def inject_outliers(model: Model, factor: float = 40.0, channels: int = 4, *, seed: int = 0) -> Model:
    """The model with `channels` channels of what its norms make `factor` times as large; seed: of which channels.

    Changed parameters are float32; the name says so. Raises QjaxError for a factor beyond `maps.LARGEST`, more channels than
    there are, a quantized model, and one in which no norm feeds linear layers alone.
    """
    require_model("inject_outliers", model)
    config = model.config
    counts = isinstance(factor, Real) and isinstance(channels, Integral) and bool not in (type(factor), type(channels))
    if not counts or not 1 / LARGEST <= factor <= LARGEST or not 1 <= channels <= config.hidden_size:
        raise QjaxError(
            f"inject_outliers: factor {factor!r}, channels {channels!r}; expected a factor of {1 / LARGEST:g} to {LARGEST:g} "
            f"and 1 to {config.hidden_size} channels"
        )
    leaves = with_plain_tables(flatten(materialised(model.params)))
    if any(map(is_quantized, leaves.values())):
        raise QjaxError(f"inject_outliers: {model.name} is quantized ({model.recipe}); start from the unquantized model")
    places = np.random.default_rng(seed).choice(config.hidden_size, channels, replace=False)
    divide = Divide(jnp.ones(config.hidden_size, jnp.float32).at[jnp.asarray(places)].set(1 / factor))
    changed = 0
    for number in range(config.layers):
        prefix = f"{block_name(number)}/"
        block = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
        for fold in filter(_of_a_norm, folds(config.of_layer(number))):
            found = fold_map(block, fold, divide)
            block |= found
            changed += len(found)
        leaves |= {prefix + path: leaf for path, leaf in block.items()}
    if not changed:
        raise QjaxError(
            f"inject_outliers: in no block of the family {config.family!r} does a norm feed one set of linear layers alone; "
            "take a model of another family"
        )
    return model._replace(params=unflatten(leaves), name=f"{model.name}-outliers")


def _of_a_norm(fold: Fold) -> bool:
    return fold.source.endswith("_norm")
