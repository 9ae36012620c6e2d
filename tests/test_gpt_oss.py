"""gpt-oss: sinks in attention, biases and the clamped activation of its experts, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.checkpoints.export import export
from qjax.checkpoints.huggingface import load_huggingface, save_huggingface
from qjax.checkpoints.targets import TARGETS
from qjax.cli.app import main
from qjax.errors import QjaxError
from qjax.lazy import is_lazy, materialised
from qjax.models.attention import QUERY_PIECES, SMALLEST_PIECE, Attention
from qjax.models.mixture import Mixture
from qjax.models.mlp import LIMIT, SLOPE
from qjax.models.model import apply, runnable
from qjax.models.parameters import flatten, unflatten
from tests import foreign, foreign_makers
from tests.conftest import GPT_OSS, byte_tokenizer, tiny_config
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


def test_a_quantized_cache_sees_sinks(model):
    """As keys and values in 16 bits do: less of them is lost than what sinks make of the logits."""
    exact = np.asarray(apply(model, TOKENS))
    leaves = flatten(model.params)
    ignored = {path: jnp.full_like(leaf, -1e9) if path.endswith("sinks") else leaf for path, leaf in leaves.items()}
    kept = dataclasses.replace(CONFIG, cache_format="int8-token(residual=4)")
    found, without = (
        np.linalg.norm(np.asarray(apply(model._replace(config=kept, params=unflatten(each)), TOKENS)) - exact)
        for each in (leaves, ignored)
    )
    assert found < 0.1 * np.linalg.norm(exact) < without


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


# --- MXFP4 ---------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}
STEM = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt_oss") / "a"
    foreign.write(folder, SETTINGS, foreign_makers.experts(), foreign.gpt_oss(vocabulary_size=257))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    return folder


@pytest.mark.parametrize("lazy", [False, True])
def test_blocks_are_read_undecoded(lazy, tmp_path):
    """Of scales from the least to the largest of normal float32 numbers; read at once or part by part."""
    make = foreign_makers.experts(least=3, most=253)
    expected = foreign.write(tmp_path / "a", SETTINGS, make, foreign.gpt_oss(vocabulary_size=64))
    model = qjax.load(tmp_path / "a", lazy=lazy)
    assert is_lazy(model.params) == lazy
    assert model.recipe == "mxfp4 checkpoint: mxfp4_even"
    for path, leaf in flatten(model.params).items():
        if "/mlp/" in path and path.endswith("kernel"):
            assert (str(leaf.format), leaf.bits_per_weight) == ("mxfp4_even", 4.25)
    foreign.assert_stands_for(model._replace(params=materialised(model.params)), expected)
    qjax.save(tmp_path / "b", model)
    foreign.assert_stands_for(qjax.load(tmp_path / "b"), expected)


def test_what_is_read_runs_and_is_written_decoded(folder, tmp_path):
    model = qjax.load(folder)
    logits = np.asarray(apply(model, TOKENS))
    np.testing.assert_allclose(apply(runnable(model), TOKENS), logits, atol=1e-5 * np.abs(logits).max())
    save_huggingface(tmp_path / "plain", model)
    plain = load_huggingface(tmp_path / "plain")
    assert plain.recipe == "none"
    np.testing.assert_allclose(apply(plain, TOKENS), logits, atol=1e-5 * np.abs(logits).max())


def test_commands(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    for words in (
        ["info", folder],
        ["eval", folder, "--data", f"text:{tmp_path / 'text.txt'}", "--convention", "windows-32"],
        ["dequantize", folder, "--out", tmp_path / "plain"],
        ["info", tmp_path / "plain"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, words)))
        assert stopped.value.code in (0, None), capsys.readouterr().err
    assert "mxfp4_even" in capsys.readouterr().out


def test_further_rounding_and_other_libraries_are_refused(folder, tmp_path):
    model = qjax.load(folder)
    with pytest.raises(QjaxError, match="quantized already"):
        qjax.quantize(model, "rtn:int4-g32")
    for target in TARGETS:
        with pytest.raises(QjaxError, match=f"{target} cannot hold .*gate_up_proj: experts that the family's files hold"):
            export(tmp_path / "theirs", model, target)
    attention, _ = qjax.quantize(small_model(foreign.gpt_oss(vocabulary_size=61)), "rtn:int4-g32", rules=["mlp=none"])
    export(tmp_path / "attention", attention, "compressed-tensors")
    back = qjax.load(tmp_path / "attention")
    np.testing.assert_array_equal(apply(back, TOKENS), apply(attention, TOKENS))


def without(name):
    return lambda tensors: tensors.pop(f"{STEM}.{name}")


def changed(name, how):
    return lambda tensors: tensors.update({f"{STEM}.{name}": how(tensors[f"{STEM}.{name}"])})


def one_scale(byte):
    def change(scales):
        scales = scales.copy()
        scales[1, 2, 0] = byte
        return scales

    return change


BROKEN = {
    "no blocks": (without("gate_up_proj_blocks"), {}, f"missing {STEM}.gate_up_proj_blocks"),
    "no scales": (without("down_proj_scales"), {}, f"missing {STEM}.down_proj_scales"),
    "no biases": (without("down_proj_bias"), {}, f"missing {STEM}.down_proj_bias"),
    "neither": (lambda each: (without("down_proj_scales")(each), without("down_proj_blocks")(each)), {}, "missing"),
    "other blocks": (
        changed("gate_up_proj_blocks", lambda x: x[:, :, :1]),
        {},
        f"{STEM}.gate_up_proj_blocks has shape (4, 192, 1, 16), expected (4, 192, 2, 16)",
    ),
    "other scales": (changed("down_proj_scales", lambda x: x[..., None]), {}, "has shape (4, 64, 3, 1), expected (4, 64, 3)"),
    "other types": (changed("down_proj_blocks", lambda x: x.astype(np.int8)), {}, "has type I8, expected U8"),
    "sinks": (lambda each: each.pop("model.layers.0.self_attn.sinks"), {}, "missing model.layers.0.self_attn.sinks"),
    "NaN": (changed("gate_up_proj_scales", one_scale(255)), {}, f"{STEM}.gate_up_proj: NaN or 2^126 and more among the scales"),
    "overflow": (changed("down_proj_scales", one_scale(253)), {}, f"{STEM}.down_proj: NaN or 2^126 and more among the scales"),
    "a setting": (lambda each: None, {"block_size": 16}, "MXFP4 with ['block_size'], which qjax does not know"),
    "modules": (lambda each: None, {"modules_to_not_convert": [1]}, "'modules_to_not_convert' has [1]; expected names"),
    "dequantize": (lambda each: None, {"dequantize": "yes"}, "'dequantize' must be bool, got 'yes'"),
    "a method": (
        lambda each: None,
        {"quant_method": "mxfp6"},
        "quantized by 'mxfp6', which qjax does not read",
    ),
    "inputs": (lambda each: None, {"hidden_size": 48}, "MXFP4 is of (experts, in, out), in a multiple of 32"),
    "no entry": (lambda each: None, None, "(MXFP4: model.layers.0.mlp.experts.down_proj_blocks)"),
    "another library": (
        lambda each: None,
        {"quant_method": "awq", "bits": 4},
        "unexpected model.layers.0.mlp.experts",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_by_name(case, folder, tmp_path):
    how, settings, part = BROKEN[case]
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    foreign.change(tmp_path, how)
    outside = {key: settings[key] for key in (settings or {}) if key == "hidden_size"}
    inside = {key: value for key, value in (settings or {}).items() if key not in outside}
    foreign.edit(tmp_path, quantization_config=None if settings is None else SETTINGS | inside, **outside)
    with pytest.raises(QjaxError) as error:
        load_huggingface(tmp_path)
    assert part in str(error.value) and "\n" not in str(error.value)
