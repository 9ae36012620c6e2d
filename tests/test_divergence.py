"""qjax.evaluate.divergence against its definition in float64, on logits of whole windows."""

import math

import jax
import numpy as np
import pytest

from qjax.driver.decoder import quantize
from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.divergence import LOGITS_AT_ONCE, divergence, summarise
from qjax.evaluate.perplexity import batches_of
from qjax.evaluate.states import States
from qjax.evaluate.windows import corpus_windows, parse_convention
from qjax.models.model import apply, hidden_states
from qjax.sweep.runner import Sweep, run_sweep
from qjax.sweep.store import ROWS

from .conftest import random_model, tiny_config

CORPUS = Corpus("dickens", ("It was the best of times, it was the worst of times. " * 12,), "f")


@pytest.fixture(scope="module")
def quantized(tiny_model):
    return quantize(tiny_model, "rtn:int3-g16")[0]


@pytest.mark.parametrize("convention", ["windows-32", "llama.cpp-16"])
def test_definitions(tiny_model, quantized, convention):
    windows = corpus_windows(tiny_model, CORPUS, parse_convention(convention))
    scored, targets = windows.scored[:, 1:], windows.tokens[:, 1:, None]
    p, q = (np.asarray(apply(model, windows.tokens), np.float64)[:, :-1] for model in (tiny_model, quantized))
    same = p.argmax(-1) == q.argmax(-1)
    p, q = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1)[scored]
    change = (np.exp(np.take_along_axis(q, targets, -1)) - np.exp(np.take_along_axis(p, targets, -1)))[..., 0][scored]
    found = divergence(quantized, tiny_model, CORPUS, convention)
    expected = [kl.mean(), np.median(kl), np.quantile(kl, 0.99), same[scored].mean(), math.sqrt(np.mean(change**2))]
    np.testing.assert_allclose([found.kl, found.kl_median, found.kl_p99, found.top1, found.rms_dp], expected, rtol=1e-4)
    assert found.tokens == scored.sum()
    assert 0 < found.kl_stderr < found.kl


def test_a_model_does_not_diverge_from_itself(tiny_model):
    found = divergence(tiny_model, tiny_model, CORPUS, "windows-32")
    assert 0 <= found.kl <= 1e-6 and found.kl_p99 <= 1e-6
    assert found.top1 == 1.0 and max(found.rms_dp, found.rms_dp_stderr) <= 1e-9  # sums in another order


@pytest.mark.parametrize("batch_tokens", [1, 70, 10**6])
def test_the_batch_and_its_padding_do_not_matter(tiny_model, quantized, batch_tokens):
    expected = divergence(quantized, tiny_model, CORPUS, "windows-32")
    found = divergence(quantized, tiny_model, CORPUS, "windows-32", batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pieces_of_the_vocabulary_do_not_matter(tiny_model, quantized, monkeypatch):
    expected = divergence(quantized, tiny_model, CORPUS, "windows-32", max_windows=3)
    monkeypatch.setitem(LOGITS_AT_ONCE, jax.default_backend(), 257 * 3 * 7)
    np.testing.assert_allclose(divergence(quantized, tiny_model, CORPUS, "windows-32", max_windows=3), expected, rtol=1e-5)
    packed = divergence(quantized, tiny_model, CORPUS, "windows-32", max_windows=3, packed=True)
    np.testing.assert_allclose(packed, expected, rtol=1e-4)


def test_fewer_bits_diverge_farther(tiny_model, quantized):
    models = (quantize(tiny_model, "rtn:int6-g16")[0], quantized)
    more, fewer = (divergence(model, tiny_model, CORPUS, "windows-32") for model in models)
    assert more.kl < fewer.kl and more.top1 > fewer.top1 and more.rms_dp < fewer.rms_dp


def test_standard_errors_are_the_spread_of_repeated_measurements():
    """Windows that are alike inside: what every mean over tokens varies by is what its error says."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        like = generator.standard_normal((3, 60, 1))
        kl, same, change = like + 0.3 * generator.standard_normal((3, 60, 5))
        kl, same, change = np.exp(0.3 * kl), (same > -1).astype(float), 0.1 * change + 0.02
        scored = np.arange(5) < generator.integers(3, 6, (60, 1))
        found.append(summarise(kl, same, change, scored))
    for name in ("kl", "top1", "rms_dp"):
        spread, told = (np.array([getattr(each, f"{name}{suffix}") for each in found]) for suffix in ("", "_stderr"))
        assert np.mean(told) == pytest.approx(np.std(spread), rel=0.12), name


def test_other_vocabularies_are_refused(tiny_model):
    other = random_model(tiny_config(vocabulary_size=256), tiny_model.tokenizer)
    with pytest.raises(QjaxError, match="one vocabulary"):
        divergence(other, tiny_model, CORPUS, "windows-32")


def test_a_sweep_runs_each_model_once(tiny_model, quantized, tmp_path, monkeypatch):
    """Perplexity's hidden states serve the divergence, the baseline's that of every model; to the last bit."""
    runs = []

    def counted(model, tokens, *rest):
        runs.append(len(tokens))
        return hidden_states(model, tokens, *rest)

    convention = parse_convention("windows-32")
    batch = len(batches_of(corpus_windows(tiny_model, CORPUS, convention).tokens)[0])
    monkeypatch.setattr("qjax.models.model.hidden_states", counted)
    sweep = Sweep(("rtn:int3-g16", "rtn:int2-g16"), (CORPUS,), convention, divergence=True)
    rows = run_sweep(tiny_model, sweep, tmp_path)
    count = len(corpus_windows(tiny_model, CORPUS, convention).tokens)
    assert sum(runs) == 3 * (batch + -(-count // batch) * batch)  # three models, of each a batch more that compiles
    found = divergence(quantized, tiny_model, CORPUS, convention)
    assert (rows[1]["kl"], rows[1]["rms_dp"], rows[0]["kl"]) == (found.kl, found.rms_dp, 0.0)
    runs.clear()
    (tmp_path / ROWS).write_text("".join((tmp_path / ROWS).read_text().splitlines(keepends=True)[:2]))  # as if interrupted
    assert run_sweep(tiny_model, sweep, tmp_path)[2]["kl"] == rows[2]["kl"]
    assert sum(runs) == batch + 2 * -(-count // batch) * batch  # the model, with what compiles, and the baseline


def test_states_that_are_too_many_are_computed_again(tiny_model):
    states, batches = States(most=10), [(tiny_model, np.zeros(size)) for size in (4, 6)]
    assert list(states.through("few", iter(batches))) == batches == list(states.through("few", iter(())))
    for again in (batches, batches[1:]):
        assert list(states.through("more", iter(again))) == again
    states.drop("few")
    assert list(states.through("more", iter(batches))) == batches == list(states.through("more", iter(())))
