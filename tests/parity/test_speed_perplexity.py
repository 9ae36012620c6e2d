"""Perplexity evaluation against transformers on torch, paired, same model and windows, float32 on the CPU.

Speeds are ratios within one process: runs alternate, and the median of the pairs counts.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.huggingface import load_huggingface
from qjax.evaluate.perplexity import score
from qjax.models import walk
from tests.parity import peers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.peer, pytest.mark.slow]

SHAPES = {  # name: hidden, mlp, layers, heads, key/value heads, vocabulary, windows, window
    "1M": (128, 384, 6, 4, 2, 1024, 64, 256),
    "15M": (288, 768, 6, 6, 6, 32000, 8, 256),
    "50M": (512, 1536, 12, 8, 4, 8192, 8, 512),
}


def make(folder, hidden, mlp, layers, heads, kv_heads, vocabulary):
    """A random Llama written by transformers, as both libraries load it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    return theirs, load_huggingface(folder)


@pytest.mark.parametrize("name", SHAPES)
def test_at_least_as_fast_as_transformers(tmp_path, name):
    *shape, count, window = SHAPES[name]
    theirs, ours = make(tmp_path, *shape)
    tokens = np.random.default_rng(0).integers(0, shape[-1], (count, window)).astype(np.int32)

    def run_theirs():
        return peers.losses_transformers(theirs, tokens)

    def run_ours():
        return score(ours, tokens)[:, 1:]

    np.testing.assert_allclose(run_ours(), run_theirs(), atol=1e-4)
    ratios, rates = [], []
    for _ in range(7):
        seconds = []
        for run in (run_ours, run_theirs):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
        rates.append(tokens.size / seconds[0])
    print(f"{name}: {statistics.median(rates):,.0f} tokens/s, {statistics.median(ratios):.2f} times transformers")
    assert statistics.median(ratios) >= 1


@pytest.mark.parametrize("name", SHAPES)
def test_at_least_half_of_the_matmul_rate(tmp_path, name):
    """Time of the whole evaluation against the time of its linear layers' matmuls alone, at the shapes they have in it."""
    *shape, count, window = SHAPES[name]
    _, ours = make(tmp_path, *shape)
    tokens = np.random.default_rng(0).integers(0, shape[-1], (count, window)).astype(np.int32)
    hidden, mlp, layers, heads, kv_heads, vocabulary = shape
    head = hidden // heads
    kernels = [(hidden, hidden), (hidden, kv_heads * head), (hidden, kv_heads * head), (hidden, hidden)]
    kernels += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
    rows = tokens.size
    weights = [jax.random.normal(jax.random.key(i), kernel) for i, kernel in enumerate(kernels)]
    table = jax.random.normal(jax.random.key(9), (hidden, vocabulary))
    inputs = {size: jax.random.normal(jax.random.key(size), (1024, size)) for size in {hidden, mlp}}
    matmul = jax.jit(jnp.matmul)

    def run_matmuls():
        for _ in range(rows // 1024):
            outputs = [matmul(inputs[weight.shape[0]], weight) for weight in weights * layers]
            outputs.append(matmul(inputs[hidden], table))
            jax.block_until_ready(outputs)

    flops = 2 * rows * (layers * sum(a * b for a, b in kernels) + hidden * vocabulary)
    flops += 4 * count * layers * heads * head * window * window  # scores and mixing, which are matmuls too
    linear = 2 * rows * (layers * sum(a * b for a, b in kernels) + hidden * vocabulary)
    run_matmuls()
    score(ours, tokens)
    fractions = []
    for _ in range(7):
        started = time.perf_counter()
        score(ours, tokens)
        middle = time.perf_counter()
        run_matmuls()
        stopped = time.perf_counter()
        fractions.append((flops / (middle - started)) / (linear / (stopped - middle)))
    print(f"{name}: {statistics.median(fractions):.2f} of the rate of plain matmuls of the same shapes")
    assert statistics.median(fractions) >= 0.5
    assert walk.compiled(walk.parts(ours.config)[1].module)._cache_size() == 1
