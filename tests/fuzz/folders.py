"""Folders of models: ours, Hugging Face's, and those of other libraries, which are also written anew in a third one's files."""

import functools
import hashlib
import json
import random
from pathlib import Path

from qjax.checkpoints.export import GGUF, export
from qjax.checkpoints.huggingface import load_huggingface, weight_files
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import DESCRIPTION, WEIGHTS, _digest, load_packed
from qjax.checkpoints.targets import TARGETS
from qjax.checkpoints.tensors import DTYPES, read_headers, read_tensor
from qjax.errors import QjaxError
from qjax.models.families import read_config
from qjax.untrusted import read_json
from tests.family_files import EVERY
from tests.fuzz import mutations, seeds, weights
from tests.fuzz.reader import Reader, write

CONVERTIBLE = (  # kinds of folders that some target can hold
    *("gptq", "awq", "awq gemv", "bitsandbytes", "bitsandbytes' fp4", "bitsandbytes' int8"),
    *("compressed", "compressed of old", "auto-round"),
)
SETTINGS = ("int", "float", "group", "channel", "tensor", "block", "gptq", "awq", "gemm", "gemv", -1, 0, 2, 3, 4, 8, 16, 32, 64)
RECORDS = ("int4-g16", "int3-channel", "nf4-g16", "int4-g32-sym", "float16[32]", "int8-token", "Scale", "Permute", 16, 32)


def _json(rng: random.Random, tree: dict) -> bytes:
    """The tree, changed; half of the time to one of values of the same kinds."""
    return json.dumps(mutations.near(rng, tree)).encode() if rng.random() < 0.5 else mutations.json_bytes(rng, tree)


def _config(rng: random.Random, folder: Path) -> None:
    ours = json.loads(seeds.checkpoint(rng.choice(list(seeds.CHECKPOINTS)))["config.json"])
    config = rng.choice((ours, rng.choice(list(EVERY.values()))))
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 16
    config |= rng.choice(({}, {"rope_scaling": scaled}, {"layer_types": ["full_attention"] * 2}, {"rope_parameters": scaled}))
    write(rng, folder, {"config.json": _json(rng, config)})


def _checkpoint(rng: random.Random, folder: Path) -> None:
    """One of the files of a folder is changed: by value, or in its header alone."""
    files = dict(seeds.checkpoint(rng.choice(list(seeds.CHECKPOINTS))))
    match rng.randrange(3):
        case 0:
            files["config.json"] = _json(rng, json.loads(files["config.json"]))
        case 1:
            files["model.safetensors"] = weights.changed(rng, files["model.safetensors"])
        case _:
            header, _ = weights.split(files["model.safetensors"])
            index = {"weight_map": dict.fromkeys(header, "model-00001-of-00001.safetensors"), "metadata": {"total_size": 1}}
            files["model-00001-of-00001.safetensors"] = files.pop("model.safetensors")
            files["model.safetensors.index.json"] = mutations.json_bytes(rng, index)
    write(rng, folder, files)


def _quantized(rng: random.Random, folder: Path, kinds: tuple[str, ...] = tuple(seeds.FOREIGN), near: float = 0.5) -> None:
    """What a folder says of its quantizer is changed, or what it holds; now and then it is said in a file of its own.

    near: the probability of a change that leaves the files whole.
    """
    files = dict(seeds.foreign_folder(rng.choice(kinds)))
    config = json.loads(files["config.json"])
    settings, whole = config.pop("quantization_config"), rng.random() < near
    if rng.random() < 0.5:
        change = weights.near if whole else weights.broken
        files["model.safetensors"] = change(rng, files["model.safetensors"])
    else:
        settings = mutations.near(rng, settings, SETTINGS) if whole else mutations.json_value(rng, settings)
    raw = json.dumps(settings).replace(f'"{mutations.RAW}', '"').encode("utf-8", "surrogatepass")
    if rng.random() < 0.2 and not whole:
        files[rng.choice(("quantize_config.json", "quant_config.json", "hf_quant_config.json"))] = raw
    else:
        config["quantization_config"] = settings
    files["config.json"] = json.dumps(config).encode()
    write(rng, folder, files)


def _tensors(rng: random.Random, folder: Path) -> None:
    write(rng, folder, {"model.safetensors": weights.changed(rng, seeds.checkpoint("llama")["model.safetensors"])})


def _read_tensors(folder: Path) -> None:
    for header in read_headers(weight_files(folder)).values():
        if header.dtype in DTYPES:
            read_tensor(header)


def _packed(rng: random.Random, folder: Path) -> None:
    """The description or the weights are changed, most often with digests that are right."""
    files = dict(seeds.packed_folder(rng.random() < 0.7))
    description = json.loads(files[DESCRIPTION])
    if rng.random() < 0.3:
        files[DESCRIPTION] = mutations.json_bytes(rng, description)
        return write(rng, folder, files)
    if rng.random() < 0.6:
        files[WEIGHTS] = weights.changed(rng, files[WEIGHTS])
    else:
        description = mutations.near(rng, description, RECORDS)
    if isinstance(digests := description.get("digests"), dict) and rng.random() < 0.9:
        description["digests"] = digests | {name: hashlib.sha256(files[name]).hexdigest() for name in digests if name in files}
        description["digest"] = _digest(description)
    return write(rng, folder, files | {DESCRIPTION: json.dumps(description).encode()})


def _read_converted(folder: Path) -> None:
    """Read, and written in the files of every target that can hold it, which are read, too."""
    model, written, said = load(folder), 0, None
    for number, target in enumerate((*TARGETS, GGUF)):
        try:
            export(folder / f"{number}.gguf", model, target)
        except QjaxError as error:
            said = error
            continue
        written += 1
        try:
            load(folder / f"{number}.gguf")
        except QjaxError as error:
            raise AssertionError(f"{target} wrote what is not read: {error}") from error
    if not written:
        raise said


READERS = {
    "config": Reader(_config, lambda folder: read_config(read_json(folder / "config.json"))),
    "checkpoint": Reader(_checkpoint, load_huggingface),
    "quantized": Reader(_quantized, load_huggingface),
    "converted": Reader(functools.partial(_quantized, kinds=CONVERTIBLE, near=0.8), _read_converted),
    "tensors": Reader(_tensors, _read_tensors),
    "packed": Reader(_packed, load_packed),
}
