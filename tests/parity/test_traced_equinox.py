"""Equinox: a module is a tree of parameters like any other, its functions among the leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:fewer calibration tokens")]
eqx = pytest.importorskip("equinox")


def batched(model, x):
    return jax.vmap(model)(x)


@pytest.mark.parametrize("recipe", ["rtn:int4-g4", "gptq:int4-g4", "awq:int4-g4", "nf4-g4"])
def test_an_mlp_under_vmap(recipe):
    model = eqx.nn.MLP(8, 8, 8, depth=2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (32, 8))
    quantized, report = qjax.quantize_function(batched, model, recipe, batches=[(x,)])
    assert [record.path for record in report.layers] == [f"layers/{i}/weight" for i in range(3)]
    assert isinstance(quantized, eqx.nn.MLP)
    got = eqx.filter_jit(lambda model, x: qjax.apply_function(batched, model, x))(quantized, x)
    np.testing.assert_allclose(got, batched(qjax.dequantize_function(quantized), x), atol=1e-5)
    alone, _ = qjax.quantize_function(lambda p, x: x @ p, model.layers[0].weight.T, recipe, batches=[(x,)])
    np.testing.assert_allclose(qjax.dequantize(quantized.layers[0].weight), qjax.dequantize(alone), atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(qjax.apply_function(batched, quantized, x)))(x)
    assert float(jnp.max(jnp.abs(gradient))) > 0
