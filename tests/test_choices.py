"""qjax.evaluate.choices: answers and accuracies from log-likelihoods."""

import math

import numpy as np
import pytest

from qjax.checkpoints.load import load
from qjax.driver.decoder import quantize
from qjax.errors import QjaxError
from qjax.evaluate.choices import accuracy
from qjax.evaluate.likelihood import Likelihood, likelihoods, make_pair
from qjax.evaluate.questions import last_word, make_task, multiple_choice, multiple_context
from qjax.evaluate.tasks import load_task

from .conftest import byte_tokenizer, random_model, tiny_config

QUESTIONS = [
    multiple_choice("the cat sat on", ["a mat", "the", "it"], 1),
    multiple_choice("a dog", ["barks", "is a rather long answer"], 0),
    multiple_context(["Ann saw Bo and Ann", "Ann saw Bo and Bo"], "smiled.", 1),
]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(context=48), byte_tokenizer(bos=True))


def test_answers_are_the_likeliest_choices(model):
    found = accuracy(model, make_task("toy", QUESTIONS))
    pairs = [[make_pair(model, *candidate) for candidate in question.candidates] for question in QUESTIONS]
    alone = [[likelihoods(model, [[pair]]).value[0] for pair in group] for group in pairs]
    for i, (question, scores) in enumerate(zip(QUESTIONS, alone, strict=True)):
        np.testing.assert_allclose(found.loglikelihoods[i], scores, rtol=1e-5)
        assert found.answers[i] == np.argmax(scores)
        assert found.answers_normalised[i] == np.argmax(np.array(scores) / question.lengths)
    right = np.array(found.answers) == found.gold
    assert found.value == right.mean()
    assert found.stderr == pytest.approx(right.std(ddof=1) / math.sqrt(3))
    assert (found.gold, found.truncated, found.kind) == ((1, 0, 1), 0, "choices")


def test_of_equally_likely_choices_the_first_is_the_answer(model, monkeypatch):
    """As in lm-evaluation-harness; also of those that are equal per character."""
    questions = [multiple_choice("q", ["aa", "bb", "cccc"], 1), multiple_choice("q", ["aaaa", "bb", "ccccc"], 0)]
    found = Likelihood(np.array([-2.0, -1.0, -1.0, -4.0, -2.0, -5.0]), np.zeros(6, bool))
    monkeypatch.setattr("qjax.evaluate.choices.likelihoods", lambda *_, **__: found)
    given = accuracy(model, make_task("toy", questions))
    assert (given.answers, given.answers_normalised, given.value, given.normalised) == ((1, 1), (2, 0), 0.5, 0.5)


def test_last_words_must_be_the_models_own(model):
    found = accuracy(model, make_task("words", [last_word("once upon a", "time"), last_word("x" * 60, "y")]))
    assert (found.value, found.answers, found.answers_normalised) == (0.0, (1, 1), ())
    assert math.isnan(found.normalised)
    assert found.perplexity == pytest.approx(math.exp(-np.mean(found.loglikelihoods)))
    assert found.truncated == 1


@pytest.mark.parametrize("batch_tokens", [16, 400])
def test_the_batch_does_not_matter(model, batch_tokens):
    task = make_task("toy", QUESTIONS * 5)
    expected, found = accuracy(model, task), accuracy(model, task, batch_tokens=batch_tokens)
    assert found.answers == expected.answers
    for ours, theirs in zip(found.loglikelihoods, expected.loglikelihoods, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_packed_weights_answer_as_decoded_ones(model):
    quantized, _ = quantize(model, "rtn:int4-g16")
    task = make_task("toy", QUESTIONS)
    decoded, packed = accuracy(quantized, task), accuracy(quantized, task, packed=True)
    assert packed.answers == decoded.answers
    np.testing.assert_allclose(np.concatenate(packed.loglikelihoods), np.concatenate(decoded.loglikelihoods), rtol=1e-5)


def test_long_and_empty_choices(model):
    assert accuracy(model, make_task("toy", [*QUESTIONS, multiple_choice("why", ["x" * 60, "y"], 0)])).truncated == 1
    task = make_task("toy", [*QUESTIONS, multiple_choice("why", ["", "y"], 0, delimiter="")])
    with pytest.raises(QjaxError, match="task toy, question 4: continuation '' has no tokens"):
        accuracy(model, task)
    assert len(accuracy(model, task, max_questions=3).answers) == 3


@pytest.mark.slow
def test_the_bundled_model_knows_its_documents():
    """Chance is 25 %; two bits take nearly all of it away."""
    model, task = load("bundled"), load_task("cloze", 60)
    found = accuracy(model, task)
    assert found.value > 0.4
    broken = accuracy(quantize(model, "rtn:int2-g128")[0], task)
    assert broken.value < found.value - 0.05
