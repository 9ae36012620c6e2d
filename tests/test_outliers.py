"""LLM.int8() against the paper's arithmetic in float64, in a layer, a model and a folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import QjaxError
from qjax.evaluate import perplexity
from qjax.linear import Linear, apply_linear, dense, dequantize
from qjax.outliers import split_outliers
from tests.conftest import MIXTRAL, random_model, tiny_config
from tests.extension.common import tiny_model

TOKENS, IN, OUT = 6, 20, 5
rng = np.random.default_rng(0)
X = jnp.asarray(rng.standard_normal((2, 3, IN)), jnp.float32).at[0, 1, 4].set(9.0).at[1, 2, 11].set(-6.0).at[1, 0].set(0)
X = X.at[0, 0, 4].set(5.5)  # no outlier itself: left out with its channel, and the largest of its token all the same
WEIGHT = jnp.asarray(rng.standard_normal((IN, OUT)), jnp.float32)


def vector_wise(x: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(values, columns left out), token by token."""
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    columns = {j for row in flat for j in range(len(row)) if abs(row[j]) >= threshold}
    values = flat.copy()
    for row, kept in zip(values, flat, strict=True):
        largest = max([abs(v) for v in kept if abs(v) < threshold], default=0) or 1
        for j in set(range(len(row))) - columns:
            row[j] = np.round(kept[j] * 127 / largest) * largest / 127
    return values.reshape(x.shape), np.array(sorted(columns))


def test_inputs_with_an_outlier_are_left_out_for_all_tokens():
    codes, scale, outlying = split_outliers(X, 6.0)
    expected, columns = vector_wise(np.asarray(X), 6.0)
    np.testing.assert_array_equal(np.flatnonzero(outlying), columns)
    assert list(columns) == [4, 11] and not np.any(np.asarray(codes)[..., columns])
    assert np.max(np.abs(codes)) <= 127 and scale.shape == (2, 3, 1)
    values = np.where(outlying, X, np.asarray(codes) * scale)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)


def test_a_layer_decoded_or_packed_in_one_program_for_every_batch():
    q, _ = qjax.rtn(WEIGHT, "int8-channel-sym-max-fp32")
    leaf = Linear(q, activation="llm_int8")
    run = jax.jit(apply_linear)
    quiet = X / 10  # no outlier at all
    for x in (X, quiet):
        expected = vector_wise(np.asarray(x), 6.0)[0] @ np.asarray(qjax.dequantize(q), np.float64)
        for held in (leaf, dense(leaf)):
            np.testing.assert_allclose(run(x, held), expected, rtol=1e-5, atol=1e-5)
    assert run._cache_size() == 2  # packed and decoded
    gradient = jax.grad(lambda x: jnp.sum(apply_linear(x, leaf)))(X)
    np.testing.assert_allclose(gradient[0, 0], np.sum(qjax.dequantize(q), axis=1), rtol=1e-5)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32)


def test_in_a_model_and_its_folder(tmp_path, tokens):
    recipe = "llm_int8(threshold=1.5):int8-channel-sym-max"
    model, _ = qjax.quantize(tiny_model(), recipe)
    leaf = model.params["block_0"]["attention"]["q"]["kernel"]
    assert str(leaf.activation) == "llm_int8(threshold=1.5)" and leaf.outliers is None
    qjax.save(tmp_path / "model", model)
    loaded = qjax.load(tmp_path / "model")
    assert loaded.params["block_0"]["attention"]["q"]["kernel"].activation == leaf.activation
    np.testing.assert_array_equal(qjax.apply(loaded, tokens), qjax.apply(model, tokens))


def test_outliers_of_calibration_keep_their_rows(tokens):
    recipe = "llm_int8(threshold=1.5,outliers=calibration):int8-channel-sym-max@parallel"
    float_model = tiny_model()
    with pytest.raises(QjaxError, match="needs calibration data"):
        qjax.quantize(float_model, recipe)
    model, report = qjax.quantize(float_model, recipe, calibration=tokens)
    seen = {row["layers"]: row["outlier_channels"] for row in qjax.input_outliers(float_model, tokens, threshold=1.5)[:4]}
    found = 0
    for path in ("attention/q", "mlp/down"):
        part, name = path.split("/")
        leaf = model.params["block_0"][part][name]["kernel"]
        assert str(leaf.activation) == "int8-token"
        if leaf.outliers is not None:
            index = np.asarray(leaf.outliers.index)
            assert len(index) == next(count for layers, count in seen.items() if path in layers)
            exact = np.asarray(float_model.params["block_0"][part][name]["kernel"])
            np.testing.assert_array_equal(leaf.outliers.weight, exact[index].astype(np.float16))
            found += len(index)
            row = next(r for r in report.layers if r.path == f"block_0/{path}/kernel")
            error = np.sum(np.square(dequantize(leaf) - exact)) / np.sum(np.square(exact))  # of codes and kept rows together
            assert row.bits_per_weight > 8.1 and row.weight_error == pytest.approx(error, rel=1e-4)
    assert found


def test_names():
    names = {
        "LLM_INT8:int8-channel": "llm_int8:int8-channel",
        "llm_int8(threshold=6):int8-channel": "llm_int8:int8-channel",
        "rtn+llm_int8(threshold=3):int8-channel": "llm_int8(threshold=3.0):int8-channel",
        "smoothquant+gptq+llm_int8:int8-channel-sym": "smoothquant+gptq+llm_int8:int8-channel-sym",
        "llm_int8(outliers=calibration):int4-g32@parallel": "llm_int8(outliers=calibration):int4-g32@parallel",
    }
    for text, name in names.items():
        assert str(qjax.parse_recipe(text)) == name and qjax.parse_recipe(name) == qjax.parse_recipe(text)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("llm_int8(threshold=0):int8-channel", "threshold=0.0; expected a number above 0"),
        ("llm_int8(threshold=1e-60):int8-channel", "threshold=1e-60; expected a number above 0"),
        ("llm_int8(threshold=1e60):int8-channel", "threshold=1e\\+60; expected a number above 0"),
        ("llm_int8(outliers=none):int8-channel", "is one of batch, calibration"),
        ("llm_int8:int8-channel/int8-token", "several things are said of the layers' inputs"),
        ("rtn:int8-channel/llm_int8", "several things are said of the layers' inputs"),
        ("llm_int8+gptq:int8-channel", "cannot follow a activation|llm_int8 ends it"),
        ("llm_int8:bf16", "is a cast and takes no method"),
    ],
)
def test_what_cannot_be_asked_for(recipe, told):
    with pytest.raises(QjaxError, match=told):
        qjax.parse_recipe(recipe)


def test_what_fills_a_batch_adds_no_outliers(tokens, monkeypatch):
    monkeypatch.setitem(perplexity.BATCH_TOKENS, jax.default_backend(), 2 * tokens.shape[1])
    model, _ = qjax.quantize(tiny_model(), "llm_int8(threshold=1.5):int4-channel")
    filled, alone = perplexity.score(model, tokens[:3])[2], perplexity.score(model, tokens[2:3])[0]
    np.testing.assert_allclose(filled, alone, rtol=1e-5)


def test_experts_do_not_keep_rows_of_their_own(tokens):
    with pytest.raises(QjaxError, match="each with outliers of its own"):
        qjax.quantize(random_model(tiny_config(**MIXTRAL)), "llm_int8(outliers=calibration):int8-channel", calibration=tokens)
