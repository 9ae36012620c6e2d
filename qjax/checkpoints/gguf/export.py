"""A model as a GGUF file: codes as they are (`joining.py`), names and rows as the architecture has them (`names.py`).

Kernels whose codes no type of blocks holds are refused. Those that are not quantized, and embeddings, keep their type; norms,
biases and routers are float32, as llama.cpp wants them. Tensors are made one by one as the file is written.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qjax.checkpoints.gguf import joining
from qjax.checkpoints.gguf.blocks import FLOATS, KINDS
from qjax.checkpoints.gguf.container import TensorInfo
from qjax.checkpoints.gguf.keys import architecture_of, model_keys, require_loadable, require_same
from qjax.checkpoints.gguf.model import SUFFIX
from qjax.checkpoints.gguf.names import Piece, stored_pieces, stored_shape
from qjax.checkpoints.gguf.tokens import tokenizer_values
from qjax.checkpoints.gguf.vocabulary import NO_TOKENIZER
from qjax.checkpoints.gguf.writing import Entry, write_container
from qjax.checkpoints.narrowing import in_float16
from qjax.checkpoints.target import LEFT_OUT, RefusedError, besides
from qjax.files import listing, write_atomically
from qjax.folders import require_file
from qjax.lazy import materialised
from qjax.linear import Linear, Table, is_quantized
from qjax.models.model import Model
from qjax.models.parameters import check_parameters, flatten, parameter_shapes
from qjax.models.walk import TABLE
from qjax.qtensor import QTensor

OWN = {dtype: number for number, (_, dtype) in FLOATS.items()}
FLOAT32 = OWN[np.dtype(np.float32)]
KEPT = ("/kernel", "/embedding")  # what is written in its own type
FILE_TYPES = {  # general.file_type of files that are mostly of a type
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12},
    **{"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "MXFP4": 38},
}
NAMES = {number: name for number, (name, *_) in (FLOATS | KINDS).items()}


def export_gguf(path: str | Path, model: Model, *, overwrite: bool = False, chat_template: str | None = None) -> None:
    """Writes a file that llama.cpp and `load_gguf` read, which appears when it is whole.

    Raises QjaxError for a family that has no such files, for what its architecture has no keys for or llama.cpp does not load,
    and lists layers that no type of blocks holds, with the nearest recipe that fits.
    """
    path, architecture = require_file(path, SUFFIX, overwrite=overwrite), architecture_of(model.config)
    require_loadable(model.config)
    shapes = parameter_shapes(model.config)
    leaves = flatten(model.params)
    check_parameters(leaves, shapes)
    leaves = {path: in_float16(leaf.weight if isinstance(leaf, Table) else leaf) for path, leaf in leaves.items()}
    pieces = stored_pieces(model.config, shapes, architecture)
    kinds = _kinds(pieces, leaves)
    values, constants = model_keys(model.config)
    entries = [_entry(name, parts, kinds[name], leaves) for name, parts in pieces.items()]
    infos = {each.name: TensorInfo(path, each.name, each.shape, each.kind, 0, 0) for each in entries}
    require_same(model.config, values, infos, constants)
    entries += [Entry(name, each.shape, FLOAT32, each.nbytes, lambda each=each: each) for name, each in constants.items()]
    mostly = Counter()
    for each in entries:
        mostly[NAMES[each.kind]] += math.prod(each.shape) * each.name.startswith("blk.")
    own = {"general.name": model.name, "general.quantization_version": 2}
    own["general.file_type"] = FILE_TYPES[mostly.most_common(1)[0][0]]
    found = tokenizer_values(model.tokenizer, model.config.vocabulary_size) if model.tokenizer is not None else {}
    own |= found or {"tokenizer.ggml.model": NO_TOKENIZER}
    if chat_template is not None:
        own["tokenizer.chat_template"] = chat_template
    write_atomically(path, functools.partial(write_container, values=values | own, entries=entries))


def _kinds(pieces: Mapping[str, tuple[Piece, ...]], leaves: Mapping[str, object]) -> dict[str, int]:
    """The number of every tensor's type. Raises QjaxError that lists what has none."""
    found, problems, nearest = {}, [], {}
    for name, parts in pieces.items():
        held = [leaves[part.path] for part in parts]
        kept = parts[0].path.endswith(KEPT)
        kinds = dict.fromkeys(_kind(leaf) if kept else FLOAT32 for leaf in held)
        if len(kinds) > 1:
            problems.append(f"{name}: parts that are stored side by side are of different types")
        found[name] = next(iter(kinds))
        if isinstance(found[name], str):
            problems.append(f"{name}: {found[name]}")
            held = [each for each in held if is_quantized(each) and each.format]
            fits = [joining.nearest(each.format, each.shape[-2]) for each in held]
            recipes = "rule embed=rtn:{}" if parts[0].path == TABLE else "rtn:{0}, gptq:{0}"
            nearest |= {recipes.format(fmt): fmt for fmt in fits if fmt is not None}
    if problems:
        advice = ", ".join(nearest)
        advice = f"; the nearest recipes that fit: {advice}" if nearest else ""
        raise RefusedError(f"gguf cannot hold {listing(problems)}{advice}")
    return found


def _kind(leaf: object) -> int | str:
    if isinstance(leaf, QTensor) and leaf.codes.ndim in (2, 3):
        return joining.kind_of(leaf.format, leaf.in_features)
    if isinstance(leaf, Linear) and (more := besides(leaf, order=False)):
        return LEFT_OUT.format(", ".join(more))
    if is_quantized(leaf):
        return "it is no matrix"
    return OWN.get(np.dtype(leaf.dtype), FLOAT32)


def _entry(name: str, parts: tuple[Piece, ...], kind: int, leaves: Mapping[str, object]) -> Entry:
    shape = stored_shape(parts)
    count, row = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 1)
    size = row // KINDS[kind].weights * KINDS[kind].nbytes if kind in KINDS else row * FLOATS[kind][1].itemsize

    def make() -> np.ndarray:
        stored = np.empty((count, size), np.uint8)
        for part in parts:
            rows = _rows(materialised(leaves[part.path]), part, kind)
            stored[slice(None) if part.rows is None else part.rows] = rows.reshape(-1, size)
        return stored

    return Entry(name, shape, kind, count * size, make)


def _rows(leaf: object, part: Piece, kind: int) -> np.ndarray:
    """The bytes of a parameter, an output channel or a token after the other."""
    if isinstance(leaf, QTensor):
        return joining.rows_of(kind, leaf)
    array = np.asarray(leaf).astype(FLOATS[kind][1])
    if part.path.endswith("/offset"):  # of a norm that multiplies with 1 + offset: files hold the sum
        array = array + np.ones((), array.dtype)
    array = array.swapaxes(-1, -2) if part.transposed else array
    return np.ascontiguousarray(array).view(np.uint8)
