"""A quantized model as a folder that another library reads: `targets.py` says how a layer is stored, here is the folder. A GGUF
file is one of its own (`gguf/export.py`).

Whatever a target cannot hold is refused before anything is written, with the nearest recipe that fits.
"""

import dataclasses
import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from qjax.checkpoints.chat_template import folder_template
from qjax.checkpoints.companions import write_companions
from qjax.checkpoints.gguf.export import export_gguf
from qjax.checkpoints.huggingface import CONFIG, REPLACED, checkpoint_dtype
from qjax.checkpoints.narrowing import in_float16
from qjax.checkpoints.quantized import module_names
from qjax.checkpoints.shards import SHARD_BYTES, write_shards
from qjax.checkpoints.target import LEFT_OUT, Codes, RefusedError, Target, besides
from qjax.checkpoints.targets import BY_MODULE, FLOAT16, TARGETS, not_run, renamed
from qjax.errors import QjaxError, QjaxWarning
from qjax.files import expand, listing, write_atomically
from qjax.folders import new_folder, standing
from qjax.formats import Format, default_scales
from qjax.lazy import materialised
from qjax.linear import Linear, Table, is_quantized
from qjax.maps import Scale
from qjax.models.families import FAMILIES, write_config
from qjax.models.family import LM_HEAD, Family, StoredTensor, head_name, stacks_in, stored_tensors
from qjax.models.model import Model, require_model
from qjax.models.parameters import check_parameters, flatten, parameter_shapes, with_plain_tables
from qjax.models.stacks import apart
from qjax.qtensor import QTensor, unpack_codes, unpack_parameters
from qjax.scales import QuantizedScales, laid, of_shape
from qjax.untrusted import refuse_links_out

GGUF = "gguf"
STACKED = "experts that the family's files hold as one tensor, of which no codes are written"


def export(
    folder: str | Path,
    model: Model,
    to: str,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    beside: Path | None = None,
) -> None:
    """Writes a folder with the model's codes as they are, in the files of another library, which appears when it is whole; to
    "gguf" a file.

    to: "gguf" or a name of `targets.TARGETS`. beside: a folder whose tokenizer's and generation's files are copied. Raises
    QjaxError for a model that is not quantized, but to "gguf", and lists layers that the target cannot hold, with the nearest
    recipe that fits.
    """
    require_model("export", model)
    require_target(to)
    beside = beside and standing(expand(beside))
    if to == GGUF:
        if beside:
            refuse_links_out(beside)
        template = folder_template(beside) if beside else model.tokenizer and model.tokenizer.chat_template
        export_gguf(folder, model, overwrite=overwrite, chat_template=template)
        return
    config, shapes, leaves = write_config(model.config), parameter_shapes(model.config), flatten(model.params)
    check_parameters(leaves, shapes)
    dtype = checkpoint_dtype(leaves)
    if tables := [path for path, leaf in leaves.items() if isinstance(leaf, Table)]:
        told = f"{to} has no place for codes of {', '.join(tables)}, which are written as numbers in {np.dtype(dtype)}"
        warnings.warn(QjaxWarning(told), stacklevel=2)
    leaves = with_plain_tables(leaves, dtype)
    target = TARGETS[to]
    leaves = {path: in_float16(leaf) if to in FLOAT16 else leaf for path, leaf in leaves.items()}
    family, dtype = FAMILIES[model.config.family], np.dtype(dtype).name
    leaves = apart(leaves, stacks_in(family, shapes))
    stored = stored_tensors(family, shapes, model.config.heads)
    modules = {
        name: tensor for name, tensor in module_names(stored).items() if any(is_quantized(leaves[p]) for p, _ in tensor.parts)
    }
    if reason := not_run(to, family):
        raise RefusedError(f"{to} cannot hold layers of {family.name}: {reason}")
    if reason := renamed(to, family):
        warnings.warn(QjaxWarning(reason), stacklevel=2)
    _require_fit(to, target, modules, leaves)
    left = _left(family, stored, modules)
    formats = {name: _described(leaves[tensor.parts[0][0]]) for name, tensor in modules.items()}
    config["torch_dtype"] = dtype
    config["quantization_config"] = target.settings(formats, left, dtype)
    units = {tensor.name: tensor for tensor in stored}

    def make(unit: str) -> Mapping[str, np.ndarray]:
        tensor, module = units[unit], unit.removesuffix(".weight")
        name = LM_HEAD if unit == head_name(family) and to in BY_MODULE else module
        held = {path: materialised(leaves[path]) for path, _ in tensor.parts}
        if module in modules:
            return {f"{name}.{suffix}": array for suffix, array in target.store(_codes(tensor, held, dtype)).items()}
        return {unit.replace(module, name): tensor.join({path: np.asarray(leaf) for path, leaf in held.items()})}

    sizes = {name: sum(leaves[path].nbytes for path, _ in tensor.parts) for name, tensor in units.items()}
    with new_folder(folder, overwrite=overwrite, replaces=REPLACED) as new:
        write_shards(new, sizes, make, shard_bytes)
        write_companions(new, model, beside)
        write_atomically(new / CONFIG, json.dumps(config, indent=1) + "\n")


def require_target(to: str) -> None:
    """Raises QjaxError for a name of no target."""
    if to not in (*TARGETS, GGUF):
        raise QjaxError(f"export to {to!r}: expected {', '.join((*TARGETS, GGUF))}")


def _require_fit(to: str, target: Target, modules: Mapping[str, StoredTensor], leaves: Mapping[str, object]) -> None:
    """Raises QjaxError that lists what the target cannot hold."""
    if not modules:
        raise QjaxError(f"export to {to}: no layer is quantized; quantize the model first, or write it with save_huggingface")
    problems, nearest, scaled = [], {}, {}
    for name, tensor in modules.items():
        parts = [leaves[path] for path, _ in tensor.parts]
        shape = (parts[0].shape[-2], sum(part.shape[-1] for part in parts))
        if reason := STACKED if len(parts[0].shape) > 2 else _refusal(target, parts, shape):
            problems.append(f"{name}: {reason}")
            formats = [part.format for part in parts if is_quantized(part) and part.format is not None]
            fits = (target.nearest(each, shape) for each in formats)
            nearest |= {str(fmt): fmt for fmt in (_by_columns(each) if len(parts) > 1 else each for each in fits)}
            if any(isinstance(each, Scale) for part in parts for each in getattr(part, "inputs", ())):
                scaled |= {path.split("/", 1)[1].removesuffix("/kernel"): None for path, _ in tensor.parts}
    if problems:
        advice = f"; the nearest recipes that fit: {', '.join(map(_recipes, nearest.values()))}" if nearest else ""
        alone = all(problem.endswith(LEFT_OUT.format(Scale.__name__)) for problem in problems)
        if alone and len(nearest) == 1:  # by awq or smoothquant, where no layer before takes the scales
            advice += f"; or the same recipe with the rule '{'|'.join(scaled)}=rtn(clip=mse):{next(iter(nearest))}'"
        raise RefusedError(f"{to} cannot hold {listing(problems)}{advice}")


def _left(family: Family, stored: Iterable[StoredTensor], modules: Collection[str]) -> list[str]:
    """The modules that stay as they are, routers and a tied head with them; the head by both of its names."""
    head = head_name(family).removesuffix(".weight")
    linear = [each.name.removesuffix(".weight") for each in stored if each.parts[0][0].endswith(("/kernel", "/matrix"))]
    left = [name for name in linear if name not in modules]
    return [*left, *dict.fromkeys(name for name in (head, LM_HEAD) if head not in modules and name not in left)]


def _by_columns(fmt: Format) -> Format:
    """With scales of columns each, where the format's span several."""
    return dataclasses.replace(fmt, scales=default_scales(fmt.grid)) if fmt.scale_codec.together else fmt


def _recipes(fmt: Format) -> str:
    return f"rtn:{fmt}" if fmt.is_flat else f"rtn:{fmt}, gptq:{fmt}"


def _refusal(target: Target, parts: list[object], shape: tuple[int, int]) -> str | None:
    for part in parts:
        weight = part.weight if isinstance(part, Linear) else part
        if not isinstance(weight, QTensor) or weight.codes.ndim != 2:
            return "a part of it is not quantized, or no matrix"
        if isinstance(part, Linear) and ((more := besides(part, order=True)) or len(part.inputs) > 1):
            return LEFT_OUT.format(", ".join(more) or "several orders")
    if len({_described(part) for part in parts}) > 1:
        return "parts that are stored side by side are of different formats"
    if len(parts) > 1 and _described(parts[0])[1]:
        orders = [np.asarray(materialised(part).inputs[0].index) for part in parts]
        if any(not np.array_equal(orders[0], order) for order in orders):
            return "parts that are stored side by side have inputs in different orders"
    fmt = parts[0].format
    if len(parts) > 1 and (fmt.scale_codec.together or fmt.crosses_columns(shape[0])):
        return f"parts that are stored side by side have scales that columns share ({fmt})"
    return target.refusal(_described(parts[0])[0], shape, _described(parts[0])[1])


def _described(leaf: Linear | QTensor) -> tuple:
    """(format, whether inputs are in another order)."""
    return leaf.format, isinstance(leaf, Linear) and bool(leaf.inputs)


def _codes(tensor: StoredTensor, held: Mapping[str, Linear | QTensor], dtype: str) -> Codes:
    """A module's codes, its parts side by side."""
    first = next(iter(held.values()))
    weights = {path: leaf.weight if isinstance(leaf, Linear) else leaf for path, leaf in held.items()}
    codes = {path: np.asarray(unpack_codes(weight)) for path, weight in weights.items()}
    zeros = None
    if first.format.is_affine:
        found = {path: np.asarray(unpack_parameters(weight)[1], np.uint8) for path, weight in weights.items()}
        zeros = _joined(tensor, found)
    order = np.asarray(first.inputs[0].index) if isinstance(first, Linear) and first.inputs else None
    return Codes(_joined(tensor, codes), _scales(tensor, weights), zeros, first.format, order, dtype)


def _scales(tensor: StoredTensor, weights: Mapping[str, QTensor]) -> np.ndarray | QuantizedScales:
    stored = {path: jax.tree.map(np.asarray, weight.scales) for path, weight in weights.items()}
    if len(stored) == 1:
        return next(iter(stored.values()))
    fmt = next(iter(weights.values())).format
    tables = {path: of_shape(stored[path], fmt.parameter_shape(*weight.shape)) for path, weight in weights.items()}
    return laid(_joined(tensor, tables), fmt.is_flat)


def _joined(tensor: StoredTensor, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(rows, outputs) arrays side by side, in the order of the file's outputs."""
    parts = tuple((path, arrays[path].shape) for path, _ in tensor.parts)
    return np.ascontiguousarray(tensor._replace(parts=parts, transposed=False).join(arrays))
