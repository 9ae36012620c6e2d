"""Hugging Face checkpoint folders: config.json, model.safetensors (one file, or shards with an index), tokenizer.json.

Weights keep the checkpoint's type; (out, in) matrices become (in, out); what other libraries quantized stays so
(`quantized.py`). Everything that can be checked before reading the weights is checked then, and all offenders are named at
once. Only safetensors is read: pickle files can run code.
"""

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qjax.checkpoints.chat_template import CHAT, TOKENIZER_CONFIG, folder_template
from qjax.checkpoints.companions import COMPANIONS, GENERATION, TOKENIZER, write_companions
from qjax.checkpoints.naming import canonical, quantizer_of
from qjax.checkpoints.quantized import (
    LEGACY,
    Quantized,
    Quantizer,
    find_quantizer,
    lazy_module,
    module_names,
    modules_with_codes,
    read_module,
    tensors_of_weights,
)
from qjax.checkpoints.shards import INDEX, SHARD_BYTES, WEIGHTS, write_shards
from qjax.checkpoints.tensors import FLOATS, Header, dtype_of, read_finite, read_headers, read_tensor
from qjax.errors import QjaxError, QjaxWarning
from qjax.files import expand, listing, write_atomically
from qjax.folders import new_folder, standing
from qjax.lazy import Lazy, materialised
from qjax.linear import dequantize, is_quantized
from qjax.models.config import DecoderConfig
from qjax.models.config_entries import ids_of
from qjax.models.families import FAMILIES, read_config, write_config
from qjax.models.family import StoredTensor, head_name, stacks_in, stored_tensors
from qjax.models.model import Model, require_model
from qjax.models.parameters import check_parameters, flatten, parameter_shapes, unflatten
from qjax.models.stacks import apart, member, together
from qjax.models.tokenizer import Tokenizer, load_tokenizer
from qjax.models.walk import TABLE
from qjax.untrusted import is_folder, read_json, refuse_links_out, status

CONFIG = "config.json"
REPLACED = ("qjax.json", CONFIG, INDEX, "model*.safetensors", "tokenizer*.json", *COMPANIONS, "layers.jsonl")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NO_GGUF = "no Hugging Face folder; qjax.load reads it"
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "tokenizer.tiktoken")
HUB_FILES = [
    *(CONFIG, GENERATION, WEIGHTS, INDEX, "model-*.safetensors", "gptq_model*.safetensors"),
    *(TOKENIZER, TOKENIZER_CONFIG, CHAT, *LEGACY),
]


def load_huggingface(folder: str | Path, *, lazy: bool = False, weights_alone: bool = False, trusted: bool = False) -> Model:
    """The model in a folder; its parameters are jax arrays in the checkpoint's type, its name the folder's.

    lazy: parameters are read from the files, which must stay, whenever they are needed (`lazy.py`). weights_alone: what a
    quantized folder says of inputs and caches is left out, with a warning that names it. trusted: its files may be links to
    anywhere, as those of qjax itself may be installed. The tokenizer is None where there is no tokenizer.json. Raises
    QjaxError, one line that names the file or all tensors at fault, for whatever is missing, corrupt, misshapen, not finite or
    not supported, and for links out of the folder.
    """
    asked = expand(folder)
    folder = standing(asked)
    if folder.suffix.lower() == ".gguf" and status(folder) and not is_folder(folder):
        raise QjaxError(f"{folder} is a GGUF file, {NO_GGUF}")
    if not is_folder(folder):
        raise QjaxError(f"{folder} is a file; give its folder" if status(folder) else f"{folder}: no such folder")
    if not status(folder / CONFIG):
        files = f"; its GGUF files are {NO_GGUF}" if any(folder.glob("*.gguf")) else ""
        raise QjaxError(f"{folder} has no {CONFIG}: it is not a Hugging Face checkpoint folder{files}")
    if not trusted:
        refuse_links_out(folder)
    content = _with_ends(folder, read_json(folder / CONFIG))
    try:
        config = read_config(content)
    except QjaxError as error:
        raise QjaxError(f"{folder / CONFIG}: {error}") from error
    family, quantizer = FAMILIES[config.family], find_quantizer(folder, content, weights_alone=weights_alone)
    shapes = parameter_shapes(config)
    tensors, stacks = stored_tensors(family, shapes, config.heads), stacks_in(family, shapes)
    headers = read_headers(weight_files(folder, quantizer))
    headers = canonical(family, tensors, headers, module_names(tensors) if quantizer else {})
    if quantizer and weights_alone:
        headers = tensors_of_weights(quantizer, headers)
    quantized = modules_with_codes(quantizer, tensors, headers) if quantizer else []
    tensors = [tensor for tensor in tensors if all(tensor is not each.tensor for each in quantized)]
    _check(folder, tensors, quantized, headers, config.tied and head_name(family), quantizer)
    head = headers.pop(head_name(family), None) if config.tied else None
    tokenizer = load_folder_tokenizer(folder, config)
    if lazy:
        read = functools.lru_cache(maxsize=1)(read_module)  # a leaf's arrays are asked for one after the other
        leaves = _lazy_parameters(tensors, headers, head)
        leaves |= {path: leaf for each in quantized for path, leaf in lazy_module(each, read).items()}
    else:
        leaves = _read_parameters(folder, tensors, headers, head, stacks)
        leaves |= {path: leaf for each in quantized for path, leaf in read_module(each).items()}
    recipe = _recipe(quantizer, leaves)
    leaves = together(leaves, stacks)
    return Model(config, unflatten(leaves), tokenizer, asked.resolve().name, recipe)


def _recipe(quantizer: Quantizer | None, leaves: Mapping[str, object]) -> str:
    """What is said of how a model was quantized: "gptq checkpoint: int4-g128"; "none" for one that is not."""
    formats = dict.fromkeys(str(leaf.format) for leaf in leaves.values() if is_quantized(leaf))
    return f"{quantizer.method} checkpoint: {listing(formats)}" if quantizer and formats else "none"


def _with_ends(folder: Path, content: dict) -> dict:
    """config.json with the ends of text that generation_config.json adds: any of them ends one."""
    if not status(folder / GENERATION):
        return content
    first, *others = _ends(folder / CONFIG, content)
    more = [i for i in _ends(folder / GENERATION, read_json(folder / GENERATION)) if i is not None]
    return {**content, "eos_token_id": [first, *others, *more]}


def _ends(file: Path, content: dict) -> list[int | None]:
    try:
        return ids_of(content, "eos_token_id")
    except QjaxError as error:
        raise QjaxError(f"{file}: {error}") from error


def weight_files(folder: Path, quantizer: Quantizer | None = None) -> list[Path]:
    """The safetensors files of a checkpoint. Raises QjaxError when there are none, or shards are missing."""
    if status(folder / WEIGHTS):
        return [folder / WEIGHTS]
    stem = quantizer and quantizer.settings.get("model_file_base_name")
    if isinstance(stem, str) and Path(stem).name == stem and status(folder / f"{stem}.safetensors"):
        return [folder / f"{stem}.safetensors"]
    if status(folder / INDEX):
        shards = read_json(folder / INDEX).get("weight_map")
        shards = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise QjaxError(f"{folder / INDEX}: expected a weight_map from tensors to files of this folder")
        there = {path.name for path in folder.iterdir()}  # once, for an index may name many
        if missing := [shard for shard in shards if shard not in there]:
            raise QjaxError(f"{folder} lacks {listing(missing)}, which {INDEX} names; copy or download them")
        return [folder / shard for shard in shards]
    if pickles := sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)}):
        raise QjaxError(
            f"{folder} holds its weights as pickle ({listing(pickles)}), which can run code and is never loaded; convert it "
            "where you trust it: transformers' from_pretrained(folder) and save_pretrained(new_folder) write safetensors"
        )
    raise QjaxError(f"{folder} has no weights: expected {WEIGHTS}, or {INDEX} and its shards")


def _check(
    folder: Path,
    tensors: list[StoredTensor],
    quantized: list[Quantized],
    headers: Mapping[str, Header],
    repeated: str | bool,
    quantizer: Quantizer | None,
) -> None:
    """Names, shapes and types of all tensors against the configuration. repeated: a tied head's, which some files have too."""
    expected = {tensor.name: (tensor.shape, FLOATS) for tensor in tensors}
    expected |= {each.name_of(suffix): told for each in quantized for suffix, told in each.stored.expected.items()}
    free = {each.name_of(suffix) for each in quantized for suffix in each.stored.optional}
    whose = quantizer_of([name for name in headers if name not in expected and name not in free])
    if whose and not quantizer:
        raise QjaxError(
            f"{folder}: the weights are not a model's own, though {CONFIG} does not say so ({whose}); give the checkpoint that "
            "was quantized, or the model that an adapter was merged into"
        )
    problems = [f"missing {name}" for name in expected if name not in headers]
    if repeated:
        table = next(tensor.shape for tensor in tensors if tensor.parts[0][0] == TABLE)
        expected[repeated] = (table, FLOATS)
    problems += [f"unexpected {name}" for name in headers if name not in expected and name not in free]
    for name, header in headers.items():
        shape, types = expected.get(name, (header.shape, (header.dtype,)))
        if header.shape != shape:
            problems.append(f"{name} has shape {header.shape}, expected {shape}")
        if header.dtype not in types:
            problems.append(f"{name} has type {header.dtype}, expected {', '.join(types)}")
    if problems:
        strange = [name for name in headers if name not in expected]
        found = f" (the file's names are as {strange[0]})" if strange and expected.keys() - headers.keys() else ""
        said = quantizer.where.name if quantizer else CONFIG
        if whose:
            said, found = f"{said}, which says {quantizer.method}", f"{found} (some are as those of {whose})"
        raise QjaxError(
            f"{folder}: the weights do not fit {said}: {listing(problems)}{found}; get the files that belong together"
        )


def _read_parameters(
    folder: Path,
    tensors: list[StoredTensor],
    headers: Mapping[str, Header],
    head: Header | None,
    stacks: Mapping[str, int],
) -> dict[str, jax.Array]:
    """The parameters; those of stacks that are all among the tensors together, so that no more than one is held twice."""
    leaves, broken, waiting = {}, [], {path: {} for path in stacks}
    there = {path for tensor in tensors for path, _ in tensor.parts}
    members_of = {path: [member(path, number) for number in range(stacks[path])] for path in stacks}
    whole = {each: path for path, members in members_of.items() if there.issuperset(members) for each in members}
    for tensor in tensors:
        array = read_tensor(headers[tensor.name])
        if not np.isfinite(array).all():
            broken.append(headers[tensor.name].name)
        _check_tied(tensor, headers, head)
        for path, piece in tensor.split(array).items():
            if path not in whole:
                leaves[path] = jnp.asarray(piece)
                continue
            members = waiting[whole[path]]
            members[path] = piece
            if len(members) == stacks[whole[path]]:
                leaves[whole[path]] = jnp.asarray(np.stack(list(members.values())))
                members.clear()
    if broken:
        raise QjaxError(f"{folder}: NaN or infinite weights in {listing(broken)}; get an intact checkpoint")
    return leaves


def _lazy_parameters(tensors: list[StoredTensor], headers: Mapping[str, Header], head: Header | None) -> dict[str, Lazy]:
    def read(tensor, path):
        _check_tied(tensor, headers, head)
        array = read_finite(headers[tensor.name], "get an intact checkpoint")
        return jnp.asarray(tensor.split(array)[path])

    return {
        path: Lazy(shape, dtype_of(headers[tensor.name]), functools.partial(read, tensor, path), headers[tensor.name].file)
        for tensor in tensors
        for path, shape in tensor.parts
    }


def _check_tied(tensor: StoredTensor, headers: Mapping[str, Header], head: Header | None) -> None:
    """Raises QjaxError where the tensor is the embedding's table and a tied head stored beside it is another one."""
    if head is None or tensor.parts[0][0] != TABLE:
        return
    if not np.array_equal(read_tensor(head), read_tensor(headers[tensor.name])):
        raise QjaxError(
            f"{head.file}: {head.name} differs from the embedding, but {CONFIG} ties them; "
            "set tie_word_embeddings to false to use both"
        )


def load_folder_tokenizer(folder: Path, config: DecoderConfig) -> Tokenizer | None:
    """The folder's tokenizer or None, with a warning where it is in a form that is not read.

    Raises QjaxError when it is corrupt or has more tokens than the embedding.
    """
    path = folder / TOKENIZER
    if not status(path):
        if other := next((name for name in OTHER_TOKENIZERS if status(folder / name)), None):
            warnings.warn(
                f"{folder} has {other} but no {TOKENIZER}, which texts need; transformers makes it: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})",
                QjaxWarning,
                stacklevel=2,
            )
        return None
    ids = {"bos": config.bos_id, "eos": config.eos_id}
    if beyond := [f"{name} is {i}" for name, i in ids.items() if i is not None and i >= config.vocabulary_size]:
        raise QjaxError(
            f"{folder}: {' and '.join(beyond)}, the model's embedding has {config.vocabulary_size} tokens; set it to "
            "one of them, or to null"
        )
    tokenizer = load_tokenizer(path, bos_id=config.bos_id, eos_id=config.eos_id)
    if tokenizer.vocabulary_size > config.vocabulary_size:
        raise QjaxError(
            f"{path} has {tokenizer.vocabulary_size} tokens, the model's embedding only {config.vocabulary_size}; "
            "get the tokenizer that belongs to the model"
        )
    return dataclasses.replace(tokenizer, chat_template=folder_template(folder))


def download(name: str) -> Path:
    """Fetches a model of the Hugging Face hub (or finds it in the hub's cache); the folder with its files.

    Raises QjaxError when there is no such model or no network.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's, HTTP's and the network's own families of exceptions, all to the same effect
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise QjaxError(
            f"{name!r} is no folder here and could not be fetched from the Hugging Face hub ({cause}); "
            "give a folder, or check the name and the network"
        ) from error


def save_huggingface(
    folder: str | Path,
    model: Model,
    *,
    overwrite: bool = False,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Path | None = None,
) -> None:
    """Writes a folder that `load_huggingface` and the transformers library read, which appears when it is whole.

    Quantized leaves are written as the values they stand for, in the checkpoint's type; with `dtype` all weights are in that.
    A lazy model is read tensor by tensor. shard_bytes: more are written as shards of that size, with an index. beside: a folder
    whose tokenizer's and generation's files are copied as they are. Raises QjaxError for a folder that is not empty (unless
    `overwrite`) or cannot be written, for a model that its family's files cannot express, and lists layers with an activation
    format, which a plain folder has no word for.
    """
    require_model("save_huggingface", model)
    config = write_config(model.config)
    shapes = parameter_shapes(model.config)
    leaves = flatten(model.params)
    check_parameters(leaves, shapes)
    if rounding := [f"{path} ({leaf.activation})" for path, leaf in leaves.items() if getattr(leaf, "activation", None)]:
        raise QjaxError(
            f"a Hugging Face folder cannot say that layers round their inputs: {listing(rounding)}; keep it with qjax.save, or "
            "write the weights alone: model._replace(params=qjax.dequantize_tree(model.params, None))"
        )
    own = checkpoint_dtype(leaves) if dtype is None else np.dtype(dtype)
    config["torch_dtype"] = own.name
    family = FAMILIES[model.config.family]
    stored = {tensor.name: tensor for tensor in stored_tensors(family, shapes, model.config.heads)}
    leaves = apart(leaves, stacks_in(family, shapes))

    def make(name: str) -> dict[str, np.ndarray]:
        arrays = {path: _to_numpy(leaves[path], own) for path, _ in stored[name].parts}
        cast = arrays if dtype is None else {path: _cast(path, array, own) for path, array in arrays.items()}
        return {name: stored[name].join(cast)}

    sizes = {name: math.prod(tensor.shape) * own.itemsize for name, tensor in stored.items()}
    with new_folder(folder, overwrite=overwrite, replaces=REPLACED) as new:
        write_shards(new, sizes, make, shard_bytes)
        write_companions(new, model, beside)
        write_atomically(new / CONFIG, json.dumps(config, indent=1) + "\n")


def checkpoint_dtype(leaves: Mapping[str, object]) -> DTypeLike:
    """The type of the unquantized weights: the token embedding's, or the first plain leaf's; float32 if there is none."""
    plain = {path: leaf for path, leaf in leaves.items() if not is_quantized(leaf)}
    first = plain.get(TABLE, next(iter(plain.values()), None))
    return np.dtype(np.float32) if first is None else np.dtype(first.dtype)


def _cast(path: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Raises QjaxError where the type holds some values as infinity."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise QjaxError(f"{path} has values that {dtype.name} does not hold; write it in bfloat16 or float32")
    return cast


def _to_numpy(leaf: object, dtype: DTypeLike) -> np.ndarray:
    leaf = materialised(leaf)
    return np.asarray(dequantize(leaf, dtype) if is_quantized(leaf) else leaf)
