"""qjax.models.model: losses in pieces of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models import model as module

VOCABULARY = 257  # of tiny_model
SHAPE = (3, 11)


@pytest.mark.parametrize(
    ("bound", "tokens"),
    [(2**23, 33), (33 * VOCABULARY, 33), (33 * VOCABULARY - 1, 17), (7 * VOCABULARY + 5, 7), (VOCABULARY, 1), (10, 1)],
)
def test_losses_keep_the_bound_and_are_those_of_all_logits(tiny_model, monkeypatch, bound, tokens):
    """The same values for any bound, the logits of `tokens` tokens at most at once: also where one sequence has more."""
    x = jax.random.normal(jax.random.key(0), (*SHAPE, tiny_model.config.hidden_size))
    targets = jax.random.randint(jax.random.key(1), SHAPE, 0, VOCABULARY)
    logits = module.stages(tiny_model.config, jnp.float32).head(tiny_model.params["head"], x, None)
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], axis=-1)[..., 0]
    sizes, logsumexp = [], jax.nn.logsumexp
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", bound)
    monkeypatch.setattr(jax.nn, "logsumexp", lambda x, **options: sizes.append(x.size) or logsumexp(x, **options))
    module.stages.cache_clear()
    try:
        losses = module.losses(tiny_model, x, targets)
    finally:
        module.stages.cache_clear()
    assert losses.shape == SHAPE
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert sizes == [tokens * VOCABULARY]
