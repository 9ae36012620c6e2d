"""A GGUF file as a Model: kernels and the table of embeddings keep the file's codes, scales and minima (`blocks.py`).

Everything is checked against the file's size before a tensor is read. What is neither is decoded to float32 where it is
quantized. Of floats each tensor keeps its type.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.gguf import blocks
from qjax.checkpoints.gguf.config import CONSTANTS, config_of
from qjax.checkpoints.gguf.container import Contents, TensorInfo, read_bytes_of, read_files
from qjax.checkpoints.gguf.names import Piece, experts_apart, stored_pieces, stored_shape
from qjax.checkpoints.gguf.vocabulary import tokenizer_json
from qjax.checkpoints.leaves import template
from qjax.errors import QjaxError
from qjax.files import expand, listing
from qjax.formats import UNQUANTIZED
from qjax.lazy import Lazy
from qjax.linear import Table, is_quantized
from qjax.models.config import DecoderConfig
from qjax.models.families import read_config
from qjax.models.model import Model
from qjax.models.parameters import parameter_shapes, unflatten
from qjax.models.stacks import spread, stack_of, together
from qjax.models.tokenizer import Tokenizer, wrap_tokenizer
from qjax.models.tokenizer_trial import parse_safely
from qjax.models.walk import TABLE
from qjax.qtensor import QTensor, dequantize
from qjax.untrusted import is_folder, refuse_links_out, status

SUFFIX = ".gguf"
DECODED = 2**23  # weights of a table at a time


def gguf_file(place: Path) -> Path | None:
    """The GGUF file at a place: itself, or the one model in a folder that holds no other kind of weights; None for neither.

    Raises QjaxError for a folder of several models, and for links out of it.
    """
    if not is_folder(place):
        return place if place.suffix.lower() == SUFFIX and status(place) else None
    if any(place.glob("*.safetensors")) or any(place.glob("*.safetensors.index.json")):
        return None
    files = sorted(path for path in place.glob("*") if path.suffix.lower() == SUFFIX and not path.name.startswith("mmproj"))
    models = [path for path in files if path.name.find("-00001-of-") >= 0 or "-of-" not in path.name]
    if len(models) > 1:
        raise QjaxError(f"{place} holds several models, {listing(path.name for path in models)}; name one of the files")
    refuse_links_out(place, files)
    return models[0] if models else None


def load_gguf(path: str | Path, *, lazy: bool = False) -> Model:
    """The model in a GGUF file, or in the several files that it was split into; its name is the file's, without the ending.

    lazy: tensors are read whenever they are needed (`lazy.py`). Raises QjaxError, one line, for whatever is missing, malformed
    or not supported.
    """
    path = expand(path)
    contents = read_files(path)
    try:
        return _load(path, contents, lazy)
    except QjaxError as error:
        raise error if str(error).startswith(str(path)) else QjaxError(f"{path}: {error}") from error


def _load(path: Path, contents: Contents, lazy: bool) -> Model:
    tensors = dict(contents.tensors)
    constants = {name: _floats(tensors.pop(name)).reshape(-1) for name in CONSTANTS if name in tensors}
    content = config_of(contents.values, tensors, constants)
    config = read_config(content)
    shapes = parameter_shapes(config)
    stacks = experts_apart(tensors, shapes)
    shapes = spread({path: shape[1:] if path in stacks else shape for path, shape in shapes.items()}, stacks)
    pieces = stored_pieces(config, shapes, str(contents.values["general.architecture"]))
    _check(pieces, tensors)
    tokenizer = _tokenizer(contents.values, config)
    leaves, broken = {}, []

    @functools.lru_cache(maxsize=1)  # a leaf's arrays are asked for one after the other
    def read(name: str, number: int) -> QTensor:
        return _leaf(tensors[name], pieces[name][number], _rows(tensors[name]))

    for name, parts in pieces.items():
        try:
            leaves |= _leaves(tensors[name], parts, read if lazy else None)
        except _NotFiniteError:
            broken.append(name)
    if broken:
        raise QjaxError(f"NaN or infinite weights in {listing(broken)}; get an intact file")
    leaves = together(leaves, stacks)
    kernels = (leaf for path, leaf in leaves.items() if is_quantized(leaf) and path != TABLE)
    formats = dict.fromkeys(str(leaf.format) for leaf in kernels)
    recipe = f"gguf file: {listing(formats)}" if formats else UNQUANTIZED
    return Model(config, unflatten(leaves), tokenizer, path.stem, recipe)


class _NotFiniteError(QjaxError):
    pass


def _check(pieces: Mapping[str, tuple[Piece, ...]], tensors: Mapping[str, TensorInfo]) -> None:
    """Names, shapes, types and places of all tensors, before any is read. Raises QjaxError that lists what is wrong."""
    problems = [f"missing {name}" for name in pieces if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in pieces]
    places = []
    for name, parts in pieces.items():
        if (info := tensors.get(name)) is None:
            continue
        shape = stored_shape(parts)
        if info.shape != shape:
            problems.append(f"{name} has shape {info.shape}, expected {shape}")
            continue
        try:
            end = info.start + _bytes(info)
            if end > info.end:
                problems.append(f"{name} ends after the file")
            places.append((str(info.file), info.start, end, name))
        except QjaxError as error:
            problems.append(str(error))
    places.sort()
    problems += [
        f"{name} begins within {other}"
        for (file, _, end, other), (same, start, _, name) in itertools.pairwise(places)
        if same == file and start < end
    ]
    problems += _mixed(pieces, tensors)
    if problems:
        raise QjaxError(f"the tensors do not fit the model that it describes: {listing(problems)}")


def _mixed(pieces: Mapping[str, tuple[Piece, ...]], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Experts that files hold one by one, of different types."""
    kinds = collections.defaultdict(dict)  # of a stack: type -> the first tensor of it
    for name, (first, *_) in pieces.items():
        if name in tensors and stack_of(first.path) != first.path:
            kinds[stack_of(first.path)].setdefault(tensors[name].kind, name)
    mixed = [" and ".join(names.values()) for names in kinds.values() if len(names) > 1]
    return [f"{names} are of different types, expected one for all experts of a layer" for names in mixed]


def _keeps_codes(path: str) -> bool:
    return path.endswith("/kernel") or path == TABLE


def _bytes(info: TensorInfo) -> int:
    return int(np.prod(info.shape[:-1], dtype=object)) * blocks.row_bytes(info)


def _leaves(info: TensorInfo, parts: tuple[Piece, ...], read: Callable | None) -> dict[str, object]:
    """Our parameters of a tensor, by path. read: of its name and the number of a part, where they are read when needed."""
    if read is None:
        stored = _rows(info)
        return {part.path: _leaf(info, part, stored) for part in parts}
    return {part.path: _lazy_leaf(info, part, functools.partial(read, info.name, i)) for i, part in enumerate(parts)}


def _rows(info: TensorInfo) -> np.ndarray:
    """The tensor's bytes, a row each."""
    return read_bytes_of(info, _bytes(info)).reshape(-1, blocks.row_bytes(info))


def _leaf(info: TensorInfo, part: Piece, stored: np.ndarray) -> QTensor | Table | jax.Array:
    try:
        if info.kind in blocks.FLOATS:
            array = _finite(stored.view(blocks.FLOATS[info.kind][1]).reshape(info.shape))
        elif _keeps_codes(part.path):
            stored = stored.reshape(*info.shape[:-1], -1)
            codes = blocks.quantized(blocks.KINDS[info.kind], stored if part.rows is None else stored[part.rows])
            return Table(codes) if part.path == TABLE else codes
        else:
            array = _decoded(blocks.KINDS[info.kind], stored, info.shape)
    except QjaxError as error:
        raise _NotFiniteError(f"{info.file}: {error} in {info.name}; get an intact file") from error
    array = array if part.rows is None else array[part.rows]
    if part.path.endswith("/offset"):  # of a norm that multiplies with 1 + offset: files hold the sum
        array = array - np.ones((), array.dtype)
    return jnp.asarray(array.swapaxes(-1, -2) if part.transposed else array)


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise QjaxError("NaN or infinite weights")
    return array


def _decoded(kind: blocks.Kind, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of rows, some at a time."""
    values = np.empty((len(rows), rows.shape[1] // kind.nbytes * kind.weights), np.float32)
    step = max(1, DECODED // values.shape[1])
    for start in range(0, len(rows), step):
        values[start : start + step] = np.asarray(dequantize(blocks.quantized(kind, rows[start : start + step]))).T
    return values.reshape(shape)


def _floats(info: TensorInfo) -> np.ndarray:
    if info.kind not in blocks.FLOATS or info.start + _bytes(info) > info.end:
        raise QjaxError(f"{info.name} is no tensor of floats within the file")
    return _finite(_rows(info).view(blocks.FLOATS[info.kind][1]).astype(np.float32))


def _lazy_leaf(info: TensorInfo, part: Piece, read: Callable[[], QTensor | Table]) -> QTensor | Table | Lazy:
    def anew():
        return _leaf(info, part, _rows(info))

    if info.kind in blocks.FLOATS:
        return Lazy(part.shape, blocks.FLOATS[info.kind][1], anew, info.file)
    if not _keeps_codes(part.path):
        return Lazy(part.shape, np.dtype(np.float32), anew, info.file)
    table = part.path == TABLE
    record = {"format": blocks.KINDS[info.kind].format, "in_features": part.shape[-1 if table else -2], "table": table}
    arrays, structure = jax.tree.flatten(template(record, part.shape))
    lazy = [
        Lazy(each.shape, np.dtype(each.dtype), functools.partial(lambda i: jax.tree.leaves(read())[i], i), info.file)
        for i, each in enumerate(arrays)
    ]
    return jax.tree.unflatten(structure, lazy)


def _tokenizer(values: Mapping[str, object], config: DecoderConfig) -> Tokenizer | None:
    """The file's tokenizer. Raises QjaxError where it is unsafe or has more tokens than the embedding."""
    content = tokenizer_json(values)
    if content is None:
        return None
    tokenizer = wrap_tokenizer(parse_safely(content), bos_id=config.bos_id, eos_id=config.eos_id)
    ids = {"bos": config.bos_id, "eos": config.eos_id}
    beyond = [f"{name} is {i}" for name, i in ids.items() if i is not None and i >= config.vocabulary_size]
    if beyond or tokenizer.vocabulary_size > config.vocabulary_size:
        what = " and ".join(beyond) or f"the tokenizer has {tokenizer.vocabulary_size} tokens"
        raise QjaxError(f"{what}, the model's embedding has {config.vocabulary_size}; get the file that belongs to the model")
    template = values.get("tokenizer.chat_template")
    return dataclasses.replace(tokenizer, chat_template=template if isinstance(template, str) else None)
