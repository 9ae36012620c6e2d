"""models/families.py and models/config_entries.py: config.json both ways, and the names of tensors."""

import dataclasses
import math

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.families import FAMILIES, find_family, read_config, write_config
from qjax.models.family import stacks_in, stored_tensors
from qjax.models.parameters import parameter_shapes
from qjax.models.scalings import DynamicScaling, LinearScaling, Llama3Scaling, LongScaling, YarnScaling
from qjax.models.stacks import spread
from tests.family_files import (
    COHERE,
    EVERY,
    FALCON,
    FALCON2,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GLM,
    GPT2,
    GPT_NEO,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MISTRAL,
    OLMO2,
    OPT,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
    STABLELM,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
MAMBA = LLAMA | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}


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
        other_eos_ids=(6,),
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


def test_windows_of_qwens_mixtures_are_in_every_layer():
    """Whatever max_window_layers says, which transformers asks in their dense relatives alone."""
    asked = EVERY["qwen3_moe"] | {"sliding_window": 8, "max_window_layers": 1}
    config = read_config(asked | {"use_sliding_window": True})
    assert config.sliding_window == 8 and config.kinds == ()
    assert read_config(write_config(config)) == config
    assert read_config(asked).sliding_window is None


@pytest.mark.parametrize(
    ("entries", "windows"),
    [
        ({"max_window_layers": 1}, [None, 16, 16]),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, [None, 16, None]),
        ({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, [16, None, None]),
    ],
)
def test_a_window_in_some_layers(entries, windows):
    config = read_config(QWEN2 | {"use_sliding_window": True, "sliding_window": 16} | entries)
    assert [kind.sliding_window for kind in config.layer_kinds] == windows
    assert config.kinds == config.layer_kinds
    assert [config.of_layer(i).sliding_window for i in range(3)] == windows
    assert config.of_layer(1) == dataclasses.replace(config, kinds=(), sliding_window=windows[1])


GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
}


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_parameters": GEMMA3_ROPE},
        {"rope_theta": 1e5, "rope_local_base_freq": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
)
def test_both_generations_of_gemma_3(entries):
    config = read_config(GEMMA3 | {"sliding_window": 16, "sliding_window_pattern": 3} | entries)
    local = LayerKind(sliding_window=16, rope_theta=1e3)
    assert config.kinds == (local, local, LayerKind(rope_theta=1e5, rope_scaling=LinearScaling(8.0)))
    assert (config.norm_places, config.qk_norm, config.attention_scale, config.logit_softcap) == ("both", "head", 1 / 16, None)


def test_defaults_of_gemma_2_and_3():
    second, third = (read_config(family | {"num_hidden_layers": 7}) for family in (GEMMA2, GEMMA3))
    assert [kind.sliding_window for kind in second.kinds] == [4096, None] * 3 + [4096]
    assert {kind.rope_theta for kind in second.kinds} == {1e4}
    assert (second.attention_softcap, second.logit_softcap) == (50.0, 30.0)
    assert [(kind.sliding_window, kind.rope_theta) for kind in third.kinds] == [
        *[(4096, 1e4)] * 5,
        (None, 1e6),
        (4096, 1e4),
    ]
    assert (third.attention_softcap, third.logit_softcap) == (None, None)
    assert read_config(GEMMA2 | {"final_logit_softcapping": None}).logit_softcap is None
    assert read_config(GEMMA3 | {"query_pre_attn_scalar": 168}).attention_scale == 168**-0.5


def test_gpt2():
    config = read_config(GPT2)
    assert (config.mlp_size, config.activation, config.tied, config.norm, config.positions) == (
        *(128, "gelu_tanh", True),
        *("layer", "learned"),
    )
    assert (config.qkv_bias, config.attention_output_bias, config.mlp_bias, config.gated) == (True, True, True, False)
    assert read_config(GPT2 | {"n_inner": 50, "activation_function": "relu"}).mlp_size == 50
    assert read_config(GPT2 | {"n_inner": None}).mlp_size == 128


def test_gpt_neox():
    config = read_config(GPT_NEOX)
    assert (config.norm, config.positions, config.activation, config.gated, config.tied) == (
        "layer",
        "rope",
        "gelu",
        False,
        False,
    )
    assert (config.qkv_bias, config.attention_output_bias, config.mlp_bias) == (True, True, True)
    assert (config.parallel_residual, config.rotary_fraction, config.rotary_dim) == (True, 0.25, 2)
    changed = read_config(GPT_NEOX | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast"})
    assert (changed.parallel_residual, changed.activation) == (False, "gelu_tanh")
    assert (changed.qkv_bias, changed.attention_output_bias, changed.mlp_bias) == (False, False, True)
    assert read_config({key: value for key, value in GPT_NEOX.items() if key != "rotary_pct"}).rotary_fraction == 0.25


@pytest.mark.parametrize(
    "entries",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 5e5},
        {"rotary_pct": 0.5, "rotary_emb_base": 500000, "partial_rotary_factor": 0.5, "rope_theta": 5e5},
        {"rotary_pct": None, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_type": "default"}},
    ],
)
def test_every_name_of_partly_rotated_heads(entries):
    config = read_config(GPT_NEOX | entries)
    assert (config.rope_theta, config.rotary_fraction, config.rope_scaling) == (5e5, 0.5, None)


def test_opt():
    config = read_config(OPT)
    assert (config.norm, config.positions, config.activation, config.gated, config.tied) == (
        *("layer", "learned", "relu"),
        *(False, True),
    )
    assert (config.context, config.position_offset) == (64, 2)
    assert (config.qkv_bias, config.attention_output_bias, config.mlp_bias) == (True, True, True)
    bare = read_config(OPT | {"enable_bias": False, "word_embed_proj_dim": None, "activation_function": "gelu"})
    assert (bare.qkv_bias, bare.attention_output_bias, bare.mlp_bias, bare.activation) == (False, False, False, "gelu")


def test_gemma():
    config = read_config(GEMMA)
    assert (config.norm, config.activation, config.gated, config.tied, config.scaled_embeddings) == (
        *("rms_offset", "gelu_tanh"),
        *(True, True, True),
    )
    assert (config.head_dim, config.kv_heads, config.qkv_bias) == (16, 2, False)
    assert read_config({key: value for key, value in GEMMA.items() if key != "head_dim"}).head_dim == 256
    untied = read_config(GEMMA | {"tie_word_embeddings": False, "attention_bias": True})
    assert (untied.tied, untied.qkv_bias, untied.attention_output_bias) == (False, True, True)


@pytest.mark.parametrize(
    ("entries", "activation"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu"}, "gelu"),
        ({"hidden_act": "silu", "hidden_activation": None}, "silu"),
        ({"hidden_activation": "silu"}, "silu"),
    ],
)
def test_both_names_of_gemmas_activation(entries, activation):
    assert read_config(GEMMA | entries).activation == activation


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(
    ("entry", "scaling"),
    [
        ({}, None),
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 4}, LinearScaling(4.0)),
        (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 16)),
        ({"rope_type": "dynamic", "factor": 4}, DynamicScaling(4.0)),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 16}, YarnScaling(4.0, 64, fast_turns=16.0)),
        (LONG, LongScaling((1.0, 1.1, 1.2, 1.3), (1.0, 2.0, 3.0, 4.0), 64, 64)),
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


def test_longrope_runs_up_to_its_original_context():
    older = {"type": "su"} | {key: value for key, value in LONG.items() if key != "rope_type"}
    entries = {"rope_scaling": older, "original_max_position_embeddings": 16}
    config = read_config(PHI3 | entries)
    assert (config.context, config.rope_scaling.original_context, config.rope_scaling.context) == (16, 16, 64)
    assert write_config(config)["max_position_embeddings"] == 64
    with pytest.raises(QjaxError, match="a context of 64; with longrope it is at most the original one, 16"):
        dataclasses.replace(config, context=64)


def test_layers_without_rotation():
    config = read_config({key: value for key, value in SMOLLM3.items() if key != "no_rope_layers"} | {"num_hidden_layers": 5})
    assert [kind.positions for kind in config.kinds] == ["rope", "rope", "rope", "none", "rope"]
    assert {kind.rope_theta for kind in config.kinds} == {2e6}


def test_where_norms_stand():
    places = {name: read_config(config).norm_places for name, config in EVERY.items()}
    assert {name for name, place in places.items() if place == "both"} == {"gemma2", "gemma3_text", "glm4"}
    assert {name for name, place in places.items() if place == "after"} == {"olmo2"}
    shared = {name for name, config in EVERY.items() if read_config(config).shared_norm}
    assert shared == {"cohere", "falcon"}
    assert read_config(STABLELM | {"use_parallel_residual": True}).shared_norm
    olmo = named_tensors(OLMO2)
    assert "model.layers.0.input_layernorm.weight" not in olmo
    assert olmo["model.layers.0.self_attn.q_norm.weight"].shape == (32,)
    assert olmo["model.layers.0.self_attn.k_norm.weight"].shape == (16,)


@pytest.mark.parametrize(
    ("entries", "heads", "blocks"),
    [
        ({}, 1, 1),
        ({"multi_query": False}, 4, 4),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, 2),
    ],
)
def test_how_falcon_fuses_queries_keys_and_values(entries, heads, blocks):
    config = read_config(FALCON | entries)
    fused = named_tensors(FALCON | entries)["transformer.h.0.self_attention.query_key_value.weight"]
    assert (config.kv_heads, fused.blocks, fused.shape) == (heads, blocks, ((4 + 2 * heads) * 8, 32))
    stored = np.arange(fused.shape[0] * 32, dtype=np.float32).reshape(fused.shape)
    rows = {path[-8]: split[0] // 32 for path, split in fused.split(stored).items()}  # whose rows each column was
    group = np.arange(fused.shape[0]).reshape(blocks, -1, 8)
    expected = {"q": group[:, :-2], "k": group[:, -2], "v": group[:, -1]}
    for name, order in expected.items():
        assert rows[name].tolist() == order.reshape(-1).tolist()
    np.testing.assert_array_equal(fused.join(fused.split(stored)), stored)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"unknown architecture: model_type None.*llama \(LlamaForCausalLM\), mistral.*qwen2.*gpt2"),
        ({"model_type": "mamba"}, "unknown architecture: model_type 'mamba'"),
        ({"model_type": ["llama"]}, "unknown architecture"),
        (LLAMA | {"architectures": ["MyForCausalLM"]}, "'MyForCausalLM'"),
        (LLAMA | {"architectures": ["MistralForCausalLM"]}, "unknown architecture"),
        (LLAMA | {"hidden_size": None}, "'hidden_size' must be int, got nothing"),
        (LLAMA | {"hidden_size": "64"}, "'hidden_size' must be int, got '64'"),
        (LLAMA | {"hidden_size": True}, "'hidden_size' must be int, got True"),
        (LLAMA | {"hidden_size": 30}, "30 does not divide into 4 heads"),
        (LLAMA | {"num_key_value_heads": 3}, "4 heads cannot share 3"),
        (LLAMA | {"num_attention_heads": 0}, "0 heads"),
        (LLAMA | {"vocab_size": -1}, "vocabulary_size is -1, expected 1 to"),
        (LLAMA | {"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number"),
        (LLAMA | {"tie_word_embeddings": 1}, "'tie_word_embeddings' must be bool"),
        (LLAMA | {"hidden_act": "mish"}, "'hidden_act' is 'mish'; supported: silu"),
        (LLAMA | {"rope_scaling": {"rope_type": "proportional"}}, "rotary scaling 'proportional' .*default, linear, dynamic"),
        (LLAMA | {"rope_scaling": {"rope_type": ["yarn"]}}, "rotary scaling .*yarn.* is not supported"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "'factor' must be a number, got nothing"),
        (LLAMA | {"rope_scaling": LONG | {"short_factor": [1.0]}}, "has 1 short and 4 long factors, expected 4"),
        (LLAMA | {"rope_scaling": LONG | {"long_factor": [1.0, 0.0, 1.0, 1.0]}}, "the long factors of longrope"),
        (MAMBA, "unknown architecture: model_type 'mamba'.*supported: llama"),
        (QWEN3_MOE | {"mlp_only_layers": [1]}, r"'mlp_only_layers' is \[1\]; the decoder can only do \[\]"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2"),
        (QWEN3_MOE | {"num_experts": 0}, "'num_experts' is 0; a mixture has at least 1"),
        (QWEN3_MOE | {"num_experts_per_tok": 5}, "4 experts, 5 for a token"),
        (GPT_OSS | {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; the decoder can only do 'silu'"),
        (GPT_OSS | {"swiglu_limit": 5.0}, "'swiglu_limit' is 5.0; the decoder can only do 7.0"),
        (GPT_OSS | {"experts_per_token": 2}, "'experts_per_token' is 2; the decoder can only do 3"),
        (GPT_OSS | {"num_experts": 0, "num_local_experts": None}, "'num_experts' is 0; a mixture has at least 1"),
        (GPT_OSS | {"layer_types": ["full_attention"]}, "'layer_types' names 1 layers; the model has 3"),
        (GPT_OSS | {"rope_scaling": {"rope_type": "yarn"}}, "'factor' must be a number, got nothing"),
        (SMOLLM3 | {"no_rope_layers": [1, 2, 1]}, "'no_rope_layers' must be a 1 or a 0"),
        (GRANITE | {"residual_multiplier": 0}, "'residual_multiplier' is 0.0, expected a positive number"),
        (GPT_NEO | {"attention_types": [[["global"], 2]]}, "'attention_types' names 2 layers; the model has 3"),
        (GPT_NEO | {"attention_types": [["global", 3]]}, "'attention_types' has .*global"),
        (FALCON | {"num_ln_in_parallel_attn": 2}, "'num_ln_in_parallel_attn' is 2"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "'factor' must be a number, got nothing"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "'low_freq_factor'"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        (
            LLAMA | {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "'rope_parameters' and 'rope_scaling' disagree",
        ),
        (LLAMA | {"rope_theta": 0}, "rope_theta is 0.0, expected 1.0 to"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["linear_attention"] * 3}, "linear_attention"),
        (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "'rope_theta' disagree: 10000.0, 500000.0"),
        (GPT_NEOX | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' and 'rotary_pct' disagree: 0.25, 0.5"),
        (GPT_NEOX | {"rotary_pct": 0.4}, "even number of features of each head, got 0.4 of 8"),
        (GPT_NEOX | {"rotary_pct": 0.0}, "rotary_fraction is 0.0, expected 0.001 to 1.0"),
        (GPT_NEOX | {"rotary_pct": 2}, "rotary_fraction is 2.0, expected"),
        (GPT_NEOX | {"rotary_pct": float("nan")}, "rotary_fraction is nan, expected"),
        (GPT_NEOX | {"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'"),
        (OPT | {"do_layer_norm_before": False}, "'do_layer_norm_before' is False; the decoder can only do True"),
        (OPT | {"word_embed_proj_dim": 16}, "'word_embed_proj_dim' is 16; the decoder can only do 32"),
        (OPT | {"_remove_final_layer_norm": True}, "'_remove_final_layer_norm' is True"),
        (OPT | {"layer_norm_elementwise_affine": False}, "'layer_norm_elementwise_affine' is False"),
        (GEMMA | {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', which versions .* add 'hidden_activation'"),
        (GEMMA | {"hidden_act": "silu", "hidden_activation": "gelu_new"}, "'hidden_act' 'silu' .* 'gelu_new' disagree"),
        (GEMMA | {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        (GEMMA | {"num_key_value_heads": None}, "'num_key_value_heads' must be int, got nothing"),
        (GEMMA | {"model_type": "gemma4", "architectures": ["Gemma4ForCausalLM"]}, "unknown architecture: model_type 'gemma4'"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
        (GEMMA3 | {"sliding_window_pattern": 0}, "'sliding_window_pattern' must be at least 1"),
        (GEMMA3 | {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is 0.0, expected a positive number"),
        (GEMMA3 | {"layer_types": ["full_attention"]}, "'layer_types' names 1 layers; the model has 3"),
        (GEMMA3 | {"rope_parameters": {"rope_theta": 1e6}}, r"'rope_parameters' has \['rope_theta'\] beside settings"),
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
    assert list(EVERY) == list(FAMILIES)
    assert [read_config(config).family for config in EVERY.values()] == list(EVERY)
    for config in EVERY.values():
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
        GPT_NEOX,
        GPT_NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
        GPT_NEOX | {"rope_scaling": {"type": "linear", "factor": 3.0}, "rotary_emb_base": 5e5, "hidden_act": "gelu_fast"},
        GEMMA,
        GEMMA | {"hidden_activation": "gelu", "tie_word_embeddings": False, "attention_bias": True, "rope_theta": 5e5},
        OPT,
        OPT | {"enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False, "bos_token_id": 2},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        GEMMA2,
        GEMMA2 | {"final_logit_softcapping": None, "query_pre_attn_scalar": 144, "layer_types": ["full_attention"] * 3},
        GEMMA3,
        GEMMA3 | {"rope_parameters": GEMMA3_ROPE, "query_pre_attn_scalar": 168, "sliding_window_pattern": 2},
        *EVERY.values(),
        LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2, "truncate": False}},
        QWEN3 | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        SMOLLM3 | {"use_sliding_window": True, "sliding_window": 9},
        GRANITE | {"logits_scaling": 13.0, "embedding_multiplier": 12, "residual_multiplier": 0.22, "mlp_bias": True},
        STABLELM | {"use_parallel_residual": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
        PHI3 | {"rope_scaling": LONG, "original_max_position_embeddings": 16, "sliding_window": 9},
        GLM | {"partial_rotary_factor": 1.0, "attention_bias": False},
        COHERE | {"use_qk_norm": True, "logit_scale": 0.3, "attention_bias": True},
        FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        FALCON2 | {"num_ln_in_parallel_attn": 1},
        GPT_OSS | {"rope_scaling": {"rope_type": "default"}, "attention_bias": False, "layer_types": ["full_attention"] * 3},
        GEMMA3 | {"layer_types": ["sliding_attention"] * 3, "rope_local_base_freq": 5e3, "final_logit_softcapping": 9.0},
    ],
)
def test_written_configurations_read_back(config):
    config = read_config(config)
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sliding_window", 8), ("norm", "layer"), ("attention_output_bias", True), ("gated", False)),
        *(("parallel_residual", True), ("rotary_fraction", 0.5), ("position_offset", 2), ("scaled_embeddings", True)),
    ],
)
def test_what_a_family_cannot_say_is_not_written(field, value):
    with pytest.raises(QjaxError, match=f"cannot say .*{field}"):
        write_config(dataclasses.replace(read_config(LLAMA), **{field: value}))


def test_an_unknown_family_is_not_written():
    with pytest.raises(
        QjaxError, match="unknown family 'other'; supported: llama, mistral, qwen2, gpt2, gpt_neox, opt, gemma, gemma2"
    ):
        write_config(dataclasses.replace(read_config(LLAMA), family="other"))


@pytest.mark.parametrize("config", [*EVERY.values(), LLAMA | {"attention_bias": True, "mlp_bias": True}])
def test_every_parameter_has_one_place_in_the_checkpoint(config):
    config = read_config(config)
    shapes = parameter_shapes(config)
    tensors = stored_tensors(FAMILIES[config.family], shapes, config.heads)
    parts = [part for tensor in tensors for part in tensor.parts]
    stacks = stacks_in(FAMILIES[config.family], shapes)
    expected = spread({path: shape[1:] if path in stacks else shape for path, shape in shapes.items()}, stacks)
    assert dict(parts) == expected
    assert len(parts) == len(expected)
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def named_tensors(config):
    config = read_config(config)
    return {tensor.name: tensor for tensor in stored_tensors(FAMILIES[config.family], parameter_shapes(config), config.heads)}


def test_names_and_shapes_of_llama():
    tensors = named_tensors(LLAMA)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (100, 32)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (32, 48)
    assert shapes["model.norm.weight"] == (32,)
    assert len(shapes) == 3 + 3 * 9


def test_gpt_oss():
    """Where config.json is silent, it is as OpenAI's models are."""
    config = read_config(GPT_OSS)
    assert [kind.sliding_window for kind in config.kinds] == [16, None, 16]
    assert (config.rope_theta, config.rope_scaling) == (150000.0, YarnScaling(32.0, 4096, truncate=False))
    assert (config.attention_sinks, config.mlp_bias, config.qkv_bias, config.attention_output_bias) == (True,) * 4
    tensors = named_tensors(GPT_OSS)
    stem = "model.layers.1.mlp"
    both = tensors[f"{stem}.experts.gate_up_proj"]
    assert (both.shape, tensors[f"{stem}.experts.gate_up_proj_bias"].shape) == ((4, 32, 96), (4, 96))
    assert (tensors[f"{stem}.experts.down_proj"].shape, tensors[f"{stem}.experts.down_proj_bias"].shape) == (
        (4, 48, 32),
        (4, 32),
    )
    assert (tensors[f"{stem}.router.weight"].shape, tensors[f"{stem}.router.bias"].shape) == ((4, 32), (4,))
    assert tensors["model.layers.1.self_attn.sinks"].shape == (4,)
    stored = np.random.default_rng(0).standard_normal(both.shape)
    gate, up = (both.split(stored)[f"block_1/mlp/{name}/kernel"] for name in ("gate", "up"))
    np.testing.assert_array_equal(gate, stored[..., ::2])
    np.testing.assert_array_equal(up, stored[..., 1::2])
    np.testing.assert_array_equal(both.join(both.split(stored)), stored)


@pytest.mark.parametrize(("layers", "experts", "billions"), [(24, 32, 20.91), (36, 128, 116.83)])
def test_openais_models(layers, experts, billions):
    """As their files' config.json says it; as many parameters as the model card tells (2508.10925)."""
    entries = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    config = read_config(entries)
    silent = ("rope_scaling", "rope_theta", "layer_types", "sliding_window", "head_dim", "num_key_value_heads")
    assert read_config({key: value for key, value in entries.items() if key not in silent}) == config
    assert round(sum(map(math.prod, parameter_shapes(config).values())) / 1e9, 2) == billions


def test_names_and_shapes_of_gpt2():
    tensors = named_tensors(GPT2)
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (32, 96)
    assert [path for path, _ in fused.parts] == [f"block_1/attention/{name}/kernel" for name in "qkv"]
    assert tensors["transformer.h.1.attn.c_attn.bias"].shape == (96,)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert tensors["transformer.wpe.weight"].shape == (64, 32)
    assert "lm_head.weight" not in tensors


def test_names_and_shapes_of_gpt_neox():
    tensors = named_tensors(GPT_NEOX)
    fused = tensors["gpt_neox.layers.1.attention.query_key_value.weight"]
    assert fused.shape == (96, 32)
    assert [path for path, _ in fused.parts] == [f"block_1/attention/{name}/kernel" for name in "qkv"]
    assert tensors["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"].shape == (32, 48)
    assert tensors["embed_out.weight"].shape == tensors["gpt_neox.embed_in.weight"].shape == (100, 32)


def test_names_and_shapes_of_opt():
    tensors = named_tensors(OPT)
    assert tensors["model.decoder.embed_positions.weight"].shape == (66, 32)
    assert tensors["model.decoder.layers.2.fc1.weight"].shape == (48, 32)
    assert tensors["model.decoder.layers.0.final_layer_norm.bias"].shape == (32,)
    assert "lm_head.weight" not in tensors
