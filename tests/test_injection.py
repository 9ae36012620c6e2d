"""Injected outliers change nothing that a model computes, and what is told of its layers' inputs."""

import numpy as np
import pytest

import qjax
from qjax.errors import QjaxError
from qjax.models.parameters import flatten
from tests.conftest import COHERE, GEMMA, GPT2, MIXTRAL, tiny_config
from tests.random_weights import small_model

TOKENS = np.random.default_rng(0).integers(0, 61, (3, 12)).astype(np.int32)


@pytest.mark.parametrize("changes", [{}, GPT2, GEMMA])
def test_the_model_computes_the_same(changes):
    model = small_model(tiny_config(vocabulary_size=61, **changes))
    exact = np.asarray(qjax.apply(model, TOKENS))
    injected = qjax.inject_outliers(model, 40, 3)
    np.testing.assert_allclose(qjax.apply(injected, TOKENS), exact, atol=2e-5 * np.max(np.abs(exact)))
    assert injected.name == "random-outliers" and injected.params["head"] is not None
    if "offset" not in "".join(flatten(model.params)):  # 1 + offset is rounded
        np.testing.assert_array_equal(qjax.apply(qjax.inject_outliers(model, 64, 3), TOKENS), exact)


def test_inputs_show_them():
    model = small_model(tiny_config(vocabulary_size=61))
    before, after = (qjax.input_outliers(each, TOKENS) for each in (model, qjax.inject_outliers(model, 1000, 2)))
    assert [row["layers"] for row in before[:4]] == [
        "attention/q,attention/k,attention/v",
        "attention/o",
        "mlp/up,mlp/gate",
        "mlp/down",
    ]
    assert [row["block"] for row in before] == [0] * 4 + [1] * 4
    for one, other in zip(before, after, strict=True):
        if one["layers"] in ("attention/o", "mlp/down"):
            np.testing.assert_allclose(
                [one[k] for k in one if k != "layers"], [other[k] for k in one if k != "layers"], rtol=1e-3
            )
        else:
            assert other["largest"] > 20 * one["largest"] and other["kurtosis"] > 2 * one["kurtosis"]
            assert other["times_median"] > 10 * one["times_median"]
            assert other["outlier_channels"] >= max(2, one["outlier_channels"])


def test_every_expert_has_an_input_of_its_own():
    rows = qjax.input_outliers(small_model(tiny_config(vocabulary_size=61, layers=1, **MIXTRAL)), TOKENS)
    named = [row["layers"] for row in rows]
    assert {"mlp/up/0,mlp/gate/0", "mlp/up/3,mlp/gate/3", "mlp/down/0", "mlp/down/3"} <= set(named)
    assert len({row["largest"] for row in rows if row["layers"].startswith("mlp/down")}) > 1


def test_what_cannot_be_injected():
    model = small_model(tiny_config(vocabulary_size=61))
    for factor, channels in (
        (0, 1),
        (-40, 1),
        (float("inf"), 1),
        (float("nan"), 1),
        (1e-40, 1),
        (40, 0),
        (40, 10**6),
        ("40", 4),
        (40, 2.5),
        (None, 4),
    ):
        with pytest.raises(QjaxError, match="to 10000 and 1 to"):
            qjax.inject_outliers(model, factor, channels)
    with pytest.raises(QjaxError, match="in no block of the family 'cohere'"):
        qjax.inject_outliers(small_model(tiny_config(vocabulary_size=61, **COHERE)))
    quantized, _ = qjax.quantize(model, "rtn:int8-channel")
    with pytest.raises(QjaxError, match="is quantized"):
        qjax.inject_outliers(quantized)
