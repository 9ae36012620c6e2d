"""`g_idx`: a transform from outside that puts a layer's inputs in another order, so that a group holds inputs alike."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.linear import dequantize
from qjax.maps import Permute
from qjax.sweep.runner import run_sweep
from tests.extension.common import sweep, tiny_model

PLAIN, ORDERED = "rtn:int3-g16", "by_size:int3-g16"  # rounded to nearest, as a recipe of a transform alone is


def by_size(weights, fmt):
    """Inputs whose weights are largest come first."""
    return Permute(jnp.argsort(-jnp.max(jnp.abs(jnp.concatenate(weights, axis=1)), axis=1)).astype(jnp.int32))


@pytest.fixture(autouse=True)
def _transform(registries):
    qjax.register(by_size, kind="transform")


def kernels(params):
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=qjax.is_quantized) if qjax.is_quantized(leaf)]


def test_every_figure_is_of_the_permuted_model(tmp_path):
    """Its bytes hold an index a layer; its groups are those of the order; its errors are another's."""
    rows = sweep(tmp_path, PLAIN, ORDERED, divergence=True)
    row, plain, model = rows[ORDERED], rows[PLAIN], tiny_model()
    quantized, report = qjax.quantize(model, ORDERED)
    leaf, weight = quantized.params["block_1"]["mlp"]["down"]["kernel"], model.params["block_1"]["mlp"]["down"]["kernel"]
    order = np.argsort(-np.abs(np.asarray(weight)).max(axis=1), kind="stable")
    assert [type(each) for each in leaf.inputs] == [Permute] and np.array_equal(leaf.inputs[0].index, order)
    expected = np.empty_like(weight)
    expected[order] = dequantize(qjax.rtn(weight[order], "int3-g16")[0])
    np.testing.assert_array_equal(dequantize(leaf), expected)
    inputs = sum(layer.in_features for layer in report.layers if layer.recipe != "none")
    assert row["size_bytes"] == plain["size_bytes"] + 4 * inputs and row["kl"] != plain["kl"]
    corpus = qjax.load_corpus(f"text:{tmp_path / 'letters.txt'}")
    assert row["nll"] == qjax.perplexity(quantized, corpus, "windows-32").nll
    layers = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text().splitlines()]
    errors = {layer["path"]: layer["weight_error"] for layer in layers if layer["recipe"] == ORDERED}
    change = float(np.sum(np.square(expected - weight)) / np.sum(np.square(weight)))
    assert errors["block_1/mlp/down/kernel"] == pytest.approx(change, rel=1e-5)
    table = next(path for path in tmp_path.glob("*windows-32.md")).read_text()
    assert "by_size" in table and f"{row['bits_per_weight']:.3f}" in table


def test_statistics_come_in_the_new_order(tmp_path):
    """GPTQ in the order of its Hessian gives the same model whatever order the inputs come in, where no group sees it."""
    rows = sweep(tmp_path, "gptq:int3-channel@parallel", "by_size+gptq:int3-channel@parallel", "rtn:int3-channel")
    plain, ordered, nearest = (row["nll"] for row in rows.values())
    assert ordered == pytest.approx(plain, rel=1e-6) != nearest


def test_such_a_model_saved_is_swept_beside_its_float_one(tmp_path):
    """Quantized once and loaded, against the same baseline: the figures of the recipe's own row, and of its evaluation."""
    own = sweep(tmp_path / "own", ORDERED, divergence=True)[ORDERED]
    qjax.save(tmp_path / "packed", qjax.quantize(tiny_model(), ORDERED)[0])
    loaded = qjax.load(tmp_path / "packed")
    corpus = qjax.load_corpus(f"text:{tmp_path / 'own/letters.txt'}")
    asked = qjax.Sweep(("none",), (corpus,), qjax.parse_convention("windows-32"), baseline=tiny_model(), divergence=True)
    base, row = run_sweep(loaded, asked, tmp_path / "sweep")
    assert (base["model_recipe"], row["model_recipe"]) == ("none", ORDERED)
    for column in ("nll", "nll_delta", "kl", "size_bytes", "bits_per_weight"):
        assert row[column] == own[column], column
    assert qjax.perplexity(loaded, corpus, "windows-32").nll == row["nll"]
    assert qjax.perplexity(loaded, corpus, "windows-32", packed=True).nll == pytest.approx(row["nll"], rel=1e-5)
