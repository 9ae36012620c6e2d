"""Folders of models: ours, Hugging Face's, and those of other libraries, which are also written anew in a third one's files."""

import json
import random
from pathlib import Path

from qjax.checkpoints.export import GGUF, export
from qjax.checkpoints.huggingface import load_huggingface, weight_files
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import load_packed
from qjax.checkpoints.targets import TARGETS
from qjax.checkpoints.tensors import DTYPES, read_headers, read_tensor
from qjax.errors import QjaxError
from qjax.models.families import read_config
from qjax.untrusted import read_json
from tests.conftest import FAMILY_CHANGES
from tests.fuzz import mutations, seeds
from tests.fuzz.reader import Reader, write


def _config(rng: random.Random, folder: Path) -> None:
    config = json.loads(seeds.checkpoint(rng.choice(list(FAMILY_CHANGES)))["config.json"])
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 16
    config |= rng.choice(({}, {"rope_scaling": scaled}, {"layer_types": ["full_attention"] * 2}, {"rope_parameters": scaled}))
    write(rng, folder, {"config.json": mutations.json_bytes(rng, config)})


def _checkpoint(rng: random.Random, folder: Path) -> None:
    """One of the files of a folder is changed: by value, or in its header alone."""
    files = dict(seeds.checkpoint(rng.choice(list(FAMILY_CHANGES))))
    match rng.randrange(3):
        case 0:
            files["config.json"] = mutations.json_bytes(rng, json.loads(files["config.json"]))
        case 1:
            files["model.safetensors"] = weights(rng, files["model.safetensors"])
        case _:
            header, _ = split(files["model.safetensors"])
            index = {"weight_map": dict.fromkeys(header, "model-00001-of-00001.safetensors"), "metadata": {"total_size": 1}}
            files["model-00001-of-00001.safetensors"] = files.pop("model.safetensors")
            files["model.safetensors.index.json"] = mutations.json_bytes(rng, index)
    write(rng, folder, files)


def _quantized(rng: random.Random, folder: Path) -> None:
    """What a folder says of its quantizer is changed, or what it holds; now and then it is said in a file of its own."""
    files = dict(seeds.foreign_folder(rng.choice(list(seeds.FOREIGN))))
    config = json.loads(files["config.json"])
    settings = config.pop("quantization_config")
    if rng.random() < 0.5:
        files["model.safetensors"] = weights(rng, files["model.safetensors"])
    else:
        settings = mutations.json_value(rng, settings)
    raw = json.dumps(settings).replace(f'"{mutations.RAW}', '"').encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        files[rng.choice(("quantize_config.json", "quant_config.json", "hf_quant_config.json"))] = raw
    else:
        config["quantization_config"] = settings
    files["config.json"] = json.dumps(config).encode()
    write(rng, folder, files)


def split(content: bytes) -> tuple[dict, bytes]:
    """Header and rest of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def weights(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutations.binary(rng, content)
    header, rest = split(content)
    for entry in header.values():
        if rng.random() < 0.1 and "dtype" in entry:
            entry["dtype"] = rng.choice(
                ("F64", "I8", "I32", "U8", "F8_E4M3", "F8_E5M2", "BOOL", "I64", "U16", "F32", "F16", "BF16", "F4", "C64")
            )
    header = mutations.json_bytes(rng, header)
    length = len(header) if rng.random() < 0.9 else rng.choice(mutations.ODD_NUMBERS[:14]) & (2**64 - 1)
    return length.to_bytes(8, "little") + header + rest


def _tensors(rng: random.Random, folder: Path) -> None:
    write(rng, folder, {"model.safetensors": weights(rng, seeds.checkpoint("llama")["model.safetensors"])})


def _read_tensors(folder: Path) -> None:
    for header in read_headers(weight_files(folder)).values():
        if header.dtype in DTYPES:
            read_tensor(header)


def _packed(rng: random.Random, folder: Path) -> None:
    files = dict(seeds.packed_folder(rng.random() < 0.7))
    if rng.random() < 0.8:
        files["qjax.json"] = mutations.json_bytes(rng, json.loads(files["qjax.json"]))
    else:
        files["model.safetensors"] = weights(rng, files["model.safetensors"])
    write(rng, folder, files)


def _read_converted(folder: Path) -> None:
    """Read, and what can be read written in the files of every target."""
    model = load(folder)
    for number, target in enumerate((*TARGETS, GGUF)):
        try:
            export(folder / f"{number}.gguf", model, target)
        except QjaxError as error:
            said = error
    raise said


READERS = {
    "config": Reader(_config, lambda folder: read_config(read_json(folder / "config.json"))),
    "checkpoint": Reader(_checkpoint, load_huggingface),
    "quantized": Reader(_quantized, load_huggingface),
    "converted": Reader(_quantized, _read_converted),
    "tensors": Reader(_tensors, _read_tensors),
    "packed": Reader(_packed, load_packed),
}
