"""checkpoints/huggingface.py, checkpoints/tensors.py and load.py: Hugging Face folders both ways, and every bad one."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax.activations import parse_activation
from qjax.checkpoints import huggingface
from qjax.checkpoints.huggingface import load_huggingface, save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.lazy import Lazy
from qjax.linear import Linear, dequantize, dequantize_tree
from qjax.maps import Scale
from qjax.models.model import Model, apply
from qjax.models.parameters import flatten, parameter_shapes, unflatten
from qjax.models.scalings import LinearScaling, Llama3Scaling
from qjax.models.walk import Decoder
from qjax.rounding.nearest import rtn
from tests.conftest import GEMMA, GPT2, GPT_NEOX, MIXTRAL, OPT, byte_tokenizer, random_model, tiny_config
from tests.paths import real_data
from tests.random_weights import weights_model

CONFIGS = {
    "llama": tiny_config(),
    "llama-tied": tiny_config(tied=True, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16), bos_id=1, eos_id=2),
    "llama-biases": tiny_config(
        qkv_bias=True, attention_output_bias=True, mlp_bias=True, head_dim=6, rope_scaling=LinearScaling(2.0)
    ),
    "mistral": tiny_config(family="mistral", sliding_window=5, norm_epsilon=1e-6),
    "qwen2": tiny_config(family="qwen2", qkv_bias=True, rope_theta=1e6),
    "gpt2": tiny_config(**GPT2),
    "gpt2-untied": tiny_config(**GPT2 | {"tied": False}),
    "gpt_neox": tiny_config(**GPT_NEOX),
    "gpt_neox-variant": tiny_config(
        **GPT_NEOX
        | {"parallel_residual": False, "qkv_bias": False, "attention_output_bias": False, "rotary_fraction": 1.0, "tied": True}
    ),
    "opt": tiny_config(**OPT),
    "gemma": tiny_config(**GEMMA),
    "gemma-untied": tiny_config(**GEMMA | {"tied": False, "kv_heads": 4}),
    "opt-variant": tiny_config(
        **OPT | {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "tied": False, "activation": "gelu"}
    ),
}


def assert_equal_trees(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(a[path]).view(np.uint8), np.asarray(b[path]).view(np.uint8), path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with an untied Llama and its tokenizer; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_huggingface(folder, weights_model(tiny_config(), byte_tokenizer()))
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit_weights(folder, change):
    """Rewrites model.safetensors after change(tensors)."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder, parts=3):
    """Splits model.safetensors into shards with an index; their names."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    placed = {name: names[i % parts] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, where in placed.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "model.safetensors").unlink()
    return names


def expect_refusal(folder, *parts):
    """Loading the folder fails with one line that holds all the parts."""
    with pytest.raises(QjaxError) as error:
        load_huggingface(folder)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


# Round trips


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_and_loading_is_bit_equal(name, dtype, tmp_path):
    model = weights_model(CONFIGS[name], byte_tokenizer(), dtype=dtype)
    save_huggingface(tmp_path / "somewhere", model)
    back = load_huggingface(tmp_path / "somewhere")
    assert back.config == model.config
    assert (back.name, back.recipe) == ("somewhere", "none")
    assert_equal_trees(back.params, model.params)
    assert back.tokenizer.to_json() == model.tokenizer.to_json()
    assert sorted(path.name for path in (tmp_path / "somewhere").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]


def test_mixed_types_survive(tmp_path):
    model = weights_model(tiny_config(), dtype=jnp.bfloat16)
    leaves = {path: leaf.astype(jnp.float32) if "norm" in path else leaf for path, leaf in flatten(model.params).items()}
    model = model._replace(params=unflatten(leaves))
    save_huggingface(tmp_path / "a", model)
    back = load_huggingface(tmp_path / "a")
    assert_equal_trees(back.params, model.params)
    assert back.tokenizer is None


def test_matrices_are_stored_out_in(source):
    stored = load_file(source / "model.safetensors")
    params = load_huggingface(source).params
    up = params["block_1"]["mlp"]["up"]["kernel"]
    assert up.shape == (32, 48)
    np.testing.assert_array_equal(stored["model.layers.1.mlp.up_proj.weight"], up.T)
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], params["embed"]["tokens"]["embedding"])


def test_gpt2_fuses_q_k_v_and_keeps_in_out(tmp_path):
    model = weights_model(CONFIGS["gpt2"])
    save_huggingface(tmp_path / "a", model)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    attention = model.params["block_0"]["attention"]
    fused = np.concatenate([attention[name]["kernel"] for name in "qkv"], axis=1)
    np.testing.assert_array_equal(stored["transformer.h.0.attn.c_attn.weight"], fused)
    np.testing.assert_array_equal(stored["transformer.h.0.attn.c_attn.bias"][32:64], attention["k"]["bias"])
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)


def test_gpt_neox_fuses_q_k_v_head_by_head(tmp_path):
    model = weights_model(CONFIGS["gpt_neox"])
    save_huggingface(tmp_path / "a", model)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    attention = model.params["block_0"]["attention"]
    weight = stored["gpt_neox.layers.0.attention.query_key_value.weight"].reshape(4, 3, 8, 32)  # (head, q k v, dim, in)
    bias = stored["gpt_neox.layers.0.attention.query_key_value.bias"].reshape(4, 3, 8)
    for place, name in enumerate("qkv"):
        np.testing.assert_array_equal(weight[:, place].reshape(32, 32), attention[name]["kernel"].T)
        np.testing.assert_array_equal(bias[:, place].reshape(32), attention[name]["bias"])


def test_quantized_kernels_are_written_as_their_values(tmp_path):
    model = weights_model(tiny_config(), dtype=jnp.bfloat16)
    leaves = flatten(model.params)
    q, _ = rtn(leaves["block_0/mlp/up/kernel"].astype(jnp.float32), parse_format("int4-g16"))
    save_huggingface(tmp_path / "a", model._replace(params=unflatten(leaves | {"block_0/mlp/up/kernel": q})))
    back = load_huggingface(tmp_path / "a").params["block_0"]["mlp"]["up"]["kernel"]
    assert back.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back, dequantize(q, jnp.bfloat16))


@pytest.mark.parametrize(("embedding", "norm"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)])
def test_decoded_kernels_of_a_model_of_mixed_types_have_the_embeddings(embedding, norm, tmp_path):
    """Whatever comes first among the parameters, and whatever is more."""
    leaves = flatten(weights_model(tiny_config(), dtype=norm).params)
    leaves["embed/tokens/embedding"] = leaves["embed/tokens/embedding"].astype(embedding)
    q, _ = rtn(leaves["block_0/mlp/up/kernel"], "int4-g16")
    leaves = dict(sorted(leaves.items())) | {"block_0/mlp/up/kernel": q}
    assert huggingface.checkpoint_dtype(leaves) == embedding
    assert huggingface.checkpoint_dtype({"a": q, "b": jnp.ones(3, jnp.float16), "c": jnp.ones(3)}) == np.float16
    assert huggingface.checkpoint_dtype({"a": q}) == np.float32
    save_huggingface(tmp_path / "a", weights_model(tiny_config())._replace(params=unflatten(leaves)))
    params = load_huggingface(tmp_path / "a").params
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == jnp.dtype(embedding).name
    assert params["block_0"]["mlp"]["up"]["kernel"].dtype == params["embed"]["tokens"]["embedding"].dtype == embedding
    assert params["block_0"]["mlp"]["down"]["kernel"].dtype == params["head"]["norm"]["scale"].dtype == norm


def test_layers_that_round_their_inputs_are_refused(tmp_path):
    """With the way out; maps, outliers and adapters are part of the weights."""
    model = weights_model(tiny_config())
    leaves = flatten(model.params)
    path = "block_0/mlp/up/kernel"
    leaf = Linear(rtn(leaves[path], parse_format("int4-g16"))[0], (Scale(jnp.full(32, 0.5, jnp.float16)),))
    rounding = dataclasses.replace(leaf, activation=parse_activation("int8-token"))
    quantized = model._replace(params=unflatten(leaves | {path: rounding}))
    with pytest.raises(QjaxError, match=rf"{path} \(int8-token\); keep it with qjax\.save, or write the weights alone"):
        save_huggingface(tmp_path / "a", quantized)
    assert not (tmp_path / "a").exists()
    save_huggingface(tmp_path / "a", quantized._replace(params=dequantize_tree(quantized.params, None)))
    save_huggingface(tmp_path / "b", model._replace(params=unflatten(leaves | {path: leaf})))
    for folder in "ab":
        back = load_huggingface(tmp_path / folder).params["block_0"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(back, 0.5 * dequantize(leaf.weight))


def test_shards(folder, source):
    shard(folder)
    assert_equal_trees(load_huggingface(folder).params, load_huggingface(source).params)


def test_loaded_models_compute(tmp_path):
    save_huggingface(tmp_path, random_model(CONFIGS["qwen2"]))
    model = load_huggingface(tmp_path)
    tokens = jnp.arange(12).reshape(2, 6)
    expected = Decoder(model.config).apply({"params": model.params}, tokens)
    np.testing.assert_allclose(apply(model, tokens), expected, atol=1e-5)


def test_load_finds_folders_by_path(source, monkeypatch):
    assert load(source).name == load(str(source)).name == "model"
    monkeypatch.chdir(source)
    assert load("./").name == load(".").name == "model"


# Variants of checkpoints


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_names_without_the_prefix(name, tmp_path):
    model = weights_model(CONFIGS[name])
    save_huggingface(tmp_path, model)

    def strip(tensors):
        for key in list(tensors):
            tensors[re.sub(r"^(model|transformer|gpt_neox)\.", "", key)] = tensors.pop(key)

    edit_weights(tmp_path, strip)
    assert_equal_trees(load_huggingface(tmp_path).params, model.params)


@pytest.mark.parametrize("wrapper", ["base_model.model.", "_orig_mod.", "module._orig_mod.", "language_model."])
@pytest.mark.parametrize("changes", [{}, {"tied": True}])
def test_names_in_a_wrapper(wrapper, changes, tmp_path):
    model = weights_model(tiny_config(**changes))
    save_huggingface(tmp_path, model)

    def wrap(tensors):
        for key in list(tensors):
            tensors[wrapper + key] = tensors.pop(key)

    edit_weights(tmp_path, wrap)
    assert_equal_trees(load_huggingface(tmp_path).params, model.params)
    edit_weights(tmp_path, lambda tensors: tensors.pop(wrapper + "model.norm.weight"))
    expect_refusal(tmp_path, "config.json: missing model.norm.weight; get")


def test_other_names_are_shown(folder):
    edit_weights(folder, lambda tensors: tensors.update({"decoder.up": tensors.pop("model.norm.weight")}))
    expect_refusal(folder, "missing model.norm.weight", "the file's names are as decoder.up")


@pytest.mark.parametrize(
    ("ending", "whose"),
    [("qweight", "GPTQ or AWQ"), ("SCB", "8 bits"), ("weight.absmax", "4 bits"), ("weight_packed", "compressed-tensors")],
)
def test_weights_of_a_quantizer_whose_config_is_silent(ending, whose, folder):
    def quantized(tensors):
        tensors[f"model.layers.0.mlp.up_proj.{ending}"] = tensors.pop("model.layers.0.mlp.up_proj.weight").astype(np.int32)

    edit_weights(folder, quantized)
    expect_refusal(folder, whose, f"model.layers.0.mlp.up_proj.{ending}", "give the checkpoint that was quantized")


def test_weights_of_another_quantizer_than_the_one_named(folder):
    names = {"model.layers.0.mlp.up_proj.SCB": np.ones(4, np.float32)}
    edit_weights(folder, lambda tensors: tensors.update(names))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": False}))
    parts = ("quantize_config.json, which says gptq", "as those of bitsandbytes, 8 bits: model.layers.0.mlp.up_proj.SCB")
    expect_refusal(folder, *parts, "unexpected model.layers.0.mlp.up_proj.SCB")


def test_files_that_are_not_read_are_told_apart(folder, tmp_path):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.warns(qjax.QjaxWarning, match=r"has tokenizer.model but no tokenizer.json.*save_pretrained"):
        assert load_huggingface(folder).tokenizer is None
    (tmp_path / "m.Q4_K.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "m.Q4_K.gguf"):
        with pytest.raises(QjaxError, match=r"GGUF file.*qjax.load reads"):
            load_huggingface(name)


def test_constants_among_the_weights_are_ignored(folder, tmp_path):
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64)}))
    load_huggingface(folder)
    save_huggingface(tmp_path / "gpt2", weights_model(CONFIGS["gpt2"]))
    mask = np.ones((1, 1, 32, 32), np.uint8)
    masks = {"transformer.h.0.attn.bias": mask, "h.1.attn.bias": mask, "h.1.attn.masked_bias": np.float32([-1e4])}
    edit_weights(tmp_path / "gpt2", lambda t: t.update(masks))
    assert_equal_trees(load_huggingface(tmp_path / "gpt2").params, weights_model(CONFIGS["gpt2"]).params)
    save_huggingface(tmp_path / "neox", weights_model(CONFIGS["gpt_neox"]))
    names = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    edit_weights(tmp_path / "neox", lambda t: t.update({f"gpt_neox.layers.0.{name}": mask for name in names}))
    assert_equal_trees(load_huggingface(tmp_path / "neox").params, weights_model(CONFIGS["gpt_neox"]).params)


def test_a_tied_head_may_be_stored_too(tmp_path):
    save_huggingface(tmp_path, weights_model(CONFIGS["llama-tied"]))
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "output" not in load_huggingface(tmp_path).params["head"]
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    expect_refusal(tmp_path, "lm_head.weight differs from the embedding", "tie_word_embeddings")


# Bad folders


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ([1, 70], None, (1, (70,))),
        ([70, 1, 70], [1, 70], (70, (1,))),
        (1, [1, 70], (1, (70,))),
        (1, 70, (1, (70,))),
        (None, [70, 1], (None, (70, 1))),
        (1, "absent", (1, ())),
        ([1, -2, 2**40], [None, -1], (1, ())),
    ],
)
def test_several_ends(config, generation, ends, folder, tmp_path):
    """Those of config.json, of which the first is the one, and of generation_config.json; saved folders keep them."""
    edit_config(folder, eos_token_id=config)
    if generation is not None:
        entry = {} if generation == "absent" else {"eos_token_id": generation}
        (folder / "generation_config.json").write_text(json.dumps(entry))
    model = load(folder, lazy=True)
    assert (model.config.eos_id, model.config.other_eos_ids) == ends
    for name, write in {"packed": save, "huggingface": save_huggingface}.items():
        write(tmp_path / name, model)
        assert load(tmp_path / name, lazy=True).config == model.config


@pytest.mark.parametrize("odd", ["2", 2.5, True, [1, "x"], {"a": 1}, [[1]]])
def test_ends_that_are_no_numbers(odd, folder):
    edit_config(folder, eos_token_id=odd)
    expect_refusal(folder, "config.json: 'eos_token_id' must be the number of a token or a list of them")
    edit_config(folder, eos_token_id=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": odd}))
    expect_refusal(folder, "generation_config.json: 'eos_token_id' must be the number of a token or a list of them")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model.safetensors"])
def test_links_to_nothing(name, folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "nowhere")
    expect_refusal(folder, f"{name} is a link to", "where nothing is")


def test_missing_folder(tmp_path):
    expect_refusal(tmp_path / "nowhere", "nowhere: no such folder")


def test_a_file_is_no_folder(source):
    expect_refusal(source / "config.json", "is a file; give its folder")
    with pytest.raises(QjaxError, match="is a file; give its folder"):
        load(source / "model.safetensors")


def test_folder_without_config(tmp_path):
    expect_refusal(tmp_path, "has no config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b"\x80\x04K\x01."])
def test_broken_config(folder, content):
    (folder / "config.json").write_bytes(content)
    expect_refusal(folder, "config.json")


def test_unreadable_files(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    expect_refusal(folder, "cannot read", "config.json: Is a directory")


def test_unreadable_weights(folder, monkeypatch):
    def refuse_to_open(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qjax.checkpoints.tensors.safe_open", refuse_to_open)
    expect_refusal(folder, "cannot read", "model.safetensors: Permission denied")


def test_unknown_architecture(folder):
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    expect_refusal(folder, "config.json", "unknown architecture", "'mamba'", "supported: llama", "gpt2")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    expect_refusal(folder, "has no weights: expected model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_never_loaded(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    expect_refusal(folder, name, "pickle", "never loaded", "convert")


@pytest.mark.parametrize("kept", [0, 5, 40, 2000, -1])
def test_truncated_weights(folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    expect_refusal(folder, "model.safetensors is truncated or corrupt", "again")


def test_weights_that_are_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(range(200)))
    expect_refusal(folder, "model.safetensors is truncated or corrupt")


def test_index_without_shard(folder):
    names = shard(folder)
    (folder / names[0]).unlink()
    (folder / names[2]).unlink()
    expect_refusal(folder, "lacks", names[0], names[2], "model.safetensors.index.json")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../model.safetensors"}}'])
def test_broken_index(folder, content):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    expect_refusal(folder, "model.safetensors.index.json")


def test_a_tensor_in_two_shards(folder):
    names = shard(folder)
    shutil.copy(folder / names[0], folder / names[1])
    expect_refusal(folder, names[1], "is also in", names[0])


def test_missing_tensors_are_all_named(folder):
    def drop(tensors):
        del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]

    edit_weights(folder, drop)
    expect_refusal(folder, "missing lm_head.weight", "missing model.layers.1.mlp.up_proj.weight")


def test_long_lists_are_cut(folder):
    edit_config(folder, num_hidden_layers=4)
    expect_refusal(folder, "missing model.layers.2", "and 13 more")


def test_unexpected_tensors(folder):
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}))
    expect_refusal(folder, "unexpected model.layers.0.self_attn.q_norm.weight")


def test_wrong_shapes(folder):
    edit_config(folder, vocab_size=300)
    expect_refusal(folder, "model.embed_tokens.weight has shape (257, 32), expected (300, 32)", "lm_head.weight has shape")


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_unsupported_types(folder, dtype):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(dtype)}))
    expect_refusal(folder, "model.norm.weight has type", "expected F32, F16, BF16")


def test_fp8_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"] |= {"dtype": "F8_E4M3", "shape": [128]}  # as many bytes as 32 of F32
    header = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    expect_refusal(folder, "model.norm.weight has type F8_E4M3, expected F32, F16, BF16")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value, dtype, tmp_path):
    save_huggingface(tmp_path, weights_model(tiny_config(), dtype=dtype))

    def broken(tensors):
        for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            tensors[name][(3,) * tensors[name].ndim] = value

    edit_weights(tmp_path, broken)
    expect_refusal(tmp_path, "NaN or infinite", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")


def test_tokenizer_larger_than_the_embedding(tmp_path):
    save_huggingface(tmp_path, weights_model(tiny_config(vocabulary_size=200), byte_tokenizer()))
    expect_refusal(tmp_path, "tokenizer.json has 256 tokens", "only 200")


def test_corrupt_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    expect_refusal(folder, "tokenizer.json: the tokenizer has no vocabulary")


# Names


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "../nowhere"])
def test_paths_are_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("qjax.checkpoints.load.download", lambda name: pytest.fail(f"looked for {name}"))
    with pytest.raises(QjaxError, match="no such folder"):
        load(name)


def test_folders_that_may_not_be_entered(source, monkeypatch):
    def refuse_to_look(*args, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("qjax.untrusted.os.stat", refuse_to_look)
        with pytest.raises(QjaxError, match=r"cannot read .*: Permission denied"):
            load(source)


def test_hub_names_are_downloaded(source, monkeypatch):
    monkeypatch.setattr("qjax.checkpoints.load.download", lambda name: source)
    assert load("someone/some-model").name == "someone/some-model"


@pytest.mark.parametrize("error", [OSError("[Errno -2] Name or service not known\nmore"), ValueError("bad name"), KeyError()])
def test_no_network(error, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(QjaxError, match="'someone/some-model' is no folder here and could not be fetched") as caught:
        load("someone/some-model")
    assert "\n" not in str(caught.value)


def test_only_needed_files_are_downloaded(monkeypatch, source):
    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: seen.update(options) or str(source))
    huggingface.download("a/b")
    assert all(name.endswith((".json", ".jinja", ".safetensors")) for name in seen["allow_patterns"])


# Writing


def test_a_folder_in_use_is_not_overwritten_unasked(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(QjaxError, match="is not empty"):
        save_huggingface(folder, weights_model(tiny_config(), seed=1))
    assert (folder / "model.safetensors").read_bytes() == before


def test_overwriting_leaves_nothing_of_the_old_model(folder):
    shard(folder)
    (folder / "qjax.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    model = weights_model(CONFIGS["gpt2"])
    save_huggingface(folder, model, overwrite=True)
    assert_equal_trees(load(folder).params, model.params)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(QjaxError, match=r"cannot write .*file"):
            save_huggingface(folder, weights_model(tiny_config()))


def test_parameters_of_another_model_are_not_written(tmp_path):
    model = weights_model(tiny_config())
    with pytest.raises(QjaxError, match=r"missing block_2/.*; and 4 more"):
        save_huggingface(tmp_path, model._replace(config=dataclasses.replace(model.config, layers=3)))
    assert list(tmp_path.iterdir()) == []


# Memory and the models at hand


# VmHWM rather than ru_maxrss, which a new process inherits from the one that started it.
PEAK = """
import sys
from pathlib import Path
from qjax.checkpoints.load import load
import jax.numpy as jnp
jnp.zeros(3).block_until_ready()
def kib(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
before = kib("VmRSS:")
model = load(sys.argv[1])
print(kib("VmHWM:") - before)
"""


def peak_bytes(place):
    """What loading a folder or a file adds to a process's memory, at most."""
    script = [sys.executable, "-c", PEAK, str(place)]
    output = subprocess.run(script, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    return int(output) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("changes", [{}, MIXTRAL | {"mlp_size": 384, "vocabulary_size": 300}], ids=["llama", "mixtral"])
def test_peak_memory_is_the_model_and_little_more(changes, tmp_path):
    config = tiny_config(hidden_size=512, mlp_size=1536, heads=8, kv_heads=8, head_dim=64, layers=8)
    save_huggingface(tmp_path, weights_model(dataclasses.replace(config, **changes)))
    size = (tmp_path / "model.safetensors").stat().st_size  # 109 MB, the largest tensor 3 MB
    assert min(peak_bytes(tmp_path) for _ in range(3)) < 1.4 * size  # what allocators keep differs from run to run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_two_gigabytes_in_shards(tmp_path):
    """In bfloat16, as most are; the largest tensor has 131 MB."""
    config = tiny_config(
        **{"vocabulary_size": 32_000, "hidden_size": 2048, "mlp_size": 5632, "layers": 19},
        **{"heads": 32, "kv_heads": 32, "head_dim": 64},
    )
    random = np.random.default_rng(0).standard_normal(2**20, np.float32)
    leaves = {
        path: Lazy(shape, np.dtype(jnp.bfloat16), lambda shape=shape: jnp.asarray(np.resize(random, shape), jnp.bfloat16))
        for path, shape in parameter_shapes(config).items()
    }
    save_huggingface(tmp_path, Model(config, unflatten(leaves), None, "random"), shard_bytes=500_000_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) >= 5
    size = sum(leaf.nbytes for leaf in leaves.values())
    assert size > 2 * 10**9
    assert peak_bytes(tmp_path) < 1.3 * size


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-hf"])
def test_a_real_model(name, tmp_path):
    folder = real_data(f"models/{name}")
    model = load(folder)
    text = real_data("text/tinystories_val.txt").read_text()[:1200]
    ids = model.tokenizer.encode(text, special_tokens=True)[None, : model.config.context]
    logits = jax.nn.log_softmax(apply(model, jnp.asarray(ids)))
    nll = -np.mean(np.take_along_axis(np.asarray(logits)[0, :-1], ids[0, 1:, None], axis=-1))
    assert nll < {"stories260K-hf": 1.7, "babyllama-hf": 1.0}[name]  # nats a token
    save_huggingface(tmp_path / "copy", model)
    assert_equal_trees(load(tmp_path / "copy").params, model.params)
