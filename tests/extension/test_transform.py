"""SmoothQuant with int8 activations, and a rotation: transforms and maps of one's own, a line of code each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import qjax
from qjax.errors import QjaxError
from qjax.maps import Divide
from tests.extension.common import sweep, tiny_model

pytestmark = pytest.mark.usefixtures("registries")


@qjax.register_map
class Rotate:
    """x H for an orthogonal H."""

    matrix: jax.Array

    def on_input(self, x):
        return x @ self.matrix.astype(x.dtype)

    def on_weight(self, weight):
        return self.matrix.T @ weight

    def on_statistic(self, value, axes):
        if axes == 1:
            raise QjaxError("a rotation mixes inputs: statistics of single inputs are not known behind it")
        return value if axes == 0 else self.matrix.T @ value @ self.matrix

    def stored(self):
        return self


def smooth(weights, fmt, *, abs_max, alpha: float = 0.5):
    """Xiao et al. 2022 (arXiv 2211.10438): s = max|x|^alpha / max|W|^(1 - alpha)."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(weight), axis=1) for weight in weights]), axis=0)
    return Divide(jnp.maximum(abs_max, 1e-5) ** alpha / jnp.maximum(largest, 1e-5) ** (1 - alpha))


def rotate(weights, fmt):
    """A Hadamard matrix where the inputs are a power of two."""
    size = len(weights[0])
    return Rotate(jnp.asarray(scipy.linalg.block_diag(*[scipy.linalg.hadamard(16) / 4] * (size // 16)), jnp.float32))


def outlying_model():
    """One input of every norm is forty times as large, which its readers undo."""
    model = tiny_model()
    params = jax.tree.map(lambda leaf: leaf, model.params)  # dicts of its own
    for i in range(model.config.layers):
        block = params[f"block_{i}"]
        for norm, readers in (("attention_norm", "qkv"), ("mlp_norm", ("gate", "up"))):
            block[norm]["scale"] = block[norm]["scale"].at[3].multiply(40)
            inner = block["attention" if norm.startswith("a") else "mlp"]
            for name in readers:
                inner[name]["kernel"] = inner[name]["kernel"].at[3].divide(40)
    return model._replace(params=params)


def test_smoothquant_with_int8_activations(tmp_path):
    """Activations are rounded in perplexity too, and cost less behind the transform where inputs have outliers."""
    qjax.register(smooth, kind="transform")
    weights = "int8-channel-sym-max"
    recipes = (f"rtn:{weights}", f"rtn:{weights}/int8-token", f"smooth+rtn:{weights}/int8-token@parallel")
    static = f"rtn:{weights}/int8-tensor@parallel"
    rows = sweep(tmp_path, *recipes, static, f"rtn:{weights}/int4-token", f"smooth+rtn:{weights}/int4-token@parallel",
                 model=outlying_model(), divergence=True)  # fmt: skip
    kl = {recipe: row["kl"] for recipe, row in rows.items()}
    assert kl[recipes[0]] < kl[recipes[1]] < kl[f"rtn:{weights}/int4-token"]
    assert kl[recipes[0]] < kl[static] < kl[f"rtn:{weights}/int4-token"] and rows[static]["order"] == "parallel"
    assert kl[f"smooth+rtn:{weights}/int4-token@parallel"] < 0.3 * kl[f"rtn:{weights}/int4-token"]


def test_a_map_of_ones_own_is_saved_with_its_layer(tmp_path):
    qjax.register(rotate, kind="transform")
    rows = sweep(tmp_path / "rows", "rotate+rtn:int8-channel-fp32", "rotate+gptq:int4-channel@qep", "gptq:int4-channel@qep")
    assert abs(rows["rotate+rtn:int8-channel-fp32"]["perplexity_ratio"] - 1) < 0.01
    model = tiny_model()
    quantized, report = qjax.quantize(model, "rotate+rtn:int8-channel-fp32")
    qjax.save(tmp_path / "model", quantized)
    loaded = qjax.load(tmp_path / "model")
    tokens = np.arange(12)[None] % 257
    np.testing.assert_array_equal(qjax.apply(loaded, tokens), qjax.apply(quantized, tokens))
    leaf = loaded.params["block_0"]["mlp"]["down"]["kernel"]
    assert [type(each) for each in leaf.inputs] == [Rotate]
    assert report.size_bytes == sum(each.nbytes for each in jax.tree.leaves(loaded.params))


def test_what_is_no_map_is_named():
    @lambda function: qjax.register(function, kind="transform")
    def scales(weights, fmt):
        return jnp.ones(len(weights[0]))

    with pytest.raises(QjaxError, match=r"scales returned .*expected a map of the input, as qjax.maps.Divide"):
        qjax.quantize(tiny_model(), "scales+rtn:int4-g16")
