"""models/families.py and models/config_entries.py: config.json both ways, and the names of tensors."""

import dataclasses

import pytest

from qjax.errors import QjaxError
from qjax.models.config import DecoderConfig, LinearScaling, Llama3Scaling
from qjax.models.families import FAMILIES, find_family, read_config, write_config
from qjax.models.family import stored_tensors
from qjax.models.parameters import parameter_shapes

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_llama():
    assert read_config(LLAMA) == DecoderConfig("llama", 100, 32, 48, 3, 4, 2, 8, 64)
    full = LLAMA | {
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 500000,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [5, 6],
    }
    assert read_config(full) == DecoderConfig(
        *("llama", 100, 32, 48, 3, 4, 2, 16, 64),
        activation="gelu_tanh",
        rope_theta=500000.0,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied=True,
        bos_id=1,
        eos_id=5,
    )


def test_defaults_of_older_llamas():
    old = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    assert read_config(old).kv_heads == 4
    assert read_config(old).norm_epsilon == 1e-6


def test_mistral():
    assert read_config(MISTRAL | {"sliding_window": 16}).sliding_window == 16
    assert read_config(MISTRAL | {"sliding_window": None}).sliding_window is None
    with pytest.raises(QjaxError, match="'sliding_window' must be at least 1"):
        read_config(MISTRAL | {"sliding_window": 0})
    with pytest.raises(QjaxError, match="'layer_types'"):
        read_config(MISTRAL | {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]})


def test_qwen2():
    config = read_config(QWEN2 | {"sliding_window": 16, "max_window_layers": 0})
    assert (config.qkv_bias, config.attention_output_bias, config.sliding_window) == (True, False, None)


@pytest.mark.parametrize(
    ("entries", "window"),
    [
        ({"max_window_layers": 0}, 16),
        ({"max_window_layers": 3}, None),
        ({"max_window_layers": 28}, None),
        ({"max_window_layers": 1, "sliding_window": 64}, None),  # as long as the context: never met
        ({"layer_types": ["sliding_attention"] * 3}, 16),
        ({"layer_types": ["full_attention"] * 3, "max_window_layers": 0}, None),
    ],
)
def test_qwen2_window(entries, window):
    assert read_config(QWEN2 | {"use_sliding_window": True, "sliding_window": 16} | entries).sliding_window == window


@pytest.mark.parametrize(
    "entries", [{"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}]
)
def test_a_window_in_some_layers_is_refused(entries):
    with pytest.raises(QjaxError, match=r"sliding window in \d of 3 layers is not supported"):
        read_config(QWEN2 | {"use_sliding_window": True, "sliding_window": 16} | entries)


def test_gpt2():
    config = read_config(GPT2)
    assert (config.mlp_size, config.activation, config.tied, config.norm, config.positions) == (
        *(128, "gelu_tanh", True),
        *("layer", "learned"),
    )
    assert (config.qkv_bias, config.attention_output_bias, config.mlp_bias, config.gated) == (True, True, True, False)
    assert read_config(GPT2 | {"n_inner": 50, "activation_function": "relu"}).mlp_size == 50
    assert read_config(GPT2 | {"n_inner": None}).mlp_size == 128


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(
    ("entry", "scaling"),
    [
        ({}, None),
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 4}, LinearScaling(4.0)),
        (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 16)),
    ],
)
def test_both_generations_of_rotary_settings(entry, scaling, newer):
    entries = {"rope_parameters": entry | {"rope_theta": 5e5}} if newer else {"rope_theta": 5e5, "rope_scaling": entry}
    config = read_config(LLAMA | entries)
    assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)


def test_the_oldest_name_of_the_rotary_type():
    config = read_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == LinearScaling(2.0)
    assert config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"unknown architecture: model_type None.*llama \(LlamaForCausalLM\), mistral.*qwen2.*gpt2"),
        ({"model_type": "mamba"}, "unknown architecture: model_type 'mamba'"),
        ({"model_type": ["llama"]}, "unknown architecture"),
        (LLAMA | {"architectures": ["MyForCausalLM"]}, "'MyForCausalLM'"),
        (LLAMA | {"architectures": ["MistralForCausalLM"]}, "unknown architecture"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        (LLAMA | {"hidden_size": None}, "'hidden_size' must be int, got nothing"),
        (LLAMA | {"hidden_size": "64"}, "'hidden_size' must be int, got '64'"),
        (LLAMA | {"hidden_size": True}, "'hidden_size' must be int, got True"),
        (LLAMA | {"hidden_size": 30}, "30 does not divide into 4 heads"),
        (LLAMA | {"num_key_value_heads": 3}, "4 heads cannot share 3"),
        (LLAMA | {"num_attention_heads": 0}, "0 heads"),
        (LLAMA | {"vocab_size": -1}, "sizes must be positive"),
        (LLAMA | {"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number"),
        (LLAMA | {"tie_word_embeddings": 1}, "'tie_word_embeddings' must be bool"),
        (LLAMA | {"hidden_act": "mish"}, "'hidden_act' is 'mish'; supported: silu"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' is not supported"),
        (LLAMA | {"rope_parameters": {"rope_type": "dynamic"}}, "rotary scaling 'dynamic' is not supported"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "'factor' must be a number, got nothing"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "'low_freq_factor'"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["linear_attention"] * 3}, "linear_attention"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        (GPT2 | {"scale_attn_weights": False}, "'scale_attn_weights' is False"),
        (GPT2 | {"add_cross_attention": True}, "'add_cross_attention' is True"),
    ],
)
def test_what_cannot_be_done_is_refused(config, message):
    with pytest.raises(QjaxError, match=message) as error:
        read_config(config)
    assert "\n" not in str(error.value)


def test_either_name_of_the_architecture_is_enough():
    for config in (LLAMA, MISTRAL, QWEN2, GPT2):
        name, architectures = config["model_type"], config["architectures"]
        assert find_family({"model_type": name}).name == name
        assert find_family({"architectures": architectures}).name == name


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"rope_scaling": LLAMA3, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 16},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}, "mlp_bias": True, "bos_token_id": 1},
        MISTRAL | {"sliding_window": 9},
        QWEN2,
        QWEN2 | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
        GPT2,
        GPT2 | {"n_inner": 50, "activation_function": "relu", "tie_word_embeddings": False},
    ],
)
def test_written_configurations_read_back(config):
    config = read_config(config)
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize(
    ("field", "value"), [("sliding_window", 8), ("norm", "layer"), ("attention_output_bias", True), ("gated", False)]
)
def test_what_a_family_cannot_say_is_not_written(field, value):
    with pytest.raises(QjaxError, match=f"cannot say .*{field}"):
        write_config(dataclasses.replace(read_config(LLAMA), **{field: value}))


def test_an_unknown_family_is_not_written():
    with pytest.raises(QjaxError, match="unknown family 'other'; supported: llama, mistral, qwen2, gpt2"):
        write_config(dataclasses.replace(read_config(LLAMA), family="other"))


@pytest.mark.parametrize("config", [LLAMA, LLAMA | {"attention_bias": True, "mlp_bias": True}, MISTRAL, QWEN2, GPT2])
def test_every_parameter_has_one_place_in_the_checkpoint(config):
    config = read_config(config)
    shapes = parameter_shapes(config)
    tensors = stored_tensors(FAMILIES[config.family], shapes)
    parts = [part for tensor in tensors for part in tensor.parts]
    assert dict(parts) == shapes
    assert len(parts) == len(shapes)
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_names_and_shapes_of_llama():
    tensors = {tensor.name: tensor for tensor in stored_tensors(FAMILIES["llama"], parameter_shapes(read_config(LLAMA)))}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (100, 32)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (32, 48)
    assert shapes["model.norm.weight"] == (32,)
    assert len(shapes) == 3 + 3 * 9


def test_names_and_shapes_of_gpt2():
    tensors = {tensor.name: tensor for tensor in stored_tensors(FAMILIES["gpt2"], parameter_shapes(read_config(GPT2)))}
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (32, 96)
    assert [path for path, _ in fused.parts] == [f"block_1/attention/{name}/kernel" for name in "qkv"]
    assert tensors["transformer.h.1.attn.c_attn.bias"].shape == (96,)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert tensors["transformer.wpe.weight"].shape == (64, 32)
    assert "lm_head.weight" not in tensors
