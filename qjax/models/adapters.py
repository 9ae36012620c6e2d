"""Low-rank adapters of a model (`linear.LowRank`) by the path of their kernel: put on, and taken off."""

import dataclasses
from collections.abc import Mapping

from jaxtyping import PyTree

from qjax.errors import QjaxError
from qjax.files import listing
from qjax.linear import Linear, LowRank
from qjax.models.model import Model
from qjax.models.parameters import flatten, unflatten


def attach(model: Model, adapters: Mapping[str, LowRank]) -> Model:
    """The model with adapters on its kernels, which may be quantized, floating point or lazy; the kernels stay as they are.

    Raises QjaxError for adapters without a kernel, of other sizes than theirs, and for kernels that have an adapter.
    """
    leaves, problems = flatten(model.params), []
    for path, adapter in adapters.items():
        leaf, shape = leaves.get(path), (adapter.a.shape[0], adapter.b.shape[1])
        if leaf is None or not path.endswith("/kernel"):
            problems.append(f"{path} is no kernel of the model")
        elif tuple(leaf.shape) != shape:
            problems.append(f"{path} is {tuple(leaf.shape)}, the adapter is for {shape}")
        elif isinstance(leaf, Linear) and leaf.adapter is not None:
            problems.append(f"{path} has an adapter already")
        else:
            layer = leaf if isinstance(leaf, Linear) else Linear(leaf)
            leaves[path] = dataclasses.replace(layer, adapter=adapter)
    if problems:
        raise QjaxError(f"the adapter does not fit {model.name}: {listing(problems)}; give the base that it was trained on")
    return model._replace(params=unflatten(leaves))


def adapters_of(params: PyTree) -> dict[str, LowRank]:
    """The adapters of a model's parameters by path."""
    found = {path: getattr(leaf, "adapter", None) for path, leaf in flatten(params).items()}
    return {path: adapter for path, adapter in found.items() if adapter is not None}


def detached(params: PyTree) -> PyTree:
    """Parameters without their adapters; a Linear of which nothing but its weight is left is that weight."""

    def bare(leaf: object) -> object:
        if not isinstance(leaf, Linear):
            return leaf
        leaf = dataclasses.replace(leaf, adapter=None)
        more = (leaf.inputs, leaf.activation, leaf.outliers)
        return leaf if any(more) else leaf.weight

    return unflatten({path: bare(leaf) for path, leaf in flatten(params).items()})
