"""The unit of weights and inputs: nothing depends on it, or an error or a warning says what the format's scales cannot hold."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qjax
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats import parse_format
from qjax.methods import names
from qjax.models.parameters import flatten, unflatten
from qjax.qtensor import dequantize
from qjax.refining.descend import descend
from qjax.rounding.hqq import hqq
from qjax.rounding.parts import unit
from qjax.transforms.smoothquant import smoothquant
from tests.conftest import random_model, tiny_config
from tests.test_factor import random_hessian
from tests.test_format_table import FORMATS

IN, OUT = 16, 3
SIZE = 2.0**-14  # of the weights: AutoAWQ's 1e-6, which is no part of the unit, counts for larger ones


@functools.cache
def layer():
    weight = np.random.default_rng(0).standard_t(4, (IN, OUT)).astype(np.float32)
    hessian = jnp.asarray(random_hessian(IN, 6 * IN))
    return weight * np.float32(SIZE / np.abs(weight).max()), hessian, jnp.sqrt(jnp.diagonal(hessian))


def methods_of(name: str) -> dict:
    """What each method of the package makes of a weight: (its QTensor, the Info)."""
    _, hessian, abs_mean = layer()
    fmt = parse_format(name)

    def awq(weight):
        linear, info = qjax.awq(weight, fmt, hessian=hessian, abs_mean=abs_mean, ratios=3, clip="none")
        return linear.weight, info

    found = {
        "rtn": lambda weight: qjax.rtn(weight, fmt, clip="mse"),
        "gptq": lambda weight: qjax.gptq(weight, fmt, hessian=hessian),
        "descend": lambda weight: descend(weight, qjax.rtn(weight, fmt)[0], hessian=hessian, sweeps=1),
        "awq": awq,
    }
    return found if fmt.has_whole_zeros else {**found, "hqq": lambda weight: hqq(weight, fmt)}


def test_all_methods_are_here():
    maps_alone = {"smoothquant", "hadamard"}  # tested below, and a matrix that no weight has a part in
    assert methods_of("int4-g16-z16").keys() == {*names("transform", "rounding", "refiner")} - maps_alone


@pytest.mark.parametrize("exponent", [-100, 100])
def test_smoothing_is_the_same_in_any_unit(exponent):
    weights, abs_max = jnp.asarray(np.random.default_rng(0).uniform(0.01, 1, (8, 4)), jnp.float32), jnp.linspace(0.1, 40, 8)
    expected = smoothquant([weights], "int4-g4", abs_max=abs_max).scale
    found = smoothquant([weights * 2.0**exponent], "int4-g4", abs_max=abs_max).scale
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)


@functools.cache
def reference(name: str, method: str):
    return methods_of(name)[method](jnp.asarray(layer()[0]))


IN_FLOAT16 = [name for name in FORMATS if getattr(parse_format(name).scale_codec, "dtype", None) == "float16"]
WIDE = [name for name in FORMATS if name not in IN_FLOAT16 and not parse_format(name).has_minima]
CASES = [*((name, "rtn") for name in WIDE), ("int4-g16-dq", "gptq"), ("nvfp4", "descend"), ("int2-b32-z32-fp32", "hqq")]
CASES.append(("nf4-g16-fp32", "awq"))


@pytest.mark.parametrize(("name", "method"), CASES)
@settings(max_examples=4, deadline=None)
@example(exponent=-85)  # weights of 1e-30
@example(exponent=-20)
@example(exponent=113)  # of 6e29
@example(exponent=13)  # larger than 1
@given(st.integers(-85, 113))
def test_codes_are_equal_in_any_unit_and_scales_take_the_factor(name, method, exponent):
    expected, info = reference(name, method)
    weight = layer()[0] * np.float32(2.0**exponent)
    q, found = methods_of(name)[method](jnp.asarray(weight))
    if method == "awq" and exponent > 0:  # where 1e-6 counts less
        assert np.mean(np.asarray(q.codes) == expected.codes) > 0.9
    else:
        np.testing.assert_array_equal(q.codes, expected.codes)
        exact = np.asarray(dequantize(expected), np.float64) * 2.0**exponent
        np.testing.assert_array_equal(dequantize(q), exact)
        np.testing.assert_array_equal(q.zeros, expected.zeros) if q.zeros is not None else None
    rel = 2e-2 if method == "awq" else 1e-5
    assert float(found.weight_error) == pytest.approx(float(info.weight_error), rel=rel)
    if info.output_error is not None:
        assert float(found.output_error) == pytest.approx(float(info.output_error), rel=rel)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-9, 1e-5, 1.0, 1e7, 1e19, 3e37])
def test_info_tells_of_scales_that_float16_does_not_hold(size):
    weight = (layer()[0].astype(np.float64) * (size / SIZE)).astype(np.float32)
    q, info = qjax.rtn(jnp.asarray(weight), "int8-g16")
    change = np.asarray(dequantize(q), np.float64) - weight
    expected = np.sum(np.square(change)) / np.sum(np.square(weight.astype(np.float64)))
    assert float(info.weight_error) == pytest.approx(expected, rel=1e-4)
    assert (expected < 1e-4) == (size == 1.0)


def test_traced_weights_are_brought_to_their_unit_too():
    weight = jnp.asarray(layer()[0])
    stack = jnp.stack([weight, weight * 2.0**-60, weight * 2.0**60])
    together, info = jax.jit(jax.vmap(lambda w: qjax.rtn(w, "int4-g16-bf16")))(stack)
    for number, each in enumerate(stack):
        alone, expected = qjax.rtn(each, "int4-g16-bf16")
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[number], y), together, alone)  # noqa: B023
        assert float(info.weight_error[number]) == pytest.approx(float(expected.weight_error), rel=1e-5)


def scaled(exponent: int):
    """A model whose MLP's last kernel is in another unit."""
    model = random_model(tiny_config(layers=1))
    kernel = model.params["block_0"]["mlp"]["down"]["kernel"]
    mlp = model.params["block_0"]["mlp"] | {"down": {"kernel": kernel * 2.0**exponent}}
    return model._replace(params=model.params | {"block_0": model.params["block_0"] | {"mlp": mlp}})


PATH = "block_0/mlp/down/kernel"
RULES = ["attention=none", "up=none", "gate=none"]
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32)


def test_a_model_with_a_layer_in_another_unit():
    """Figures of a layer do not depend on its unit; the loss of its output takes the factor's square, beyond float32 too."""
    recipe = "gptq:int4-g16-bf16@parallel"
    plain, report = qjax.quantize(scaled(-14), recipe, calibration=TOKENS, rules=RULES)
    for exponent in (-90, 80):
        model, found = qjax.quantize(scaled(exponent), recipe, calibration=TOKENS, rules=RULES)
        leaf, expected = (m.params["block_0"]["mlp"]["down"]["kernel"] for m in (model, plain))
        (record,), (reference,) = ([r for r in each.layers if r.path.endswith("down/kernel")] for each in (found, report))
        assert record.weight_error == pytest.approx(reference.weight_error, rel=1e-3)
        np.testing.assert_array_equal(leaf.codes, expected.codes)
        assert record.output_error == pytest.approx(reference.output_error, rel=1e-3)
        assert record.proxy_loss == pytest.approx(reference.proxy_loss * 4.0 ** (exponent + 14), rel=1e-3)


@pytest.mark.parametrize(("fmt", "wider"), [("int4-g16", "int4-g16-bf16"), ("int6-g16-sym-full-k8s", "int6-g16-sym-full-bf16")])
def test_scales_out_of_the_range_of_their_type_are_an_error(fmt, wider):
    for exponent in (-60, 40):
        with pytest.raises(QjaxError, match=rf"mlp/down/kernel: {fmt} stores scales as \w+, which loses 100%.*{wider} or"):
            qjax.quantize(scaled(exponent), f"rtn:{fmt}", rules=RULES)
    qjax.quantize(scaled(0), f"rtn:{fmt}", rules=RULES)


def test_minima_out_of_the_range_of_their_type_are_an_error():
    """Where scales are not; and scales that are lost or coarse are none where a minimum stands for the weights."""
    down = lambda values: scaled(0)._replace(params=unflatten(flatten(scaled(0).params) | {PATH: values}))  # noqa: E731
    noise = jax.random.normal(jax.random.key(0), flatten(scaled(0).params)[PATH].shape)
    with pytest.raises(
        QjaxError, match=r"mlp/down/kernel: int4-g16-m16 stores minima as m16, which loses \d+%.*int4-g16-bf16 or"
    ):
        qjax.quantize(down(1e5 + noise), "rtn:int4-g16-m16", rules=RULES)
    for exponent in (-60, 40):
        with pytest.raises(QjaxError, match=r"int4-g16-m16 stores \w+ as \w+, which loses 100%"):
            qjax.quantize(scaled(exponent), "rtn:int4-g16-m16", rules=RULES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (0.3 + 1e-7 * noise, jnp.full(noise.shape, -0.3), noise):
            qjax.quantize(down(values), "rtn:int4-g16-m16", rules=RULES)


def test_minima_take_the_factor_of_an_odd_unit():
    weight = jnp.asarray(layer()[0] + 2 * SIZE)
    expected, info = qjax.rtn(weight * 2.0**13, "int4-g16-m16")
    q, found = qjax.rtn(weight * 2.0**28, "int4-g16-m16")  # of 49152 at most
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_array_equal(dequantize(q), np.asarray(dequantize(expected)) * 2.0**15)
    assert float(found.weight_error) == pytest.approx(float(info.weight_error), rel=1e-5)
    assert float(found.clipped) == float(info.clipped)


def test_coarse_scales_are_a_warning():
    with pytest.warns(QjaxWarning, match=r"mlp/down/kernel: int8-g16 stores scales as fp16, which is coarse for \d+% of"):
        qjax.quantize(scaled(-12), "rtn:int8-g16", rules=RULES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qjax.quantize(scaled(-5), "rtn:int8-g16", rules=RULES)


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e13])
def test_inputs_whose_squares_float32_cannot_hold_are_an_error(size):
    import flax.linen as nn

    module, x = nn.Dense(4, use_bias=False), np.full((8, 4), size, np.float32)
    params = module.init(jax.random.key(0), x)["params"]
    with pytest.raises(QjaxError, match="calibration: squares of the input of kernel are beyond"):
        qjax.quantize_flax(module, params, "gptq:int4-g4", batches=[(x,)])
    qjax.quantize_flax(module, params, "gptq:int4-g4", batches=[(0 * x,)])  # inputs that are 0 weigh nothing


def test_hessians_of_any_ordinary_unit_give_the_same_codes():
    weight, hessian, _ = layer()
    expected, info = qjax.gptq(jnp.asarray(weight), "int3-g16", hessian=hessian)
    for exponent in (-66, 66):  # 1e-20 and 1e20
        q, found = qjax.gptq(jnp.asarray(weight), "int3-g16", hessian=hessian * 2.0**exponent)
        np.testing.assert_array_equal(q.codes, expected.codes)
        assert float(found.proxy_loss) == pytest.approx(float(info.proxy_loss) * 2.0**exponent, rel=1e-4)


def test_sizes_are_asked_for_once_and_forgotten_with_the_weight(monkeypatch):
    first, second = jnp.full((2, 3), -4.0), jnp.array([[jnp.nan, 1.0]])
    found = unit.sizes([first, second])
    assert found[0] == 4 and np.isnan(found[1]) and unit.exponent_of(first, second) == 0
    monkeypatch.setattr(unit, "_all_largest", None)  # no more is computed
    assert unit.sizes([first]) == [4] and unit.exponent_of(first) == 0
    known = id(first)
    del first
    assert known not in unit._sizes


@pytest.mark.parametrize("path", ["block_0/mlp/down/kernel", "block_0/mlp_norm/scale"])
def test_casts_to_fp16_that_lose_numbers(path):
    """A kernel or a norm, by values beyond its end, and by those that become 0; fewer digits are a warning."""
    model = random_model(tiny_config(layers=1))
    flat = flatten(model.params)

    def cast(times):
        return qjax.quantize(model._replace(params=unflatten(flat | {path: flat[path] * times})), "fp16")

    for times in (1e9, 1e-9):
        with pytest.raises(QjaxError, match=rf"{path}: fp16 cannot hold it, it ends at 65504 and at 6e-8: the largest"):
            cast(times)
    with pytest.warns(QjaxWarning, match=rf"{path}: fp16 is coarse for \d+% of it"):
        cast(3e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cast(1.0)


@pytest.mark.parametrize("recipe", ["rtn:int4-g8", "rtn:int4-g8-dq", "gptq:int4-g8", "awq:int4-g8", "rtn:nf4-g8", "rtn:bf16"])
@pytest.mark.filterwarnings("ignore:fewer calibration tokens", "ignore:.*is coarse for")
def test_weights_below_what_float32_computes_with_are_refused(recipe):
    """XLA takes them for 0, and would report no error at all."""
    weight = np.float32(np.random.default_rng(0).normal(size=(8, 4))) * np.float32(1e-41)
    assert np.abs(weight).max() > 0
    fn, x = lambda p, x: x @ p["w"], jax.random.normal(jax.random.key(0), (20, 8))
    with pytest.raises(QjaxError, match="w: "):
        qjax.quantize_function(fn, {"w": weight}, recipe, batches=[(x,)])
