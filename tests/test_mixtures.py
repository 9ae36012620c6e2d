"""Mixtures of experts: what they compute, what calibration sees of them, and that each expert is a layer like any other."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.capture import Batch, capture_statistics
from qjax.calibrate.experts import FEWEST
from qjax.checkpoints.export import export
from qjax.checkpoints.huggingface import load_huggingface, save_huggingface
from qjax.driver.decoder import kernel_shapes
from qjax.driver.placement import in_our_words, parse_rule
from qjax.errors import QjaxError, QjaxWarning
from qjax.lazy import is_lazy, materialised
from qjax.models.mixture import Mixture
from qjax.models.model import apply, runnable
from qjax.models.parameters import flatten, unflatten
from qjax.models.stacks import apart, member, together
from tests.conftest import MIXTRAL, tiny_config
from tests.random_weights import small_model

EXPERTS, CHOSEN = 4, 2
CONFIG = tiny_config(vocabulary_size=61, layers=1, **MIXTRAL)
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 24)).astype(np.int32)
ALONE = ["attention=none"]
STACKS = {f"block_0/mlp/{name}/kernel": EXPERTS for name in ("gate", "up", "down")}


def unreachable(leaves, expert):
    """A router that gives no token to an expert: all inputs have a first feature of 1."""
    matrix = np.array(leaves["router/matrix"])
    matrix[0, expert] = -100
    return leaves | {"router/matrix": jnp.asarray(matrix)}


@pytest.fixture(scope="module")
def model():
    return small_model(CONFIG)


@pytest.fixture(scope="module")
def case(model):
    """A mixture's parameters by path, of which the last expert is never chosen, its input (batch, time, hidden), and weights of
    tokens.
    """
    generator = np.random.default_rng(1)
    x = generator.standard_normal((3, 16, CONFIG.hidden_size)).astype(np.float32)
    x[..., 0] = 1
    weights = generator.uniform(0.5, 2, x.shape[:2]).astype(np.float32) * (generator.random(x.shape[:2]) > 0.2)
    leaves = {path.removeprefix("block_0/mlp/"): leaf for path, leaf in flatten(model.params).items() if "/mlp/" in path}
    return unreachable(leaves, EXPERTS - 1), x, weights


def slowly(leaves, x):
    """Token by token in float64: outputs, inputs of down by expert and token, which experts a token goes through."""
    arrays = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
    tokens = x.reshape(-1, x.shape[-1]).astype(np.float64)
    outputs, inner = np.zeros_like(tokens), np.zeros((EXPERTS, len(tokens), CONFIG.mlp_size))
    routed = np.zeros((EXPERTS, len(tokens)), bool)
    for t, token in enumerate(tokens):
        logits = token @ arrays["router/matrix"]
        shares = np.exp(logits - logits.max())
        chosen = np.argsort(-shares)[:CHOSEN]
        routed[chosen, t] = True
        for e in range(EXPERTS):
            gate, up = (token @ arrays[f"{name}/kernel"][e] for name in ("gate", "up"))
            inner[e, t] = gate / (1 + np.exp(-gate)) * up
        for e in chosen:
            outputs[t] += shares[e] / shares[chosen].sum() * inner[e, t] @ arrays["down/kernel"][e]
    return outputs.reshape(x.shape), inner, routed


def test_each_token_goes_through_its_experts(case):
    leaves, x, _ = case
    expected, _, routed = slowly(leaves, x)
    assert routed.sum() == CHOSEN * routed.shape[1] and not routed[-1].any()
    found = Mixture(CONFIG).apply({"params": unflatten(leaves)}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_an_expert_is_calibrated_on_its_own_tokens(case):
    """And one that none is routed to on all, which its values tell."""
    leaves, x, weights = case
    batches = [Batch((jnp.asarray(each),), jnp.asarray(w)) for each, w in ((x[:2], weights[:2]), (x[2:], weights[2:]))]
    needed = {"up/kernel": CONFIG.hidden_size, "down/kernel": CONFIG.mlp_size}
    stacks = dict.fromkeys(needed, EXPERTS)
    found = capture_statistics(Mixture(CONFIG), unflatten(leaves), batches, needed, ["hessian", "abs_max"], stacks=stacks)
    _, inner, routed = slowly(leaves, x)
    tokens, flat = x.reshape(-1, x.shape[-1]), weights.reshape(-1).astype(np.float64)
    for number in range(EXPERTS):
        counts = flat * (routed[number] if number < EXPERTS - 1 else True)
        for name, given in (("up", tokens), ("down", inner[number])):
            got = found.statistics[member(f"{name}/kernel", number)]
            hessian = (given * counts[:, None]).T @ given / counts.sum()
            np.testing.assert_allclose(got["hessian"], hessian, atol=1e-5 * np.abs(hessian).max())
            np.testing.assert_allclose(got["abs_max"], np.abs(given[counts > 0]).max(axis=0), rtol=1e-5)
            assert int(got["tokens"]) == (counts > 0).sum()
            assert int(got["routed"]) == (flat * routed[number] > 0).sum()
    assert found.statistics.keys() == {member(path, number) for path in needed for number in range(EXPERTS)}


@pytest.mark.parametrize("order", ["parallel", "qep"])
def test_a_mixture_of_one_is_an_mlp(order):
    """To the same codes, in the orders that share what is captured and that see the quantized layers before."""
    alone = tiny_config(vocabulary_size=61, layers=1, **MIXTRAL | {"experts": 1, "experts_per_token": 1})
    plain = small_model(tiny_config(vocabulary_size=61, layers=1, **MIXTRAL | {"experts": 0, "experts_per_token": 0}))
    leaves = flatten(plain.params)
    stacked = {path: leaf[None] if path in STACKS else leaf for path, leaf in leaves.items()}
    stacked["block_0/mlp/router/matrix"] = jnp.ones((alone.hidden_size, 1))
    recipe = f"gptq:int4-g16@{order}"
    expected, _ = qjax.quantize(plain, recipe, calibration=TOKENS, rules=ALONE)
    found, report = qjax.quantize(
        plain._replace(config=alone, params=unflatten(stacked)), recipe, calibration=TOKENS, rules=ALONE
    )
    got = flatten(found.params)
    for path, leaf in flatten(expected.params).items():
        same = jax.tree.map(lambda array: array[0], got[path]) if path in STACKS else got[path]
        for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(same), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=path)
    assert [record.routed for record in report.layers if "/mlp/" in record.path] == [TOKENS.size] * 3


@pytest.fixture(scope="module")
def quantized(model):
    """(model, report, warnings): quantized in the default order, its last expert never chosen."""
    leaves = flatten(model.params)
    mlp = {path.removeprefix("block_0/mlp/"): leaf for path, leaf in leaves.items() if "/mlp/" in path}
    starved = leaves | {f"block_0/mlp/{path}": leaf for path, leaf in unreachable(mlp, EXPERTS - 1).items()}
    starved |= {"block_0/mlp_norm/scale": leaves["block_0/mlp_norm/scale"].at[0].set(5.0)}
    starved |= {"embed/tokens/embedding": leaves["embed/tokens/embedding"].at[:, 0].set(20.0)}  # above 0 in every token
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, report = qjax.quantize(
            model._replace(params=unflatten(starved)), "awq+rtn:int4-g16@sequential", calibration=TOKENS, rules=ALONE
        )
    return found, report, [str(each.message) for each in told if issubclass(each.category, QjaxWarning)]


def test_experts_that_calibration_hardly_reached_are_named(quantized):
    _, report, told = quantized
    records = {record.path: record for record in report.layers}
    for name in ("gate", "up", "down"):
        counts = [records[f"block_0/mlp/{name}/{number}/kernel"] for number in range(EXPERTS)]
        assert sum(record.routed for record in counts) == CHOSEN * TOKENS.size
        mean = CHOSEN * TOKENS.size / EXPERTS
        assert [record.tokens for record in counts] == [
            TOKENS.size if record.routed < max(1, FEWEST * mean) else record.routed for record in counts
        ]
        assert (counts[-1].routed, counts[-1].tokens) == (0, TOKENS.size)
    assert [text for text in told if "block_0/mlp/up/3/kernel (0 of 96)" in text and text.startswith("experts that hardly")]
    assert [record.routed for record in report.layers if "attention" in record.path] == [None] * 4
    assert "block_0/mlp/router/matrix" not in records


def test_folders_hold_stacks(quantized, tmp_path):
    """Packed, bit-equal, read at once or part by part; and as plain folders of single experts."""
    model, *_ = quantized
    expected = np.asarray(apply(model, TOKENS))
    qjax.save(tmp_path / "packed", model)
    for lazy in (False, True):
        back = qjax.load(tmp_path / "packed", lazy=lazy)
        np.testing.assert_array_equal(apply(back, TOKENS), expected)
    np.testing.assert_allclose(apply(runnable(model), TOKENS), expected, atol=1e-4 * np.abs(expected).max())
    save_huggingface(tmp_path / "plain", model)
    plain = load_huggingface(tmp_path / "plain", lazy=True)
    assert is_lazy(plain.params)
    for path, leaf in flatten(runnable(model).params).items():
        np.testing.assert_array_equal(materialised(flatten(plain.params)[path]), leaf, err_msg=path)


def test_files_of_other_libraries_hold_experts_one_by_one(model, tmp_path):
    save_huggingface(tmp_path, model)
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    leaves = flatten(model.params)
    stem = "model.layers.0.block_sparse_moe"
    np.testing.assert_array_equal(tensors[f"{stem}.gate.weight"], leaves["block_0/mlp/router/matrix"].T)
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        for number in range(EXPERTS):
            stored = tensors[f"{stem}.experts.{number}.{theirs}.weight"]
            np.testing.assert_array_equal(stored, leaves[f"block_0/mlp/{ours}/kernel"][number].T)
    (rule,) = in_our_words(model, [parse_rule("w2=none")])
    assert rule.pattern == "mlp/down"
    assert kernel_shapes(model)[0].count((CONFIG.mlp_size, CONFIG.hidden_size)) == EXPERTS


def test_stacks_come_apart_and_together(model):
    leaves = flatten(model.params)
    members = apart(leaves, STACKS)
    assert len(members) == len(leaves) + 3 * (EXPERTS - 1)
    np.testing.assert_array_equal(members["block_0/mlp/down/2/kernel"], leaves["block_0/mlp/down/kernel"][2])
    back = together(members, STACKS)
    assert list(back) == list(leaves)
    np.testing.assert_array_equal(back["block_0/mlp/down/kernel"], leaves["block_0/mlp/down/kernel"])
    q, _ = qjax.rtn(members["block_0/mlp/down/2/kernel"], "int4-g16")
    with pytest.raises(QjaxError, match="block_0/mlp/down/kernel: its 4 members are not of one format"):
        together(members | {"block_0/mlp/down/2/kernel": q}, STACKS)


def test_inputs_of_experts_are_rounded(model):
    """Each expert by a scale of its own, from its own tokens; packed and decoded alike."""
    recipe = "rtn:int8-channel-sym-max/int8-tensor@parallel"
    found, _ = qjax.quantize(model, recipe, calibration=np.tile(TOKENS, (3, 1)), rules=ALONE)
    leaf = flatten(found.params)["block_0/mlp/down/kernel"]
    assert leaf.activation_scale.shape == (EXPERTS,) and np.unique(leaf.activation_scale).size == EXPERTS
    exact, packed, decoded = (np.asarray(apply(each, TOKENS)) for each in (model, found, runnable(found)))
    np.testing.assert_allclose(packed, decoded, atol=1e-3 * np.abs(exact).max())
    assert 1e-4 < np.abs(packed - exact).max() / np.abs(exact).max() < 0.2


def test_folders_of_other_libraries_keep_codes(tmp_path):
    sizes = {"hidden_size": 64, "mlp_size": 32, "head_dim": 16, "kv_heads": 4}
    found, _ = qjax.quantize(small_model(tiny_config(vocabulary_size=61, layers=1, **MIXTRAL | sizes)), "rtn:int4-g32")
    with pytest.warns(QjaxWarning, match="gptq of mixtral: GPTQModel 7 looks for its experts by other names"):
        export(tmp_path / "theirs", found, "gptq")
    settings = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    assert settings["dynamic"] == {r"-:model\.layers\.0\.block_sparse_moe\.gate$": {}}  # which some library takes for a layer
    for lazy in (False, True):
        back = flatten(load_huggingface(tmp_path / "theirs", lazy=lazy).params)
        for path in STACKS:
            leaf = flatten(found.params)[path]
            assert (back[path].format, back[path].shape) == (leaf.format, leaf.shape)
            for one, other in zip(jax.tree.leaves(back[path]), jax.tree.leaves(leaf), strict=True):
                np.testing.assert_array_equal(materialised(one), other, err_msg=path)
