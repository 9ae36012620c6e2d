"""Falcon and BLOOM: q, k and v stored as one tensor, layer norms, no gate, and ALiBi (Press et al. 2021, arXiv 2108.12409).

Falcon's blocks call their norms one way where attention and MLP each have one of their own beside one another, and another way
elsewhere: FALCON2 is that variant.
"""

from collections.abc import Callable

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models import rope_entries
from qjax.models.config import DecoderConfig
from qjax.models.family import Family

BLOCK = "transformer.h.{i}"
FALCON_MODULES = {
    "embed/tokens": "transformer.word_embeddings",
    "block_{i}/attention_norm": f"{BLOCK}.input_layernorm",
    "block_{i}/attention/q": f"{BLOCK}.self_attention.query_key_value",
    "block_{i}/attention/k": f"{BLOCK}.self_attention.query_key_value",
    "block_{i}/attention/v": f"{BLOCK}.self_attention.query_key_value",
    "block_{i}/attention/o": f"{BLOCK}.self_attention.dense",
    "block_{i}/mlp_norm": f"{BLOCK}.post_attention_layernorm",
    "block_{i}/mlp/up": f"{BLOCK}.mlp.dense_h_to_4h",
    "block_{i}/mlp/down": f"{BLOCK}.mlp.dense_4h_to_h",
    "head/norm": "transformer.ln_f",
    "head/output": "lm_head",
}
BLOOM_MODULES = FALCON_MODULES | {"embed/norm": "transformer.word_embeddings_layernorm"}
FALCON2_MODULES = FALCON_MODULES | {
    "block_{i}/attention_norm": f"{BLOCK}.ln_attn",
    "block_{i}/mlp_norm": f"{BLOCK}.ln_mlp",
}


def _read_falcon(config: dict) -> DecoderConfig:
    hidden = entries.get(config, "hidden_size", int)
    heads = entries.get(config, "num_attention_heads", int)
    new = entries.get(config, "new_decoder_architecture", bool, False)
    parallel = new or entries.get(config, "parallel_attn", bool, True)
    norms = entries.get(config, "num_ln_in_parallel_attn", int, 2 if new else 1)
    if norms not in ((1, 2) if new else (1,)):
        raise QjaxError(f"'num_ln_in_parallel_attn' is {norms}; supported: 1, and 2 with 'new_decoder_architecture'")
    many = new or not entries.get(config, "multi_query", bool, True)
    bias = entries.get(config, "bias", bool, False)
    rope = rope_entries.rope(config)
    return DecoderConfig(
        family="falcon2" if norms == 2 else "falcon",
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "ffn_hidden_size", int, 4 * hidden),
        layers=entries.get(config, "num_hidden_layers", int),
        heads=heads,
        kv_heads=(entries.get(config, "num_kv_heads", int, heads) if new else heads) if many else 1,
        head_dim=entries.head_dim(hidden, heads),
        context=rope_entries.context_of({"max_position_embeddings": 2048} | config, rope["rope_scaling"]),
        norm="layer",
        norm_epsilon=float(entries.get(config, "layer_norm_epsilon", float, 1e-5)),
        activation=entries.activation(config, "activation", "gelu"),
        gated=False,
        positions="alibi_scaled" if entries.get(config, "alibi", bool, False) else "rope",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        parallel_residual=parallel,
        shared_norm=parallel and norms == 1,
        **rope,
        **entries.token_ids(config),
    )


def _write_falcon(config: DecoderConfig) -> dict:
    new = config.family == "falcon2" or 1 < config.kv_heads < config.heads
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if config.family == "falcon2" else 1 if new else None,
        "multi_query": config.kv_heads == 1,
        "parallel_attn": config.parallel_residual,
        "max_position_embeddings": rope_entries.written_context(config),
        "layer_norm_epsilon": config.norm_epsilon,
        "activation": entries.ACTIVATION_NAMES[config.activation],
        "alibi": config.positions == "alibi_scaled",
        "bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
        **rope_entries.write_rope(config),
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }


def _read_bloom(config: dict) -> DecoderConfig:
    entries.require(config, "apply_residual_connection_post_layernorm", False, False)
    hidden = entries.get(config, "n_embed", int, None) or entries.get(config, "hidden_size", int)
    heads = entries.get(config, "n_head", int, None) or entries.get(config, "num_attention_heads", int)
    return DecoderConfig(
        family="bloom",
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=4 * hidden,
        layers=entries.get(config, "n_layer", int, None) or entries.get(config, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads,
        head_dim=entries.head_dim(hidden, heads),
        context=entries.get(config, "seq_length", int, 2048),  # what it was trained on; ALiBi itself has no end
        norm="layer",
        norm_epsilon=float(entries.get(config, "layer_norm_epsilon", float, 1e-5)),
        activation="gelu_tanh",
        gated=False,
        positions="alibi",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        embedding_norm=True,
        **entries.token_ids(config),
    )


def _write_bloom(config: DecoderConfig) -> dict:
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "seq_length": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }


def _fused(name: str, classes: tuple[str, ...], read: Callable, write: Callable, modules: dict[str, str], **more) -> Family:
    ignored = r"(rotary_emb\.inv_freq|attention\.(masked_)?bias)$"
    return Family(name, classes, read, write, modules, "transformer.", fused_by_head=True, ignored=ignored, **more)


FALCON = _fused("falcon", ("FalconForCausalLM", "FalconModel"), _read_falcon, _write_falcon, FALCON_MODULES)
FALCON2 = _fused("falcon2", FALCON.architectures, _read_falcon, _write_falcon, FALCON2_MODULES, model_type="falcon")
BLOOM = _fused("bloom", ("BloomForCausalLM", "BloomModel"), _read_bloom, _write_bloom, BLOOM_MODULES)
