"""The readers: each makes an input in a folder from a random generator, and reads it."""

import bz2
import gzip
import io
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qjax.checkpoints.huggingface import load_huggingface, weight_files
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import load_packed
from qjax.checkpoints.peft import load_adapter
from qjax.checkpoints.tensors import DTYPES, read_headers, read_tensor
from qjax.driver.placement import parse_rule, place
from qjax.evaluate.corpora import load_corpus
from qjax.evaluate.tasks import load_task
from qjax.models.families import read_config
from qjax.models.tokenizer import Tokenizer, load_tokenizer
from qjax.recipe import parse_recipe
from qjax.report.rendering import to_csv
from qjax.report.reports import tables
from qjax.sweep import store
from qjax.untrusted import read_json
from tests.conftest import FAMILY_CHANGES
from tests.fuzz import mutations, seeds
from tests.gguf_files import NUMBERS, file_bytes

KERNELS = [f"block_{i}/{name}/kernel" for i in range(3) for name in ("attention/q", "attention/o", "mlp/up", "mlp/down")]
RECIPES = (
    *("rtn:int4-g128", "rtn(clip=mse):int3-g128", "awq+gptq(damp=0.05):int3-g128", "gptq+descend(sweeps=4):int2-g64", "nf4-dq"),
    *("gptq:int3-g128@sequential", "rtn:int8-channel-sym/int8-token", "bf16", "none", "mxfp4", "nvfp4", "int4-g64-z16"),
)
WORDS = (
    *(
        "rtn",
        "gptq",
        "awq",
        "hqq",
        "descend",
        "int",
        "4",
        "nf4",
        "fp8_e4m3",
        "-g",
        "-dq",
        "-sym",
        "-channel",
        "channel",
        "(",
        ")",
    ),
    *(
        "=",
        ",",
        ":",
        "@",
        "/",
        "+",
        "-",
        ";",
        ".",
        "clip=mse",
        "damp=",
        "sweeps=",
        "none",
        "qep",
        "int8-token",
        "^",
        "$",
        "*",
        "{9}",
    ),
    *("{4294967296}", "(" * 3_000, "(a+)+", "\\d", "[", "]", "|", "?"),
)
EXTRA = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "qjax.json", "rows.jsonl")


class Reader(NamedTuple):
    """make(rng, folder) writes an input; read(folder) reads it."""

    make: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]


def _write(rng: random.Random, folder: Path, files: dict[str, bytes]) -> None:
    """Writes the files; one in a hundred is something else than a file of this content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match rng.randrange(1_000):
            case 0:
                os.mkfifo(path)
            case 1:
                path.mkdir()
            case 2:
                path.symlink_to("/dev/zero")
            case 3:
                path.symlink_to(path)
            case 4:
                path.write_bytes(b"")
            case 5:
                pass
            case _:
                path.write_bytes(content)


def _config(rng: random.Random, folder: Path) -> None:
    config = json.loads(seeds.checkpoint(rng.choice(list(FAMILY_CHANGES)))["config.json"])
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 16
    config |= rng.choice(({}, {"rope_scaling": scaled}, {"layer_types": ["full_attention"] * 2}, {"rope_parameters": scaled}))
    _write(rng, folder, {"config.json": mutations.json_bytes(rng, config)})


def _checkpoint(rng: random.Random, folder: Path) -> None:
    """One of the files of a folder is changed: by value, or in its header alone."""
    files = dict(seeds.checkpoint(rng.choice(list(FAMILY_CHANGES))))
    match rng.randrange(3):
        case 0:
            files["config.json"] = mutations.json_bytes(rng, json.loads(files["config.json"]))
        case 1:
            files["model.safetensors"] = _weights(rng, files["model.safetensors"])
        case _:
            header, _ = _split(files["model.safetensors"])
            index = {"weight_map": dict.fromkeys(header, "model-00001-of-00001.safetensors"), "metadata": {"total_size": 1}}
            files["model-00001-of-00001.safetensors"] = files.pop("model.safetensors")
            files["model.safetensors.index.json"] = mutations.json_bytes(rng, index)
    _write(rng, folder, files)


def _quantized(rng: random.Random, folder: Path) -> None:
    """What a folder says of its quantizer is changed, or what it holds; now and then it is said in a file of its own."""
    files = dict(seeds.foreign_folder(rng.choice(list(seeds.FOREIGN))))
    config = json.loads(files["config.json"])
    settings = config.pop("quantization_config")
    if rng.random() < 0.5:
        files["model.safetensors"] = _weights(rng, files["model.safetensors"])
    else:
        settings = mutations.json_value(rng, settings)
    raw = json.dumps(settings).replace(f'"{mutations.RAW}', '"').encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        files[rng.choice(("quantize_config.json", "quant_config.json", "hf_quant_config.json"))] = raw
    else:
        config["quantization_config"] = settings
    files["config.json"] = json.dumps(config).encode()
    _write(rng, folder, files)


def _split(content: bytes) -> tuple[dict, bytes]:
    """Header and rest of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _weights(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutations.binary(rng, content)
    header, rest = _split(content)
    for entry in header.values():
        if rng.random() < 0.1 and "dtype" in entry:
            entry["dtype"] = rng.choice(
                ("F64", "I8", "I32", "U8", "F8_E4M3", "F8_E5M2", "BOOL", "I64", "U16", "F32", "F16", "BF16", "F4", "C64")
            )
    header = mutations.json_bytes(rng, header)
    length = len(header) if rng.random() < 0.9 else rng.choice(mutations.ODD_NUMBERS[:14]) & (2**64 - 1)
    return length.to_bytes(8, "little") + header + rest


def _tensors(rng: random.Random, folder: Path) -> None:
    _write(rng, folder, {"model.safetensors": _weights(rng, seeds.checkpoint("llama")["model.safetensors"])})


def _read_tensors(folder: Path) -> None:
    for header in read_headers(weight_files(folder)).values():
        if header.dtype in DTYPES:
            read_tensor(header)


def _packed(rng: random.Random, folder: Path) -> None:
    files = dict(seeds.packed_folder(rng.random() < 0.7))
    if rng.random() < 0.8:
        files["qjax.json"] = mutations.json_bytes(rng, json.loads(files["qjax.json"]))
    else:
        files["model.safetensors"] = _weights(rng, files["model.safetensors"])
    _write(rng, folder, files)


def _adapter(rng: random.Random, folder: Path) -> None:
    files = dict(seeds.adapter())
    if rng.random() < 0.7:
        files["adapter_config.json"] = mutations.json_bytes(rng, json.loads(files["adapter_config.json"]))
    else:
        files["adapter_model.safetensors"] = _weights(rng, files["adapter_model.safetensors"])
    _write(rng, folder, files)


def _gguf(rng: random.Random, folder: Path) -> None:
    """A file whose values, tensors or bytes are changed, now and then the first of two."""
    values, tensors = map(dict, seeds.gguf_parts(rng.random() < 0.5))
    kind = rng.randrange(3)
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
    content = file_bytes(values, tensors, version=rng.choice((2, 3)))
    if kind == 2:
        head = rng.choice((600, 12_000, len(content)))  # most of what can go wrong is in the first bytes
        content = mutations.binary(rng, content[:head]) + content[head:]
    _write(rng, folder, {rng.choice(("tiny.gguf", "tiny-00001-of-00002.gguf")): content})


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
        _write(rng, folder, {"tokenizer.json": json.dumps(tree).replace(f'"{mutations.RAW}', '"').encode()})
        return
    _write(rng, folder, {"tokenizer.json": mutations.json_bytes(rng, tree)})


def _read_tokenizer(folder: Path) -> None:
    _use(load_tokenizer(folder / "tokenizer.json"))


def _use(tokenizer: Tokenizer) -> None:
    for text in ("a b  é😀 The end.", "<s>\n" * 9):
        ids, counts = tokenizer.encode_with_bytes(text)
        assert not len(ids) or counts.sum() == len(text.encode())
        tokenizer.decode(tokenizer.encode(text, special_tokens=True))


def _rows(rng: random.Random, folder: Path) -> None:
    held = [dict(row) for row in rng.sample(seeds.rows(), rng.randint(1, 4))]
    lines = [json.dumps(row).encode() for row in held]
    if rng.random() < 0.9:
        at = rng.randrange(len(lines))
        lines[at] = mutations.json_bytes(rng, held[at]).replace(b"\n", b" ")
    content = b"".join(line + b"\n" for line in lines)
    _write(rng, folder, {"rows.jsonl": content if rng.random() < 0.9 else mutations.binary(rng, content)})


def _read_rows(folder: Path) -> None:
    list(store.Reader(folder / "rows.jsonl").objects())
    rows = store.read_rows(folder / "rows.jsonl")
    for _, table in tables(rows):
        to_csv(table)


QUESTIONS = (
    {"query": "Question: why?", "choices": ["because", "for no reason"], "gold": 1},
    {"context_options": ["The cup fell so the cup", "The cup fell so the table"], "continuation": "broke.", "gold": 0},
    {"context": "Once upon a", "continuation": "time"},
)
CSV = "".join(f"Example {i}?,w,x,y,z,{'ABCDAB'[i]}\n" for i in range(6)).encode()


def _compressed(rng: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    suffix = rng.choice(("", "", ".gz", ".bz2"))
    packed = {"": bytes, ".gz": lambda c: gzip.compress(c, 1), ".bz2": lambda c: bz2.compress(c, 1)}[suffix](content)
    return name + suffix, mutations.binary(rng, packed) if rng.random() < 0.3 else packed


def _lines(rng: random.Random, entries: list[dict]) -> bytes:
    lines = [json.dumps(entry).encode() for entry in entries]
    lines[rng.randrange(len(lines))] = mutations.json_bytes(rng, rng.choice(entries)).replace(b"\n", b" ")
    return b"\n".join(lines)


def _task(rng: random.Random, folder: Path) -> None:
    match rng.randrange(4):
        case 0 | 1:
            name, content = _compressed(rng, "t.jsonl", _lines(rng, [rng.choice(QUESTIONS)] * 3))
        case 2:
            text = "Cooking: A man\n2\nruns.\nsits.\ncooks.\nsleeps.\n" * 2
            name, content = _compressed(rng, "t.txt", mutations.binary(rng, text.encode()))
        case _:
            files = {"data/dev/art_dev.csv": CSV, "data/test/art_test.csv": CSV, "data/test/law_test.csv": CSV}
            changed = rng.choice(list(files))
            files[changed] = mutations.binary(rng, CSV)
            if rng.random() < 0.3:
                _write(rng, folder / "task.folder", files)
                return
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", rng.choice((0, 8, 12, 14))) as archive:
                for path, rows in files.items():
                    archive.writestr(path, rows)
            content = buffer.getvalue()
            name, content = "t.zip", mutations.binary(rng, content) if rng.random() < 0.7 else content
    _write(rng, folder, {f"task.{name}": content})


def _read_task(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        load_task(f"mmlu:{path}")


def _text(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        name, content = _compressed(rng, "t.jsonl", _lines(rng, [{"text": "Once upon a time"}] * 3))
    else:
        name, content = _compressed(rng, "t.txt", mutations.binary(rng, ("Once upon a time.\n" * 5).encode()))
    _write(rng, folder, {name: content})


def _read_text(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        load_corpus(f"{'jsonl' if '.jsonl' in path.name else 'text'}:{path}")


def _recipe(rng: random.Random, folder: Path) -> None:
    words = mutations.text(rng, rng.choice(RECIPES), WORDS)
    (folder / "recipe").write_bytes(words.encode("utf-8", "surrogatepass"))


def _rule(rng: random.Random, folder: Path) -> None:
    words = mutations.text(
        rng, f"{rng.choice(('mlp/down', '^block_1/', 'attention/(q|k)', '.*'))}={rng.choice(RECIPES)}", WORDS
    )
    (folder / "recipe").write_bytes(words.encode("utf-8", "surrogatepass"))


def _words(folder: Path) -> str:
    return (folder / "recipe").read_bytes().decode("utf-8", "surrogatepass")


def _read_recipe(folder: Path) -> None:
    recipe = parse_recipe(_words(folder))
    assert recipe is None or parse_recipe(str(recipe)) == recipe


def _read_rule(folder: Path) -> None:
    rule = parse_rule(_words(folder))
    if not re.search(r"[*+}].*[*+}]", rule.pattern):  # patterns are the user's own: how long they search is theirs, too
        place(KERNELS, None, [rule])


def _path(rng: random.Random, folder: Path) -> None:
    words = mutations.text(
        rng, rng.choice(("models/a", "~/texts/b.txt", "./c", "d.jsonl.gz")), ("/", "~", "..", "x" * 250, "\0")
    )
    (folder / "recipe").write_bytes(words.encode("utf-8", "surrogatepass"))


def _read_path(folder: Path) -> None:
    path = _words(folder)
    readers = (
        load_huggingface,
        lambda p: load_corpus(f"text:{p}"),
        lambda p: load_task(f"piqa:{p}"),
        lambda p: store.read_rows(Path(p)),
    )
    readers[len(path) % len(readers)](path)


def read_unchanged(folder: Path) -> int:
    """Reads the models and tokenizers as they are before any change; their number."""
    files = [*seeds.models(), *({"tokenizer.json": json.dumps(tree).encode()} for tree in seeds.tokenizers())]
    for number, each in enumerate(files):
        place = folder / str(number)
        place.mkdir()
        for name, content in each.items():
            (place / name).write_bytes(content)
        read = _read_tokenizer if "tokenizer.json" in each and len(each) == 1 else load
        read(place)
    return len(files)


READERS = {
    "config": Reader(_config, lambda folder: read_config(read_json(folder / "config.json"))),
    "checkpoint": Reader(_checkpoint, load_huggingface),
    "quantized": Reader(_quantized, load_huggingface),
    "tensors": Reader(_tensors, _read_tensors),
    "packed": Reader(_packed, load_packed),
    "adapter": Reader(_adapter, lambda folder: load_adapter(folder, seeds.ADAPTED)),
    "gguf": Reader(_gguf, _read_gguf),
    "tokenizer": Reader(_tokenizer, _read_tokenizer),
    "rows": Reader(_rows, _read_rows),
    "task": Reader(_task, _read_task),
    "text": Reader(_text, _read_text),
    "recipe": Reader(_recipe, _read_recipe),
    "rule": Reader(_rule, _read_rule),
    "path": Reader(_path, _read_path),
}
