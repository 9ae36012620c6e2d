"""checkpoints/gguf/{joining,keys,tokens,writing,export}.py: what is written is read as the same model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.checkpoints.export import export
from qjax.checkpoints.gguf.blocks import KINDS, quantized
from qjax.checkpoints.gguf.container import read_contents
from qjax.checkpoints.gguf.joining import kind_of, nearest, rows_of
from qjax.checkpoints.gguf.model import load_gguf
from qjax.checkpoints.gguf.names import stored_pieces
from qjax.checkpoints.gguf.tokens import WRITTEN_CUTS, tokenizer_values
from qjax.checkpoints.gguf.vocabulary import tokenizer_json
from qjax.checkpoints.modules import unpack
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.models.parameters import flatten, parameter_shapes
from qjax.models.tokenizer import load_tokenizer, wrap_tokenizer
from qjax.models.tokenizer_trial import parse
from tests import foreign, test_export
from tests.conftest import FAMILY_CHANGES, FURTHER_CHANGES, GPT_OSS, byte_tokenizer, tiny_config
from tests.fuzz import seeds
from tests.gguf_files import ARCHITECTURES, FURTHER, random_rows
from tests.paths import real_data
from tests.random_weights import small_model, weights_model
from tests.test_export import random_leaf

REPEATED = ("int4-g32-sym", "int4-g64-sym-max", "int5-g96-sym-full", "int8-channel-sym", "int8-g128-sym-max")
WITH_MINIMA = ("int4-g32-m16", "int5-g32-m16", "int4-g64-m16", "int5-channel-m16")


@pytest.mark.parametrize("kind", KINDS.values(), ids=[kind.name for kind in KINDS.values()])
def test_blocks_are_written_as_they_were_read(kind):
    rows = random_rows(kind.name, 3, 512)
    if kind.name == "MXFP4":  # whose -0 is 0 here
        qs = rows.reshape(3, -1, 17)[..., 1:]
        qs[(qs & 15) == 8] &= 0xF0
        qs[(qs >> 4) == 8] &= 0x0F
    q = quantized(kind, rows)
    number = kind_of(q.format, 512)
    assert KINDS[number] == kind
    np.testing.assert_array_equal(rows_of(number, q), rows)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(REPEATED + WITH_MINIMA), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_blocks_repeat_the_scale_of_longer_groups(name, blocks, columns, seed):
    fmt, inputs = parse_format(name), 32 * blocks
    generator = np.random.default_rng(seed)
    if fmt.has_minima:
        q, _ = qjax.rtn(jnp.asarray(generator.standard_normal((inputs, columns)), jnp.float32), fmt)
    else:
        q = random_leaf((inputs, columns), fmt, generator)
    back = quantized(KINDS[kind_of(fmt, inputs)], rows_of(kind_of(fmt, inputs), q))
    np.testing.assert_array_equal(back.codes, q.codes)
    for found, stored in ((back.scales, q.scales), (back.zeros, q.zeros)):
        if stored is not None:
            np.testing.assert_array_equal(found, np.repeat(np.asarray(stored), fmt.group or inputs, axis=0)[:inputs:32])
    np.testing.assert_array_equal(qjax.dequantize(back), qjax.dequantize(q))
    assert unpack(np.asarray(back.codes).T.copy(), fmt.bits, inputs).shape == (columns, inputs)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_model_comes_back(case, tmp_path):
    """Its configuration, and its weights, in the order of rows that its architecture has; ends of text with it."""
    config = tiny_config(**ARCHITECTURES[case] | {"vocabulary_size": 64, "bos_id": 1, "eos_id": 2, "other_eos_ids": (5,)})
    original = weights_model(config)
    export(tmp_path / "a.gguf", original, "gguf")
    found = load_gguf(tmp_path / "a.gguf")
    assert found.recipe == "none" and found.tokenizer is None
    assert read_contents(tmp_path / "a.gguf").values["tokenizer.ggml.model"] == "none"  # without it llama.cpp loads no file
    family = "llama" if case == "mistral" else config.family
    epsilon = np.float32(config.norm_epsilon).item()  # as files hold it
    assert dataclasses.replace(found.config, rope_scaling=config.rope_scaling) == dataclasses.replace(
        config, family=family, norm_epsilon=epsilon
    )
    if config.rope_scaling is not None:
        assert found.config.rope_scaling.factor == pytest.approx(config.rope_scaling.factor)
    for path, leaf in flatten(original.params).items():
        tolerance = 2e-7 if path.endswith("offset") else 0
        np.testing.assert_allclose(np.asarray(flatten(found.params)[path]), np.asarray(leaf), rtol=0, atol=tolerance)


APART, ENDS = {"attn_q", "attn_k", "attn_v"}, {"attn_norm", "attn_output", "ffn_down", "ffn_up"}
BLOCKS = {  # of llama.cpp's files, as its gguf/constants.py lists them
    "gptneox": ENDS | {"attn_qkv", "ffn_norm"},
    "phi3": ENDS | {"attn_qkv", "ffn_norm"},
    "stablelm": ENDS | APART | {"ffn_gate", "ffn_norm"},
    "stablelm, parallel": ENDS | APART | {"ffn_gate"},
    "command-r": ENDS | APART | {"ffn_gate"},
    "command-r, 64 layers": ENDS | APART | {"ffn_gate", "attn_q_norm", "attn_k_norm"},
    "glm4": ENDS | APART | {"post_attention_norm", "ffn_norm", "post_ffw_norm"},
    "falcon": ENDS | {"attn_qkv"},
    "falcon, two norms": ENDS | {"attn_qkv", "attn_norm_2"},
    "bloom": ENDS | {"attn_qkv", "ffn_norm"},
}


@pytest.mark.parametrize("case", BLOCKS)
def test_names_of_tensors(case):
    """And what they are made of: q before k before v, gate before up, and which of two norms reads what."""
    config = tiny_config(**FURTHER[case])
    pieces = stored_pieces(config, parameter_shapes(config), case.partition(",")[0])
    assert {name.split(".")[2] for name in pieces if name.startswith("blk.1.")} == BLOCKS[case]
    made = {name: [part.path.removeprefix("block_0/") for part in parts] for name, parts in pieces.items()}
    if "attn_qkv" in BLOCKS[case]:
        assert made["blk.0.attn_qkv.weight"] == [f"attention/{name}/kernel" for name in "qkv"]
    if case in ("phi3", "glm4"):
        assert made["blk.0.ffn_up.weight"] == ["mlp/gate/kernel", "mlp/up/kernel"]
    two = case == "falcon, two norms"
    assert made["blk.0.attn_norm.weight"] == ["mlp_norm/scale" if two else "attention_norm/scale"]
    assert ("token_embd_norm.weight" in made) == (case == "bloom")


def test_codes_come_back(tmp_path):
    """Of several types in one model, rows of q and k moved; lazily too, tokenizer and template with them."""
    recipe = {"attention/q": "int4-g32-sym", "attention/k": "int8-g32-sym-max", "mlp": "int5-g64-sym-full"}
    model = test_export.quantized(foreign.llama(vocabulary_size=300), recipe)
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    export(tmp_path / "a.gguf", model, "gguf", beside=beside)
    back = qjax.load(tmp_path / "a.gguf", lazy=True)
    assert back.recipe == "gguf file: int4-g32-sym-full; int8-g32-sym-max; int5-g32-sym-full"
    found, text = flatten(qjax.load(tmp_path / "a.gguf").params), "Hello, wörld! 123"
    for path, leaf in flatten(model.params).items():
        if hasattr(leaf, "codes"):
            np.testing.assert_array_equal(found[path].codes, leaf.codes, path)
            times = 2 if "mlp" in path else 1
            np.testing.assert_array_equal(found[path].scales, np.repeat(leaf.scales, times, axis=0), path)
        else:
            np.testing.assert_array_equal(found[path], leaf, path)
    np.testing.assert_array_equal(back.tokenizer.encode(text), model.tokenizer.encode(text))
    values = read_contents(tmp_path / "a.gguf").values
    assert values["tokenizer.chat_template"] == "{{ x }}" and len(values["tokenizer.ggml.tokens"]) == 300
    assert values["general.file_type"] == 8  # mostly Q5_0


@pytest.mark.parametrize("recipe", ["rtn(clip=mse):int4-g32-m16", "gptq:int5-g32-m16@parallel", "hqq:int4-g32-m16"])
def test_minima_are_rounded_to_written_and_read(recipe, tmp_path):
    """As Q4_1 and Q5_1; and a packed folder between."""
    tokens = np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int32)
    options = {"calibration": tokens} if recipe.startswith("gptq") else {}
    model, _ = qjax.quantize(small_model(foreign.llama(vocabulary_size=288), byte_tokenizer()), recipe, **options)
    qjax.save(tmp_path / "packed", model)
    qjax.export(tmp_path / "a.gguf", qjax.load(tmp_path / "packed"), "gguf")
    fmt = recipe.partition(":")[2].partition("@")[0]
    back = qjax.load(tmp_path / "a.gguf")
    assert back.recipe == f"gguf file: {fmt}"
    found, leaves = flatten(back.params), flatten(model.params)
    written = [path for path, leaf in leaves.items() if hasattr(leaf, "codes")]
    assert len(written) == 7 * model.config.layers
    for path in written:
        jax.tree.map(np.testing.assert_array_equal, found[path], leaves[path])
    contents = read_contents(tmp_path / "a.gguf")
    assert contents.values["general.file_type"] == {"4": 3, "5": 9}[fmt[3]]
    assert KINDS[contents.tensors["blk.0.attn_q.weight"].kind].name == f"Q{fmt[3]}_1"


def test_norms_are_float32(tmp_path):
    """Those too that have a scale for each head, which are matrices."""
    config = tiny_config(**FURTHER["command-r, 64 layers"])
    model = weights_model(config)
    export(tmp_path / "a.gguf", model._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)), "gguf")
    kinds = {name: info.kind for name, info in read_contents(tmp_path / "a.gguf").tensors.items()}
    assert all(kind == (0 if "norm" in name else 30) for name, kind in kinds.items())
    assert "blk.0.attn_q_norm.weight" in kinds and flatten(load_gguf(tmp_path / "a.gguf").params)


def test_heads_stored_side_by_side(tmp_path):
    model = test_export.quantized(tiny_config(**FAMILY_CHANGES["gpt2"]), {"block": "int8-g32-sym-max"})
    export(tmp_path / "a.gguf", model, "gguf")
    test_export.assert_equal(model, qjax.load(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ({"mlp": "int4-g32"}, r"ffn_gate.weight: int4-g32 is no type of blocks; .* fit: rtn:int4-g32-m16, gptq:int4-g32-m16"),
        ({"mlp": "int5-g128"}, "fit: rtn:int5-g32-m16, gptq"),
        ({"mlp": "int6-g128"}, "fit: rtn:int8-g128-sym, gptq"),
        ({"mlp": "int4-g32-z16"}, "fit: rtn:int4-g32-m16, gptq"),
        ({"mlp": "int3-g128-sym-max"}, "fit: rtn:int4-g128-sym-max"),
        ({"mlp": "nf4-g64"}, "fit: rtn:int4-g64-sym"),
        ({"mlp": "int8-g16-sym"}, "fit: rtn:int8-g32-sym"),
        ({"mlp": "int4-g32-sym-fp32"}, "is no type of blocks; .* fit: rtn:int4-g32-sym,"),
    ],
)
def test_what_no_block_holds_is_refused(recipe, part, tmp_path):
    model = test_export.quantized(foreign.llama(vocabulary_size=288), recipe)
    with pytest.raises(QjaxError, match=part):
        export(tmp_path / "a.gguf", model, "gguf")
    assert not list(tmp_path.iterdir())


def test_what_a_layer_does_to_its_input_is_refused(tmp_path):
    order = np.random.default_rng(0).permutation
    model = test_export.quantized(foreign.llama(vocabulary_size=288), {"mlp/up": "int4-g32-sym"}, order=order)
    with pytest.raises(QjaxError, match=r"blk.0.ffn_up.weight: the layer does more to its input: Permute"):
        export(tmp_path / "a.gguf", model, "gguf")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    fmt = parse_format("int8-g32-sym-max")
    assert kind_of(fmt, 48) == "rows of 48 weights, no whole blocks of Q8_0, of 32" and nearest(fmt, 48) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (FAMILY_CHANGES["mistral"], "architecture llama cannot say sliding_window 5"),
        ({"activation": "gelu"}, "cannot say activation gelu"),
        (FAMILY_CHANGES["opt"], "no GGUF files of the family opt are written; families with such files: llama"),
    ],
)
def test_what_an_architecture_has_no_key_for_is_refused(changes, said, tmp_path):
    with pytest.raises(QjaxError, match=said):
        export(tmp_path / "a.gguf", weights_model(tiny_config(**changes)), "gguf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (FURTHER_CHANGES["cohere"], "command-r with qk_norm each_head, not none"),
        (FURTHER["command-r"] | {"layers": 64}, "command-r with qk_norm none, not each_head"),
        (
            FURTHER["command-r"] | {"qkv_bias": True, "tied": False},
            "tied False, not True, qkv_bias True, not False",
        ),
        (FAMILY_CHANGES["gpt_neox"] | {"tied": True}, "gptneox with tied True, not False"),
        (FAMILY_CHANGES["gemma"] | {"tied": False}, "gemma with tied False, not True"),
        (GPT_OSS | {"qkv_bias": False}, "gpt-oss with qkv_bias False, not True"),
    ],
)
def test_what_llama_cpp_does_not_load_is_refused(changes, said, tmp_path):
    """Of tensors that its loader asks for whatever the keys say; `parity/test_llama_cpp.py` asks it."""
    with pytest.raises(QjaxError, match=f"llama.cpp does not load models of the architecture .*{said}"):
        export(tmp_path / "a.gguf", weights_model(tiny_config(**changes)), "gguf")
    assert not list(tmp_path.iterdir())


def test_where_a_file_is_written(tmp_path):
    model = weights_model(tiny_config())
    with pytest.raises(QjaxError, match=r"name a file that ends in \.gguf"):
        export(tmp_path / "a", model, "gguf")
    (tmp_path / "b.gguf").mkdir()
    with pytest.raises(QjaxError, match="it is a folder; name a file"):
        export(tmp_path / "b.gguf", model, "gguf")
    export(tmp_path / "new/c.gguf", model, "gguf")
    with pytest.raises(QjaxError, match="is there; name a new file or ask to overwrite"):
        export(tmp_path / "new/c.gguf", model, "gguf")
    export(tmp_path / "new/c.gguf", model, "gguf", overwrite=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.gguf"]


def assert_same_ids(tokenizer, values, rows, text):
    """What is written of a tokenizer is read as one that makes the same ids."""
    found = wrap_tokenizer(parse(tokenizer_json(values)))
    assert found.vocabulary_size == rows and found.adds_bos == tokenizer.adds_bos
    np.testing.assert_array_equal(found.encode(text, special_tokens=True), tokenizer.encode(text, special_tokens=True))


@pytest.mark.parametrize("cut", WRITTEN_CUTS)
def test_tokenizers_of_bytes(cut):
    letters = sorted("abcdefghijklmnopqrstuvwxyzHWITDVEL0123456789'Ġ.,/Ċč!$=()")
    tokens = ["<s>", "</s>", *letters, "ll", "'ll", "12", "123", "ĠI"]
    values = {"pre": cut, "tokens": tokens, "token_type": np.int32([3, 3] + [1] * (len(tokens) - 2))}
    values["merges"] = ["1 2", "12 3", "l l", "' ll", "Ġ I"]
    base = seeds.gguf_parts(False)[0] | {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    original = wrap_tokenizer(parse(tokenizer_json(base)))
    found = tokenizer_values(original, 100)
    assert found["tokenizer.ggml.token_type"][:2].tolist() == [3, 3]
    assert_same_ids(original, found, 100, "I'll 1234 12 I I'LL</s>\n/ $12 123")
    assert found["tokenizer.ggml.pre"] == cut


def test_tokenizers_of_pieces():
    """A real SentencePiece as Hugging Face's file has it."""
    original = load_tokenizer(real_data("models/stories260K-hf/tokenizer.json"))
    found = tokenizer_values(original, 520)
    text = real_data("text/tinystories_val.txt").read_text()[:5_000]
    assert found["tokenizer.ggml.model"] == "llama"
    assert_same_ids(original, found, 520, text)


def test_the_tokenizer_of_pythia():
    """GPT-2's way to cut text that is composed first, as OLMo's: the name that llama.cpp has for both."""
    original = load_tokenizer(real_data("tokenizers/neox/20B_tokenizer.json"))
    found = tokenizer_values(original, 50304)
    assert found["tokenizer.ggml.pre"] == "olmo"
    back, text = parse(tokenizer_json(found)), real_data("text/tinystories_val.txt").read_text()[:5_000] + "e\u0301  x\n   y"
    np.testing.assert_array_equal(back.encode(text).ids, original.encode(text))


def test_a_tokenizer_that_no_file_has_a_word_for_is_left_out():
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.warns(qjax.QjaxWarning, match="the tokenizer is left out of the file: one of the kind WordLevel"):
        assert tokenizer_values(wrap_tokenizer(inner), 2) == {}
    ending = byte_tokenizer().inner
    ending.add_special_tokens(["</s>"])
    ending.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 256)])
    with pytest.warns(qjax.QjaxWarning, match="what this one puts before and behind it, has no name in GGUF files"):
        assert tokenizer_values(wrap_tokenizer(ending), 257) == {}


def test_the_command(tmp_path, capsys):
    model = test_export.quantized(foreign.llama(vocabulary_size=288), {"block": "int8-g32-sym-max"})
    qjax.save(tmp_path / "packed", model)
    test_export.run(["export", str(tmp_path / "packed"), "--to", "gguf", "--out", str(tmp_path / "a.gguf")])
    assert "for gguf" in capsys.readouterr().out
    back = qjax.load(tmp_path / "a.gguf")
    test_export.assert_equal(model, back)
    test_export.run(["export", str(tmp_path / "packed"), "--to", "gguf", "--out", str(tmp_path / "b")], code=2)
    assert "name a file that ends in .gguf" in capsys.readouterr().err
