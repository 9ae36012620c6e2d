"""GGUF files against the library of llama.cpp's authors: values of all types, of random blocks and of a real file.

Needs the package gguf (0.19), and for the real file QJAX_TEST_MODELS.
"""

import numpy as np
import pytest

from qjax import qtensor
from qjax.checkpoints.gguf.blocks import KINDS, quantized
from qjax.checkpoints.gguf.model import load_gguf
from qjax.lazy import materialised
from qjax.models.parameters import flatten
from tests.gguf_files import random_rows, rotated
from tests.paths import real_model

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
