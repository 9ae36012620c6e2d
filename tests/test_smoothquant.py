"""SmoothQuant against its formula in float64, in models of families that fold it and do not."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import QjaxError
from qjax.maps import Divide, Scale
from qjax.transforms.smoothquant import smoothquant
from tests.conftest import FALCON, GPT2, MIXTRAL, tiny_config
from tests.extension.test_transform import outlying_model
from tests.random_weights import small_model

IN = 12
rng = np.random.default_rng(0)
WEIGHTS = [jnp.asarray(rng.standard_normal((IN, out)) * np.exp(rng.standard_normal((IN, 1))), jnp.float32) for out in (5, 3)]
ABS_MAX = jnp.asarray(np.exp(2 * rng.standard_normal(IN)), jnp.float32)
TOKENS = np.random.default_rng(0).integers(0, 61, (8, 16)).astype(np.int32)
FINEST = "int8-g1-fp32"  # every weight its own scale: nothing but float32's rounding


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_the_formula(alpha):
    largest = np.max([np.max(np.abs(np.asarray(weight, np.float64)), axis=1) for weight in WEIGHTS], axis=0)
    expected = np.asarray(ABS_MAX, np.float64) ** alpha / largest ** (1 - alpha)
    found = smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX, alpha=alpha)
    assert isinstance(found, Divide)
    np.testing.assert_allclose(found.scale, expected, rtol=1e-5)


def test_inputs_that_never_move_are_left_alone():
    found = smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX.at[2].set(0))
    assert float(found.scale[2]) == 1 and float(found.scale[3]) != 1


def test_search_takes_the_alpha_of_the_least_error():
    wanted = smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX, alpha=0.7)
    trial = lambda by: jnp.sum(jnp.square(jnp.log(by.scale) - jnp.log(wanted.scale)))  # noqa: E731
    found = smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX, search=True, trial=trial)
    np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-5)
    lost = smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX, search=True, trial=lambda by: jnp.float32(jnp.nan))
    assert np.all(np.isnan(lost.scale))


@pytest.mark.parametrize(("changes", "folded"), [({}, True), (GPT2, True), (FALCON, False)])
def test_logits_are_unchanged(changes, folded):
    model = small_model(tiny_config(vocabulary_size=61, **changes))
    exact = np.asarray(qjax.apply(model, TOKENS))
    smoothed, _ = qjax.quantize(model, f"smoothquant+rtn:{FINEST}@parallel", calibration=TOKENS)
    np.testing.assert_allclose(qjax.apply(smoothed, TOKENS), exact, atol=1e-5 * np.max(np.abs(exact)))
    leaf = smoothed.params["block_0"]["attention"]["q"]["kernel"]
    assert (not getattr(leaf, "inputs", ())) == folded
    if not folded:
        assert [type(each) for each in leaf.inputs] == [Scale]
    weight = np.asarray(qjax.dequantize(leaf), np.float64)
    assert np.allclose(weight, model.params["block_0"]["attention"]["q"]["kernel"], rtol=1e-3) != folded


def test_experts_are_smoothed_one_by_one():
    model = small_model(tiny_config(vocabulary_size=61, layers=1, **MIXTRAL))
    enough = np.tile(TOKENS, (2, 1))
    exact = np.asarray(qjax.apply(model, TOKENS))
    smoothed, _ = qjax.quantize(model, f"smoothquant+rtn:{FINEST}@parallel", calibration=enough)
    np.testing.assert_allclose(qjax.apply(smoothed, TOKENS), exact, atol=1e-5 * np.max(np.abs(exact)))
    with pytest.raises(QjaxError, match="no map is tried on one expert of a mixture"):
        qjax.quantize(model, "smoothquant(search=true)+rtn:int8-channel/int8-token@parallel", calibration=enough)


@pytest.mark.slow
def test_smoothing_keeps_what_outliers_would_cost():
    """In integers of 4 bits, with alpha searched and given, in both kinds of order, weights by GPTQ too."""
    model, tokens = outlying_model(), np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32)
    exact = np.asarray(qjax.apply(model, tokens))

    def loss(recipe):
        return float(np.mean(np.square(qjax.apply(qjax.quantize(model, recipe, calibration=tokens)[0], tokens) - exact)))

    naive = loss("rtn:int8-channel-sym-max/int4-token")
    for transform, rest in (
        ("smoothquant(search=true)", "rtn:int8-channel-sym-max/int4-token@parallel"),
        ("smoothquant", "gptq:int8-channel/int4-token@qep"),
    ):
        assert loss(f"{transform}+{rest}") < 0.5 * naive, (transform, rest)


def test_what_cannot_be_smoothed():
    for alpha in (-0.1, 1.5):
        with pytest.raises(QjaxError, match=rf"alpha={alpha}; expected 0 .* to 1"):
            smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX, alpha=alpha)
    with pytest.raises(QjaxError, match="search=true needs trial="):
        smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX, search=True)
    with pytest.raises(QjaxError, match=r"abs_max has shape \(3,\)"):
        smoothquant(WEIGHTS, "int8-channel", abs_max=ABS_MAX[:3])
    model = small_model(tiny_config(vocabulary_size=61))
    with pytest.raises(QjaxError, match=r"alpha=2\.0; expected 0"):
        qjax.quantize(model, "smoothquant(alpha=2)+rtn:int8-channel", calibration=TOKENS)
    for before in ("", "awq+"):
        recipe = f"{before}smoothquant(search=true)+rtn:int8-channel/int8-tensor-mse@parallel"
        with pytest.raises(QjaxError, match="a search of maps does not know magnitudes of the inputs behind them"):
            qjax.quantize(model, recipe, calibration=TOKENS)
    with pytest.raises(QjaxError, match="needs calibration data"):
        qjax.quantize(model, "rtn:int8-channel/int8-tensor-p99.9")
