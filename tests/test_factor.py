"""qjax.rounding.parts.feedback: the triangular factor against float64 NumPy, damping, order, dead inputs, broken Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.rounding.parts.feedback import FIRST_DAMP, factorize
from tests.oracles import gptq as oracle


def random_hessian(size: int, tokens: int, seed: int = 0, power: float = 0.5) -> np.ndarray:
    """Mean of x x^T of correlated inputs whose variances fall over two decades, in no order."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((tokens, size)) @ generator.standard_normal((size, size)) / size**0.5
    x = mixed * generator.permutation(np.arange(1, size + 1) ** -power)
    return (x.T @ x / tokens).astype(np.float32)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_is_a_factor_of_the_damped_hessian(act_order, damp):
    hessian = random_hessian(24, 200)
    factor = factorize(jnp.asarray(hessian), damp=damp, act_order=act_order)
    order = np.asarray(factor.order)
    expected = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(24)
    np.testing.assert_array_equal(order, expected)
    feedback, pivots = np.asarray(factor.feedback, np.float64), np.asarray(factor.pivots, np.float64)
    np.testing.assert_array_equal(np.triu(feedback), 0)
    root = (feedback.T + np.eye(24)) * pivots  # R_ji = feedback_ij R_ii
    damped = hessian.astype(np.float64) + damp * np.mean(np.diag(hessian)) * np.eye(24)
    np.testing.assert_allclose(root @ root.T, damped[np.ix_(order, order)], atol=3e-6 * np.max(hessian))
    assert float(factor.damp) == np.float32(damp)
    assert np.all(factor.added == factor.added[0])


def test_pivots_are_those_of_the_inverse_that_gptq_takes():
    """R_ii = 1 / U_ii, with U the upper factor of the inverse: what each input's error costs."""
    hessian = random_hessian(24, 200)
    factor = factorize(jnp.asarray(hessian), act_order=False)
    upper = oracle.inverse_factor(hessian.astype(np.float64), 0.01 * np.mean(np.diag(hessian)))
    np.testing.assert_allclose(factor.pivots, 1 / np.diag(upper), rtol=1e-4)
    # feedback = what one input's unit of error asks of those after it: -U_ij / U_ii as GPTQ's code applies it, all at once
    left = np.eye(24) + np.asarray(factor.feedback, np.float64)
    np.testing.assert_allclose(np.linalg.inv(left).T, upper / np.diag(upper)[:, None], atol=1e-4)


def test_dead_inputs_are_alone_and_do_not_move_the_damping():
    hessian = random_hessian(16, 100)
    hessian[[3, 7]] = 0
    hessian[:, [3, 7]] = 0
    factor = factorize(jnp.asarray(hessian))
    np.testing.assert_array_equal(np.flatnonzero(factor.added > np.min(factor.added)), [3, 7])
    order = list(np.asarray(factor.order))
    assert order[-2:] == [3, 7]  # they come last: their diagonal is 0
    places = [order.index(3), order.index(7)]
    np.testing.assert_array_equal(np.asarray(factor.feedback)[places], 0)
    np.testing.assert_array_equal(np.asarray(factor.feedback)[:, places], 0)
    assert np.all(np.asarray(factor.pivots)[places] > 0)
    assert float(factor.damp) == np.float32(0.01)
    alive = np.setdiff1d(np.arange(16), [3, 7])
    part = factorize(jnp.asarray(hessian[np.ix_(alive, alive)]), damp=0.01 * 14 / 16)  # the same mean over 16
    np.testing.assert_allclose(np.asarray(factor.pivots)[:14], part.pivots, rtol=1e-5)


def test_a_hessian_of_nothing_is_the_identity():
    factor = factorize(jnp.zeros((8, 8)))
    np.testing.assert_array_equal(factor.feedback, 0)
    assert np.all(np.asarray(factor.pivots) > 0)
    np.testing.assert_allclose(factor.added, 1 + factor.damp)


def test_a_singular_hessian_raises_the_damping():
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)  # rank 5 of 32
    hessian = jnp.asarray(x.T @ x / 5)
    factor = factorize(hessian, damp=0.0)
    assert float(factor.damp) >= np.float32(FIRST_DAMP)
    assert np.all(np.isfinite(factor.feedback)) and np.all(np.isfinite(factor.pivots))
    assert float(factorize(hessian, damp=0.01).damp) == np.float32(0.01)  # enough at once
    indefinite = hessian - 0.05 * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(32)  # as rounding could not make it
    assert float(factorize(indefinite, damp=0.01).damp) == pytest.approx(0.1)  # ten times as much


@pytest.mark.parametrize("act_order", [False, True])
def test_pivots_of_float32_noise_are_not_accepted(act_order):
    """A factor exists, but what its last pivot says is rounding: a millionth of the mean diagonal is the least that counts."""
    x = np.random.default_rng(1).standard_normal((300, 12))
    x[:, 7] = x[:, 2] + x[:, 5]  # the same as two others together
    hessian = (x.T @ x / 300).astype(np.float32)
    alone = np.linalg.cholesky(hessian + 1e-7 * np.eye(12, dtype=np.float32))
    assert np.all(np.isfinite(alone)) and np.min(np.diag(alone)) ** 2 < 1e-6
    factor = factorize(jnp.asarray(hessian), damp=1e-7, act_order=act_order)
    assert float(factor.damp) == np.float32(FIRST_DAMP)
    diagonal = jnp.array([1.0, 2.0, 1.0, 1e-7])
    assert float(factorize(jnp.diag(diagonal), damp=0.0, act_order=act_order).damp) == np.float32(FIRST_DAMP)
    assert float(factorize(jnp.diag(diagonal.at[3].set(1e-5)), damp=0.0, act_order=act_order).damp) == 0


def test_a_narrow_hessian_is_the_float32_one_of_its_values():
    x = jax.random.normal(jax.random.key(0), (64, 16))
    narrow = (x.T @ x / 64).astype(jnp.bfloat16)
    np.testing.assert_array_equal(factorize(narrow).feedback, factorize(narrow.astype(jnp.float32)).feedback)


def test_not_finite_in_not_finite_out():
    hessian = jnp.asarray(random_hessian(8, 50)).at[2, 3].set(jnp.nan).at[3, 2].set(jnp.nan)
    factor = factorize(hessian)
    assert not np.all(np.isfinite(factor.pivots))


def test_vmap_escalates_each_hessian_on_its_own():
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    stacked = jnp.stack([jnp.asarray(random_hessian(16, 100)), jnp.asarray(x.T @ x / 4)])
    together = jax.vmap(lambda h: factorize(h, damp=0.0))(stacked)
    for i, hessian in enumerate(stacked):
        alone = factorize(hessian, damp=0.0)
        assert float(together.damp[i]) == float(alone.damp)
        np.testing.assert_allclose(together.feedback[i], alone.feedback, atol=1e-4)
    assert float(together.damp[0]) == 0 < float(together.damp[1])
