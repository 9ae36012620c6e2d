"""qjax.calibrate.statistics: against NumPy, weighted, in batches, masked, and of a rescaled input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.statistics import STATISTICS, added, mapped
from qjax.maps import Divide

SIZE = 6


def run(name, *batches):
    """The value over batches (x, exact, weights)."""
    statistic = STATISTICS[name]
    state = statistic.init(SIZE)
    update = jax.jit(statistic.update)
    for batch in batches:
        state = update(state, *map(jnp.asarray, batch))
    return np.asarray(statistic.finalize(state))


@pytest.fixture
def batch():
    """50 tokens, of which some do not count and others count more."""
    generator = np.random.default_rng(0)
    x, exact = generator.standard_normal((2, 50, SIZE)).astype(np.float32)
    weights = (generator.uniform(0.5, 3, 50) * (generator.random(50) > 0.3)).astype(np.float32)
    return x, exact, weights


def of_all_inputs(name, x, counts):
    if name == "kurtosis":
        square, fourth = (np.average(x**power, weights=counts) for power in (2, 4))
        return fourth / square**2
    places = np.floor(np.log2(np.abs(x), dtype=np.float32) * 32).astype(int) + 40 * 32
    return np.bincount(places.reshape(-1), counts.reshape(-1), 80 * 32)


def expected(name, x, exact, weights):
    x, exact, counts = x.astype(np.float64), exact.astype(np.float64), weights.astype(np.float64)[:, None]
    match name:
        case "hessian":
            return x.T @ (x * counts) / np.sum(counts)
        case "drift":
            return x.T @ ((exact - x) * counts) / np.sum(counts)
        case "abs_mean":
            return np.sum(np.abs(x) * counts, axis=0) / np.sum(counts)
        case "abs_max":
            return np.max(np.abs(x[weights > 0]), axis=0)
        case "magnitudes" | "kurtosis":
            return of_all_inputs(name, x, np.broadcast_to(counts, x.shape))
        case "tokens":
            return np.sum(weights > 0)


@pytest.mark.parametrize("name", STATISTICS)
def test_equals_numpy(name, batch):
    np.testing.assert_allclose(run(name, batch), expected(name, *batch), rtol=1e-5, atol=1e-6)
    plain = (*batch[:2], np.ones(50, np.float32))
    np.testing.assert_allclose(run(name, plain), expected(name, *plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STATISTICS)
def test_batches_add_up(name, batch):
    parts = [tuple(array[a:b] for array in batch) for a, b in ((0, 1), (1, 20), (20, 50))]
    np.testing.assert_allclose(run(name, *parts), run(name, batch), rtol=1e-5, atol=1e-6)
    empty = (*(array[:4] for array in batch[:2]), np.zeros(4, np.float32))
    np.testing.assert_array_equal(run(name, batch, empty), run(name, batch))


def of(name, x, exact, weights):
    """The value of inputs of any type."""
    update = jax.jit(functools.partial(added, STATISTICS[name]))
    return np.asarray(STATISTICS[name].finalize(update(STATISTICS[name].init(x.shape[1]), x, exact, jnp.asarray(weights))))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 6, 700])
@pytest.mark.parametrize("name", ["hessian", "drift"])
def test_products_of_bfloat16_inputs_are_exact(name, size, weighted):
    """Of numbers near each other as in float32; weights other than 0 and 1 are rounded into them, by 2^-8 on either side."""
    generator = np.random.default_rng(0)
    x, change = generator.standard_normal((2, 50, size)).astype(np.float32)
    weights = ((generator.random(50) > 0.3) * (generator.uniform(0.5, 3, 50) if weighted else 1)).astype(np.float32)
    narrow = [jnp.asarray(each, jnp.bfloat16) for each in (x, x * (1 + 2**-5 * np.tanh(change)))]
    found = of(name, *narrow, weights)
    right = expected(name, *(np.asarray(each, np.float32) for each in narrow), weights)
    assert found.dtype == np.float32 and (size == 1 or np.array_equal(found, found.T) == (name == "hessian"))
    assert np.max(np.abs(found - right)) < np.max(np.abs(right)) * (2**-7 if weighted else 1e-6)


def test_a_run_that_is_the_exact_one_has_no_drift(batch):
    x = jnp.asarray(batch[0], jnp.bfloat16)
    assert not np.any(of("drift", x, x, batch[2]))


@pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
@pytest.mark.parametrize("name", STATISTICS)
def test_bfloat16_tokens_of_weight_0_are_left_out(name, value, batch):
    counted = batch[2] > 0
    given = [jnp.asarray(np.where(counted[:, None], each, value), jnp.bfloat16) for each in batch[:2]]
    zero = [jnp.asarray(np.where(counted[:, None], each, 0), jnp.bfloat16) for each in batch[:2]]
    np.testing.assert_array_equal(of(name, *given, batch[2]), of(name, *zero, batch[2]))


TAKEN_AS_THEY_ARE = [(name, "bfloat16 bfloat16") for name in ("hessian", "drift")]
OTHER_TYPES = [(name, types) for name in STATISTICS for types in ("float16 float16", "bfloat16 float32", "bfloat16 bfloat16")]


@pytest.mark.parametrize(("name", "types"), [each for each in OTHER_TYPES if each not in TAKEN_AS_THEY_ARE])
def test_inputs_of_other_types_count_in_float32(name, types, batch):
    given = [jnp.asarray(each, kind) for each, kind in zip(batch[:2], types.split(), strict=True)]
    np.testing.assert_array_equal(of(name, *given, batch[2]), run(name, (*(x.astype(jnp.float32) for x in given), batch[2])))


@pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
@pytest.mark.parametrize("name", STATISTICS)
def test_tokens_of_weight_0_are_left_out_whatever_they_are(name, value, batch):
    """Models give padding tokens that see no other token NaN: 0 times NaN would spoil everything."""
    x, exact, weights = (array.copy() for array in batch)
    x[weights == 0] = value
    exact[weights == 0] = value
    np.testing.assert_array_equal(run(name, (x, exact, weights)), run(name, batch))


def test_what_counts_and_is_not_finite_shows():
    x = np.ones((3, SIZE), np.float32)
    x[1, 2] = np.nan
    for name in ("hessian", "abs_mean", "abs_max"):
        assert not np.all(np.isfinite(run(name, (x, x, np.ones(3, np.float32)))))


def test_rescaling_is_dividing_the_input(batch):
    x, exact, weights = batch
    scale = np.random.default_rng(1).uniform(0.1, 10, SIZE).astype(np.float32)
    names = ("hessian", "abs_mean", "abs_max", "tokens")
    got = mapped({name: jnp.asarray(run(name, batch)) for name in names}, Divide(jnp.asarray(scale)))
    for name in names:
        np.testing.assert_allclose(got[name], expected(name, x / scale, exact / scale, weights), rtol=1e-5)
    got = mapped({"drift": jnp.asarray(run("drift", batch))}, Divide(jnp.asarray(scale)))["drift"]
    np.testing.assert_allclose(got, expected("drift", x / scale, exact / scale, weights), rtol=1e-4, atol=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    """Sums of bfloat16 would stop growing at 256."""
    x = jnp.ones((2000, SIZE), jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(run("hessian", (x, x, np.ones(2000, np.float32))), 1)
