"""qjax.models.layout: rows of several sequences, and cached keys and values, give what each sequence gives alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.layout import cache_layout, tree_layout
from qjax.models.model import apply, empty_caches, hidden_states, hidden_states_cached

from .conftest import FAMILY_CHANGES, FURTHER_CHANGES, random_model, tiny_config

CHANGES = FAMILY_CHANGES | {name: FURTHER_CHANGES[name] for name in ("bloom", "falcon", "smollm3", "gpt_oss")}


@pytest.fixture(scope="module", params=CHANGES)
def model(request):
    return random_model(tiny_config(**CHANGES[request.param]))


def test_branches_see_the_beginning_and_themselves(model):
    generator = np.random.default_rng(0)
    beginning, first, second = (generator.integers(0, 257, n).astype(np.int32) for n in (7, 5, 9))
    tokens = np.concatenate([beginning, first, second])[None]
    positions = np.concatenate([np.arange(7), np.arange(7, 12), np.arange(7, 16)])[None]
    branches = np.repeat([0, 1, 2], [7, 5, 9])[None]
    layout = tree_layout(jnp.asarray(positions), jnp.asarray(branches))
    together = np.asarray(hidden_states(model, tokens, layout))[0]
    for branch, place in ((first, slice(7, 12)), (second, slice(12, 21))):
        alone = np.asarray(hidden_states(model, np.concatenate([beginning, branch])[None]))[0]
        np.testing.assert_allclose(together[place], alone[7:], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(together[:7], alone[:7], rtol=1e-5, atol=1e-5)


def test_cached_steps_are_the_whole_sequence(model):
    """Sequences of two lengths in one padded batch, then a token at a time: what is behind a sequence's end never matters."""
    tokens = np.random.default_rng(1).integers(0, 257, (2, 20)).astype(np.int32)
    whole = np.asarray(hidden_states(model, tokens))
    lengths = np.array([12, 8])
    caches = empty_caches(model, 2, 24)
    x, caches = hidden_states_cached(model, tokens[:, :12], cache_layout(jnp.zeros(2, jnp.int32), 12, 24), caches)
    np.testing.assert_allclose(np.asarray(x)[0], whole[0, :12], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(x)[1, :8], whole[1, :8], rtol=1e-5, atol=1e-5)
    for step in range(8):
        at = lengths + step
        layout = cache_layout(jnp.asarray(at), 1, 24)
        x, caches = hidden_states_cached(model, tokens[[0, 1], at][:, None], layout, caches)
        np.testing.assert_allclose(np.asarray(x)[:, 0], whole[[0, 1], at], rtol=1e-5, atol=1e-5)


def test_logits_are_those_of_the_plain_path(model):
    """A single branch is the sequence itself."""
    tokens = np.random.default_rng(2).integers(0, 257, (2, 16)).astype(np.int32)
    places = jnp.broadcast_to(jnp.arange(16), (2, 16))
    layout = tree_layout(places, jnp.zeros((2, 16), jnp.int32))
    np.testing.assert_allclose(hidden_states(model, tokens, layout), hidden_states(model, tokens), rtol=1e-5, atol=1e-5)
    assert apply(model, tokens).shape == (2, 16, 257)
