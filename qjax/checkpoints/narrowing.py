"""Scales of integers in float16, the one type of some files, where that is exact: bfloat16 ones of usual sizes are."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qjax.formats import INTEGERS
from qjax.lazy import materialised
from qjax.linear import Linear
from qjax.qtensor import QTensor


def in_float16(leaf: object) -> object:
    """The leaf with its scales in float16 where they are floats that float16 holds exactly; else itself. Of a lazy leaf the
    scales are read.
    """
    if isinstance(leaf, Linear):
        return dataclasses.replace(leaf, weight=in_float16(leaf.weight))
    if not isinstance(leaf, QTensor) or leaf.format.grid not in INTEGERS or leaf.format.scales not in ("bf16", "fp32"):
        return leaf
    scales = np.asarray(materialised(leaf.scales)).astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = scales.astype(np.float16)
    if not np.array_equal(narrow.astype(np.float32), scales):
        return leaf
    return dataclasses.replace(leaf, scales=jnp.asarray(narrow), format=dataclasses.replace(leaf.format, scales="fp16"))
