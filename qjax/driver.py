"""The driver: a model and a recipe -> the same model with quantized kernels, and a report of every layer.

By default the linear layers inside the blocks are quantized; embeddings, norms and the head stay as they are unless a rule
names them. The casts fp32, bf16 and fp16 are storage types of the whole model: every floating-point leaf is cast.
"""

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from qjax.errors import QjaxError
from qjax.interception import KernelView, linear_layers, quantized_kernels
from qjax.models.model import Model
from qjax.qtensor import FLOAT_DTYPES, QTensor, dequantize, is_quantized
from qjax.recipe import UNQUANTIZED, Recipe, method, parse_recipe
from qjax.rounding.info import Info
from qjax.rules import Rule, parse_rule, place


class LayerRecord(NamedTuple):
    """What happened to one kernel; see `Info` for the figures. `recipe` is "none" for a kernel that was left alone."""

    path: str
    recipe: str
    in_features: int
    out_features: int
    bits_per_weight: float
    weight_error: float | None = None
    clipped: float | None = None
    seconds: float = 0.0


class Report(NamedTuple):
    """One record per linear kernel, and exact sizes: bits per weight of the quantized kernels and of the whole model."""

    layers: tuple[LayerRecord, ...]
    bits_per_weight: float
    model_bits_per_weight: float
    size_bytes: int
    seconds: float


def quantize(
    model: Model,
    recipe: str | Recipe | None,
    *,
    rules: Iterable[str | Rule] = (),
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> tuple[Model, Report]:
    """The model with its kernels in the recipe's format, and a report. The given model is left as it is.

    rules: "PATTERN=RECIPE" strings, the first that matches a kernel's path decides (`rules.py`).
    on_layer is called with each layer's record as it is done. Raises QjaxError for a bad recipe or rule, and when the
    model is quantized already.
    """
    recipe, rules = _parsed(recipe, rules)
    placed = placement(model, recipe, rules)
    flat = flatten_dict(model.params, sep="/")
    started = time.perf_counter()
    views = {path: KernelView(flat[path].shape, (0,), (1,)) for path in placed}
    flat, records = _quantize_kernels(flat, placed, views, on_layer)
    flat |= _cast_others(flat, recipe, placed)
    name = "; ".join([str(recipe or UNQUANTIZED), *map(str, rules)])
    result = model._replace(params=unflatten_dict(flat, sep="/"), recipe=name)
    return result, _report(result.params, records, time.perf_counter() - started)


def placement(model: Model, recipe: str | Recipe | None, rules: Iterable[str | Rule] = ()) -> dict[str, Recipe | None]:
    """What `quantize` would do to every linear kernel, by path; None leaves it. Raises what `quantize` raises."""
    recipe, rules = _parsed(recipe, rules)
    flat = flatten_dict(model.params, sep="/")
    if any(is_quantized(leaf) for leaf in flat.values()):
        raise QjaxError(f"{model.name} is quantized already ({model.recipe}); start from the unquantized model")
    kernels = [path for path in flat if path.endswith("/kernel")]
    everywhere = recipe is not None and recipe.is_cast
    return place(kernels, recipe, rules, kernels if everywhere else [path for path in kernels if path.startswith("block_")])


def kernel_shapes(model: Model) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(in, out) of the kernels that are quantized, or would be by default, and (elements, bytes of one) of every other leaf."""
    flat = flatten_dict(model.params, sep="/")
    in_block = re.compile("block_.*/kernel")
    linear = {path for path, leaf in flat.items() if is_quantized(leaf) or in_block.fullmatch(path)}
    others = [(leaf.size, leaf.dtype.itemsize) for path, leaf in flat.items() if path not in linear]
    return [flat[path].shape for path in flat if path in linear], others


def quantize_flax(
    module: nn.Module,
    params: PyTree,
    recipe: str | Recipe | None,
    *,
    batches: Sequence[tuple],
    rules: Iterable[str | Rule] = (),
) -> tuple[PyTree, Report]:
    """Quantizes the kernels of any Linen model: nn.Dense, nn.DenseGeneral and nn.Einsum layers, found by tracing it.

    params: the "params" collection. batches: arguments of module.apply, each a tuple; the first is used to trace.
    Run the result with `apply_flax`. Raises QjaxError when no layer can be quantized or a rule names none, and lists layers
    that cannot run with a quantized kernel unless a rule "PATTERN=none" leaves them out.
    """
    recipe, rules = _parsed(recipe, rules)
    if not batches:
        raise QjaxError("quantize_flax: batches is empty; give at least one tuple of arguments of module.apply")
    if any(is_quantized(leaf) for leaf in flatten_dict(params, sep="/").values()):
        raise QjaxError("quantize_flax: the parameters are quantized already; start from the unquantized ones")
    views, refused = linear_layers(module, params, *batches[0])
    placed = place([*views, *refused], recipe, rules)
    blocked = [refused[path] for path in refused if placed[path] is not None and not placed[path].is_cast]
    if blocked:
        raise QjaxError(f"{'; '.join(blocked)}. A rule 'PATTERN=none' leaves such a layer as it is")
    if not views:
        raise QjaxError(f"{type(module).__name__}: no Dense, DenseGeneral or Einsum layer found to quantize")
    started = time.perf_counter()
    flat = flatten_dict(params, sep="/")
    flat, records = _quantize_kernels(flat, {path: placed[path] for path in views}, views, lambda record: None)
    flat |= _cast_others(flat, recipe, views)
    result = unflatten_dict(flat, sep="/")
    return result, _report(result, records, time.perf_counter() - started)


def apply_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> object:
    """module.apply({"params": params}, *args, **kwargs) with quantized kernels; works under jit, grad and vmap."""
    with quantized_kernels():
        return module.apply({"params": params}, *args, **kwargs)


def dequantize_flax(module: nn.Module, params: PyTree, *args: object, **kwargs: object) -> PyTree:
    """The inverse of `quantize_flax`: every quantized kernel as a float32 array of the shape module's layer expects.

    args: arguments of module.apply, to find the layers by tracing.
    """
    views, _ = linear_layers(module, params, *args, **kwargs)
    flat = flatten_dict(params, sep="/")
    decoded = {path: views[path].to_kernel(dequantize(leaf)) for path, leaf in flat.items() if is_quantized(leaf)}
    return unflatten_dict(flat | decoded, sep="/")


def _quantize_kernels(flat, placed, views, on_layer):
    """Rounds every placed kernel; returns the new flat tree and the records in the order of `placed`."""
    flat, records = dict(flat), []
    for path, chosen in placed.items():
        kernel, view = flat[path], views[path]
        if chosen is None:
            record = LayerRecord(path, UNQUANTIZED, *view.matrix_shape, 8.0 * kernel.dtype.itemsize)
        elif kernel.shape != view.shape:
            raise QjaxError(
                f"{path} has shape {kernel.shape} where its layer multiplies with {view.shape}: a layer under nn.scan or "
                "nn.vmap; quantize such kernels with jax.vmap(qjax.rtn, ...), a rule 'PATTERN=none' leaves them as they are"
            )
        else:
            matrix = view.to_matrix(kernel)
            started = time.perf_counter()
            q, info = round_weight(matrix, chosen)
            weight_error, clipped = float(info.weight_error), float(info.clipped)  # waits for the result
            flat[path] = view.to_kernel(q.codes) if chosen.is_cast else q
            seconds = time.perf_counter() - started
            bits = q.bits_per_weight
            record = LayerRecord(path, str(chosen), *matrix.shape, bits, weight_error, clipped, seconds)
        records.append(record)
        on_layer(record)
    broken = [record.path for record in records if record.weight_error is not None and not math.isfinite(record.weight_error)]
    if broken:
        raise QjaxError(f"weights that are not finite cannot be quantized: {', '.join(broken)}; start from an intact model")
    return flat, records


def round_weight(weight: Float[Array, "in out"], recipe: Recipe) -> tuple[QTensor, Info]:
    """Applies a recipe's rounding to one (in, out) weight."""
    return method(recipe.rounding.name)(weight, recipe.format, **dict(recipe.rounding.options))


def _parsed(recipe: str | Recipe | None, rules: Iterable[str | Rule]) -> tuple[Recipe | None, tuple[Rule, ...]]:
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    rules = (rules,) if isinstance(rules, str) else rules
    return recipe, tuple(parse_rule(rule) if isinstance(rule, str) else rule for rule in rules)


def _cast_others(flat: dict[str, Array], recipe: Recipe | None, done: Collection[str]) -> dict[str, Array]:
    """For a cast, the floating-point leaves besides the kernels in `done`, in its type; nothing for other recipes."""
    if recipe is None or not recipe.is_cast:
        return {}
    floating = {p: leaf for p, leaf in flat.items() if p not in done and jnp.issubdtype(leaf.dtype, jnp.floating)}
    return {path: leaf.astype(FLOAT_DTYPES[recipe.format.grid]) for path, leaf in floating.items()}


def _report(params: PyTree, records: list[LayerRecord], seconds: float) -> Report:
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    weights = sum(_weights(leaf) for leaf in leaves)
    size = sum(leaf.nbytes for leaf in leaves)
    chosen = [record for record in records if record.recipe != UNQUANTIZED] or records
    counts = [record.in_features * record.out_features for record in chosen]
    bits = sum(record.bits_per_weight * count for record, count in zip(chosen, counts, strict=True)) / sum(counts)
    return Report(tuple(records), bits, 8 * size / weights, size, seconds)


def _weights(leaf: Array | QTensor) -> int:
    return jax.eval_shape(dequantize, leaf).size if is_quantized(leaf) else leaf.size
