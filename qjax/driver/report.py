"""What a run of the driver tells: a record of every layer, exact sizes, warnings."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree

from qjax.driver.layer import LayerRecord
from qjax.driver.scale_range import check_cast
from qjax.errors import QjaxWarning
from qjax.lazy import is_lazy
from qjax.linear import Table, is_quantized
from qjax.methods import UNQUANTIZED
from qjax.models.stacks import stack_of
from qjax.models.walk import TABLE
from qjax.numbers import as_json
from qjax.qtensor import FLOAT_DTYPES
from qjax.recipe import Recipe


class Report(NamedTuple):
    """One record per linear kernel, and of the table of embeddings where a rule names it; exact sizes: bits per weight of the
    quantized kernels and of the whole model.
    """

    layers: tuple[LayerRecord, ...]
    bits_per_weight: float
    model_bits_per_weight: float
    size_bytes: int
    seconds: float


def make_report(params: PyTree, records: Sequence[LayerRecord], seconds: float) -> Report:
    """The report of quantized parameters."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    weights = sum(math.prod(leaf.shape) for leaf in leaves)
    size = sum(leaf.nbytes for leaf in leaves)
    flat = flatten_dict(params, sep="/")
    kernels = [each for each in records if each.path != TABLE]
    chosen = [each for each in kernels if each.recipe != UNQUANTIZED or is_quantized(_kernel(flat, each.path))] or kernels
    counts = [record.in_features * record.out_features for record in chosen]
    bits = sum(record.bits_per_weight * count for record, count in zip(chosen, counts, strict=True)) / sum(counts)
    return Report(tuple(records), bits, 8 * size / weights, size, seconds)


def _kernel(flat: Mapping[str, object], path: str) -> object:
    """The leaf that a record's layer is in."""
    return flat.get(path, flat.get(stack_of(path)))


def stored_size(params: PyTree) -> tuple[float, int]:
    """Bits of a weight of quantized kernels, in the mean (0 without any), and bytes of all parameters, as they are held; may be
    lazy.
    """
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    quantized = [leaf for leaf in leaves if is_quantized(leaf) and not isinstance(leaf, Table)]
    weights = sum(math.prod(leaf.shape) for leaf in quantized)
    return 8 * sum(leaf.nbytes for leaf in quantized) / max(weights, 1), sum(leaf.nbytes for leaf in leaves)


def files_size(params: PyTree) -> int:
    """Bytes of the files that lazy parameters are read from; 0 of what is in memory. Files hold tokenizers and names too, and
    a GGUF file's vectors may be quantized there.
    """
    return sum(file.stat().st_size for file in {leaf.file for leaf in jax.tree.leaves(params) if is_lazy(leaf) and leaf.file})


def rows_of(records: Sequence[LayerRecord]) -> list[dict[str, object]]:
    """A row of JSON values for each quantized kernel."""
    return [as_json(record._asdict()) for record in records if record.recipe != UNQUANTIZED]


def warn_of_few_tokens(records: Sequence[LayerRecord], callers: int) -> None:
    """Warns (QjaxWarning) of experts that calibration hardly reached, and of layers with fewer calibration tokens than inputs,
    at the line that called so many callers up.
    """
    hardly = [each for each in records if each.routed is not None and each.routed < each.tokens]
    if hardly:
        listed = ", ".join(f"{record.path} ({record.routed} of {record.tokens})" for record in hardly[:5])
        more = f" and {len(hardly) - 5} more" if len(hardly) > 5 else ""
        warnings.warn(
            f"experts that hardly any calibration token was routed to are calibrated on all tokens: {listed}{more}; more "
            "tokens would reach them",
            QjaxWarning,
            stacklevel=callers + 1,
        )
    few = [record for record in records if record.tokens is not None and record.tokens < record.in_features]
    if few:
        listed = ", ".join(f"{record.path} ({record.tokens} tokens, {record.in_features} inputs)" for record in few[:5])
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        warnings.warn(
            f"fewer calibration tokens than inputs: {listed}{more}; tokens are the rank of a Hessian at most, damping fills "
            "the rest, more tokens would be better",
            QjaxWarning,
            stacklevel=callers + 1,
        )


def cast_others(flat: Mapping[str, object], recipe: Recipe | None, done: Collection[str]) -> dict[str, Array]:
    """For a cast, the floating-point leaves besides the kernels in `done`, in its type; nothing for other recipes."""
    if recipe is None or not recipe.is_cast:
        return {}
    floating = {
        p: leaf
        for p, leaf in flat.items()
        if p not in done and not is_quantized(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    for path, leaf in floating.items():
        check_cast(path, leaf, recipe.format)
    return {path: leaf.astype(FLOAT_DTYPES[recipe.format.grid]) for path, leaf in floating.items()}
