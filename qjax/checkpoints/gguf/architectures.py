"""Architectures of GGUF files: the family of each, what its keys are called in that family's config.json, and what its files
say by the tensors that they hold. As llama.cpp's converter and its loader have them.
"""

from collections.abc import Collection, Mapping

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
GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
FAMILIES = {  # architecture -> its model_type, what every file of it means without saying so, and its keys
    "llama": ("llama", {}, NAMES),
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
}
PARTIAL = ("gptneox", "phi3", "stablelm", "glm4")  # whose families rotate a share of a head where a config.json is silent


def told_by_tensors(name: str, tensors: Collection[str], config: Mapping[str, object]) -> dict[str, object]:
    """Entries of config.json that an architecture's files have no keys for, or keys that llama.cpp does not go by."""
    bias, norm = "blk.0.attn_q.bias" in tensors, "blk.0.attn_q_norm.weight" in tensors
    match name:
        case "llama":
            return {"attention_bias": True} if bias else {}
        case "glm4":
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
