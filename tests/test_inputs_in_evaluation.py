"""Rounded inputs and caches in all that is measured: perplexity, divergence, answers, generation are of what `apply` does."""

import numpy as np
import pytest
import scipy.special

import qjax
from qjax.evaluate.choices import accuracy
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.divergence import divergence
from qjax.evaluate.generate import generate
from qjax.evaluate.likelihood import make_pair
from qjax.evaluate.questions import make_task, multiple_choice
from qjax.evaluate.windows import corpus_windows, parse_convention
from qjax.models.model import apply
from tests.conftest import byte_tokenizer, random_model, tiny_config
from tests.test_cli import succeeds

CORPUS = Corpus("dickens", ("It was the best of times, it was the worst of times. " * 6,), "f")
QUESTIONS = [multiple_choice("the cat sat on", ["a mat", "the", "it"], 1), multiple_choice("a dog", ["barks", "sleeps"], 0)]
PROMPTS = [np.array(list(text.encode()), np.int32) for text in ("a", "the cat")]
TOKENS = np.random.default_rng(0).integers(0, 257, (4, 24)).astype(np.int32)
RECIPES = (
    "rtn:int8-channel-sym-max/int4-token",
    pytest.param("rtn:int4-g16/int5-g16-affine", marks=pytest.mark.slow),
    pytest.param("rtn:int4-g16/mxfp4", marks=pytest.mark.slow),
    "rtn:int8-channel-sym-max/int8-tensor-p99@parallel",
    pytest.param("hadamard(block=16)+rtn:nvfp4/nvfp4@parallel", marks=pytest.mark.slow),
    pytest.param(  # its other outliers are those of a whole batch
        "llm_int8(threshold=2,outliers=calibration):int8-channel-sym-max@parallel", marks=pytest.mark.slow
    ),
    "rtn:int8-channel-sym-max/int4-token kv:int4-g8",
)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(context=48), byte_tokenizer(bos=True))


def log_softmax(model, tokens):
    return scipy.special.log_softmax(np.asarray(apply(model, tokens), np.float64), axis=-1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_measured_is_what_the_model_computes(model, recipe):
    kept, _ = qjax.quantize(model, recipe, calibration=TOKENS)
    plain = kept._replace(params=qjax.dequantize_tree(kept.params))
    windows = corpus_windows(model, CORPUS, parse_convention("windows-32"))
    scored, targets = windows.scored[:, 1:], windows.tokens[:, 1:, None]

    def of(each):
        found = log_softmax(each, windows.tokens)[:, :-1]
        return found, -np.take_along_axis(found, targets, -1)[..., 0][scored].mean()

    (ours, nll), (_, without), (theirs, _) = map(of, (kept, plain, model))
    for packed in (False, True):
        found = qjax.perplexity(kept, CORPUS, "windows-32", packed=packed)
        assert np.log(found.value) == pytest.approx(nll, rel=1e-5)
        assert abs(nll - without) > 1e-5 or recipe.endswith("kv:int4-g8")  # what is rounded is told from what is not
        kl = (np.exp(theirs) * (theirs - ours)).sum(-1)[scored].mean()
        assert divergence(kept, model, CORPUS, "windows-32", packed=packed).kl == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_and_generation(model, recipe):
    kept, _ = qjax.quantize(model, recipe, calibration=TOKENS)
    given = accuracy(kept, make_task("toy", QUESTIONS)).loglikelihoods
    for question, scores in zip(QUESTIONS, given, strict=True):
        for candidate, value in zip(question.candidates, scores, strict=True):
            pair = make_pair(kept, *candidate)
            found = np.take_along_axis(log_softmax(kept, pair.tokens[None])[0, :-1], pair.tokens[1:, None], -1)
            assert value == pytest.approx(found[-pair.continuation :].sum(), rel=1e-4)
    for packed in (False, True):
        for prompt, tokens in zip(PROMPTS, generate(kept, PROMPTS, 8, packed=packed).tokens, strict=True):
            whole = np.concatenate([prompt, tokens]).astype(np.int32)
            logits = np.asarray(apply(kept, np.pad(whole, (0, 48 - len(whole)))[None]))[0, len(prompt) - 1 : len(whole) - 1]
            np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_the_cache_is_told(model, tmp_path, capsys):
    """Bytes of a token, exactly, in rows and by `qjax info`: 2 layers, 2 heads of 8 numbers, keys and values."""
    recipe = "rtn:int8-channel-sym-max kv:int4-g8(residual=16)"
    sweep = qjax.Sweep(("rtn:int8-channel-sym-max", recipe), (CORPUS,), parse_convention("windows-32"), 2)
    rows = {row["recipe"]: row for row in qjax.run_sweep(model, sweep, tmp_path / "rows")}
    assert "cache_bytes_per_token" not in rows["rtn:int8-channel-sym-max"]
    each = 2 * 2 * 2 * (8 * 4 // 8 + 4)  # codes, a scale and a smallest value in 16 bits
    assert (rows[recipe]["cache_bytes_per_token"], rows[recipe]["cache_window_bytes"]) == (each, 2 * 2 * 2 * 8 * 16 * 2)
    kept, _ = qjax.quantize(model, recipe)
    qjax.save(tmp_path / "kept", kept)
    told = succeeds(capsys, "info", tmp_path / "kept")
    assert f"{each} bytes a token in kv:int4-g8(residual=16), and 2,048 of a text in 16 bits" in told
