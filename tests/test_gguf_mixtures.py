"""GGUF files of mixtures of experts: which expert is where, what the model then computes, and what is refused.

The files are made here, with names and keys as llama.cpp's converter and loader have them (gguf-py/gguf/constants.py,
src/models/{llama,qwen3moe,openai-moe}.cpp).
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

import qjax
from qjax import qtensor
from qjax.checkpoints.export import export
from qjax.checkpoints.gguf.blocks import KINDS, quantized
from qjax.checkpoints.gguf.container import read_contents
from qjax.checkpoints.gguf.model import load_gguf
from qjax.checkpoints.huggingface import load_huggingface, save_huggingface
from qjax.errors import QjaxError
from qjax.lazy import is_lazy, materialised
from qjax.models.model import apply, runnable
from qjax.models.parameters import flatten, unflatten
from tests import foreign, foreign_makers, test_export
from tests.conftest import GPT_OSS, MIXTRAL, byte_tokenizer, tiny_config
from tests.gguf_files import NUMBERS, file_bytes, random_rows, rotated
from tests.oracles import gguf as oracle
from tests.random_weights import small_model

HIDDEN, INNER, EXPERTS, CHOSEN = 256, 512, 3, 2
SIZES = {"vocabulary_size": 61, "hidden_size": HIDDEN, "mlp_size": INNER, "head_dim": 16, "experts": EXPERTS}
CONFIGS = {
    "llama": tiny_config(**MIXTRAL | SIZES),
    "qwen3moe": tiny_config(**MIXTRAL | SIZES | {"family": "qwen3_moe", "qk_norm": "head"}),
    "gpt-oss": tiny_config(**GPT_OSS | SIZES),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)
NAMES = {  # of a block, but the experts'
    "attn_norm.weight": "attention_norm/scale",
    "ffn_norm.weight": "mlp_norm/scale",
    "ffn_gate_inp.weight": "mlp/router/matrix",
    **{f"attn_{name}.weight": f"attention/{name}/kernel" for name in "qkv"},
    "attn_output.weight": "attention/o/kernel",
}
FURTHER_NAMES = {
    "llama": NAMES,
    "qwen3moe": NAMES | {f"attn_{name}_norm.weight": f"attention/{name}_norm/scale" for name in "qk"},
    "gpt-oss": {name.replace("ffn_norm", "post_attention_norm"): path for name, path in NAMES.items()}
    | {f"attn_{name}.bias": f"attention/{name}/bias" for name in "qkv"}
    | {f"ffn_{name}_exps.bias": f"mlp/{name}/bias" for name in ("gate", "up", "down")}
    | {
        "attn_output.bias": "attention/o/bias",
        "attn_sinks.weight": "attention/sinks",
        "ffn_gate_inp.bias": "mlp/router/bias",
    },
}
PARTS = [(name, place) for place in range(2) for name in ("gate", "up", "down")]


def values_of(architecture):
    c = CONFIGS[architecture]
    own = {
        "context_length": c.context,
        "embedding_length": c.hidden_size,
        "block_count": c.layers,
        "feed_forward_length": 77 if architecture == "qwen3moe" else c.mlp_size,  # there of layers without experts
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_epsilon,
        "rope.freq_base": c.rope_theta,
        "expert_count": EXPERTS,
        "expert_used_count": CHOSEN,
    }
    if architecture != "llama":
        own["expert_feed_forward_length"] = c.mlp_size
    if architecture == "gpt-oss":
        own |= {"attention.sliding_window": 5, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        own["rope.scaling.original_context_length"] = 8
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in own.items()}


@functools.cache
def rows_of(architecture, kind):
    """uint8 (experts, out, bytes) of every part of every layer; a model's own numbers for F32."""
    leaves = flatten(small_model(CONFIGS[architecture]).params)
    found = {}
    for number, (name, block) in enumerate(PARTS):
        kernel = np.asarray(leaves[f"block_{block}/mlp/{name}/kernel"]).swapaxes(1, 2)
        _, rows, inputs = kernel.shape
        if kind == "F32":
            found[name, block] = np.ascontiguousarray(kernel).view(np.uint8)
        else:
            found[name, block] = random_rows(kind, EXPERTS * rows, inputs, number).reshape(EXPERTS, rows, -1)
    return found


def decoded(kind, rows):
    """float32 (experts, in, out), expert by expert."""
    if kind == "F32":
        return rows.view(np.float32).swapaxes(1, 2)
    return np.stack([np.asarray(qtensor.dequantize(quantized(KINDS[NUMBERS[kind]], each))) for each in rows])


@functools.cache
def tensors_of(architecture, kind, *, apart=False):
    """A file's tensors, and the parameters that they stand for. apart: experts one by one, as older files hold them."""
    config = CONFIGS[architecture]
    leaves = flatten(small_model(config).params)
    named = {"token_embd.weight": "embed/tokens/embedding", "output_norm.weight": "head/norm/scale"}
    named["output.weight"] = "head/output/kernel"
    named |= {f"blk.{i}.{name}": f"block_{i}/{path}" for i in range(2) for name, path in FURTHER_NAMES[architecture].items()}
    tensors = {}
    for name, path in named.items():
        array = np.asarray(leaves[path])
        array = array.T if path.endswith(("kernel", "matrix")) else array
        if architecture == "llama" and re.search("attn_[qk]", name):
            array = rotated(array, config.head_dim)
        tensors[name] = ("F32", array.shape, array.tobytes())
    for (name, block), rows in rows_of(architecture, kind).items():
        path = f"block_{block}/mlp/{name}/kernel"
        leaves[path] = decoded(kind, rows)
        shape = leaves[path].shape[0], leaves[path].shape[2], leaves[path].shape[1]
        if apart:
            each = {f"blk.{block}.ffn_{name}.{e}.weight": (kind, shape[1:], rows[e].tobytes()) for e in range(EXPERTS)}
        else:
            each = {f"blk.{block}.ffn_{name}_exps.weight": (kind, shape, rows.tobytes())}
        tensors |= each
    return tensors, leaves


def written(path, architecture, kind, *, apart=False):
    tensors, leaves = tensors_of(architecture, kind, apart=apart)
    path.write_bytes(file_bytes(values_of(architecture), tensors))
    return leaves


CASES = [
    *[("llama", kind, False) for kind in ("F32", *(kind.name for kind in KINDS.values()))],
    *[("llama", kind, True) for kind in ("F32", "Q4_0", "Q4_K")],
    *[("qwen3moe", kind, False) for kind in ("F32", "Q8_0", "Q6_K")],
    *[("gpt-oss", kind, False) for kind in ("F32", "MXFP4")],
]


@pytest.mark.parametrize(("architecture", "kind", "apart"), CASES)
def test_every_expert_is_in_its_place(architecture, kind, apart, tmp_path):
    """Bit for bit, undecoded, in as many bytes as the file has; lazy or not."""
    expected = written(tmp_path / "m.gguf", architecture, kind, apart=apart)
    model = load_gguf(tmp_path / "m.gguf")
    epsilon = np.float32(model.config.norm_epsilon).item()
    assert model.config == dataclasses.replace(CONFIGS[architecture], norm_epsilon=epsilon)
    found, rows = flatten(model.params), rows_of(architecture, kind)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        values = leaf if kind == "F32" or "/mlp/" not in path or "kernel" not in path else qtensor.dequantize(leaf)
        np.testing.assert_array_equal(np.asarray(values), expected[path], err_msg=path)
    for name, block in PARTS:
        assert found[f"block_{block}/mlp/{name}/kernel"].nbytes == rows[name, block].nbytes
    lazy = load_gguf(tmp_path / "m.gguf", lazy=True)
    assert all(map(is_lazy, flatten(lazy.params).values()))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), lazy.params) == jax.tree.map(lambda x: (x.shape, x.dtype), model.params)
    jax.tree.map(np.testing.assert_array_equal, materialised(lazy.params), model.params)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_an_expert_against_an_oracle(kind, tmp_path):
    """Output o of an expert reads, along the inputs, the o-th row of the file's part of the expert."""
    written(tmp_path / "m.gguf", "llama", kind)
    leaf = flatten(load_gguf(tmp_path / "m.gguf").params)["block_1/mlp/down/kernel"]
    assert leaf.shape == (EXPERTS, INNER, HIDDEN)
    values, size = np.asarray(qtensor.dequantize(leaf)), KINDS[NUMBERS[kind]].nbytes
    for expert, output in ((0, 0), (1, 200), (2, 255)):
        row = rows_of("llama", kind)["down", 1][expert, output].reshape(-1, size)
        expected = np.concatenate([oracle.decode(kind, block.tobytes()) for block in row])
        np.testing.assert_array_equal(values[expert, :, output], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("architecture", "kind", "apart"),
    [("llama", "Q4_K", False), ("llama", "Q4_0", True), ("qwen3moe", "Q8_0", False), ("gpt-oss", "MXFP4", False)],
)
def test_logits_are_those_of_the_folder_of_hugging_face(architecture, kind, apart, tmp_path):
    """And every expert has its part in them."""
    expected = written(tmp_path / "m.gguf", architecture, kind, apart=apart)
    model = load_gguf(tmp_path / "m.gguf")
    save_huggingface(tmp_path / "plain", small_model(CONFIGS[architecture])._replace(params=unflatten(expected)))
    theirs = load_huggingface(tmp_path / "plain")
    assert theirs.config.family == model.config.family
    exact = np.asarray(apply(theirs, TOKENS))
    found = np.asarray(apply(runnable(model), TOKENS))
    np.testing.assert_allclose(found, exact, atol=2e-5 * np.abs(exact).max())
    np.testing.assert_allclose(apply(model, TOKENS), exact, atol=1e-4 * np.abs(exact).max())
    for expert in range(EXPERTS):
        path = "block_1/mlp/down/kernel"
        without = expected | {path: expected[path] * (np.arange(EXPERTS) != expert)[:, None, None]}
        other = np.asarray(apply(theirs._replace(params=unflatten(without)), TOKENS))
        assert np.abs(other - exact).max() > 2e-4 * np.abs(exact).max()


def test_widths_of_experts_that_files_do_not_say(tmp_path):
    """Of Qwen's experts what llama.cpp takes then: that of a layer without experts, divided among the experts of a token. A
    theta that a file is silent about is 10000, whatever the family's.
    """
    tensors, _ = tensors_of("qwen3moe", "F32")
    values = values_of("qwen3moe") | {"qwen3moe.feed_forward_length": INNER * CHOSEN}
    del values["qwen3moe.expert_feed_forward_length"]
    (tmp_path / "m.gguf").write_bytes(file_bytes(values, tensors))
    assert load_gguf(tmp_path / "m.gguf").config.mlp_size == INNER
    for architecture in ("llama", "gpt-oss"):
        values = values_of(architecture)
        left = {key: value for key, value in values.items() if ".rope." not in key}
        (tmp_path / "m.gguf").write_bytes(file_bytes(left, tensors_of(architecture, "F32")[0]))
        config = load_gguf(tmp_path / "m.gguf").config
        assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


EXPS, NUMBER = "blk.1.ffn_up_exps.weight", "llama.expert_used_count"
BROKEN = {  # changes of values, of tensors, whether experts stand apart, and what is said
    "fewer experts": (
        {"llama.expert_count": 2},
        {},
        False,
        r"ffn_gate_exps.weight has shape \(3, 512, 256\), expected \(2, 5",
    ),
    "more used": ({NUMBER: 4}, {}, False, "expert_count is 3 and llama.expert_used_count 4, expected at least 1 expert, of wh"),
    "none used": ({NUMBER: None}, {}, False, "llama.expert_used_count 0, expected at least 1"),
    "none counted": (
        {"llama.expert_count": None},
        {},
        False,
        "llama.expert_count is 0 and llama.expert_used_count 2, exp",
    ),
    "a list": (
        {NUMBER: np.array([1, 2], np.int32)},
        {},
        False,
        r"expert_used_count is array\(\[1, 2\].*, expected a number",
    ),
    "no tensor": ({}, {EXPS: None}, False, f"missing {EXPS}"),
    "no router": ({}, {"blk.0.ffn_gate_inp.weight": None}, False, "missing blk.0.ffn_gate_inp.weight"),
    "other shares": ({"llama.expert_weights_norm": False}, {}, False, "expert_weights_norm is False, but llama.cpp makes"),
    "another gate": ({"llama.expert_gating_func": 2}, {}, False, "not understood: llama.expert_gating_func = 2"),
    "shared": ({}, {"blk.0.ffn_up_shexp.weight": "blk.0.attn_q.weight"}, False, "unexpected blk.0.ffn_up_shexp.weight"),
    "no expert": ({}, {"blk.0.ffn_gate.0.weight": None}, True, "missing blk.0.ffn_gate.0.weight"),
    "an expert more": (
        {},
        {"blk.1.ffn_up.3.weight": "blk.1.ffn_up.2.weight"},
        True,
        "unexpected blk.1.ffn_up.3.weight",
    ),
    "other types": (
        {},
        {"blk.1.ffn_up.2.weight": ("Q8_0", (INNER, HIDDEN), random_rows("Q8_0", INNER, HIDDEN).tobytes())},
        True,
        "blk.1.ffn_up.0.weight and blk.1.ffn_up.2.weight are of different types, expected one for all experts of a layer",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("lazy", [False, True])
def test_what_does_not_fit_is_refused_by_name(case, lazy, tmp_path):
    values, tensors, apart, said = BROKEN[case]
    own, _ = tensors_of("llama", "Q4_0", apart=apart)
    changed = own | {name: own.get(each) if isinstance(each, str | None) else each for name, each in tensors.items()}
    kept = {key: value for key, value in (values_of("llama") | values).items() if value is not None}
    path = tmp_path / "m.gguf"
    path.write_bytes(file_bytes(kept, {name: each for name, each in changed.items() if each is not None}))
    with pytest.raises(QjaxError, match=said) as error:
        load_gguf(path, lazy=lazy)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_infinite_scales_of_an_expert_are_refused(tmp_path):
    tensors, _ = tensors_of("llama", "Q4_0")
    kind, shape, content = tensors[EXPS]
    broken = bytearray(content)
    broken[-18:-16] = np.float16([np.inf]).tobytes()
    (tmp_path / "m.gguf").write_bytes(file_bytes(values_of("llama"), tensors | {EXPS: (kind, shape, bytes(broken))}))
    with pytest.raises(QjaxError, match=f"NaN or infinite weights in {EXPS}; get an intact file"):
        load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("architecture", CONFIGS)
def test_codes_come_back(architecture, tmp_path):
    """What was read of a file is written as the same bytes, also where an older one held experts one by one."""
    tensors, _ = tensors_of(architecture, "Q4_K", apart=architecture == "llama")
    (tmp_path / "a.gguf").write_bytes(file_bytes(values_of(architecture), tensors))
    for lazy in (False, True):
        export(tmp_path / "b.gguf", load_gguf(tmp_path / "a.gguf", lazy=lazy), "gguf", overwrite=True)
        back = read_contents(tmp_path / "b.gguf").tensors
        for name, (kind, shape, content) in tensors_of(architecture, "Q4_K")[0].items():
            info = back.pop(name)
            assert (info.shape, info.kind) == (shape, NUMBERS[kind])
            assert (tmp_path / "b.gguf").read_bytes()[info.start : info.start + len(content)] == content, name
        assert not back
    values = read_contents(tmp_path / "b.gguf").values
    assert values[f"{architecture}.expert_count"] == EXPERTS and values[f"{architecture}.expert_used_count"] == CHOSEN
    assert values.get(f"{architecture}.expert_feed_forward_length") == (None if architecture == "llama" else INNER)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_is_quantized_is_written_evaluated_and_generates(architecture, tmp_path, capsys):
    """With a tokenizer; its biases, sinks and routers in float32, as llama.cpp wants them."""
    config = dataclasses.replace(CONFIGS[architecture], vocabulary_size=256)
    model = jax.tree.map(lambda x: x.astype("bfloat16"), small_model(config).params)
    found, _ = qjax.quantize(small_model(config, byte_tokenizer())._replace(params=model), "rtn:int8-g64-sym-max")
    qjax.save(tmp_path / "packed", found)
    test_export.run(["export", str(tmp_path / "packed"), "--to", "gguf", "--out", str(tmp_path / "a.gguf")])
    back = qjax.load(tmp_path / "a.gguf")
    assert back.recipe == "gguf file: int8-g32-sym-max"
    for path, leaf in flatten(found.params).items():
        if hasattr(leaf, "codes"):
            np.testing.assert_array_equal(flatten(back.params)[path].codes, leaf.codes, err_msg=path)
        else:
            np.testing.assert_array_equal(flatten(back.params)[path].astype("float32"), leaf.astype("float32"), err_msg=path)
    infos = read_contents(tmp_path / "a.gguf").tensors
    small = [name for name in infos if re.search(r"norm|bias|sinks|gate_inp", name)]
    assert {infos[name].kind for name in small} == {NUMBERS["F32"]} and infos["token_embd.weight"].kind == NUMBERS["BF16"]
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    capsys.readouterr()
    data = ["--data", f"text:{tmp_path / 'text.txt'}", "--convention", "windows-32"]
    test_export.run(["eval", str(tmp_path / "a.gguf"), *data])
    test_export.run(["generate", str(tmp_path / "a.gguf"), "--prompt", "the cat", "--tokens", "4"])
    assert "the cat" in capsys.readouterr().out
    qjax.save(tmp_path / "again", back)
    np.testing.assert_array_equal(apply(qjax.load(tmp_path / "again"), TOKENS), apply(back, TOKENS))


def test_openais_blocks_are_converted_as_they_are(tmp_path):
    """A folder of gpt-oss, gate and up by turns in one tensor, as a file that has them apart."""
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    foreign.write(tmp_path / "a", settings, foreign_makers.experts(), foreign.gpt_oss(vocabulary_size=64))
    test_export.run(["convert", str(tmp_path / "a"), "--to", "gguf", "--out", str(tmp_path / "b.gguf")])
    before, after = (flatten(qjax.load(tmp_path / name).params) for name in ("a", "b.gguf"))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(after[path]), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=path)
    assert read_contents(tmp_path / "b.gguf").tensors["blk.0.ffn_gate_exps.weight"].kind == NUMBERS["MXFP4"]


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("llama", {"sliding_window": 5}, "architecture llama cannot say sliding_window 5"),
        ("qwen3moe", {"normalised_shares": False}, "architecture qwen3moe cannot say normalised_shares False"),
        ("gpt-oss", {"kinds": (), "sliding_window": None}, "architecture gpt-oss cannot say sliding_window None, kinds"),
    ],
)
def test_what_files_have_no_key_for_is_not_written(architecture, changes, said, tmp_path):
    config = dataclasses.replace(CONFIGS[architecture], **changes)
    with pytest.raises(QjaxError, match=said):
        export(tmp_path / "a.gguf", small_model(config), "gguf")
