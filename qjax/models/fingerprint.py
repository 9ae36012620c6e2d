"""What a model is, as a few digits: figures of models with equal fingerprints may be compared."""

import dataclasses
import hashlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from qjax.activations import Activation
from qjax.formats import Format
from qjax.lazy import is_array
from qjax.linear import is_quantized
from qjax.models.model import Model


def model_fingerprint(model: Model) -> str:
    """Digest of a model's configuration, vocabulary and every parameter's path, type, shape and bytes; of a quantized one also
    of all that it is besides its arrays.
    """
    total = hashlib.sha256(repr(model.config).encode())
    if model.tokenizer is not None:
        total.update(model.tokenizer.to_json().encode())
    for path, leaf in sorted(flatten_dict(model.params, sep="/").items()):
        if is_quantized(leaf):
            total.update(f"{path} {_kind(leaf)}".encode())
        for array in jax.tree.leaves(leaf):
            total.update(f"{path} {array.dtype} {array.shape}".encode())
            total.update(np.asarray(array).tobytes())
    return total.hexdigest()[:16]


def _kind(part: object) -> str:
    """A leaf without its arrays: its classes, formats and static fields. What is None is left out, so that a field added later
    changes nothing where it is not used.
    """
    if is_array(part):
        return ""
    if isinstance(part, tuple):
        return f"({','.join(map(_kind, part))})"
    if not dataclasses.is_dataclass(part) or isinstance(part, Format | Activation):
        return str(part)
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    inside = ",".join(f"{name}={_kind(value)}" for name, value in values.items() if value is not None)
    return f"{type(part).__name__}({inside})"
