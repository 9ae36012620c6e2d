"""What a model is, as a few digits: figures of models with equal fingerprints may be compared."""

import hashlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from qjax.models.model import Model


def model_fingerprint(model: Model) -> str:
    """Digest of a model's configuration, vocabulary and every parameter's path, type, shape and bytes."""
    total = hashlib.sha256(repr(model.config).encode())
    if model.tokenizer is not None:
        total.update(model.tokenizer.to_json().encode())
    for path, leaf in sorted(flatten_dict(model.params, sep="/").items()):
        for array in jax.tree.leaves(leaf):
            total.update(f"{path} {array.dtype} {array.shape}".encode())
            total.update(np.asarray(array).tobytes())
    return total.hexdigest()[:16]
