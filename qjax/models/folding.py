"""Where the decoder's block can take the division of an input without computing anything else: tables, and the folding itself.

Layers that share an input are given x / s when whatever makes x is divided by s, and their rows are multiplied by s. A norm
makes its output by a product with its scale (and a sum with its bias); a linear layer by its output columns, where only
linear maps, or products and maps that keep a positive factor, lie between it and the layers that read it (a norm behind a
branch stands after the layers, and norms of queries and keys behind theirs: neither is in the way):

    norm -> q, k, v;   norm -> gate, up            a norm of their own before them: not one that parallel branches share, or
                                                   that a router and many experts read
    v -> o             each value head feeds its own inputs of o: not where heads share values
    up -> down         gated: activation(gate) * up, unless up is clamped;  not gated: relu(c x) = c relu(x), but no such thing
                       holds for gelu or silu
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.maps import Divide
from qjax.models.config import DecoderConfig


class Fold(NamedTuple):
    """Layers of a block that share an input, and the norm or linear layer whose output it is."""

    layers: tuple[str, ...]
    source: str
    holds: Callable[[DecoderConfig], bool] = lambda config: True


def _own_norms(config: DecoderConfig) -> bool:
    """Whether attention and MLP each read a norm, which nothing else does."""
    return config.norm_places != "after" and not config.shared_norm


def _mlp_norm(config: DecoderConfig) -> bool:
    """Whether the MLP's first layers alone read a norm."""
    return _own_norms(config) and not config.experts


FOLDS = (
    Fold(("attention/q", "attention/k", "attention/v"), "attention_norm", _own_norms),
    Fold(("attention/o",), "attention/v", lambda c: c.heads == c.kv_heads),
    Fold(("mlp/up",), "mlp_norm", lambda c: not c.gated and _mlp_norm(c)),
    Fold(("mlp/gate", "mlp/up"), "mlp_norm", lambda c: c.gated and _mlp_norm(c)),
    Fold(("mlp/down",), "mlp/up", lambda c: c.activation != "swiglu_oai" if c.gated else c.activation == "relu"),
)


def folds(config: DecoderConfig) -> tuple[Fold, ...]:
    """The folds that a configuration's block allows."""
    return tuple(fold for fold in FOLDS if fold.holds(config))


def fold_members(fold: Fold, stacks: Mapping[str, int]) -> list[Fold]:
    """The fold, or that of each member of the stacks of kernels that it is about (`stacks.py`)."""
    count = stacks.get(f"{fold.source}/kernel", 0)
    return [
        fold._replace(layers=tuple(f"{layer}/{number}" for layer in fold.layers), source=f"{fold.source}/{number}")
        for number in range(count)
    ] or [fold]


def fold_map(leaves: Mapping[str, Array], fold: Fold, divide: Divide) -> dict[str, Array]:
    """The leaves of a block that change, as float32, when its layers' input is divided; the block computes the same.

    leaves: by path within the block, for example "mlp/up/kernel". A Divide is the one map that the tables hold for; every other
    one stays on the layers.
    """
    scale = divide.scale
    changed = {f"{layer}/kernel": divide.on_weight(leaves[f"{layer}/kernel"].astype(jnp.float32)) for layer in fold.layers}
    for name in ("scale", "bias", "kernel"):  # of a norm, of either, of a linear layer: (out,), (out,), (in, out)
        path = f"{fold.source}/{name}"
        if path in leaves:
            changed[path] = leaves[path].astype(jnp.float32) / scale
    if (path := f"{fold.source}/offset") in leaves:  # of a norm whose scale is 1 + offset
        changed[path] = (1 + leaves[path].astype(jnp.float32)) / scale - 1
    return changed


def is_linear(fold: Fold, leaves: Mapping[str, jax.Array]) -> bool:
    """Whether the fold's source is a linear layer, whose kernel changes with it."""
    return f"{fold.source}/kernel" in leaves
