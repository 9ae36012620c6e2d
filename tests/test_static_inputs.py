"""Static activation formats behind maps: their scale is that of the mapped inputs, which are captured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.activations import parse_activation, static_scale
from qjax.calibrate.statistics import magnitudes
from qjax.errors import QjaxError
from qjax.interception.linen import recorded
from qjax.linear import dequantize_tree
from qjax.maps import on_input
from qjax.models.model import apply, runnable
from qjax.models.parameters import flatten
from qjax.models.walk import Decoder
from tests.conftest import MIXTRAL, tiny_config
from tests.random_weights import small_model

TOKENS = np.random.default_rng(0).integers(0, 61, (4, 24)).astype(np.int32)
WEIGHTS = "int8-channel-sym-max"
DOWN, UP = "block_0/mlp/down/kernel", "block_0/mlp/up/kernel"
CASES = (
    ("hadamard", "int8-tensor"),
    pytest.param("hadamard", "nvfp4", marks=pytest.mark.slow),
    pytest.param("hadamard(block=16)", "nvfp4", marks=pytest.mark.slow),
    ("hadamard(online=true)", "int8-tensor-mse"),
    ("smoothquant", "int8-tensor-p99"),
    pytest.param("smoothquant+hadamard(block=16)", "int8-tensor", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def model():
    return small_model(tiny_config(vocabulary_size=61, layers=1))


def input_of(model: qjax.Model, path: str) -> jax.Array:
    """What a layer is given on the calibration tokens."""
    with recorded() as recording:
        Decoder(model.config).apply({"params": model.params}, TOKENS)
    return recording.inputs[path][0].reshape(-1, recording.inputs[path][0].shape[-1])


def scale_of(x: jax.Array, name: str) -> float:
    """The scale of a static format for these inputs."""
    weights = jnp.ones(len(x))
    found = magnitudes.finalize(magnitudes.update(magnitudes.init(x.shape[1]), x, x, weights))
    return float(static_scale(jnp.max(jnp.abs(x), axis=0), parse_activation(name), found))


@pytest.mark.parametrize(("transform", "name"), CASES)
def test_the_scale_is_that_of_mapped_inputs(model, transform, name):
    """Of inputs in the float model, up to what weights of 8 bits change of them; in order, those of the quantized model."""
    for order, most in (("parallel", 0.03), ("sequential", 1e-5)):
        weights = WEIGHTS if order == "parallel" else "int4-channel"
        found, _ = qjax.quantize(model, f"{transform}+rtn:{weights}/{name}@{order}", calibration=TOKENS)
        leaves = flatten(found.params)
        running = found if order == "sequential" else found._replace(params=dequantize_tree(found.params))
        for path in (DOWN, UP):
            x = on_input(leaves[path].inputs, input_of(running, path))
            assert float(leaves[path].activation_scale) == pytest.approx(scale_of(x, name), rel=most), (order, path)
        packed, decoded, exact = (np.asarray(apply(each, TOKENS)) for each in (found, runnable(found), model))
        np.testing.assert_allclose(packed, decoded, atol=1e-3 * np.abs(exact).max())
        assert 1e-4 < np.abs(packed - exact).max() / np.abs(exact).max() < 0.5, order


def test_nothing_before_changes(model):
    """The float model's own inputs; another program may give them other last bits."""
    rule = f"down=hadamard(online=true)+rtn:{WEIGHTS}/int8-tensor@parallel"
    found, _ = qjax.quantize(model, "none", calibration=TOKENS, rules=[rule])
    leaf = flatten(found.params)[DOWN]
    expected = scale_of(on_input(leaf.inputs, input_of(model, DOWN)), "int8-tensor")
    assert float(leaf.activation_scale) == pytest.approx(expected, rel=1e-6)


def test_outliers_of_calibration_are_those_of_mapped_inputs(model):
    """LLM.int8()'s, behind a rotation that spreads what is larger than the threshold."""
    recipe = "llm_int8(threshold=3.5,outliers=calibration):int8-channel-sym-max@parallel"
    alone, _ = qjax.quantize(model, recipe, calibration=TOKENS)
    turned, _ = qjax.quantize(model, "hadamard(online=true)+" + recipe, calibration=TOKENS)
    x = input_of(model, DOWN)
    for found in (alone, turned):
        leaf = flatten(found.params)[DOWN]
        largest = np.abs(on_input(leaf.inputs, x)).max(axis=0)
        held = [] if leaf.outliers is None else list(leaf.outliers.index)
        assert held == list(np.flatnonzero(largest >= 3.5))


ONLINE = pytest.param("hadamard(online=true)", marks=pytest.mark.slow)


@pytest.mark.parametrize("transform", [ONLINE, "smoothquant+hadamard(block=16)"])
def test_experts(transform):
    """Each by the largest of its own tokens' mapped inputs; as many as one that is a model of its own."""
    model = small_model(tiny_config(vocabulary_size=61, layers=1, **MIXTRAL))
    enough, rules = np.tile(TOKENS, (2, 1)), ["attention=none"]
    found, _ = qjax.quantize(model, f"{transform}+rtn:{WEIGHTS}/int8-tensor@parallel", calibration=enough, rules=rules)
    leaf = flatten(found.params)[DOWN]
    with recorded() as recording:
        Decoder(model.config).apply({"params": model.params}, enough)
    inputs, routed = recording.inputs[DOWN][0], recording.routed[DOWN][0]
    for expert in range(model.config.experts):
        one = jax.tree.map(lambda part, e=expert: part[e], leaf)
        x = on_input(one.inputs, inputs[expert][routed[expert]])
        assert float(one.activation_scale) == pytest.approx(scale_of(x, "int8-tensor"), rel=1e-6)


def test_traced_functions():
    """A stack of matrices in a scan: each has the scale of its own mapped inputs."""
    stack = np.random.default_rng(0).standard_normal((3, 16, 16)).astype(np.float32) / 4
    x = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, params["w"])

    recipe = f"hadamard+rtn:{WEIGHTS}/int8-tensor@parallel"
    found, _ = qjax.quantize_function(fn, {"w": stack}, recipe, batches=[(x[:20],), (x[20:],)])
    _, inputs = fn({"w": stack}, x)
    for number in range(3):
        leaf = jax.tree.map(lambda part, n=number: part[n], found["w"])
        largest = float(jnp.max(jnp.abs(on_input(leaf.inputs, inputs[number]))))
        assert float(leaf.activation_scale) == pytest.approx(largest / 127, rel=1e-5)
    np.testing.assert_allclose(qjax.apply_function(fn, found, x)[0], fn({"w": stack}, x)[0], atol=0.1)


def test_what_stays_refused(model):
    """A transform that reads single inputs behind a rotation, and calibration that is missing."""
    with pytest.raises(QjaxError, match="which awq and smoothquant read, are not known behind it"):
        qjax.quantize(model, f"hadamard(online=true)+smoothquant+rtn:{WEIGHTS}/int8-token@parallel", calibration=TOKENS)
    with pytest.raises(QjaxError, match="needs calibration data"):
        qjax.quantize(model, f"hadamard+rtn:{WEIGHTS}/nvfp4")
