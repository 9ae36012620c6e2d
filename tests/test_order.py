"""qjax.calibrate.order: the correction for the error of a layer's inputs, against least squares."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.order import block, correct, parallel, qep, sequential
from qjax.errors import QjaxError

IN, OUT, TOKENS = 12, 5, 200


@pytest.fixture
def case():
    """Weight, inputs as they are, inputs as they should be, and the two statistics."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((TOKENS, IN))
    exact = x + 0.3 * generator.standard_normal((TOKENS, IN)) + 0.2 * x[:, ::-1]
    weight = generator.standard_normal((IN, OUT))
    return weight, x, exact, x.T @ x / TOKENS, x.T @ (exact - x) / TOKENS


def run(weight, hessian, drift, alpha, damp):
    return np.asarray(correct(*(jnp.asarray(a, jnp.float32) for a in (weight, hessian, drift)), alpha, damp), np.float64)


def test_is_least_squares(case):
    weight, x, exact, hessian, drift = case
    solution = np.linalg.lstsq(x, exact @ weight, rcond=None)[0]
    np.testing.assert_allclose(run(weight, hessian, drift, 1.0, 0.0), solution, atol=1e-4)  # damped by 1e-6 at least
    np.testing.assert_allclose(run(weight, hessian, drift, 0.3, 0.0), weight + 0.3 * (solution - weight), atol=1e-4)
    np.testing.assert_array_equal(run(weight, hessian, drift, 0.0, 0.01), np.float32(weight))


def test_damping_is_ridge_regression_of_the_change(case):
    weight, x, exact, hessian, drift = case
    damp = 0.2
    rows = np.sqrt(damp * np.mean(np.diag(hessian)) * TOKENS) * np.eye(IN)
    target = np.concatenate([(exact - x) @ weight, np.zeros((IN, OUT))])
    change = np.linalg.lstsq(np.concatenate([x, rows]), target, rcond=None)[0]
    np.testing.assert_allclose(run(weight, hessian, drift, 1.0, damp), weight + change, atol=1e-4)


def test_brings_the_output_nearer(case):
    weight, x, exact, hessian, drift = case
    errors = [np.sum((x @ run(weight, hessian, drift, alpha, 0.01) - exact @ weight) ** 2) for alpha in (0, 0.5, 1)]
    assert errors[0] > errors[1] > errors[2]


def test_exact_inputs_need_no_correction(case):
    weight, _, _, hessian, _ = case
    np.testing.assert_array_equal(run(weight, hessian, np.zeros((IN, IN)), 1.0, 0.01), np.float32(weight))


def test_singular_and_dead_inputs(case):
    """Inputs that never moved, and fewer tokens than inputs: finite, and no change of what was not seen."""
    weight, x, exact, *_ = case
    x, exact = x[:4].copy(), exact[:4].copy()
    x[:, 3] = exact[:, 3] = 0
    got = run(weight, x.T @ x / 4, x.T @ (exact - x) / 4, 1.0, 0.01)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got[3], weight[3], atol=1e-6)
    np.testing.assert_array_equal(run(weight, np.zeros((IN, IN)), np.zeros((IN, IN)), 1.0, 0.0), np.float32(weight))


@pytest.mark.parametrize("tokens", [3, 20, 200])
def test_a_singular_hessian_is_damped_until_it_has_a_factor(tokens):
    """Without damping the correction would be nan, or what noise of float32 makes of it."""
    generator = np.random.default_rng(0)
    x = 3 + 0.1 * generator.standard_normal((tokens, 256))
    exact, weight = x + 0.1 * generator.standard_normal(x.shape), generator.standard_normal((256, OUT))
    got = run(weight, x.T @ x / tokens, x.T @ (exact - x) / tokens, 1.0, 0.0)
    assert np.sum(np.square(got - weight)) < np.sum(np.square(weight))
    assert np.sum((x @ got - exact @ weight) ** 2) < np.sum((x @ weight - exact @ weight) ** 2)


def test_inputs_that_never_moved_ask_for_no_damping(case):
    weight, x, exact, *_ = case
    x, exact = x.copy(), exact.copy()
    x[:, 3] = exact[:, 3] = 0
    solution = np.linalg.lstsq(x, exact @ weight, rcond=None)[0]
    solution[3] = weight[3]
    for size in np.linspace(
        1, 4, 13
    ):  # of units; the damping of a dead input alone is as large as the least pivot, but for rounding
        got = run(weight, size * x.T @ x / TOKENS, size * x.T @ (exact - x) / TOKENS, 1.0, 0.0)
        np.testing.assert_allclose(got, solution, atol=1e-4)


def test_half_precision_weights(case):
    weight, _, _, hessian, drift = case
    got = correct(jnp.asarray(weight, jnp.bfloat16), jnp.float32(hessian), jnp.float32(drift), 0.5, 0.01)
    assert got.dtype == jnp.float32


def test_orders():
    assert [(order.prefix, order.inside) for order in (parallel(), block(), sequential(), qep())] == [
        *((False, False), (True, False), (True, True), (True, True)),
    ]
    assert [order.alpha > 0 for order in (parallel(), block(), sequential(), qep())] == [False, False, False, True]
    for bad in ({"alpha": -0.1}, {"alpha": 1.5}, {"damp": -1.0}):
        with pytest.raises(QjaxError, match=f"alpha is between 0 and 1.*{next(iter(bad))}={next(iter(bad.values()))}"):
            qep(**bad)


def test_narrow_statistics_are_the_float32_ones_of_their_values():
    x = np.random.default_rng(0).standard_normal((64, 16))
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (x[:16, :4], x.T @ x / 64, 0.1 * x[:16])]
    wide = [array.astype(jnp.float32) for array in narrow]
    np.testing.assert_array_equal(correct(*narrow, 1.0, 0.01), correct(*wide, 1.0, 0.01))
