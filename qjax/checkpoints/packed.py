"""qjax's own folders: packed codes in model.safetensors, and qjax.json that says what they are. They load back bit-equal.

    model.safetensors   block_0/attention/q/kernel.codes, .scales, .zeros of a QTensor; doubly quantized scales as
                        .scales.codes, .scales.scales, .scales.offset; those of a Linear's weight as .weight.codes and so on,
                        beside .inputs[0].scale, .outliers.index, .adapter.a, ...; every other parameter under its path. It
                        may be several files instead, which qjax.json lists: `parts.py` writes one for each part of a model
    qjax.json           version, name, recipe, config, and the record of every quantized leaf (`leaves.py`); written last, so a
                        folder that has it is complete
    tokenizer.json      where the model has one

Keys, shapes and types are checked against the description before anything is read. Version 1 knew no Linear, only an input's
scale: "input_scale": true beside a format, stored as .input_scale.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from qjax.checkpoints import leaves as records_of
from qjax.checkpoints.huggingface import load_folder_tokenizer
from qjax.checkpoints.leaves import TYPES, entry, template
from qjax.checkpoints.tensors import FLOATS, Header, read_arrays, read_headers, write_tensors
from qjax.errors import QjaxError
from qjax.files import expand, listing, prepare_output_folder, read_json, write_atomically
from qjax.linear import Linear, is_quantized
from qjax.maps import Permute
from qjax.models.config import DecoderConfig, LinearScaling, Llama3Scaling
from qjax.models.model import Model, require_model
from qjax.models.parameters import check_parameters, flatten, parameter_shapes, unflatten

DESCRIPTION, WEIGHTS, TOKENIZER = "qjax.json", "model.safetensors", "tokenizer.json"
REPLACED = (DESCRIPTION, "config.json", "model.safetensors.index.json", "model*.safetensors", "tokenizer*.json")
VERSION = 2
SCALINGS = {"llama3": Llama3Scaling, "linear": LinearScaling}


def save(folder: str | Path, model: Model, *, overwrite: bool = False) -> None:
    """Writes the model, packed, into `folder`.

    Raises QjaxError for a folder that is not empty (unless `overwrite`) or cannot be written (read-only, full).
    """
    require_model("save", model)
    leaves = flatten(model.params)
    check_parameters(leaves, parameter_shapes(model.config))
    quantized = describe(leaves)
    tensors = {name: np.asarray(array) for name, array in stored(leaves).items()}  # read before the folder is touched
    folder = prepare_output_folder(folder, overwrite=overwrite, replaces=REPLACED)
    write_tensors(folder / WEIGHTS, tensors)
    write_description(folder, model, quantized)


def write_description(folder: Path, model: Model, quantized: Mapping[str, dict], files: Sequence[str] = ()) -> None:
    """tokenizer.json and, last, qjax.json of a folder whose weights are there.

    quantized: `describe` of the leaves. files: those with weights, where they are several.
    """
    description = {
        "version": VERSION,
        "name": model.name,
        "recipe": model.recipe,
        "config": config_to_dict(model.config),
        "quantized": dict(quantized),
        **({"files": list(files)} if files else {}),
    }
    if model.tokenizer is not None:
        write_atomically(folder / TOKENIZER, model.tokenizer.to_json())
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def describe(leaves: Mapping[str, object]) -> dict[str, dict]:
    """What qjax.json says of quantized leaves, by path. Raises QjaxError for those that no folder can hold."""
    records, problems = {}, []
    for path, leaf in leaves.items():
        if is_quantized(leaf):
            try:
                records[path] = records_of.describe(leaf)
            except QjaxError as error:
                problems.append(f"{path}: {error}")
    if problems:
        raise QjaxError(listing(problems))
    return records


def load_packed(folder: str | Path, *, lazy: bool = False) -> Model:
    """The model that `save` wrote, bit-equal. Raises QjaxError, one line, for whatever is missing or malformed.

    lazy: arrays are read from the files, which must stay, whenever they are needed (`lazy.py`).
    """
    folder = expand(folder)
    description = read_json(folder / DESCRIPTION)
    try:
        if (version := description.get("version")) not in (1, VERSION):
            raise QjaxError(f"version {version!r} is not supported, expected 1 or {VERSION}; use the qjax that wrote it")
        config = config_from_dict(entry(description, "config", dict))
        name, recipe = entry(description, "name", str), entry(description, "recipe", str)
        records = entry(description, "quantized", dict)
        if version == 1:
            records = {path: _of_version_1(record) for path, record in records.items()}
        templates = templates_of(config, records)
        files = _files(description)
    except QjaxError as error:
        raise QjaxError(f"{folder / DESCRIPTION}: {error}") from error
    headers = read_headers([folder / file for file in files])
    if version == 1:
        headers = {name.replace(".input_scale", ".inputs[0].scale"): header for name, header in headers.items()}
    _check(folder, templates, headers)
    arrays = read_arrays(headers, advice="quantize an intact model again", lazy=lazy, below=_indices(templates))
    return Model(config, unflatten(filled(templates, arrays)), load_folder_tokenizer(folder, config), name, recipe)


def _files(description: dict) -> list[str]:
    """Names of the files with weights: one, or those that are listed."""
    files = description.get("files", [WEIGHTS])
    if not isinstance(files, list) or not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise QjaxError(f"'files' is {files!r}; expected names of files of this folder")
    return files


def _indices(templates: Mapping[str, object]) -> dict[str, int]:
    """Keys of the arrays that are distinct inputs of their kernel, and its number of inputs."""
    found = {}
    for path, leaf in templates.items():
        if isinstance(leaf, Linear):
            keys = [f".inputs[{i}].index" for i, each in enumerate(leaf.inputs) if isinstance(each, Permute)]
            keys += [] if leaf.outliers is None else [".outliers.index"]
            found |= {path + key: leaf.shape[0] for key in keys}
    return found


def filled(templates: Mapping[str, object], arrays: Mapping[str, object]) -> dict[str, object]:
    """The templates' leaves with the arrays of their keys."""
    return {
        path: jax.tree.unflatten(jax.tree.structure(template), [arrays[key] for key in stored({path: template})])
        for path, template in templates.items()
    }


def stored(leaves: Mapping[str, object]) -> dict[str, object]:
    """Arrays by the key they are stored under: the path, and for a field of a QTensor its name after a dot."""
    return {
        path + keystr(field): array
        for path, leaf in leaves.items()
        for field, array in jax.tree_util.tree_flatten_with_path(leaf)[0]
    }


def templates_of(config: DecoderConfig, records: dict) -> dict[str, object]:
    """Every leaf with ShapeDtypeStructs for arrays; the type of plain leaves is left open as float32."""
    templates = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in parameter_shapes(config).items()}
    for path, record in records.items():
        if path not in templates or len(shape := templates[path].shape) != 2:
            raise QjaxError(f"'quantized' names {path!r}, which is no matrix of this model")
        try:
            templates[path] = template(record, shape)
        except QjaxError as error:
            raise QjaxError(f"{path}: {error}") from error
    return templates


def _of_version_1(record: object) -> object:
    """A record as this version writes it."""
    if not isinstance(record, dict) or record.get("input_scale") is not True:
        return record
    scale = {"map": "Scale", "arrays": {"scale": f"float16[{record.get('in_features')}]"}}
    return {**record, "linear": {"inputs": [scale]}}


def _check(folder: Path, templates: Mapping[str, object], headers: Mapping[str, Header]) -> None:
    """Keys, shapes and types of all tensors against the description."""
    expected = stored(templates)
    problems = [f"missing {key}" for key in expected if key not in headers]
    problems += [f"unexpected {key}" for key in headers if key not in expected]
    for key, array in expected.items():
        if key not in headers:
            continue
        header, types = headers[key], FLOATS if key in templates else (TYPES[str(array.dtype)],)
        if header.shape != array.shape or header.dtype not in types:
            problems.append(f"{key} is {header.dtype} {header.shape}, expected {' or '.join(types)} {tuple(array.shape)}")
    if problems:
        raise QjaxError(f"{folder}: the weights do not fit {DESCRIPTION}: {listing(problems)}; quantize the model again")


def config_to_dict(config: DecoderConfig) -> dict:
    """The configuration as JSON values; `rope_scaling` carries its kind."""
    scaling = config.rope_scaling
    kinds = {cls: kind for kind, cls in SCALINGS.items()}
    tagged = None if scaling is None else {"kind": kinds[type(scaling)], **dataclasses.asdict(scaling)}
    return {**dataclasses.asdict(config), "rope_scaling": tagged}


def config_from_dict(values: dict) -> DecoderConfig:
    """The inverse of `config_to_dict`. Raises QjaxError for unknown, missing or malformed entries."""
    if (tagged := values.get("rope_scaling")) is not None:
        if not isinstance(tagged, dict) or tagged.get("kind") not in SCALINGS:
            raise QjaxError(f"'rope_scaling' is {tagged!r}; its kind must be one of {', '.join(SCALINGS)}")
        scaling = {key: value for key, value in tagged.items() if key != "kind"}
        values = {**values, "rope_scaling": _build(SCALINGS[tagged["kind"]], scaling)}
    return _build(DecoderConfig, values)


def _build(cls: type, values: dict) -> object:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    problems = [f"unknown entry {name!r}" for name in values if name not in fields]
    problems += [f"missing entry {name!r}" for name in required if name not in values]
    for name in values.keys() & fields.keys():
        kind = int | float if fields[name].type is float else fields[name].type
        if not isinstance(values[name], kind):
            problems.append(f"{name!r} is {values[name]!r}")
    if problems:
        raise QjaxError(f"{cls.__name__}: {listing(problems)}")
    return cls(**values)
