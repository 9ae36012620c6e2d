"""A config.json of every family, small."""

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
GPT_NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_parallel_residual": True,
    "rotary_pct": 0.25,
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "do_layer_norm_before": True,
}
GEMMA = LLAMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 16}
GEMMA2 = GEMMA | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def _llama_like(name: str, title: str, **entries) -> dict:
    return LLAMA | {"model_type": name, "architectures": [f"{title}ForCausalLM"]} | entries


QWEN3 = _llama_like("qwen3", "Qwen3", head_dim=16)
OLMO2 = _llama_like("olmo2", "Olmo2")
SMOLLM3 = _llama_like("smollm3", "SmolLM3", no_rope_layers=[1, 0, 1])
GRANITE = _llama_like("granite", "Granite", attention_multiplier=0.25)
STABLELM = _llama_like("stablelm", "StableLm")
PHI3 = _llama_like("phi3", "Phi3")
GLM = _llama_like("glm", "Glm", head_dim=8)
GLM4 = _llama_like("glm4", "Glm4", head_dim=8)
COHERE = _llama_like("cohere", "Cohere")
MIXTRAL = _llama_like("mixtral", "Mixtral", num_local_experts=3)
QWEN3_MOE = _llama_like("qwen3_moe", "Qwen3Moe", num_experts=4, num_experts_per_tok=3, moe_intermediate_size=16)
GPT_OSS = _llama_like("gpt_oss", "GptOss", num_local_experts=4, num_experts_per_tok=3, head_dim=8, sliding_window=16)
GPT_NEO = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
    "window_size": 16,
    "max_position_embeddings": 64,
}
FALCON = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
FALCON2 = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
BLOOM = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "n_layer": 3,
    "n_head": 4,
}
EVERY = {  # family -> a config.json
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "stablelm": STABLELM,
    "phi3": PHI3,
    "glm": GLM,
    "glm4": GLM4,
    "cohere": COHERE,
    "gpt_neo": GPT_NEO,
    "falcon": FALCON,
    "bloom": BLOOM,
    "falcon2": FALCON2,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
}
