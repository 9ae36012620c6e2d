"""Folders as other libraries write them, by hand: packing as their documents have it, and the weights that they stand for."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from qjax.checkpoints.huggingface import save_huggingface
from qjax.linear import dequantize, is_quantized
from qjax.models.families import FAMILIES
from qjax.models.family import stored_tensors
from qjax.models.parameters import flatten, parameter_shapes
from tests.conftest import GPT_OSS, tiny_config
from tests.random_weights import small_model

Maker = Callable[[str, np.ndarray], tuple[dict[str, np.ndarray], np.ndarray] | None]


def llama(**changes):
    """A Llama whose sizes fit every library's packing, its layers all of one shape: what one compiles serves the others."""
    return tiny_config(**{"hidden_size": 64, "mlp_size": 64, "kv_heads": 4, "head_dim": 16, "layers": 1} | changes)


def gpt_oss(**changes):
    """A gpt-oss whose experts fit MXFP4's blocks; gate and up have two, down has three."""
    return tiny_config(**GPT_OSS | {"hidden_size": 64, "mlp_size": 96} | changes)


def write(folder: Path, settings: dict, make: Maker, config=None, *, name: str = "quantization_config", head=False) -> dict:
    """Writes a folder whose linear layers `make` stores, and returns the (out, in) weights that it says they stand for.

    make: (module, (out, in) weight, (experts, out, in) of a stack) -> (tensors by what follows the module's name, weight), or
    None for a plain layer. name: of the entry of config.json, or of a file of its own. head: whether the head is such a layer,
    too.
    """
    config = config or llama()
    save_huggingface(folder, small_model(config))
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for stored in stored_tensors(FAMILIES[config.family], parameter_shapes(config), config.heads):
        module = stored.name.removesuffix(".weight")
        if not all(path.endswith("kernel") and (head or path != "head/output/kernel") for path, _ in stored.parts):
            continue
        weight = tensors[stored.name]
        made = make(module, weight if stored.transposed else weight.swapaxes(-1, -2))
        if made is not None:
            del tensors[stored.name]
            joint = "." if weight.ndim == 2 else "_"
            tensors |= {f"{module}{joint}{suffix}": array for suffix, array in made[0].items()}
            expected[stored.name] = made[1] if stored.transposed else made[1].swapaxes(-1, -2)
    save(folder / "model.safetensors", tensors)
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(settings))
    else:
        edit(folder, **{name: settings})
    return expected


def save(file: Path, tensors: dict) -> None:
    """Writes a file in which marked bytes (`foreign_makers.F8`) have the type that they are marked with."""
    marked = {name: array.name for name, array in tensors.items() if hasattr(array, "stored")}
    plain = {name: np.asarray(getattr(array, "stored", array), order="C") for name, array in tensors.items()}
    save_file(plain, file)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, kind in marked.items():
        header[name]["dtype"] = kind
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])


def edit(folder: Path, **entries) -> None:
    """Changes config.json."""
    content = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(content))


def change(folder: Path, how: Callable[[dict], None]) -> None:
    """Changes the tensors."""
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file({key: np.asarray(array, order="C") for key, array in tensors.items()}, folder / "model.safetensors")


def assert_stands_for(model, expected: dict) -> None:
    """Every weight of the model is, bit for bit, the one expected."""
    leaves = flatten(model.params)
    config = model.config
    found = 0
    for stored in stored_tensors(FAMILIES[config.family], parameter_shapes(config), config.heads):
        if stored.name in expected:
            here = {path: leaves[path] for path, _ in stored.parts}
            here = stored.join({p: np.asarray(dequantize(leaf) if is_quantized(leaf) else leaf) for p, leaf in here.items()})
            np.testing.assert_array_equal(here, expected[stored.name], err_msg=stored.name)
            found += 1
    assert found == len(expected) > 0


# Packing, as the libraries' documents describe it


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the first axis as 32-bit words: code i in the bits from i * bits on."""
    count = math.ceil(len(codes) * bits / 32)
    found = np.zeros((count + 1, *codes.shape[1:]), np.uint64)
    for i, row in enumerate(codes):
        word, at = divmod(i * bits, 32)
        shifted = row.astype(np.uint64) << np.uint64(at)
        found[word] |= shifted & np.uint64(2**32 - 1)
        found[word + 1] |= shifted >> np.uint64(32)
    return found[:count].astype(np.uint32).view(np.int32)


def gptq(
    seed: int = 0, *, bits: int = 4, group: int = 16, symmetric=False, version=1, dtype=np.float16, ordered=False, **leave
) -> Maker:
    """Random codes, scales and zero points as GPTQ's files hold them. ordered: inputs belong to groups at random."""
    generator = np.random.default_rng(seed)

    def make(module: str, weight: np.ndarray):
        columns, rows = weight.shape
        if any(word in module for word in leave.get("leave", ())):
            return None
        size = rows if group == -1 else group
        groups = math.ceil(rows / size)
        codes = generator.integers(0, 2**bits, (rows, columns))
        zeros = generator.integers(1, 2**bits, (groups, columns))
        if symmetric:
            zeros[:] = 2 ** (bits - 1)
        scales = generator.uniform(0.5, 1, (groups, columns)).astype(dtype) * dtype(0.05)
        index = np.arange(rows) // size
        if ordered:
            index = generator.permutation(index)
        tensors = {
            "qweight": words(codes, bits),
            "qzeros": words((zeros - (version == 1)).T, bits).T,
            "scales": scales,
            "g_idx": index.astype(np.int32),
        }
        value = scales.astype(np.float32)[index] * (codes - zeros[index]).astype(np.float32)
        return tensors, value.T

    return make
