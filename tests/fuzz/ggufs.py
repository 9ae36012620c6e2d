"""GGUF files and tokenizers."""

import json
import math
import random
from pathlib import Path

import numpy as np

from qjax.checkpoints.gguf.blocks import KINDS
from qjax.checkpoints.load import load
from qjax.models.tokenizer import Tokenizer, load_tokenizer
from tests.fuzz import mutations, seeds
from tests.fuzz.reader import Reader, write
from tests.gguf_files import ARCHITECTURES, NUMBERS, file_bytes, random_rows


def _gguf(rng: random.Random, folder: Path) -> None:
    """A file whose values, tensors or bytes are changed, now and then the first of two."""
    _write(rng, folder, *seeds.gguf_parts(rng.random() < 0.5))


def _architecture(rng: random.Random, folder: Path) -> None:
    """The same of a file of any architecture, as `export_gguf` writes it."""
    _write(rng, folder, *seeds.gguf_written(rng.choice(list(ARCHITECTURES))))


def _write(rng: random.Random, folder: Path, values: dict, tensors: dict) -> None:
    name = rng.choice(("tiny.gguf", "tiny-00001-of-00002.gguf"))
    write(rng, folder, {name: _changed(rng, values, tensors)})


def _split(rng: random.Random, folder: Path) -> None:
    """A model in two files, one of which is changed."""
    halves, changed = seeds.gguf_halves(), rng.randrange(2)
    files = seeds.gguf_files()
    files[list(files)[changed]] = _changed(rng, *halves[changed])
    write(rng, folder, files)


def _changed(rng: random.Random, values: dict, tensors: dict) -> bytes:
    values, tensors = dict(values), dict(tensors)
    kind = rng.randrange(4)
    if kind == 0:
        key = rng.choice(list(values))
        values[key] = _gguf_value(rng, values[key])
        if rng.random() < 0.2:
            values["split.count"] = rng.choice((0, 1, 2, 10**6))
            values["split.no"] = rng.randrange(2)
    elif kind == 1:
        name = rng.choice(list(tensors))
        stored, shape, content = tensors.pop(name)
        sizes = (*mutations.ODD_NUMBERS[:15], *shape)
        shape = tuple(rng.choice(sizes) % 2**63 for _ in shape) if rng.random() < 0.5 else shape
        stored = rng.choice(list(NUMBERS)) if rng.random() < 0.5 else stored
        name = rng.choice((name, name, "x" * 70, "output.weight", "rope_freqs.weight", "\x1b[2J"))
        tensors[name] = (stored, shape, content[: rng.choice((0, len(content) // 2, len(content)))])
    elif kind == 2:
        name = rng.choice(list(tensors))
        tensors[name] = _retyped(rng, tensors[name][1])
    content = file_bytes(values, tensors, version=rng.choice((2, 3)))
    if kind == 3:
        head = rng.choice((600, 12_000, len(content)))  # most of what can go wrong is in the first bytes
        content = mutations.binary(rng, content[:head]) + content[head:]
    return content


def _retyped(rng: random.Random, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor of this shape in blocks of any type that it fits; one in five is of random bytes, scales too."""
    kind = rng.choice([kind for kind in KINDS.values() if shape[-1] % kind.weights == 0] or list(KINDS.values()))
    rows = random_rows(kind.name, math.prod(shape[:-1]), shape[-1], rng.randrange(2**32))
    return kind.name, shape, rng.randbytes(rows.size) if rng.random() < 0.2 else rows.tobytes()


def _gguf_value(rng: random.Random, value: object) -> object:
    """Another of a kind that can be written."""
    new = mutations.value(rng)
    if isinstance(value, list) and rng.random() < 0.7:
        return [mutations.text(rng, each)[:2_000] if rng.random() < 0.02 else each for each in value] * rng.choice((1, 1, 2))
    if isinstance(new, str):
        return new.encode("utf-8", "replace").decode()
    if type(new) is int:
        return new % 2**63
    if isinstance(value, np.ndarray) and value.size:
        return rng.choice((value[:-1], value[::-1].copy(), np.full_like(value, rng.choice((0, -1, 3, 2**31 - 1)))))
    return float(np.clip(new, -1e38, 1e38)) if type(new) is float else rng.random() < 0.5


def _read_gguf(folder: Path) -> None:
    model = load(folder)
    if model.tokenizer is not None:
        _use(model.tokenizer)


def _tokenizer(rng: random.Random, folder: Path) -> None:
    kinds = seeds.tokenizers()
    tree = rng.choice(kinds)
    if rng.random() < 0.3:  # parts of another
        other = rng.choice(kinds)
        tree = tree | {name: other[name] for name in rng.sample(list(other), 2)}
    if rng.random() < 0.7:  # of its parts the vocabulary alone would be met otherwise
        model = tree["model"]
        head = {"model": {name: each for name, each in model.items() if name not in ("vocab", "merges")}}
        changed = mutations.json_value(rng, {name: each for name, each in tree.items() if name != "model"} | head)
        if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
            changed["model"] |= {name: model[name] for name in ("vocab", "merges") if name in model}
        tree = changed
        write(rng, folder, {"tokenizer.json": json.dumps(tree).replace(f'"{mutations.RAW}', '"').encode()})
        return
    write(rng, folder, {"tokenizer.json": mutations.json_bytes(rng, tree)})


def read_tokenizer(folder: Path) -> None:
    _use(load_tokenizer(folder / "tokenizer.json"))


def _use(tokenizer: Tokenizer) -> None:
    for text in ("a b  é😀 The end.", "<s>\n" * 9):
        ids, counts = tokenizer.encode_with_bytes(text)
        assert not len(ids) or counts.sum() == len(text.encode())
        tokenizer.decode(tokenizer.encode(text, special_tokens=True))


READERS = {
    "gguf": Reader(_gguf, _read_gguf),
    "architecture": Reader(_architecture, _read_gguf),
    "split": Reader(_split, _read_gguf),
    "tokenizer": Reader(_tokenizer, read_tokenizer),
}
