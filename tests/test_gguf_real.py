"""Real models in GGUF files: perplexity as transformers has it on the dequantized weights, in float32, and the time of loading.

Marked `real`; the files are in QJAX_TEST_MODELS (`paths.py`).
"""

import time

import jax
import numpy as np
import pytest

import qjax
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
