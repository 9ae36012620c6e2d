"""gpt-oss: sinks in attention, biases and the clamped activation of its experts, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.checkpoints.huggingface import load_huggingface, save_huggingface
from qjax.models.attention import QUERY_PIECES, SMALLEST_PIECE, Attention
from qjax.models.mixture import Mixture
from qjax.models.mlp import LIMIT, SLOPE
from qjax.models.model import apply
from qjax.models.parameters import flatten, unflatten
from tests.conftest import GPT_OSS, tiny_config
from tests.random_weights import small_model

EXPERTS, CHOSEN = GPT_OSS["experts"], GPT_OSS["experts_per_token"]
CONFIG = tiny_config(vocabulary_size=61, **GPT_OSS)
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 24)).astype(np.int32)
MANY = np.tile(TOKENS, (8, 1))
FEW = ["sinks", "router/bias", "gate/bias", "up/bias", "down/bias"]  # what other families do not have


@pytest.fixture(scope="module")
def model():
    """With sinks and biases that matter, and gates and ups beyond their limits."""
    model, generator = small_model(CONFIG), np.random.default_rng(3)
    leaves = flatten(model.params)
    sizes = {"sinks": 2.0, "gate/bias": LIMIT, "up/bias": LIMIT}
    for path, leaf in leaves.items():
        if path.endswith(tuple(FEW)):
            size = sizes.get(next(name for name in FEW if path.endswith(name)), 0.5)
            leaves[path] = jnp.asarray(size * generator.standard_normal(leaf.shape), jnp.float32)
    return model._replace(params=unflatten(leaves))


def part_of(model, name):
    """(parameters, the same by path in float64) of a module of the first block."""
    params = model.params["block_0"][name]
    return params, {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}


def attended(leaves, x):
    """One sequence, query by query: softmax over what is seen and the sink, which has no value."""
    c = dataclasses.replace(CONFIG, positions="none")
    by_head = {name: (x @ leaves[f"{name}/kernel"] + leaves[f"{name}/bias"]).reshape(len(x), -1, c.head_dim) for name in "qkv"}
    mixed = np.zeros((len(x), c.heads, c.head_dim))
    for head in range(c.heads):
        k, v = (by_head[name][:, head // (c.heads // c.kv_heads)] for name in "kv")
        for t in range(len(x)):
            seen = slice(max(0, t - c.sliding_window + 1), t + 1)
            scores = np.exp(k[seen] @ by_head["q"][t, head] * c.head_dim**-0.5)
            mixed[t, head] = scores @ v[seen] / (scores.sum() + np.exp(leaves["sinks"][head]))
    return mixed.reshape(len(x), -1) @ leaves["o/kernel"] + leaves["o/bias"]


def test_a_sink_takes_its_share_of_attention(model):
    """Of texts that attend in pieces, too; large logits do not overflow."""
    params, leaves = part_of(model, "attention")
    x = np.random.default_rng(1).standard_normal((QUERY_PIECES * SMALLEST_PIECE // 2, CONFIG.hidden_size))
    alone = Attention(dataclasses.replace(CONFIG, positions="none", kinds=(), rope_scaling=None))
    found = alone.apply({"params": params}, jnp.asarray(x[None], jnp.float32))[0]
    expected = attended(leaves, x)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    without = attended(leaves | {"sinks": np.full(CONFIG.heads, -np.inf)}, x)
    assert np.abs(without - expected).max() > 0.1 * np.abs(expected).max()
    everything = alone.apply({"params": params | {"sinks": jnp.full(CONFIG.heads, 200.0)}}, jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(everything[0], np.broadcast_to(leaves["o/bias"], x.shape), atol=1e-6)


def test_experts_add_biases_and_clamp(model):
    params, leaves = part_of(model, "mlp")
    x = np.random.default_rng(1).standard_normal((24, CONFIG.hidden_size))
    found = Mixture(CONFIG).apply({"params": params}, jnp.asarray(x[None], jnp.float32))[0]
    expected, beyond = np.zeros_like(x), 0
    for t, token in enumerate(x):
        logits = token @ leaves["router/matrix"] + leaves["router/bias"]
        chosen = np.argsort(-logits)[:CHOSEN]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for share, e in zip(shares, chosen, strict=True):
            gate, up = (token @ leaves[f"{name}/kernel"][e] + leaves[f"{name}/bias"][e] for name in ("gate", "up"))
            beyond += (gate > LIMIT).sum() * (np.abs(up) > LIMIT).sum()
            gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
            inner = gate / (1 + np.exp(-SLOPE * gate)) * (up + 1)
            expected[t] += share * (inner @ leaves["down/kernel"][e] + leaves["down/bias"][e])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert beyond > 100


@pytest.mark.parametrize("name", FEW)
def test_nothing_is_ignored(model, name):
    """What only this family has changes the logits, each of them in every block."""
    exact = np.asarray(apply(model, TOKENS))
    for number in range(CONFIG.layers):
        leaves = flatten(model.params)
        (path,) = (path for path in leaves if path.startswith(f"block_{number}/") and path.endswith(f"/{name}"))
        other = apply(model._replace(params=unflatten(leaves | {path: jnp.zeros_like(leaves[path])})), TOKENS)
        assert np.abs(np.asarray(other) - exact).max() > 1e-2 * np.abs(exact).max()


def test_folders_hold_experts_as_one_tensor(model, tmp_path):
    """Bit for bit, read at once or part by part."""
    from safetensors.numpy import load_file

    save_huggingface(tmp_path, model)
    stored = load_file(tmp_path / "model.safetensors")
    leaves, stem = flatten(model.params), "model.layers.1.mlp.experts"
    for ours, start in (("gate", 0), ("up", 1)):
        for suffix, leaf in (("", "kernel"), ("_bias", "bias")):
            here = leaves[f"block_1/mlp/{ours}/{leaf}"]
            np.testing.assert_array_equal(stored[f"{stem}.gate_up_proj{suffix}"][..., start::2], here)
    for lazy in (False, True):
        back = load_huggingface(tmp_path, lazy=lazy)
        assert back.config == model.config
        for path, leaf in flatten(back.params).items():
            np.testing.assert_array_equal(np.asarray(leaf), leaves[path], err_msg=path)


@pytest.mark.parametrize("recipe", ["rtn:int4-g16", "gptq:int4-g16@qep", "awq+rtn:int4-g16@sequential"])
def test_every_expert_is_quantized(model, recipe, tmp_path):
    """By itself, on the tokens that are routed to it; sinks, router and biases stay as they are."""
    found, report = qjax.quantize(model, recipe, calibration=MANY)
    records = {record.path: record for record in report.layers}
    calibrated = not recipe.startswith("rtn")
    for number in range(CONFIG.layers):
        for name in ("gate", "up", "down"):
            members = [records[f"block_{number}/mlp/{name}/{expert}/kernel"] for expert in range(EXPERTS)]
            if calibrated:
                assert sum(record.routed for record in members) == CHOSEN * MANY.size
    before, after = flatten(model.params), flatten(found.params)
    for path in (path for path in before if path.endswith(tuple(FEW)) or "router" in path):
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    exact, packed = (np.asarray(apply(each, TOKENS)) for each in (model, found))
    assert 1e-3 < np.linalg.norm(packed - exact) / np.linalg.norm(exact) < 0.4
    qjax.save(tmp_path / "packed", found)
    np.testing.assert_array_equal(apply(qjax.load(tmp_path / "packed"), TOKENS), packed)


def test_what_awq_folds_into_experts_changes_their_biases():
    """The division of what up makes, where nothing is clamped: the scaled model computes the same."""
    config = dataclasses.replace(CONFIG, family="mixtral", activation="silu")
    scaled, _ = qjax.quantize(small_model(config), "awq+rtn:int8-g16@parallel", calibration=MANY)
    leaves = flatten(scaled.params)
    changed = leaves["block_0/mlp/up/bias"], flatten(small_model(config).params)["block_0/mlp/up/bias"]
    assert not np.allclose(*changed)
    exact, found = (np.asarray(apply(each, TOKENS)) for each in (small_model(config), scaled))
    assert np.abs(found - exact).max() < 0.03 * np.abs(exact).max()
