"""NNX modules run quantized when they are called, and are kept by Orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.tracing.kernel import Kernel
from tests.traced_models import Bonsai, X

pytestmark = pytest.mark.filterwarnings("ignore:fewer calibration tokens")


class Net(nnx.Module):
    """State besides parameters, random numbers, a list, a parameter that two layers share, a layer that has two names."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(2)])
        self.rest[1].kernel = self.rest[0].kernel
        self.last, self.drop = self.first, nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.norm(nnx.relu(self.first(x)), use_running_average=not train)
        x = self.drop(self.rest[1](jnp.tanh(self.rest[0](x))), deterministic=not train)
        return self.last(x)


def test_a_module_runs_quantized_when_it_is_called():
    model = Net(nnx.Rngs(0))
    quantized, report = qjax.quantize_nnx(model, "gptq:int4-g4@parallel", batches=[(X,)])
    assert isinstance(quantized, Net) and isinstance(quantized.first.kernel.get_value(), Kernel)
    assert [record.path for record in report.layers] == ["first/kernel", "rest/0/kernel"]
    _, params, rest = nnx.split(nnx.clone(quantized), nnx.Param, ...)
    dense = nnx.merge(nnx.graphdef(model), qjax.dequantize_function(params), rest)
    near = lambda got: np.testing.assert_allclose(got, dense(X), atol=1e-5)  # noqa: E731
    near(quantized(X))
    near(nnx.jit(lambda model, x: model(x))(quantized, X))
    near(nnx.clone(quantized)(X))
    assert float(jnp.max(jnp.abs(dense(X) - model(X)))) > 1e-3
    gradient = jax.grad(lambda x: jnp.sum(quantized(x)))(X)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: jnp.sum(dense(x)))(X), atol=1e-4)
    np.testing.assert_allclose(quantized(X, train=True), dense(X, train=True), atol=1e-5)  # of the same random numbers
    assert quantized.drop.rngs.count[...] == dense.drop.rngs.count[...] == model.drop.rngs.count[...] + 1
    np.testing.assert_allclose(quantized.norm.mean[...], dense.norm.mean[...], atol=1e-6)
    assert float(jnp.max(jnp.abs(quantized.norm.mean[...]))) > 0


def test_a_module_is_kept_by_orbax(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    make = lambda seed: qjax.quantize_nnx(Bonsai(nnx.Rngs(seed)), "nf4-g4", batches=[(X,)])[0]  # noqa: E731
    model, fresh = make(0), make(1)
    with orbax.StandardCheckpointer() as keeper:
        keeper.save(tmp_path / "kept", nnx.state(model))
    with orbax.StandardCheckpointer() as keeper:
        nnx.update(fresh, keeper.restore(tmp_path / "kept", jax.eval_shape(lambda: nnx.state(fresh))))
    np.testing.assert_array_equal(fresh(X), model(X))


def test_misuse_is_named():
    with pytest.raises(qjax.QjaxError, match=r"expected a module of flax.nnx, got int"):
        qjax.quantize_nnx(7, "nf4", batches=[(X,)])
    with pytest.raises(qjax.QjaxError, match="batches is empty"):
        qjax.quantize_nnx(Bonsai(nnx.Rngs(0)), "nf4", batches=[])
    assert "q/kernel   8 2 4  (8) -> (8)" in str(qjax.coverage_nnx(Bonsai(nnx.Rngs(0)), X))


class Layers(nnx.Module):
    """Layers made under nnx.vmap, run under nnx.scan and nnx.remat, which return all state."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        run = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))
        return nnx.scan(lambda x, layer: run(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_layers_under_scan_are_quantized_one_by_one():
    model = Layers(nnx.Rngs(0))
    quantized, report = qjax.quantize_nnx(model, "gptq:int4-g4@parallel", batches=[(X,)])
    assert [record.path for record in report.layers] == [f"layers/kernel[{i}]" for i in range(3)]
    kernel, x = quantized.layers.kernel.get_value().array(), X
    for i in range(3):
        x = jnp.tanh(x @ kernel[i] + model.layers.bias[...][i])
    np.testing.assert_allclose(quantized(X), x, atol=1e-5)
    assert float(jnp.max(jnp.abs(model(X) - x))) > 1e-3
