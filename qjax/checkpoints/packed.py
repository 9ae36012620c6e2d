"""qjax's own folders: packed codes in model.safetensors, and qjax.json that says what they are. They load back bit-equal.

    model.safetensors   block_0/attention/q/kernel.codes, .scales, .zeros of a QTensor; doubly quantized scales as
                        .scales.codes, .scales.scales, .scales.offset; those of a Linear's weight as .weight.codes and so on,
                        beside .inputs[0].scale, .outliers.index, .adapter.a, ...; every other parameter under its path. It
                        may be several files instead, which qjax.json lists: `parts.py` writes one for each part of a model
    qjax.json           version, name, recipe, config, the record of every quantized leaf (`leaves.py`), `digests` of the files
                        beside it (SHA-256), and a `digest` of all this, so that no part of it is changed unnoticed
    tokenizer.json, ... where the model has one, and the other files of `companions.py` where its own folder had them
    layers.jsonl        where the driver wrote the folder: a row of all that is quantized

Keys, shapes and types are checked against the description before anything is read, the digest of the description always, those
of the files with them, of a lazy model before each is first read. Version 3 knew no tables, version 2 had no digests; version
1 knew no Linear, only an input's scale: "input_scale": true beside a format, stored as .input_scale.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from qjax.checkpoints import leaves as records_of
from qjax.checkpoints.chat_template import CHAT
from qjax.checkpoints.companions import COMPANIONS, TOKENIZER, read_companions
from qjax.checkpoints.huggingface import load_folder_tokenizer
from qjax.checkpoints.leaves import TYPES, entry, template
from qjax.checkpoints.tensors import FLOATS, Header, read_arrays, read_headers, write_tensors
from qjax.errors import QjaxError
from qjax.files import expand, listing, write_atomically
from qjax.folders import new_folder, standing
from qjax.linear import Linear, Table, is_quantized
from qjax.maps import Permute
from qjax.models.config import DecoderConfig
from qjax.models.config_json import config_from_dict, config_to_dict
from qjax.models.model import Model, require_model
from qjax.models.parameters import check_parameters, flatten, parameter_shapes, unflatten
from qjax.models.walk import TABLE
from qjax.untrusted import digest_of, quoted, read_json, refuse_links_out

DESCRIPTION, WEIGHTS, LAYERS = "qjax.json", "model.safetensors", "layers.jsonl"
REPLACED = (
    *(DESCRIPTION, "config.json", "model.safetensors.index.json"),
    *("model*.safetensors", "tokenizer*.json", *COMPANIONS, LAYERS),
)
VERSION = 4


def save(folder: str | Path, model: Model, *, overwrite: bool = False, beside: Path | None = None) -> None:
    """Writes the model, packed, into `folder`, which appears when it is whole.

    beside: a folder whose tokenizer's and generation's files are copied as they are. Raises QjaxError for a folder that is
    not empty (unless `overwrite`) or cannot be written (read-only, full).
    """
    require_model("save", model)
    leaves = flatten(model.params)
    check_parameters(leaves, parameter_shapes(model.config))
    quantized = describe(leaves)
    with new_folder(folder, overwrite=overwrite, replaces=REPLACED) as new:
        write_tensors(new / WEIGHTS, {name: np.asarray(array) for name, array in stored(leaves).items()})
        write_description(new, model, quantized, {WEIGHTS: digest_of(new / WEIGHTS)}, beside=beside)


def write_description(
    folder: Path,
    model: Model,
    quantized: Mapping[str, dict],
    weights: Mapping[str, str],
    layers: str | None = None,
    beside: Path | None = None,
) -> None:
    """tokenizer.json and other companions, layers.jsonl where its content is given, and, last, qjax.json of a folder whose
    weights are there.

    quantized: `describe` of the leaves. weights: digests of the files with weights, by name. beside: see `save`.
    """
    tokenizer = model.tokenizer
    template = tokenizer and tokenizer.chat_template
    own = {TOKENIZER: tokenizer and tokenizer.to_json(), CHAT: template, LAYERS: layers}
    others = {name: content for name, content in own.items() if content is not None} | read_companions(beside)
    for name, content in others.items():
        write_atomically(folder / name, content)
    digests = {name: digest_of(folder / name) for name in others}
    description = {
        "version": VERSION,
        "name": model.name,
        "recipe": model.recipe,
        "config": config_to_dict(model.config),
        "quantized": dict(quantized),
        **({} if list(weights) == [WEIGHTS] else {"files": list(weights)}),
        "digests": {**weights, **digests},
    }
    description["digest"] = _digest(description)
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def _digest(description: Mapping[str, object]) -> str:
    """Of all that a description says besides its own digest."""
    said = {name: value for name, value in description.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
    """The model that `save` wrote, bit-equal. Raises QjaxError, one line, for whatever is missing or malformed, and
    for links out of the folder.

    lazy: arrays are read from the files, which must stay, whenever they are needed (`lazy.py`).
    """
    folder = standing(expand(folder))
    refuse_links_out(folder)
    description = read_json(folder / DESCRIPTION)
    try:
        if type(version := description.get("version")) is not int or not 1 <= version <= VERSION:
            raise QjaxError(f"version {quoted(version)} is not supported, expected 1 to {VERSION}; use the qjax that wrote it")
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
    told = version > 2 or "digest" in description
    check = functools.cache(lambda file: _check_digests(folder, description, [file.name]) if told else None)
    arrays = read_arrays(headers, advice="quantize an intact model again", lazy=lazy, below=_indices(templates), before=check)
    tokenizer = load_folder_tokenizer(folder, config)
    if told:
        _check_digests(folder, description, COMPANIONS if lazy else [*COMPANIONS, *files])
    return Model(config, unflatten(filled(templates, arrays)), tokenizer, name, recipe)


def _check_digests(folder: Path, description: Mapping[str, object], files: Sequence[str]) -> None:
    """Raises QjaxError where the description, or one of the files that it tells digests of, is not what was written."""
    digests = description.get("digests")
    if description.get("digest") != _digest(description) or not isinstance(digests, dict):
        raise QjaxError(f"{folder / DESCRIPTION} is not as qjax wrote it; get the folder anew, or quantize the model again")
    changed = [name for name in files if name in digests and digest_of(folder / name) != digests[name]]
    if changed:
        raise QjaxError(f"{folder}: {listing(changed)} is not as {DESCRIPTION} tells it; get the folder anew")


def _files(description: dict) -> list[str]:
    """Names of the files with weights: one, or those that are listed."""
    files = description.get("files", [WEIGHTS])
    if not isinstance(files, list) or not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise QjaxError(f"'files' is {quoted(files)}; expected names of files of this folder")
    return files


def _indices(templates: Mapping[str, object]) -> dict[str, int]:
    """Keys of the arrays that are distinct inputs of their kernel, and its number of inputs."""
    found = {}
    for path, leaf in templates.items():
        if isinstance(leaf, Linear):
            keys = [f".inputs[{i}].index" for i, each in enumerate(leaf.inputs) if isinstance(each, Permute)]
            keys += [] if leaf.outliers is None else [".outliers.index"]
            found |= {path + key: leaf.shape[-2] for key in keys}
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
        if path not in templates or len(shape := templates[path].shape) not in (2, 3):
            raise QjaxError(f"'quantized' names {quoted(path)}, which is no matrix of this model, nor a stack of them")
        try:
            templates[path] = template(record, shape)
        except QjaxError as error:
            raise QjaxError(f"{path}: {error}") from error
        if isinstance(templates[path], Table) != (path == TABLE):
            raise QjaxError(f"'quantized' has {quoted(path)} as {quoted(record)}; the table of embeddings alone is a table")
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
