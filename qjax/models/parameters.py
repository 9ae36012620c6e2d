"""The parameters of a decoder as a flat table of paths: which there are, and of what shape."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import PyTree

from qjax.errors import QjaxError
from qjax.files import listing
from qjax.lazy import is_array, map_lazily
from qjax.linear import Table, dequantize, is_quantized
from qjax.models.config import DecoderConfig
from qjax.models.walk import parts


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by its path, for example "block_0/attention/q/kernel": (in, out); nothing is computed."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    hidden = jax.ShapeDtypeStruct((1, 1, config.hidden_size), jnp.float32)
    table = jax.ShapeDtypeStruct((config.vocabulary_size, config.hidden_size), jnp.float32)
    arguments = {"embed": (jax.ShapeDtypeStruct((1, 1), jnp.int32),), "block": (hidden,), "head": (hidden, table)}
    initialised = functools.cache(lambda module, kind: jax.eval_shape(module.init, key, *arguments[kind])["params"])
    tree = {part.name: initialised(part.module, part.kind) for part in parts(config)}  # equal blocks are traced once
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def flatten(params: PyTree) -> dict[str, object]:
    """Leaves (arrays, and what stands for them) of nested dicts by their path."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, object]) -> PyTree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def with_plain_tables(leaves: Mapping[str, object], dtype: DTypeLike = np.float32) -> dict[str, object]:
    """The leaves with tables of embeddings in floating point; those that are lazy stay so."""
    decoded = functools.partial(dequantize, dtype=dtype)
    plain = functools.partial(map_lazily, decoded, dtype=np.dtype(dtype), is_leaf=is_quantized)
    return {path: plain(leaf) if isinstance(leaf, Table) else leaf for path, leaf in leaves.items()}


def check_parameters(leaves: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises QjaxError unless the leaves are the arrays, and what stands for them, of these shapes, that a decoder has."""
    problems = [f"missing {path}" for path in shapes if path not in leaves]
    problems += [f"unexpected {path}" for path in leaves if path not in shapes]
    for path, leaf in leaves.items():
        if not is_quantized(leaf) and not is_array(leaf):
            problems.append(f"{path} is a {type(leaf).__name__}, which has no place in a file")
        elif path in shapes and leaf.shape != shapes[path]:
            problems.append(f"{path} has shape {leaf.shape}, expected {shapes[path]}")
    if problems:
        raise QjaxError(f"the parameters do not fit the configuration: {listing(problems)}")
