"""Our decoder as any other function: the tracing gives what the driver gives, bit for bit; to rounding where JAX is newer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import qjax
from qjax.calibrate.capture import Batch, capture_statistics
from qjax.models import walk
from qjax.tracing.trace import leaves_of
from tests.conftest import tiny_config
from tests.random_weights import small_model

EXACT = jax.__version_info__ < (0, 11)  # a newer compiler fuses sums of the two programs in its own ways
CONFIG = tiny_config(vocabulary_size=61)
TOKENS = np.random.default_rng(0).integers(0, 61, (16, 32)).astype(np.int32)


@functools.cache
def function(halves):
    """The decoder as a function of its parameters that calls its compiled parts, as the driver does."""
    parts = walk.parts(CONFIG, jnp.float32, halves=halves)

    def fn(params, tokens):
        x = tokens
        for part in parts:
            x = walk.compiled(part.module)(walk.subtree(part, params), x, *walk.further_arguments(part, params))
        return x

    return fn


@pytest.mark.parametrize("order", ["parallel", "sequential", "qep"])
def test_codes_statistics_and_logits_are_those_of_the_driver(order):
    model = small_model(CONFIG)
    fn, recipe = function(order != "parallel"), f"gptq:int4-g16@{order}"
    expected, told = qjax.quantize(model, recipe, calibration=TOKENS)
    params, report = qjax.quantize_function(
        fn,
        model.params,
        recipe,
        batches=[(jnp.asarray(TOKENS),)],
        weights=[jnp.ones(TOKENS.shape)],
        rules=["^(embed|head)=none"],
    )
    records, known = ({r.path: r for r in each.layers if r.recipe != "none"} for each in (report, told))
    assert records.keys() == known.keys()
    for path, record in records.items():
        for name in record._fields:
            found, exact = getattr(record, name), getattr(known[path], name)
            same = found == (exact if EXACT or not isinstance(exact, float) else pytest.approx(exact, rel=1e-6))
            assert same or name == "seconds", (path, name)
    wanted, got = leaves_of(expected.params).arrays, leaves_of(params).arrays
    for path in records:
        np.testing.assert_array_equal(got[path].weight.codes, wanted[path].codes, err_msg=path)
        np.testing.assert_array_equal(got[path].weight.scales, wanted[path].scales, err_msg=path)
    logits = qjax.apply_function(function(False), params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, qjax.apply(expected, TOKENS), rtol=0, atol=0 if EXACT else 1e-5)


def test_statistics_are_those_of_the_driver():
    model, weights, x = small_model(CONFIG), jnp.ones(TOKENS.shape), jnp.asarray(TOKENS)
    found = qjax.capture_function(
        function(False), model.params, batches=[(x,)], statistics=["hessian", "abs_max"], weights=[weights]
    )
    seen = set()
    for part in walk.parts(CONFIG, jnp.float32, halves=False):
        params, further = walk.params_of(part, model.params), walk.further_arguments(part, model.params)
        kernels = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if part.prefix + path in found}
        needed = {path: kernel.shape[0] for path, kernel in kernels.items()}
        captured = capture_statistics(
            part.module, params, [Batch((x, *further), weights)], needed, ["hessian", "abs_max"], keep_outputs=True
        )
        (x,) = captured.outputs
        bound = {"rtol": 0} if EXACT else {"rtol": 1e-5, "atol": 1e-6}
        close = functools.partial(np.testing.assert_allclose, **bound)
        for path in needed:
            for name in ("hessian", "abs_max"):
                close(found[part.prefix + path][name], captured.statistics[path][name], err_msg=part.prefix + path)
        seen |= {part.prefix + path for path in needed}
    assert seen == found.keys() and len(seen) > 7 * CONFIG.layers
