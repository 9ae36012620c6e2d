"""Architectures of GGUF files: the family of each, what its keys are called in that family's config.json, and what its files
say by the tensors that they hold. As llama.cpp's converter and its loader have them.
"""

from collections.abc import Collection, Mapping

from qjax.errors import QjaxError

NAMES = {  # key of the architecture -> entry of config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
GPT2_NAMES = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
CAPS = {key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")}
LOCAL = dict.fromkeys(("rope.local.freq_base", "rope.freq_base_swa"), "rope_local_base_freq")
SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
LAYER_NORMS = {key: entry for key, entry in NAMES.items() if "rms" not in key} | {
    "attention.layer_norm_epsilon": "layer_norm_eps"
}
PARALLEL = {"use_parallel_residual": "use_parallel_residual"}
FALCON_NAMES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "rope.freq_base": "rope_theta",
}
BLOOM_NAMES = {
    "context_length": "seq_length",
    "embedding_length": "hidden_size",
    "block_count": "n_layer",
    "feed_forward_length": "intermediate_size",  # which the family has no word for: four times the other
    "attention.head_count": "n_head",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
QWEN_EXPERTS = EXPERTS | {"expert_count": "num_experts"}
EXPERT_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
DEFAULT_ROPE = {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default"}}  # llama.cpp's, not the family's
GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
FAMILIES = {  # architecture -> its model_type, what every file of it means without saying so, and its keys
    "llama": ("llama", DEFAULT_ROPE, NAMES | EXPERTS),  # or Mixtral, by the number of experts
    "qwen2": ("qwen2", {}, NAMES),
    "qwen3": ("qwen3", {}, NAMES),
    "olmo2": ("olmo2", {}, NAMES),
    "smollm3": ("smollm3", {}, NAMES),
    "granite": ("granite", {}, NAMES | SCALES),
    "gemma": ("gemma", GEMMA, NAMES),
    "gemma2": ("gemma2", GEMMA, NAMES | WINDOW | CAPS),
    "gemma3": ("gemma3_text", GEMMA, NAMES | WINDOW | CAPS | LOCAL),
    "gpt2": ("gpt2", {}, GPT2_NAMES),
    "gptneox": ("gpt_neox", {}, LAYER_NORMS | PARALLEL),
    "phi3": ("phi3", {}, NAMES | WINDOW),
    "stablelm": ("stablelm", {}, LAYER_NORMS | PARALLEL),
    "command-r": ("cohere", {}, LAYER_NORMS | {"logit_scale": "logit_scale"}),
    "glm4": ("glm4", {}, NAMES),
    "falcon": ("falcon", {"alibi": False, "bias": False, "parallel_attn": True}, FALCON_NAMES),
    "bloom": ("bloom", {}, BLOOM_NAMES),
    "qwen3moe": ("qwen3_moe", {}, NAMES | QWEN_EXPERTS | EXPERT_SIZE),
    "gpt-oss": ("gpt_oss", DEFAULT_ROPE, NAMES | WINDOW | EXPERTS | EXPERT_SIZE),
}
MIXTURES = ("llama", "qwen3moe", "gpt-oss")
PARTIAL = ("gptneox", "phi3", "stablelm", "glm4")  # whose families rotate a share of a head where a config.json is silent


def told_by_tensors(name: str, tensors: Collection[str], config: Mapping[str, object]) -> dict[str, object]:
    """Entries of config.json that an architecture's files have no keys for, or keys that llama.cpp does not go by."""
    bias, norm = "blk.0.attn_q.bias" in tensors, "blk.0.attn_q_norm.weight" in tensors
    match name:
        case "llama":
            return {"attention_bias": True} if bias else {}
        case "glm4" | "gpt-oss":
            return {"attention_bias": bias}
        case "command-r":
            return {"attention_bias": bias, "use_qk_norm": norm}
        case "stablelm":
            return {"use_qkv_bias": bias, "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors}
        case "falcon":
            two, one_key = "blk.0.attn_norm_2.weight" in tensors, config.get("num_kv_heads") == 1
            return {
                "new_decoder_architecture": two or not one_key,
                "num_ln_in_parallel_attn": 2 if two else 1,
                "multi_query": one_key,
            }
    return {}


def told_by_experts(name: str, own: Mapping[str, object], config: Mapping[str, object]) -> dict[str, object]:
    """Entries of a mixture's config.json that follow from others; {} of a model without experts. own: the architecture's keys.

    Raises QjaxError for numbers of experts that cannot be, and shares that are not what llama.cpp computes.
    """
    if name not in MIXTURES:
        return {}
    keys = ("expert_count", "expert_used_count")
    count, used = (config.get(FAMILIES[name][2][key], 0) for key in keys)
    if name == "llama" and count == used == 0:
        return {}
    if not 1 <= used <= count:
        said = f"{name}.{keys[0]} is {count} and {name}.{keys[1]} {used}"
        raise QjaxError(f"{said}, expected at least 1 expert, of which 1 to all are used; get an intact file")
    if name != "gpt-oss" and own.get("expert_weights_norm", True) is False:
        raise QjaxError(
            f"{name}.expert_weights_norm is False, but llama.cpp makes the shares of this architecture add up to 1; load the "
            "folder that the file was made of"
        )
    if name == "llama":
        return {"model_type": "mixtral"}
    inner = config.get("intermediate_size", 0)
    if name == "gpt-oss":
        return {"intermediate_size": config.get("moe_intermediate_size", inner)}
    size = config.get("moe_intermediate_size") or inner // used
    return {"moe_intermediate_size": size, "intermediate_size": inner or size, "norm_topk_prob": True}
