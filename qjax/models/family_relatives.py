"""Families that differ from Llama in a few switches: Qwen3, OLMo-2, SmolLM3, Granite, StableLM, Phi-3, GLM-4, Cohere."""

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models import layer_entries as layers
from qjax.models import rope_entries
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.family_llama import LLAMA_MODULES, llama_like, read_llama_like, read_windows, write_llama_like, write_windows

ATTENTION = "model.layers.{i}.self_attn"
QK_NORMS = {
    "block_{i}/attention/q_norm": f"{ATTENTION}.q_norm",
    "block_{i}/attention/k_norm": f"{ATTENTION}.k_norm",
}
OLMO2_MODULES = (
    {ours: theirs for ours, theirs in LLAMA_MODULES.items() if not ours.endswith(("attention_norm", "mlp_norm"))}
    | QK_NORMS
    | {
        "block_{i}/attention_post_norm": "model.layers.{i}.post_attention_layernorm",
        "block_{i}/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
    }
)
STABLELM_MODULES = LLAMA_MODULES | {  # a norm for each head, which we hold as a stack
    f"block_{{i}}/attention/{name}_norm/{{e}}": f"{ATTENTION}.{name}_layernorm.norms.{{e}}" for name in "qk"
}
NO_PADDING = {"pad_token_id": None}  # where transformers thinks of a token that smaller vocabularies have not
FUSED_QKV = {f"block_{{i}}/attention/{name}": f"{ATTENTION}.qkv_proj" for name in "qkv"}
FUSED_GATE = {f"block_{{i}}/mlp/{name}": "model.layers.{i}.mlp.gate_up_proj" for name in ("gate", "up")}
GLM4_MODULES = (
    LLAMA_MODULES
    | FUSED_GATE
    | {
        "block_{i}/attention_post_norm": "model.layers.{i}.post_self_attn_layernorm",
        "block_{i}/mlp_post_norm": "model.layers.{i}.post_mlp_layernorm",
    }
)


def attention_bias(config: dict, default: bool = False) -> dict[str, bool]:
    """The biases of attention, which one entry is about."""
    bias = entries.get(config, "attention_bias", bool, default)
    return {"qkv_bias": bias, "attention_output_bias": bias}


def _read_qwen3(config: dict) -> DecoderConfig:
    return read_llama_like(
        config,
        family="qwen3",
        head_dim=entries.get(config, "head_dim", int, 128),
        qk_norm="head",
        **attention_bias(config),
        **read_windows(config),
    )


def _write_qwen3(config: DecoderConfig) -> dict:
    return write_llama_like(config, attention_bias=config.qkv_bias, **write_windows(config))


def _read_olmo2(config: dict) -> DecoderConfig:
    epsilon = float(entries.get(config, "rms_norm_eps", float, 1e-5))
    return read_llama_like(
        config, family="olmo2", norm_places="after", qk_norm="width", norm_epsilon=epsilon, **attention_bias(config)
    )


def _write_biased(config: DecoderConfig) -> dict:
    return write_llama_like(config, attention_bias=config.qkv_bias)


def _read_smollm3(config: dict) -> DecoderConfig:
    period = entries.get(config, "no_rope_layer_interval", int, 4)
    count = layers.layer_count(config)
    rotates = entries.get(config, "no_rope_layers", list, None)
    if rotates is None and period > 0:
        rotates = [int((number + 1) % period != 0) for number in range(count)]
    if rotates is None or len(rotates) < count or any(each not in (0, 1) for each in rotates):
        raise QjaxError("'no_rope_layers' must be a 1 or a 0 (no rotation) for each layer, 'no_rope_layer_interval' at least 1")
    window = entries.window(config, None) if entries.get(config, "use_sliding_window", bool, False) else None
    sliding = layers.sliding_layers(config, lambda number: not rotates[number])
    rope = rope_entries.rope(config, theta=2e6)
    kinds = [
        LayerKind(sliding_window=window if slides else None, positions="rope" if turns else "none", **rope)
        for slides, turns in zip(sliding, rotates, strict=False)
    ]
    return read_llama_like(
        config,
        family="smollm3",
        kv_heads=entries.get(config, "num_key_value_heads", int, 4),
        mlp_bias=entries.get(config, "mlp_bias", bool, False),
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        **attention_bias(config),
        **layers.by_layer(kinds),
    )


def _write_smollm3(config: DecoderConfig) -> dict:
    window = layers.window_of(config)
    return write_llama_like(
        config,
        attention_bias=config.qkv_bias,
        mlp_bias=config.mlp_bias,
        no_rope_layers=[int(kind.positions == "rope") for kind in config.layer_kinds],
        layer_types=layers.layer_types(config),
        use_sliding_window=window is not None,
        sliding_window=window,
        **NO_PADDING,
    )


def _number(config: dict, key: str, default: float = 1.0) -> float:
    value = float(entries.get(config, key, float, default))
    if not 1e-9 < value < 1e9:
        raise QjaxError(f"{key!r} is {value}, expected a positive number")
    return value


def _read_granite(config: dict) -> DecoderConfig:
    return read_llama_like(
        config,
        family="granite",
        embedding_scale=_number(config, "embedding_multiplier"),
        attention_scale=_number(config, "attention_multiplier"),
        residual_scale=_number(config, "residual_multiplier"),
        logit_scale=1 / _number(config, "logits_scaling"),
        mlp_bias=entries.get(config, "mlp_bias", bool, False),
        **attention_bias(config),
    )


def _write_granite(config: DecoderConfig) -> dict:
    return write_llama_like(
        config,
        attention_bias=config.qkv_bias,
        mlp_bias=config.mlp_bias,
        embedding_multiplier=config.embedding_scale,
        attention_multiplier=config.attention_scale,
        residual_multiplier=config.residual_scale,
        logits_scaling=1 / config.logit_scale,
    )


def _write_layer_normed(config: DecoderConfig, **further) -> dict:
    written = write_llama_like(config, layer_norm_eps=config.norm_epsilon, **further)
    del written["rms_norm_eps"]
    return written


def _read_stablelm(config: dict) -> DecoderConfig:
    parallel = entries.get(config, "use_parallel_residual", bool, False)
    return read_llama_like(
        config,
        family="stablelm",
        norm="layer",
        norm_epsilon=float(entries.get(config, "layer_norm_eps", float, 1e-5)),
        qkv_bias=entries.get(config, "use_qkv_bias", bool, False),
        qk_norm="each_head" if entries.get(config, "qk_layernorm", bool, False) else "none",
        parallel_residual=parallel,
        shared_norm=parallel,
        **rope_entries.partial_rope(config, share=0.25),
    )


def _write_stablelm(config: DecoderConfig) -> dict:
    return _write_layer_normed(
        config,
        use_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm != "none",
        use_parallel_residual=config.parallel_residual,
        partial_rotary_factor=config.rotary_fraction,
    )


def _read_phi3(config: dict) -> DecoderConfig:
    epsilon = float(entries.get(config, "rms_norm_eps", float, 1e-5))
    window = entries.window(config, None)
    rope = rope_entries.partial_rope(config, share=1.0, long_names=("su", "yarn"))
    return read_llama_like(config, family="phi3", norm_epsilon=epsilon, sliding_window=window, **rope)


def _write_phi3(config: DecoderConfig) -> dict:
    written = write_llama_like(config, sliding_window=config.sliding_window, partial_rotary_factor=config.rotary_fraction)
    written |= NO_PADDING
    if (scaling := written["rope_scaling"]) is not None:  # in the form that every version of transformers reads
        written[rope_entries.ORIGINAL] = scaling.pop(rope_entries.ORIGINAL, config.context)
        written["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    return written


def _read_glm(config: dict, family: str, norm_places: str) -> DecoderConfig:
    return read_llama_like(
        config,
        family=family,
        norm_places=norm_places,
        head_dim=entries.get(config, "head_dim", int, 128),
        norm_epsilon=float(entries.get(config, "rms_norm_eps", float, 1.5625e-7)),
        qkv_bias=entries.get(config, "attention_bias", bool, True),
        rope_interleaved=True,
        **rope_entries.partial_rope(config, share=0.5),
    )


def _write_glm(config: DecoderConfig) -> dict:
    written = write_llama_like(config, attention_bias=config.qkv_bias, partial_rotary_factor=config.rotary_fraction)
    return written | NO_PADDING


def _read_cohere(config: dict) -> DecoderConfig:
    return read_llama_like(
        config,
        family="cohere",
        norm="layer_scale",
        norm_epsilon=float(entries.get(config, "layer_norm_eps", float, 1e-5)),
        parallel_residual=True,
        shared_norm=True,
        rope_interleaved=True,
        qk_norm="each_head" if entries.get(config, "use_qk_norm", bool, False) else "none",
        logit_scale=_number(config, "logit_scale", 0.0625),
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        **attention_bias(config),
    )


def _write_cohere(config: DecoderConfig) -> dict:
    return _write_layer_normed(
        config,
        use_qk_norm=config.qk_norm != "none",
        logit_scale=config.logit_scale,
        attention_bias=config.qkv_bias,
    )


QWEN3 = llama_like("qwen3", "Qwen3", _read_qwen3, _write_qwen3, LLAMA_MODULES | QK_NORMS)
OLMO2 = llama_like("olmo2", "Olmo2", _read_olmo2, _write_biased, OLMO2_MODULES)
SMOLLM3 = llama_like("smollm3", "SmolLM3", _read_smollm3, _write_smollm3)
GRANITE = llama_like("granite", "Granite", _read_granite, _write_granite)
STABLELM = llama_like("stablelm", "StableLm", _read_stablelm, _write_stablelm, STABLELM_MODULES)
PHI3 = llama_like("phi3", "Phi3", _read_phi3, _write_phi3, LLAMA_MODULES | FUSED_QKV | FUSED_GATE)
GLM = llama_like("glm", "Glm", lambda config: _read_glm(config, "glm", "before"), _write_glm, LLAMA_MODULES | FUSED_GATE)
GLM4 = llama_like("glm4", "Glm4", lambda config: _read_glm(config, "glm4", "both"), _write_glm, GLM4_MODULES)
COHERE = llama_like("cohere", "Cohere", _read_cohere, _write_cohere, LLAMA_MODULES | QK_NORMS)
