"""qjax.models.vocabulary: likelihoods by a piece of the vocabulary at a time are those of all logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qjax.models import model as module
from qjax.models.model import apply_head, losses, scores
from tests.conftest import random_model, tiny_config

VOCABULARY, TOKENS = 257, 33
HEADS = {
    "untied": {},
    "tied": {"tied": True},
    "tied, capped and scaled": {"tied": True, "logit_softcap": 2.0, "logit_scale": 3.0},
    "bias": {"head_bias": True},
}


@pytest.fixture
def bounded(monkeypatch):
    """Sets how many logits are held at a time."""
    module.stages.cache_clear()
    yield lambda bound: monkeypatch.setattr(module, "LOGITS_AT_ONCE", bound)
    module.stages.cache_clear()


def largest_array(function, *args) -> int:
    """Elements of the largest array that a function computes."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            yield from itertools.chain.from_iterable(map(sizes, jaxprs_in_params(equation.params)))

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize(("head", "words"), [*((head, 64) for head in HEADS), ("tied, capped and scaled", 1), ("bias", 200)])
def test_pieces_of_the_vocabulary_are_the_whole(bounded, head, words):
    model = random_model(tiny_config(**HEADS[head]))
    if head == "bias":
        output = model.params["head"]["output"]
        output["bias"] = jnp.arange(VOCABULARY) / 100.0
    x = 3 * jax.random.normal(jax.random.key(0), (3, 11, model.config.hidden_size))
    targets = jax.random.randint(jax.random.key(1), (3, 11), 0, VOCABULARY)
    logits = np.asarray(apply_head(model, x), np.float64)
    best = logits.argmax(-1)
    targets = targets.at[:, ::2].set(best[:, ::2])
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]

    bounded(words * TOKENS)
    np.testing.assert_allclose(losses(model, x, targets), expected, rtol=1e-5, atol=1e-5)
    places = jnp.arange(TOKENS)
    likelihood, likeliest = scores(model, x, places, targets.reshape(-1))
    np.testing.assert_allclose(likelihood, -expected.reshape(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(likeliest, (targets == best).reshape(-1))
    hidden = TOKENS * model.config.hidden_size
    held = max(words * TOKENS, words * model.config.hidden_size, hidden)
    assert largest_array(lambda x: losses(model, x, targets), x) <= held < VOCABULARY * TOKENS
    assert largest_array(lambda x: scores(model, x, places, targets.reshape(-1)), x) <= held


def test_words_of_no_probability_are_none(bounded):
    """Logits of -inf, as of words that a mask or an infinite bias leaves out."""
    model = random_model(tiny_config(head_bias=True))
    bias = jnp.zeros(VOCABULARY).at[:150].set(-jnp.inf)
    model.params["head"]["output"]["bias"] = bias
    x = jax.random.normal(jax.random.key(0), (1, TOKENS, model.config.hidden_size))
    targets = jnp.full((1, TOKENS), 200)
    expected = losses(model, x, targets)
    module.stages.cache_clear()
    bounded(64 * TOKENS)
    np.testing.assert_allclose(losses(model, x, targets), expected, rtol=1e-5)
    assert np.all(np.isfinite(expected))
