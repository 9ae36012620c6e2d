"""GPT-2, GPT-Neo, GPT-NeoX (Pythia) and OPT: layer norms, biases, no gate."""

import itertools

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models import rope_entries
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.family import Family
from qjax.models.layer_entries import by_layer, window_of
from qjax.models.ranges import RANGES
from qjax.untrusted import quoted

GPT2_MODULES = {
    "embed/tokens": "transformer.wte",
    "embed/positions": "transformer.wpe",
    "block_{i}/attention_norm": "transformer.h.{i}.ln_1",
    "block_{i}/attention/q": "transformer.h.{i}.attn.c_attn",
    "block_{i}/attention/k": "transformer.h.{i}.attn.c_attn",
    "block_{i}/attention/v": "transformer.h.{i}.attn.c_attn",
    "block_{i}/attention/o": "transformer.h.{i}.attn.c_proj",
    "block_{i}/mlp_norm": "transformer.h.{i}.ln_2",
    "block_{i}/mlp/up": "transformer.h.{i}.mlp.c_fc",
    "block_{i}/mlp/down": "transformer.h.{i}.mlp.c_proj",
    "head/norm": "transformer.ln_f",
    "head/output": "lm_head",
}
GPT_NEO_MODULES = GPT2_MODULES | {
    "block_{i}/attention/q": "transformer.h.{i}.attn.attention.q_proj",
    "block_{i}/attention/k": "transformer.h.{i}.attn.attention.k_proj",
    "block_{i}/attention/v": "transformer.h.{i}.attn.attention.v_proj",
    "block_{i}/attention/o": "transformer.h.{i}.attn.attention.out_proj",
}
GPT_NEOX_MODULES = {
    "embed/tokens": "gpt_neox.embed_in",
    "block_{i}/attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    "block_{i}/attention/q": "gpt_neox.layers.{i}.attention.query_key_value",
    "block_{i}/attention/k": "gpt_neox.layers.{i}.attention.query_key_value",
    "block_{i}/attention/v": "gpt_neox.layers.{i}.attention.query_key_value",
    "block_{i}/attention/o": "gpt_neox.layers.{i}.attention.dense",
    "block_{i}/mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "block_{i}/mlp/up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "block_{i}/mlp/down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    "head/norm": "gpt_neox.final_layer_norm",
    "head/output": "embed_out",
}
OPT_MODULES = {
    "embed/tokens": "model.decoder.embed_tokens",
    "embed/positions": "model.decoder.embed_positions",
    "block_{i}/attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "block_{i}/attention/q": "model.decoder.layers.{i}.self_attn.q_proj",
    "block_{i}/attention/k": "model.decoder.layers.{i}.self_attn.k_proj",
    "block_{i}/attention/v": "model.decoder.layers.{i}.self_attn.v_proj",
    "block_{i}/attention/o": "model.decoder.layers.{i}.self_attn.out_proj",
    "block_{i}/mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
    "block_{i}/mlp/up": "model.decoder.layers.{i}.fc1",
    "block_{i}/mlp/down": "model.decoder.layers.{i}.fc2",
    "head/norm": "model.decoder.final_layer_norm",
    "head/output": "lm_head",
}


def _read_gpt2(config: dict) -> DecoderConfig:
    entries.require(config, "scale_attn_weights", True, True)
    entries.require(config, "scale_attn_by_inverse_layer_idx", False, False)
    entries.require(config, "add_cross_attention", False, False)
    # reorder_and_upcast_attn is about precision alone: the decoder's softmax is in float32 in any case.
    hidden, heads = entries.get(config, "n_embd", int), entries.get(config, "n_head", int)
    return DecoderConfig(
        family="gpt2",
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "n_inner", int, 4 * hidden),
        layers=entries.get(config, "n_layer", int),
        heads=heads,
        kv_heads=heads,
        head_dim=entries.head_dim(hidden, heads),
        context=entries.get(config, "n_positions", int),
        norm="layer",
        norm_epsilon=float(entries.get(config, "layer_norm_epsilon", float, 1e-5)),
        activation=entries.activation(config, "activation_function", "gelu_new"),
        gated=False,
        positions="learned",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        **entries.token_ids(config),
    )


def _write_gpt2(config: DecoderConfig) -> dict:
    return {
        "vocab_size": config.vocabulary_size,
        "n_embd": config.hidden_size,
        "n_inner": config.mlp_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": entries.ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }


GPT2 = Family(
    "gpt2",
    ("GPT2LMHeadModel", "GPT2Model"),
    _read_gpt2,
    _write_gpt2,
    GPT2_MODULES,
    "transformer.",
    kernels_in_out=True,
    ignored=r"h\.\d+\.attn\.(masked_)?bias$",
)


def _read_gpt_neo(config: dict) -> DecoderConfig:
    hidden, heads = entries.get(config, "hidden_size", int), entries.get(config, "num_heads", int)
    window = entries.get(config, "window_size", int, 256)
    local = _local_layers(entries.get(config, "attention_types", list, [[["global", "local"], 12]]))
    layers = entries.get(config, "num_layers", int)
    if len(local) != layers:
        raise QjaxError(f"'attention_types' names {len(local)} layers; the model has {layers}")
    return DecoderConfig(
        family="gpt_neo",
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "intermediate_size", int, 4 * hidden),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=entries.head_dim(hidden, heads),
        context=entries.get(config, "max_position_embeddings", int),
        norm="layer",
        norm_epsilon=float(entries.get(config, "layer_norm_epsilon", float, 1e-5)),
        activation=entries.activation(config, "activation_function", "gelu_new"),
        gated=False,
        attention_scale=1.0,
        attention_output_bias=True,
        mlp_bias=True,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        **by_layer([LayerKind(sliding_window=window if each else None, positions="learned") for each in local]),
        **entries.token_ids(config),
    )


def _local_layers(types: list) -> list[bool]:
    """Which layers see a window alone, of [[["global", "local"], times], ...]; one more than may be, of too many."""
    for each in types:
        names, times = each if isinstance(each, list) and len(each) == 2 else (None, None)
        if not isinstance(names, list) or not names or set(map(str, names)) - {"global", "local"} or type(times) is not int:
            raise QjaxError(f"'attention_types' has {quoted(each)}; expected as [['global', 'local'], 12]")
    kinds = (name == "local" for names, times in types for _ in range(times) for name in names)
    return list(itertools.islice(kinds, RANGES["layers"][1] + 1))


def _write_gpt_neo(config: DecoderConfig) -> dict:
    local = [kind.sliding_window is not None for kind in config.layer_kinds]
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "attention_types": [[["local" if each else "global"], 1] for each in local],
        "window_size": window_of(config) or 256,
        "max_position_embeddings": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": entries.ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }


GPT_NEO = Family(
    "gpt_neo",
    ("GPTNeoForCausalLM", "GPTNeoModel"),
    _read_gpt_neo,
    _write_gpt_neo,
    GPT_NEO_MODULES,
    "transformer.",
    ignored=r"h\.\d+\.attn\.attention\.(masked_)?bias$",
)


def _read_gpt_neox(config: dict) -> DecoderConfig:
    hidden, heads = entries.get(config, "hidden_size", int), entries.get(config, "num_attention_heads", int)
    bias = entries.get(config, "attention_bias", bool, True)
    rope = rope_entries.partial_rope(config, share=0.25, older=("rotary_emb_base", "rotary_pct"))
    return DecoderConfig(
        family="gpt_neox",
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "intermediate_size", int),
        layers=entries.get(config, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads,
        head_dim=entries.head_dim(hidden, heads),
        context=rope_entries.context_of(config, rope["rope_scaling"]),
        norm="layer",
        norm_epsilon=float(entries.get(config, "layer_norm_eps", float, 1e-5)),
        activation=entries.activation(config, "hidden_act", "gelu"),
        gated=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        tied=entries.get(config, "tie_word_embeddings", bool, False),
        parallel_residual=entries.get(config, "use_parallel_residual", bool, True),
        **rope,
        **entries.token_ids(config),
    )


def _write_gpt_neox(config: DecoderConfig) -> dict:
    rope = rope_entries.write_rope(config)
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": rope_entries.written_context(config),
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": entries.ACTIVATION_NAMES[config.activation],
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
        "use_parallel_residual": config.parallel_residual,
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": config.rotary_fraction,
        "rope_scaling": rope["rope_scaling"],
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }


GPT_NEOX = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM", "GPTNeoXModel"),
    _read_gpt_neox,
    _write_gpt_neox,
    GPT_NEOX_MODULES,
    "gpt_neox.",
    fused_by_head=True,
    ignored=r"(attention\.(masked_)?bias|rotary_emb\.inv_freq)$",
)


def _read_opt(config: dict) -> DecoderConfig:
    hidden, heads = entries.get(config, "hidden_size", int), entries.get(config, "num_attention_heads", int)
    # Of the published sizes 350m alone has norms behind its layers, and narrower embeddings with projections.
    entries.require(config, "do_layer_norm_before", True, True)
    entries.require(config, "word_embed_proj_dim", hidden, hidden)
    entries.require(config, "_remove_final_layer_norm", False, False)
    entries.require(config, "layer_norm_elementwise_affine", True, True)
    bias = entries.get(config, "enable_bias", bool, True)
    return DecoderConfig(
        family="opt",
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "ffn_dim", int),
        layers=entries.get(config, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads,
        head_dim=entries.head_dim(hidden, heads),
        context=entries.get(config, "max_position_embeddings", int),
        norm="layer",
        norm_epsilon=1e-5,  # config.json has no word for it
        activation=entries.activation(config, "activation_function", "relu"),
        gated=False,
        positions="learned",
        position_offset=2,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        **entries.token_ids(config),
    )


def _write_opt(config: DecoderConfig) -> dict:
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.hidden_size,
        "ffn_dim": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "do_layer_norm_before": True,
        "activation_function": entries.ACTIVATION_NAMES[config.activation],
        "enable_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }


OPT = Family("opt", ("OPTForCausalLM", "OPTModel"), _read_opt, _write_opt, OPT_MODULES, "model.")
