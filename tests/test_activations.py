"""qjax.activations: names, and rounded inputs against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import registry
from qjax.activations import (
    calibrated,
    is_integer_product,
    multiply_rounded,
    parse_activation,
    round_activation,
    static_scale,
)
from qjax.calibrate.statistics import magnitudes
from qjax.errors import QjaxError
from qjax.formats import codebooks, register_codebook, register_scales
from qjax.kernels import integers, layout
from qjax.linear import Linear, runs_in_integers
from qjax.recipe import parse_recipe
from qjax.rounding.nearest import rtn
from qjax.scales import Floats

IN, OUT = 24, 5
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, IN)) * 3, jnp.float32).at[1, 2].set(0)


def nearest(scaled: np.ndarray, grid: str) -> np.ndarray:
    """The values of a grid nearest to x over its scale."""
    if grid.startswith("int"):
        half = 2 ** (int(grid[3:]) - 1)
        return np.clip(np.round(scaled), -half, half - 1)
    values = np.array(codebooks()[grid].values)
    return values[np.argmin(np.abs(scaled[..., None] - values), axis=-1)]


def bound(grid: str) -> float:
    return 2 ** (int(grid[3:]) - 1) - 1.0 if grid.startswith("int") else codebooks()[grid].bound


@pytest.mark.parametrize("name", ["int8-token", "int4-token", "fp8_e4m3-token", "nf4-token", "int8-g8", "int4-g16"])
def test_every_token_or_group_by_its_largest_value(name):
    grid, sharing = name.split("-")
    size = IN if sharing == "token" else int(sharing[1:])
    expected = np.zeros((6, IN))
    for row, x in zip(expected, np.asarray(X, np.float64).reshape(6, IN), strict=True):
        for start in range(0, IN, size):
            part = x[start : start + size]
            scale = np.float32(np.max(np.abs(part)) / bound(grid)) or 1.0
            row[start : start + size] = nearest(part / scale, grid) * scale
    got = round_activation(X, parse_activation(name))
    assert got.dtype == X.dtype and got.shape == X.shape
    assert np.mean(np.isclose(got, expected.reshape(X.shape), rtol=1e-5, atol=1e-7)) > 0.99  # but for ties
    assert not np.any(got[1, 2])
    assert float(jnp.max(jnp.abs(got - X))) > 0


@pytest.mark.parametrize("name", ["int8-tensor", "fp8_e4m3-tensor"])
def test_a_static_scale_is_that_of_calibration(name):
    """What is larger than calibration saw is clipped, whatever the batch holds besides."""
    activation, grid = parse_activation(name), name.split("-")[0]
    assert activation.is_static
    scale = static_scale(jnp.linspace(0, 4, IN), activation)
    assert float(scale) == pytest.approx(4 / bound(grid))
    expected = nearest(np.clip(np.asarray(X, np.float64) / float(scale), -200 if "int" in grid else -448, 448), grid) * float(
        scale
    )
    got = round_activation(X, activation, scale)
    assert np.mean(np.isclose(got, expected, rtol=1e-5)) > 0.99
    np.testing.assert_array_equal(got[:1], round_activation(X[:1], activation, scale))
    with pytest.raises(QjaxError, match=f"{name} is static, but there is none"):
        round_activation(X, activation)
    weight = rtn(jnp.ones((IN, 4)), "int8-channel-sym")[0]
    with pytest.raises(QjaxError, match="int8-token is dynamic, but one was given"):  # on the path of integers too
        multiply_rounded(X, weight, parse_activation("int8-token"), jnp.float32(1))
    with pytest.raises(QjaxError, match="int8-token is dynamic, but one was given"):
        round_activation(X, parse_activation("int8-token"), scale)


def test_names():
    for text, name in {
        "nf4": "nf4-g64",
        " fp4-token": "fp4_e2m1-token",
        "int8-tensor": "int8-tensor",
        "int3-g128": "int3-g128",
        "int8-token-sym": "int8-token-sym",
        "int8-token-affine": "int8-token-affine",
        "int8-g32-affine": "int8-g32-affine",
        "int8-tensor-p99.9": "int8-tensor-p99.9",
        "fp8_e4m3-tensor-mse": "fp8_e4m3-tensor-mse",
        "int8-tensor-max": "int8-tensor",
        "nvfp4": "nvfp4",
        "mxfp8": "mxfp8_e4m3",
        "llm_int8": "llm_int8",
        "llm_int8(threshold=2.5)": "llm_int8(threshold=2.5)",
    }.items():
        assert str(parse_activation(text)) == name and parse_activation(name) == parse_activation(text)
    misspelled = ["int8", "int8-channel", "int8-token-max", "int9-token", "bf16", "nf4-b64", "nf4-dq", "token", "", "int8-g0"]
    unfit = ["int8-tensor-affine", "int8-token-mse", "fp8_e4m3-token-affine", "int8-tensor-p", "llm_int8(threshold=x)"]
    for wrong in [*misspelled, *unfit]:
        with pytest.raises(QjaxError, match="expected GRID-token, GRID-gN or GRID-tensor"):
            parse_activation(wrong)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "int8-g8", "int8-token-affine", "nf4-token", "fp8_e4m3-token"])
def test_tokens_do_not_act_on_each_other(name):
    activation = parse_activation(name)
    larger = round_activation(X.at[1].mul(1e4), activation)
    np.testing.assert_array_equal(larger[0], round_activation(X, activation)[0])


def test_affine_integers_span_from_the_least_to_the_largest():
    x = jnp.abs(X) + 1  # all above zero: symmetric integers would waste half of their codes
    for name, size in (("int8-token-affine", IN), ("int4-g8-affine", 8)):
        steps = 2 ** parse_activation(name).format.bits - 1
        parts = np.asarray(x, np.float64).reshape(-1, size)
        scale = np.float32(parts.max(axis=1, keepdims=True) / steps)  # zero is in the range
        expected = (np.round(parts / scale) * scale).reshape(x.shape)
        got = round_activation(x, parse_activation(name))
        assert np.mean(np.isclose(got, expected, rtol=1e-5)) > 0.99
    both = round_activation(X, parse_activation("int8-token-affine"))
    step = (np.max(X, axis=-1) - np.min(X, axis=-1)).max() / 255
    assert np.max(np.abs(both - X)) < 0.51 * step


def test_two_levels_are_relative_to_what_calibration_saw():
    """NVFP4: E4M3 scales of 16 inputs times one float32, largest |x| / (448 * 6)."""
    activation = parse_activation("nvfp4")
    assert activation.is_static and activation.statistics == ("abs_max",)
    x = X[..., :16]
    common = static_scale(jnp.asarray([1.0, 7.0, 2.0]), activation)
    assert float(common) == pytest.approx(7 / (448 * 6))
    largest = np.max(np.abs(np.asarray(x, np.float64)), axis=-1, keepdims=True)
    scale = np.asarray(jnp.asarray(largest / 6 / float(common)).astype(jnp.float8_e4m3fn), np.float64) * float(common)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(nearest(np.nan_to_num(np.asarray(x, np.float64) / scale), "fp4_e2m1") * scale)
    got = round_activation(x, activation, common)
    assert np.mean(np.isclose(got, expected, rtol=1e-5, atol=1e-7)) > 0.98
    np.testing.assert_array_equal(got[:1], round_activation(x[:1], activation, common))


def counted(x: np.ndarray) -> jax.Array:
    return magnitudes.update(magnitudes.init(x.shape[1]), jnp.asarray(x), None, jnp.ones(len(x)))


def test_static_scales_by_percentile_and_least_squared_error():
    x = np.random.default_rng(0).standard_t(3, (512, 8)).astype(np.float32)
    abs_max, found = jnp.max(jnp.abs(x), axis=0), counted(x)
    assert float(jnp.sum(found)) == x.size
    for percent in (50, 99, 99.9):
        scale = static_scale(abs_max, parse_activation(f"int8-tensor-p{percent}"), found)
        assert float(scale) * 127 == pytest.approx(np.percentile(np.abs(x), percent), rel=0.03)
    assert float(static_scale(abs_max, parse_activation("int8-tensor-p100"), found)) * 127 == pytest.approx(np.abs(x).max())
    activation = parse_activation("int4-tensor-mse")

    def error(scale):
        return float(np.sum(np.square(round_activation(jnp.asarray(x), activation, jnp.float32(scale)) - x)))

    best = min(error(np.abs(x).max() * i / 700) for i in range(1, 101))
    chosen = error(static_scale(abs_max, activation, found))
    assert chosen < 1.02 * best and chosen < 0.5 * error(np.abs(x).max() / 7)


@pytest.mark.usefixtures("registries")
def test_scales_relative_to_all_tokens_are_refused():
    class Common(Floats):
        def common(self, largest, bound):
            return jnp.max(largest)

    register_scales("shared", Common("float32"))
    with pytest.raises(QjaxError, match="shared stores scales relative"):
        parse_activation("nf4-shared")


def test_what_is_forgotten_is_no_format():
    with registry.scoped():
        register_codebook("two", (-1.0, 1.0))
        assert parse_recipe("rtn:int8-channel/two-token").activation.format.bits == 1
    with pytest.raises(QjaxError, match="activation format"):
        parse_activation("two-token")


def test_the_gradient_is_that_of_the_input():
    for name in ("int8-token", "int4-g8"):
        gradient = jax.grad(lambda x, name=name: jnp.sum(round_activation(x, parse_activation(name)) * X))(X)
        np.testing.assert_allclose(gradient, X, rtol=1e-6)


@pytest.mark.parametrize(
    ("fmt", "name", "whole"),
    [
        ("int8-channel-sym", "int8-token", True),
        ("int8-channel-sym-max", "int4-token", True),
        ("int8-channel-sym", "int8-tensor", True),
        ("int8-channel-sym", "llm_int8", False),
        ("int8-channel-sym", "int8-g8", False),
        ("int8-channel-sym", "int8-token-affine", False),
        ("int8-channel-sym", "fp8_e4m3-token", False),
        ("int8-channel", "int8-token", False),
        ("int8-g8-sym", "int8-token", False),
        ("int4-channel-sym", "int8-token", False),
    ],
)
def test_which_products_are_of_integers(fmt, name, whole, monkeypatch):
    """Layers of them run in integers where that is fast; decoded weights and stacks do not."""
    weight, activation = rtn(jnp.ones((IN, OUT)), fmt)[0], parse_activation(name)
    assert is_integer_product(activation, weight) == whole
    assert not is_integer_product(activation, jnp.ones((IN, OUT)))
    scale = jnp.float32(1) if activation.is_static else None
    for fast in (True, False):
        monkeypatch.setattr(integers, "pays_decoded", lambda fast=fast: fast)
        assert runs_in_integers(Linear(weight, activation=activation, activation_scale=scale)) == (whole and fast)
    stack = jax.tree.map(lambda leaf: leaf[None], weight)
    assert not runs_in_integers(Linear(stack, activation=activation, activation_scale=scale))


def test_products_are_those_of_rounded_inputs_whatever_holds_the_weight():
    """In integers, decoded or laid out for a kernel."""
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((IN, OUT)), jnp.float32)
    whole = [("int8-channel-sym", name) for name in ("int8-token", "int8-token-sym", "int4-token", "int8-tensor")]
    for fmt, name in (*whole, ("int8-channel-sym-max", "llm_int8(threshold=5)"), ("int8-channel-sym", "int8-token-affine"),
                      ("int4-g8", "int8-token"), ("int4-g8", "fp8_e4m3-token")):  # fmt: skip
        activation = parse_activation(name)
        scale = calibrated(activation, {"abs_max": jnp.full(IN, 4.0)})
        q, _ = rtn(weight, fmt)
        decoded = layout.dequantize(layout.prepare(q))
        expected = np.asarray(round_activation(X, activation, scale), np.float64) @ np.asarray(decoded, np.float64)
        for held in (q, layout.prepare(q), decoded):
            how = {"implementation": "reference"} if isinstance(held, layout.KernelWeight) else {}
            np.testing.assert_allclose(multiply_rounded(X, held, activation, scale, **how), expected, atol=1e-4)
