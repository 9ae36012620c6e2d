"""GGUF files against the library of llama.cpp's authors: values of all types, of random blocks and of a real file.

Needs the package gguf (0.19), and for the real file QJAX_TEST_MODELS.
"""

import numpy as np
import pytest

from qjax import qtensor
from qjax.checkpoints.gguf.blocks import KINDS, quantized
from qjax.checkpoints.gguf.export import export_gguf
from qjax.checkpoints.gguf.model import load_gguf
from qjax.lazy import materialised
from qjax.models.families import FAMILIES
from qjax.models.family import stored_tensors
from qjax.models.parameters import flatten, parameter_shapes
from tests.conftest import tiny_config
from tests.gguf_files import FURTHER, random_rows, rotated
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


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf", "qwen2.5-coder-0.5b-instruct.gguf"]
)
def test_values_of_a_real_file(name):
    path = real_model(name)
    model, reader = load_gguf(path, lazy=True), gguf.GGUFReader(path)
    tensors, leaves = {each.name: each for each in reader.tensors}, flatten(model.params)
    for layer in (0, model.config.layers - 1):
        for ours, theirs in NAMES.items():
            tensor = tensors[f"blk.{layer}.{theirs}.weight"]
            found = np.asarray(qtensor.dequantize(materialised(leaves[f"block_{layer}/{ours}/kernel"]))).T
            if model.config.family == "llama" and theirs in ("attn_q", "attn_k"):
                found = rotated(found, model.config.head_dim)
            expected = quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), err_msg=tensor.name)
    tensor = tensors["token_embd.weight"]
    expected = quants.dequantize(tensor.data[:1_000], tensor.tensor_type)
    np.testing.assert_array_equal(np.asarray(leaves["embed/tokens/embedding"])[:1_000], expected)
