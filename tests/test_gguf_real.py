"""Real models in GGUF files: perplexity as transformers has it on the dequantized weights, in float32, and the time of loading.

Marked `real`; the files are in QJAX_TEST_MODELS (`paths.py`).
"""

import math
import time

import jax
import numpy as np
import pytest

import qjax
from qjax.checkpoints.gguf.blocks import row_bytes
from qjax.checkpoints.gguf.container import read_bytes_of, read_contents
from qjax.evaluate.corpora import Corpus
from tests.paths import real_data, real_model

pytestmark = pytest.mark.real
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("name", "convention", "windows", "expected"),
    [
        (SMOLLM2, "windows-1024", 4, 23.24),
        ("qwen2.5-coder-0.5b-instruct.gguf", "windows-1024", 3, 32.10),
        ("gemma-3-270m.Q4_K_M.gguf", "windows-1024-bos", 3, 16.89),
    ],
)
def test_perplexity(name, convention, windows, expected):
    """Of the first windows of WikiText-2's raw test text.

    Qwen's file holds its tied table twice, embedding Q5_0 and head Q8_0; transformers takes the latter for both. Each as it is
    stored gives 32.16.
    """
    model = qjax.load(real_model(name))
    if name.startswith("qwen"):
        table = qjax.dequantize(model.params["head"]["output"]["kernel"]).T
        model = model._replace(params=model.params | {"embed": {"tokens": {"embedding": table}}})
    text = real_data("text/wikitext2/wiki.test.raw").read_text()
    _, nbytes = model.tokenizer.encode_with_bytes(text[: 8_000 * windows])
    end = int(np.cumsum(nbytes)[windows * 1024 + 100])
    corpus = Corpus("head", (text.encode()[:end].decode("utf-8", "ignore"),), "head")
    found = qjax.perplexity(model, corpus, convention)
    assert found.tokens == windows * 1023
    assert found.value == pytest.approx(expected, abs=0.01)


def test_loading_takes_less_than_three_seconds():
    """When it was loaded before: of the processor, which nothing else on the machine takes away."""
    path = real_model(SMOLLM2)
    jax.block_until_ready(qjax.load(path).params)
    started = time.process_time()
    jax.block_until_ready(qjax.load(path).params)
    assert time.process_time() - started < 3


def test_a_file_is_written_as_it_was_read(tmp_path):
    """Every block, in its order of rows, and a tokenizer that makes the same ids."""
    path, model = real_model(SMOLLM2), qjax.load(real_model(SMOLLM2), lazy=True)
    qjax.export(tmp_path / "a.gguf", model, "gguf")
    before, after = (read_contents(each) for each in (path, tmp_path / "a.gguf"))
    assert before.tensors.keys() == after.tensors.keys()
    for name, info in before.tensors.items():
        there = after.tensors[name]
        assert (info.kind, info.shape) == (there.kind, there.shape)
        count = math.prod(info.shape[:-1]) * row_bytes(info)
        np.testing.assert_array_equal(read_bytes_of(info, count), read_bytes_of(there, count), err_msg=name)
    for key in ("pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id"):
        np.testing.assert_array_equal(
            before.values[f"tokenizer.ggml.{key}"], after.values[f"tokenizer.ggml.{key}"], err_msg=key
        )
