"""Gemma, Gemma 2 and the text models of Gemma 3: norms by 1 + offset, scaled embeddings; later ones have norms on both sides
of each branch and layers of two kinds, of which one sees a window alone.
"""

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models import layer_entries as layers
from qjax.models import rope_entries
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.family import Family
from qjax.models.family_llama import LLAMA_MODULES, ROTARY, llama_like, read_llama_like, write_llama_like

GEMMA2_MODULES = LLAMA_MODULES | {
    "block_{i}/attention_post_norm": "model.layers.{i}.post_attention_layernorm",
    "block_{i}/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "block_{i}/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
GEMMA3_MODULES = GEMMA2_MODULES | {
    "block_{i}/attention/q_norm": "model.layers.{i}.self_attn.q_norm",
    "block_{i}/attention/k_norm": "model.layers.{i}.self_attn.k_norm",
}
LOCAL_THETA = 10000.0
GLOBAL_THETA = 1e6


def _read_gemma_like(config: dict, **fields) -> DecoderConfig:
    entries.require(config, "use_bidirectional_attention", False, False)
    bias = entries.get(config, "attention_bias", bool, False)
    return read_llama_like(
        config,
        kv_heads=entries.get(config, "num_key_value_heads", int),
        head_dim=entries.get(config, "head_dim", int, 256),
        norm="rms_offset",
        activation=_activation(config),
        scaled_embeddings=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        **fields,
    )


def _activation(config: dict) -> str:
    """Gemma's first files say "gelu" and mean its tanh form. transformers 4 reads hidden_activation, and the tanh form where
    it is missing; transformers 5 reads hidden_act.
    """
    former, later = (
        None if config.get(key) is None else entries.activation(config, key, "") for key in ("hidden_act", "hidden_activation")
    )
    if former == "gelu" and later is None:
        raise QjaxError(
            "'hidden_act' is 'gelu', which versions of transformers read differently for this family; add "
            "'hidden_activation': 'gelu_pytorch_tanh', what Gemma was trained with, or 'gelu'"
        )
    if former not in (None, "gelu", later) and later is not None:
        raise QjaxError(
            f"'hidden_act' {config['hidden_act']!r} and 'hidden_activation' {config['hidden_activation']!r} disagree"
        )
    return later or former or "gelu_tanh"


def _write_gemma(config: DecoderConfig, **further) -> dict:
    written = write_llama_like(config, attention_bias=config.qkv_bias)
    return written | {"hidden_activation": written["hidden_act"]} | further


def _scores(config: dict) -> dict[str, object]:
    """What Gemma 2 and 3 do to scores and logits."""
    scalar = float(entries.get(config, "query_pre_attn_scalar", float, 256))
    if not 1e-6 < scalar < 1e12:
        raise QjaxError(f"'query_pre_attn_scalar' is {scalar}, expected a positive number as the size of a head")
    return {"norm_places": "both", "attention_scale": scalar**-0.5}


def _write_later(config: DecoderConfig, **further) -> dict:
    scalar = config.attention_scale**-2 if config.attention_scale else config.head_dim
    whole = round(scalar)
    return _write_gemma(
        config,
        layer_types=layers.layer_types(config),
        sliding_window=layers.window_of(config),
        query_pre_attn_scalar=whole if whole**-0.5 == config.attention_scale else scalar,
        final_logit_softcapping=config.logit_softcap,
        attn_logit_softcapping=config.attention_softcap,
        **further,
    )


def _read_gemma2(config: dict) -> DecoderConfig:
    sliding = layers.sliding_layers(config, lambda number: number % 2 == 0)
    window, rope = entries.window(config, 4096), rope_entries.rope(config)
    return _read_gemma_like(
        config,
        family="gemma2",
        logit_softcap=_softcap(config, "final_logit_softcapping", 30.0),
        attention_softcap=_softcap(config, "attn_logit_softcapping", 50.0),
        **_scores(config),
        **layers.by_layer([LayerKind(sliding_window=window if each else None, **rope) for each in sliding]),
    )


def _softcap(config: dict, key: str, default: float | None) -> float | None:
    """A soft cap; null is none, unlike a missing entry."""
    cap = entries.get(config, key, float, None) if key in config else default
    return None if cap is None else float(cap)


def _read_gemma3(config: dict) -> DecoderConfig:
    entries.require(config, "attn_logit_softcapping", None, None)
    period = entries.get(config, "sliding_window_pattern", int, 6)
    if period < 1:
        raise QjaxError(f"'sliding_window_pattern' must be at least 1, got {period}")
    sliding = layers.sliding_layers(config, lambda number: (number + 1) % period != 0)
    full = LayerKind(**rope_entries.rope_of_kind(config, layers.FULL, "rope_theta", theta=GLOBAL_THETA))
    local = rope_entries.rope_of_kind(config, layers.SLIDING, "rope_local_base_freq", theta=LOCAL_THETA)
    local = LayerKind(sliding_window=entries.window(config, 4096), **local)
    return _read_gemma_like(
        config,
        family="gemma3_text",
        qk_norm="head",
        logit_softcap=_softcap(config, "final_logit_softcapping", None),
        **_scores(config),
        **layers.by_layer([local if each else full for each in sliding]),
    )


def _write_gemma3(config: DecoderConfig) -> dict:
    full, local = (
        next((kind for kind in config.layer_kinds if (kind.sliding_window is not None) == sliding), LayerKind(rope_theta=theta))
        for sliding, theta in ((False, GLOBAL_THETA), (True, LOCAL_THETA))
    )
    return _write_later(config, **rope_entries.write_rope(full), rope_local_base_freq=local.rope_theta)


GEMMA = llama_like("gemma", "Gemma", lambda config: _read_gemma_like(config, family="gemma"), _write_gemma)
GEMMA2 = llama_like("gemma2", "Gemma2", _read_gemma2, _write_later, GEMMA2_MODULES)
GEMMA3 = Family(
    "gemma3_text",
    ("Gemma3ForCausalLM", "Gemma3TextModel"),
    _read_gemma3,
    _write_gemma3,
    GEMMA3_MODULES,
    "model.",
    ignored=ROTARY,
)
