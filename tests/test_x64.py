"""JAX's 64-bit mode changes nothing: the same codes, scales, zeros, bytes and figures, by every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.evaluate.corpora import Corpus
from qjax.methods import added_methods, names
from qjax.models.model import Model
from qjax.refining.descend import descend
from qjax.rounding.hqq import hqq
from tests.conftest import byte_tokenizer, random_model, tiny_config
from tests.test_factor import random_hessian

IN, OUT = 16, 4
WEIGHT = np.random.default_rng(0).normal(size=(IN, OUT)) * 0.1  # float64, as NumPy makes them
HESSIAN = np.asarray(random_hessian(IN, 6 * IN), np.float64)


def rounded(method: str, fmt: str):
    """The method's result for float64 arrays."""
    weight, hessian = jnp.asarray(WEIGHT), jnp.asarray(HESSIAN)
    match method:
        case "rtn":
            return qjax.rtn(weight, fmt, clip="mse")
        case "gptq":
            return qjax.gptq(weight, fmt, hessian=hessian, clip="hessian")
        case "hqq":
            return hqq(weight, fmt)
        case "awq":
            return qjax.awq(weight, fmt, hessian=hessian, abs_mean=jnp.sqrt(jnp.diagonal(hessian)), ratios=2)
        case "descend":
            return descend(weight, qjax.rtn(weight, fmt)[0], hessian=hessian, sweeps=1)


CASES = [
    *(("rtn", "int4-g8-dq"), ("rtn", "nvfp4"), ("gptq", "int4-g8")),
    *(("hqq", "int4-g8-z16"), pytest.param("awq", "nf4-g8-dq", marks=pytest.mark.slow), ("descend", "int3-g8")),
]


HOUSE = {*names("transform", "rounding", "refiner")}  # before any test registers one


def test_every_method_is_here():
    maps_alone = {"smoothquant", "hadamard"}  # which round nothing
    assert {getattr(case, "values", case)[0] for case in CASES} == HOUSE - {*added_methods()} - maps_alone


@pytest.mark.parametrize(("method", "fmt"), CASES)
def test_codes_and_bytes(method, fmt):
    expected = rounded(method, fmt)
    with jax.enable_x64(True):
        found = rounded(method, fmt)
    assert found[0].nbytes == expected[0].nbytes
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_model_and_its_perplexity():
    """Calibrated, corrected (qep) and measured."""
    corpus = Corpus("letters", ("".join(chr(97 + (i * i + i // 7) % 26) for i in range(200)),), "0")
    params = random_model(tiny_config(layers=1)).params

    def measured():
        model = Model(tiny_config(layers=1), params, byte_tokenizer(), "random")
        calibration = qjax.load_calibration(model, corpus, windows=3, window=32)
        rules = ["attention=none", "gate=none"]
        quantized, report = qjax.quantize(model, "gptq:int4-g16-dq", calibration=calibration, rules=rules)
        found = qjax.perplexity(quantized, corpus, "windows-32")
        layers = [record._replace(seconds=0.0) for record in report.layers]
        return calibration.fingerprint, layers, report.size_bytes, found.value, found.window_nll

    expected = measured()
    with jax.enable_x64(True):
        assert measured() == expected
