"""Models in the style of Flax's own examples, written here: they run with weights rounded by hand as they run quantized."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import qjax
from tests.traced_models import normal

pytestmark = pytest.mark.filterwarnings("ignore:fewer calibration tokens")
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)


class CNN(nn.Module):
    """As the example of MNIST."""

    @nn.compact
    def __call__(self, x):
        for features in (4, 8):
            x = nn.avg_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(x)


class Decoder(nn.Module):
    """As the example of LM1B: its own modules around attention of Flax, positions that are added, a head of its own."""

    @nn.compact
    def __call__(self, tokens):
        mask = nn.make_causal_mask(tokens)
        x = nn.Embed(11, 8, name="embed")(tokens) + jnp.sin(jnp.arange(tokens.shape[1])[:, None] / 10.0 ** jnp.arange(8))
        for _ in range(2):
            y = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False, deterministic=True)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dropout(0.1, deterministic=True)(y)
            x = x + nn.Dense(8)(nn.relu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(11, name="logitdense")(nn.LayerNorm()(x))


def rounded_by_hand(params, fmt):
    """Kernels of Dense, Conv and attention rounded as (in, out) matrices of their first and last axes."""
    flat = flatten_dict(params)
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            inputs = 2 if path[-2] == "out" else 1 if path[-2] in ("query", "key", "value") else leaf.ndim - 1
            matrix = leaf.reshape(math.prod(leaf.shape[:inputs]), -1)
            flat[path] = qjax.dequantize(qjax.rtn(matrix, fmt)[0]).reshape(leaf.shape)
    return unflatten_dict(flat)


@pytest.mark.parametrize(("module", "x"), [(CNN(), normal(1, 2, 8, 8, 1)), (Decoder(), TOKENS)], ids=["mnist", "lm1b"])
def test_linen_models_are_those_of_weights_rounded_by_hand(module, x):
    params = module.init(jax.random.key(1), x)["params"]
    quantized, report = qjax.quantize_flax(module, params, "rtn:int4-g4", batches=[(x,)])
    assert len(report.layers) == len([path for path in flatten_dict(params) if path[-1] == "kernel"])
    expected = module.apply({"params": rounded_by_hand(params, "int4-g4")}, x)
    np.testing.assert_allclose(qjax.apply_flax(module, quantized, x), expected, atol=1e-4)
    assert float(jnp.max(jnp.abs(expected - module.apply({"params": params}, x)))) > 1e-3


class Einsum(nnx.Module):
    def __init__(self, shape, rngs):
        self.w = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), shape))

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


class GemmaBlock(nnx.Module):
    """Grouped queries, keys and values in one array, gates in one array, norms of one plus a scale."""

    def __init__(self, rngs):
        self.q, self.kv, self.o = Einsum((4, 8, 4), rngs), Einsum((2, 2, 8, 4), rngs), Einsum((4, 4, 8), rngs)
        self.gating, self.linear = Einsum((2, 8, 16), rngs), Einsum((16, 8), rngs)
        self.before, self.after = nnx.RMSNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, x):
        y = self.before(x)
        q, (k, v) = self.q("BTD,NDH->BTNH", y), self.kv("BSD,CKDH->CBSKH", y)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(*q.shape[:2], 2, 2, 4), k)
        weights = jax.nn.softmax(jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -1e9))
        x = x + self.o("BTNH,NHD->BTD", jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape))
        gate, up = self.gating("BTF,NFH->NBTH", self.after(x))
        return x + self.linear("BTH,HF->BTF", jax.nn.gelu(gate) * up)


class Gemma(nnx.Module):
    """As the example of Gemma: one table that tokens are looked up in and logits are made of."""

    def __init__(self, rngs):
        self.input_embedding = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), (11, 8)))
        self.layers = nnx.List([GemmaBlock(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.input_embedding[...][tokens]
        for layer in self.layers:
            x = nnx.remat(type(layer).__call__)(layer, x)
        return x @ self.input_embedding[...].T


def test_an_nnx_model_is_that_of_its_decoded_weights():
    model = Gemma(nnx.Rngs(0))
    with pytest.raises(qjax.QjaxError, match=r"input_embedding is contracted, and looked up. A rule 'PATTERN=none'"):
        qjax.quantize_nnx(model, "rtn:int4-g4", batches=[(TOKENS,)])
    quantized, report = qjax.quantize_nnx(model, "gptq:int4-g4@parallel", batches=[(TOKENS,)], rules=["input_embedding=none"])
    names = ("q", "kv", "o", "gating", "linear")
    assert {record.path for record in report.layers if record.recipe != "none"} == {
        f"layers/{i}/{name}/w" for i in range(2) for name in names
    }
    _, params, rest = nnx.split(quantized, nnx.Param, ...)
    expected = nnx.merge(nnx.graphdef(model), qjax.dequantize_function(params), rest)(TOKENS)
    np.testing.assert_allclose(quantized(TOKENS), expected, atol=1e-4)
    assert float(jnp.max(jnp.abs(expected - model(TOKENS)))) > 1e-3
