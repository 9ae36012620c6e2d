"""GGUF files against the library of llama.cpp's authors: values of all types, of random blocks and of a real file.

Needs the package gguf (0.19), and for the real file QJAX_TEST_MODELS.
"""

import re

import numpy as np
import pytest

from qjax import dequantize, qtensor
from qjax.checkpoints.gguf.blocks import KINDS, quantized
from qjax.checkpoints.gguf.export import export_gguf
from qjax.checkpoints.gguf.model import load_gguf
from qjax.lazy import materialised
from qjax.models.families import FAMILIES
from qjax.models.family import stacks_in, stored_tensors
from qjax.models.parameters import flatten, parameter_shapes
from qjax.models.stacks import apart
from tests.conftest import tiny_config
from tests.gguf_files import FURTHER, MIXTURES, random_rows, rotated
from tests.paths import real_model
from tests.random_weights import weights_model

gguf = pytest.importorskip("gguf", reason="compares with gguf")
quants = pytest.importorskip("gguf.quants")

pytestmark = pytest.mark.peer
NAMES = {  # of the blocks' kernels, by ours
    **{f"attention/{ours}": f"attn_{theirs}" for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"mlp/{name}": f"ffn_{name}" for name in ("gate", "up", "down")},
}


@pytest.mark.parametrize(("number", "kind"), KINDS.items(), ids=[kind.name for kind in KINDS.values()])
def test_values_of_random_blocks(number, kind):
    rows = random_rows(kind.name, 40, 4 * 256, seed=1)
    theirs = quants.dequantize(rows, gguf.GGMLQuantizationType(number))
    ours = np.asarray(qtensor.dequantize(quantized(kind, rows))).T
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def converted(architecture: str, name: str, array: np.ndarray, config) -> np.ndarray:
    """A tensor of Hugging Face's files as llama.cpp's converter moves its rows."""
    if "query_key_value" not in name:
        return array
    if architecture == "falcon":
        groups = array.reshape(config.kv_heads, config.heads // config.kv_heads + 2, config.head_dim, -1)
        return np.concatenate([part.reshape(-1, array.shape[1]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
    parts = array.reshape(config.heads, 3, config.head_dim, *array.shape[1:])
    return np.concatenate([parts[:, i].reshape(-1, *array.shape[1:]) for i in range(3)])


@pytest.mark.parametrize("case", FURTHER)
def test_names_and_rows_of_an_architecture(case, tmp_path):
    """Every tensor of Hugging Face's files has the name that the library's map gives, and rows as the converter has them."""
    model, architecture = weights_model(tiny_config(**FURTHER[case])), case.partition(",")[0]
    export_gguf(tmp_path / "m.gguf", model)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {each.name: each.data for each in reader.tensors if not each.name.startswith("rope_factors")}
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.layers)
    config, leaves = model.config, flatten(model.params)
    for stored in stored_tensors(FAMILIES[config.family], parameter_shapes(config), config.heads):
        array = stored.join({path: np.asarray(leaves[path]) for path, _ in stored.parts})
        short = stored.name.removeprefix("transformer.") if architecture == "bloom" else stored.name
        theirs = names.get_name(short, try_suffixes=(".weight", ".bias"))
        expected = converted(architecture, stored.name, array, config)
        np.testing.assert_array_equal(found.pop(theirs), expected, err_msg=f"{stored.name} {theirs}")
    assert not found


def merged(config, stored: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """A tensor of a mixture's folder under the names that the converter gives it, gate and up of gpt-oss apart."""
    name = stored.replace("_proj_bias", "_proj.bias").replace(".sinks", ".sinks.weight")
    if ".mlp.experts." not in name or config.family != "gpt_oss":
        return {name: array}
    name, array = (name, array) if name.endswith("bias") else (f"{name}.weight", array.swapaxes(-1, -2))
    if "gate_up" not in name:
        return {name: array}
    turns = (array[:, start::2] for start in (0, 1))
    return {name.replace("gate_up", each): turn for each, turn in zip(("gate", "up"), turns, strict=True)}


@pytest.mark.parametrize("case", MIXTURES)
def test_names_and_experts_of_a_mixture(case, tmp_path):
    model, architecture = weights_model(tiny_config(**MIXTURES[case])), case.partition(",")[0]
    export_gguf(tmp_path / "m.gguf", model)
    found = {each.name: each.data for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.layers)
    config, leaves = model.config, flatten(model.params)
    folder, stacks = FAMILIES[config.family], {}
    leaves = {path: np.asarray(leaf) for path, leaf in apart(leaves, stacks_in(folder, parameter_shapes(config))).items()}
    for stored in stored_tensors(folder, parameter_shapes(config), config.heads):
        for name, array in merged(config, stored.name, stored.join(leaves)).items():
            together = re.sub(r"model\.(.*)block_sparse_moe(\.experts)\.\d+", r"\1feed_forward\2", name)
            stacks.setdefault(re.sub(r"experts\.\d+", "experts", together), []).append(array)
    for name, arrays in stacks.items():
        expected = np.stack(arrays) if len(arrays) > 1 else arrays[0]
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            expected = rotated(expected, config.head_dim)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        np.testing.assert_array_equal(found.pop(theirs), expected, err_msg=f"{name} {theirs}")
    assert not found


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "MXFP4"])
def test_values_of_experts(kind):
    rows = random_rows(kind, 3 * 5, 256, seed=2).reshape(3, 5, -1)
    number = next(key for key, each in KINDS.items() if each.name == kind)
    theirs = quants.dequantize(rows, gguf.GGMLQuantizationType(number))
    ours = np.asarray(qtensor.dequantize(quantized(KINDS[number], rows))).swapaxes(1, 2)
    np.testing.assert_array_equal(np.ascontiguousarray(ours).view(np.uint32), theirs.view(np.uint32))


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf", "qwen2.5-coder-0.5b-instruct.gguf"]
)
def test_values_of_a_real_file(name):
    path = real_model(name)
    model, reader = load_gguf(path, lazy=True), gguf.GGUFReader(path)
    tensors, leaves = {each.name: each for each in reader.tensors}, flatten(model.params)
    for layer in range(model.config.layers):
        for ours, theirs in NAMES.items():
            tensor = tensors[f"blk.{layer}.{theirs}.weight"]
            found = np.asarray(qtensor.dequantize(materialised(leaves[f"block_{layer}/{ours}/kernel"]))).T
            if model.config.family == "llama" and theirs in ("attn_q", "attn_k"):
                found = rotated(found, model.config.head_dim)
            expected = quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), err_msg=tensor.name)
    tensor = tensors["token_embd.weight"]
    table = np.asarray(dequantize(materialised(leaves["embed/tokens/embedding"])))
    for start in range(0, len(table), 10_000):
        rows = slice(start, start + 10_000)
        np.testing.assert_array_equal(table[rows], quants.dequantize(tensor.data[rows], tensor.tensor_type))
