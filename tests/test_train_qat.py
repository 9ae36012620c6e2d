"""refining/fake.py, refining/block_ap.py and train/qat.py: training of what is quantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import grid
from qjax.driver.decoder import quantize
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.linear import Linear
from qjax.models.model import apply, runnable
from qjax.models.parameters import flatten
from qjax.qtensor import QTensor, dequantize
from qjax.refining import fake
from qjax.rounding.nearest import rtn
from qjax.train import loop, qat
from qjax.train.qat import QatConfig
from tests.conftest import GEMMA, MIXTRAL, random_model, tiny_config

FORMATS = (
    *("int3-g16", "int2-g16-sym-full", "int4-g16-z16", "int4-g16-m16", "int8-tensor"),
    *("nf4-b16", "mxfp4", "nvfp4", "int4-g16-dq"),
)
FURTHER = ("int4-channel-sym-max", "int1-g16-sym", "nf4-g16", "fp4_e2m1-g16", "fp8_e4m3-channel")  # that repeat what these show
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FURTHER]
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 9)).astype(np.int32)
CALIBRATION = np.random.default_rng(1).integers(0, 257, (3, 32)).astype(np.int32)
WEIGHT = jax.random.normal(jax.random.key(0), (40, 12))


def moved(each: fake.FakeWeight) -> fake.FakeWeight:
    """Away from where training starts."""
    noise = jax.random.normal(jax.random.key(1), each.weight.shape)
    zero = None if each.zero is None else each.zero + 0.3
    return dataclasses.replace(each, weight=each.weight + 0.1 * noise, scale=0.9 * each.scale, zero=zero)


def started(name: str, **options) -> fake.FakeWeight:
    """A weight that is not quite what was rounded, on a grid that is too narrow for some of it."""
    q, _ = rtn(WEIGHT, name)
    start = fake.begin(q, WEIGHT, **options)
    noise = 0.3 * jax.random.normal(jax.random.key(1), WEIGHT.shape)
    zero = None if start.zero is None else start.zero + 0.3
    return dataclasses.replace(start, weight=WEIGHT + noise, scale=0.9 * start.scale, zero=zero)


@pytest.mark.parametrize("name", [*FORMATS, *SLOW])
def test_the_finished_weight_has_the_values_of_training(name):
    start = started(name)
    q = jax.jit(fake.finished)(start)
    assert isinstance(q, QTensor) and q.format == parse_format(name) and q.shape == (40, 12)
    rounding = 5e-7 if name.endswith("-dq") else 0  # scales that are sums of products, fused into what they multiply or not
    np.testing.assert_allclose(dequantize(q), jax.jit(lambda each: each.values())(start), rtol=rounding)
    assert float(jnp.abs(dequantize(q) - start.weight).max()) > 0.01


@pytest.mark.parametrize("name", [*(name for name in FORMATS if name not in ("nvfp4", "int4-g16-dq")), *SLOW])
def test_training_starts_with_the_codes_of_the_rounding(name):
    """Also where they are not the nearest ones; within a code's range a weight is where it was."""
    q, _ = rtn(WEIGHT + 0.2 * jax.random.normal(jax.random.key(2), WEIGHT.shape), name)
    start = fake.begin(q, WEIGHT)
    np.testing.assert_array_equal(fake.finished(start).codes, q.codes)
    np.testing.assert_array_equal(dequantize(fake.finished(start)), dequantize(q))
    assert float(jnp.mean(jnp.abs(start.weight - WEIGHT))) < float(jnp.mean(jnp.abs(dequantize(q) - WEIGHT)))


def oracle(start: fake.FakeWeight, slope: np.ndarray):
    """Gradients by weight, scale and zero of sum(slope * values), in float64 by LSQ's and LSQ+'s formulas."""
    fmt, found = start.format, start.parameters()
    groups = lambda array: np.asarray(grid.to_groups(jnp.asarray(array, jnp.float32), fmt), np.float64)  # noqa: E731
    w, g, value = groups(start.weight), groups(slope), groups(dequantize(fake.finished(start)))
    scale = np.asarray(found.scale, np.float64)[:, None]
    if fmt.has_minima:
        minimum = np.asarray(found.zero, np.float64)[:, None]
        w, value = w - minimum, value - minimum
    v, code_value = w / scale, value / scale
    if fmt.codebook:
        values = np.asarray(fmt.codebook.values, np.float64)
        low, high = values[0] - (values[1] - values[0]) / 2, values[-1] + (values[-1] - values[-2]) / 2
    else:
        zero = 2 ** (fmt.bits - 1) if found.zero is None else np.asarray(found.zero, np.float64)[:, None]
        zero = 0 if fmt.has_minima else zero
        low, high = -0.5 - zero, fmt.largest_code + 0.5 - zero
    inside = (v >= low) & (v <= high)
    summed = (1, 2) if fmt.granularity == "tensor" else 1
    by_scale = (g * (code_value - np.where(inside, v, 0))).sum(axis=summed).reshape(start.scale.shape)
    by_zero = (g * np.where(inside, 0, 1 if fmt.has_minima else -scale)).sum(axis=summed).reshape(start.scale.shape)
    return g * inside, by_scale, by_zero, w.size / start.scale.size * fmt.largest_value


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("int3-g8", False),
        ("int3-g8", True),
        ("int2-g8-sym", True),
        ("int2-g8-z16", False),
        ("int2-g8-m16", True),
        ("int8-tensor", True),
        ("nf4-b16", False),
    ],
)
def test_gradients_are_the_formulas(name, normalised):
    start, slope = started(name, normalised=normalised), np.random.default_rng(3).normal(size=WEIGHT.shape)
    found = jax.grad(lambda each: jnp.sum(jnp.float32(slope) * each.values()))(start)
    weight, scale, zero, divisor = oracle(start, slope)
    factor = 1 / np.sqrt(divisor) if normalised else 1.0
    np.testing.assert_allclose(grid.to_groups(found.weight, start.format), weight, atol=1e-6)
    np.testing.assert_allclose(found.scale, factor * scale, atol=2e-5 * factor * max(1, np.abs(scale).max()))
    assert (weight == 0).any() and (weight != 0).any()
    if start.zero is not None:
        np.testing.assert_allclose(found.zero, factor * zero, atol=1e-5 * factor)
        assert (zero != 0).any()


def test_block_ap_lowers_the_error_of_every_block():
    model = random_model(tiny_config())
    recipe = "rtn+block_ap(steps=12,rate=0.001,weight_rate=0.003):int2-g16@parallel"
    told = [each for each in quantize(model, recipe, calibration=CALIBRATION)[1].layers if "block" in each.path]
    assert len(told) == 14
    assert all(each.block_loss_after < 0.97 * each.block_loss_before for each in told)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(**GEMMA))


@pytest.fixture(scope="module")
def rounded(model):
    return quantize(
        model, "awq+rtn:int3-g16/int8-token@parallel", calibration=CALIBRATION, rules=["mlp/up=none", "mlp/gate=nf4-g16"]
    )[0]


@pytest.fixture(scope="module")
def trained(model, rounded):
    told = []
    config = loop.TrainConfig(steps=6, batch=2, window=8, learning_rate=0.003)
    settings = QatConfig(rate=0.3)
    result = qat.train_quantized(rounded, np.tile(TOKENS[0], 20), config, settings, original=model, on_step=told.append)
    return result, told


def test_training_end_to_end(rounded, trained):
    result, told = trained
    assert told[-1].loss < told[0].loss - 0.1 and result.recipe == f"{rounded.recipe}, trained"
    before, after = flatten(rounded.params), flatten(result.params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for path, leaf in before.items():
        moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (leaf, after[path])), strict=True)]
        assert any(moved) == isinstance(leaf, QTensor | Linear), path


def test_the_result_is_the_trained_model_bit_for_bit(model, rounded):
    start = qat.faked(rounded, model)
    start = start._replace(params=qat.each_fake(start.params, moved))
    finished = runnable(qat.finish(start))
    np.testing.assert_array_equal(apply(finished, TOKENS), apply(runnable(qat.as_used(start)), TOKENS))


def test_what_is_learned_and_from_whom(model, rounded):
    start = qat.faked(rounded, model)
    asked = qat.problem(start, QatConfig(learns=("scales",), loss="kl"), model)
    assert asked.trained and {key.rpartition("/")[2] for key in asked.trained} == {"scale"}
    assert not any("norm" in key for key in asked.trained)
    value = float(jax.jit(asked.loss)(asked.trained, asked.frozen, TOKENS))
    theirs, ours = (jax.nn.log_softmax(apply(each, TOKENS[:, :-1])) for each in (model, qat.finish(start)))
    assert value == pytest.approx(float(jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), -1))), rel=1e-4)


def test_what_is_refused(model, rounded):
    with pytest.raises(QjaxError, match="random is not quantized; name a recipe"):
        qat.faked(model)
    with pytest.raises(QjaxError, match="from a float model; give one"):
        qat.problem(qat.faked(rounded), QatConfig(loss="kl"))
    with pytest.raises(QjaxError, match=r"mlp/down/kernel is \(48, 32\), in random \(64, 32\); give the model before"):
        qat.faked(rounded, random_model(tiny_config(**(GEMMA | {"mlp_size": 64}))))
    with pytest.raises(QjaxError, match="a vocabulary of 99, random 257"):
        qat.problem(qat.faked(rounded), QatConfig(loss="kl"), random_model(tiny_config(**(GEMMA | {"vocabulary_size": 99}))))
    mixture = quantize(random_model(tiny_config(**MIXTRAL, layers=1)), "rtn:int4-g16")[0]
    with pytest.raises(QjaxError, match="block_0/mlp/down/kernel holds experts, which are not trained"):
        qat.faked(mixture)
    with pytest.raises(QjaxError, match="expected some of weights, scales, zeros"):
        QatConfig(learns=("norms",))
    with pytest.raises(QjaxError, match="fp16: it has no grid"):
        fake.require_trainable(parse_format("fp16"))
