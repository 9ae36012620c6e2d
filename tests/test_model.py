"""qjax.models.model: losses in pieces of tokens, and what layers do to their inputs when a model is made to run."""

import functools

import jax
import numpy as np
import pytest

import qjax
from qjax.activations import parse_activation
from qjax.errors import QjaxError
from qjax.evaluate.generate import generate
from qjax.kernels import integers
from qjax.linear import Linear
from qjax.models import model as module
from qjax.models.model import apply, runnable
from qjax.qtensor import QTensor
from qjax.rounding.nearest import rtn

VOCABULARY = 257  # of tiny_model
SHAPE = (3, 11)


@pytest.mark.parametrize(
    ("bound", "tokens"),
    [(2**23, 33), (33 * VOCABULARY, 33), (33 * VOCABULARY - 1, 17), (7 * VOCABULARY + 5, 7), (VOCABULARY, 1), (10, 1)],
)
def test_losses_of_a_packed_head_keep_the_bound(tiny_model, monkeypatch, bound, tokens):
    """The same values for any bound, the logits of `tokens` tokens at most at once: also where one sequence has more."""
    head = tiny_model.params["head"]
    packed = Linear(head["output"]["kernel"], activation="int8-token")
    tiny_model = tiny_model._replace(params=tiny_model.params | {"head": head | {"output": {"kernel": packed}}})
    x = jax.random.normal(jax.random.key(0), (*SHAPE, tiny_model.config.hidden_size))
    targets = jax.random.randint(jax.random.key(1), SHAPE, 0, VOCABULARY)
    logits = module.apply_head(tiny_model, x)
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], axis=-1)[..., 0]
    sizes, logsumexp = [], jax.nn.logsumexp
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", bound)
    monkeypatch.setattr(jax.nn, "logsumexp", lambda x, **options: sizes.append(x.size) or logsumexp(x, **options))
    losses = module.losses(tiny_model, x, targets)
    assert losses.shape == SHAPE
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert sizes == [tokens * VOCABULARY]


@pytest.mark.parametrize("in_integers", [False, True])
def test_what_layers_do_to_their_inputs_survives_being_made_to_run(in_integers, tiny_model, monkeypatch):
    """An activation format moves the logits, the same whether weights are decoded or packed; without it they are as before.
    Where products of integers are fast, codes are what runs.
    """
    monkeypatch.setattr(integers, "pays_decoded", lambda: in_integers)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, VOCABULARY)

    def logits(change, packed=False):
        def leaf(kernel):
            return change(rtn(kernel, "int8-channel-sym")[0])

        params = dict(tiny_model.params)
        for name in ("block_0", "block_1"):
            mlp = params[name]["mlp"]
            params[name] = params[name] | {"mlp": mlp | {"down": {"kernel": leaf(mlp["down"]["kernel"])}}}
        model = runnable(tiny_model._replace(params=params), packed)
        return np.asarray(apply(model, tokens)), model

    bare, _ = logits(lambda q: q)
    plain, decoded = logits(Linear)
    np.testing.assert_array_equal(plain, bare)
    assert isinstance(decoded.params["block_0"]["mlp"]["down"]["kernel"], jax.Array)
    rounding = functools.partial(Linear, activation=parse_activation("int8-token"))
    dense, decoded = logits(rounding)
    runs = decoded.params["block_0"]["mlp"]["down"]["kernel"]
    assert isinstance(runs, Linear) and isinstance(runs.weight, QTensor if in_integers else jax.Array)
    packed, held = logits(rounding, packed=True)
    np.testing.assert_allclose(packed, dense, atol=1e-5 * np.max(np.abs(bare)))
    moved = np.max(np.abs(dense - bare)) / np.max(np.abs(bare))
    assert 1e-4 < moved < 0.1
    np.testing.assert_array_equal(runnable(decoded).params["head"]["norm"]["scale"], tiny_model.params["head"]["norm"]["scale"])
    texts = [generate(model, [np.asarray(tokens[0])], 4, packed=True).tokens[0].tolist() for model in (decoded, held)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda name: qjax.quantize(name, "rtn:int4-g32"),
        lambda name: qjax.perplexity(name, "python-docs"),
        lambda name: qjax.divergence(qjax.load("bundled"), name, "python-docs"),
        lambda name: qjax.accuracy(name, "cloze"),
        lambda name: qjax.generate(name, "Hello"),
        lambda name: qjax.load_calibration(name, "python-docs"),
        qjax.inject_outliers,
        lambda name: qjax.save("folder", name),
    ],
)
def test_a_name_is_no_model(call):
    with pytest.raises(QjaxError, match=r"expected a Model, got the name 'bundled'; give qjax.load\('bundled'\)"):
        call("bundled")
