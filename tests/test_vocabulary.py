"""qjax.models.vocabulary: likelihoods and distances by a piece of the vocabulary at a time are those of all logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qjax.linear import Linear, Table
from qjax.models import model as module
from qjax.models.model import apply_head, head_of, losses, scores
from qjax.models.vocabulary import distances, over_pieces, words_at_once
from qjax.rounding.nearest import rtn
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
    return lambda bound: monkeypatch.setattr(module, "LOGITS_AT_ONCE", bound)


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
    bounded(64 * TOKENS)
    np.testing.assert_allclose(losses(model, x, targets), expected, rtol=1e-5)
    assert np.all(np.isfinite(expected))


def test_the_first_of_equally_likely_words():
    """Within a piece and in another."""
    model = random_model(tiny_config(head_bias=True))
    output = model.params["head"]["output"]
    output["kernel"], output["bias"] = 0 * output["kernel"], jnp.zeros(VOCABULARY).at[jnp.array([70, 75, 200])].set(1.0)
    x, targets = jnp.ones((1, VOCABULARY, model.config.hidden_size)), jnp.arange(VOCABULARY)
    found = over_pieces(head_of(model), x[0], targets, words=64, likeliest=True)
    np.testing.assert_array_equal(found.likeliest, 70)
    assert np.flatnonzero(scores(model, x, targets, targets)[1]).tolist() == [70]


QUANTIZED = {
    "packed": lambda kernel: rtn(kernel, "int4-g16")[0],
    "rounds its input": lambda kernel: Linear(rtn(kernel, "int4-g16")[0], activation="int8-token"),
    "decoded, rounds its input": lambda kernel: Linear(kernel, activation="int8-token"),
    "table": None,
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("beside", ["float", "itself"])
def test_heads_that_are_not_cut(kind, beside):
    """They have all words at once, also beside a head that could be cut."""
    plain = random_model(tiny_config(tied=kind == "table"))
    if kind == "table":
        table = Table(rtn(plain.params["embed"]["tokens"]["embedding"].T, "int8-g32")[0])
        model = plain._replace(params=plain.params | {"embed": {"tokens": {"embedding": table}}})
    else:
        head = plain.params["head"]
        kernel = QUANTIZED[kind](head["output"]["kernel"])
        model = plain._replace(params=plain.params | {"head": head | {"output": {"kernel": kernel}}})
    x = jax.random.normal(jax.random.key(0), (1, TOKENS, plain.config.hidden_size))
    targets = jnp.arange(TOKENS) * 7
    logits = apply_head(model, x)[0]
    likelihood, likeliest = scores(model, x, jnp.arange(TOKENS), targets)
    np.testing.assert_allclose(likelihood, jax.nn.log_softmax(logits)[jnp.arange(TOKENS), targets], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(likeliest, logits.argmax(-1) == targets)
    other = plain if beside == "float" else model
    p, q = (jax.nn.log_softmax(each) for each in (apply_head(other, x)[0], logits))
    heads = (head_of(model), head_of(other))
    words = max(words_at_once(each, TOKENS, 10) for each in heads)
    assert words == VOCABULARY
    kl, same, _ = distances(heads, (x[0], x[0]), targets, words=words)
    np.testing.assert_allclose(kl, (jnp.exp(p) * (p - q)).sum(-1), rtol=1e-3, atol=2e-6)
    np.testing.assert_array_equal(same, p.argmax(-1) == q.argmax(-1))


@pytest.mark.parametrize("head", [*HEADS, "words of no probability"])
def test_distances_by_pieces_are_their_definition(head):
    """In float64, at logits whose largest one moves from piece to piece."""
    models = [random_model(tiny_config(**HEADS.get(head, HEADS["bias"])), seed=seed) for seed in (0, 1)]
    if head == "words of no probability":
        for model, ruled_out in zip(models, (90, 100), strict=True):  # Q leaves out no word that P has
            model.params["head"]["output"]["bias"] = jnp.zeros(VOCABULARY).at[:ruled_out].set(-jnp.inf)
    states = tuple(4 * jax.random.normal(jax.random.key(seed), (TOKENS, models[0].config.hidden_size)) for seed in (2, 3))
    q, p = (np.asarray(apply_head(model, x[None])[0], np.float64) for model, x in zip(models, states, strict=True))
    targets = np.where(np.arange(TOKENS) % 2, p.argmax(-1), 200)
    same = p.argmax(-1) == q.argmax(-1)
    of_q, of_p = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in (q, p))
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(of_p > 0, of_p * np.log(of_p / of_q), 0).sum(-1)
    change = (of_q - of_p)[np.arange(TOKENS), targets]
    assert len(set(p.argmax(-1) // 64)) > 2
    heads = tuple(map(head_of, models))
    for words in (1, 64, 200, VOCABULARY):
        found = distances(heads, states, jnp.asarray(targets), words=words)
        np.testing.assert_allclose(found, [kl, same, change], rtol=2e-5, atol=2e-6)
    itself = distances(heads[:1] * 2, states[:1] * 2, jnp.asarray(targets), words=64)
    np.testing.assert_allclose(itself, np.outer([0, 1, 0], np.ones(TOKENS)), atol=1e-6)


def test_words_at_a_time():
    head = head_of(random_model(tiny_config()))
    assert [words_at_once(head, 10, elements) for elements in (1, 10, 1290, 1300, 2560, 2570, 10**6)] == [
        1,
        1,
        129,
        129,
        129,
        257,
        257,
    ]
