"""Llama and its relatives: Mistral, Qwen2, Gemma."""

from collections.abc import Callable

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models.config import DecoderConfig
from qjax.models.family import Family

LLAMA_MODULES = {
    "embed/tokens": "model.embed_tokens",
    "block_{i}/attention_norm": "model.layers.{i}.input_layernorm",
    "block_{i}/attention/q": "model.layers.{i}.self_attn.q_proj",
    "block_{i}/attention/k": "model.layers.{i}.self_attn.k_proj",
    "block_{i}/attention/v": "model.layers.{i}.self_attn.v_proj",
    "block_{i}/attention/o": "model.layers.{i}.self_attn.o_proj",
    "block_{i}/mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "block_{i}/mlp/gate": "model.layers.{i}.mlp.gate_proj",
    "block_{i}/mlp/up": "model.layers.{i}.mlp.up_proj",
    "block_{i}/mlp/down": "model.layers.{i}.mlp.down_proj",
    "head/norm": "model.norm",
    "head/output": "lm_head",
}


def _read_llama_like(config: dict, **fields) -> DecoderConfig:
    hidden, heads = entries.get(config, "hidden_size", int), entries.get(config, "num_attention_heads", int)
    head_dim = entries.get(config, "head_dim", int, None)
    shared = dict(
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "intermediate_size", int),
        layers=entries.get(config, "num_hidden_layers", int),
        heads=heads,
        kv_heads=entries.get(config, "num_key_value_heads", int, heads),
        head_dim=entries.head_dim(hidden, heads) if head_dim is None else head_dim,
        context=entries.get(config, "max_position_embeddings", int),
        norm_epsilon=float(entries.get(config, "rms_norm_eps", float, 1e-6)),
        activation=entries.activation(config, "hidden_act", "silu"),
        tied=entries.get(config, "tie_word_embeddings", bool, False),
        **entries.rope(config),
        **entries.token_ids(config),
    )
    return DecoderConfig(**shared | fields)


def _write_llama_like(config: DecoderConfig, **further) -> dict:
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": entries.ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tied,
        **entries.write_rope(config),
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        **further,
    }


def _read_llama(config: dict) -> DecoderConfig:
    bias = entries.get(config, "attention_bias", bool, False)
    return _read_llama_like(
        config,
        family="llama",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=entries.get(config, "mlp_bias", bool, False),
    )


def _write_llama(config: DecoderConfig) -> dict:
    return _write_llama_like(config, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _read_mistral(config: dict) -> DecoderConfig:
    window = entries.window(config, None)
    if window is not None and set(map(str, entries.get(config, "layer_types", list, []))) - {"sliding_attention"}:
        raise QjaxError("'layer_types' beside 'sliding_window': the family has its window in every layer")
    return _read_llama_like(config, family="mistral", sliding_window=window)


def _write_mistral(config: DecoderConfig) -> dict:
    return _write_llama_like(config, sliding_window=config.sliding_window)


def _read_qwen2(config: dict) -> DecoderConfig:
    window = entries.window(config, 4096) if entries.get(config, "use_sliding_window", bool, False) else None
    window = entries.window_of_all_layers(config, window, first=entries.get(config, "max_window_layers", int, 28))
    return _read_llama_like(config, family="qwen2", qkv_bias=True, sliding_window=window)


def _write_qwen2(config: DecoderConfig) -> dict:
    sliding = config.sliding_window is not None
    return _write_llama_like(
        config,
        use_sliding_window=sliding,
        sliding_window=config.sliding_window,
        max_window_layers=0 if sliding else config.layers,
    )


def _read_gemma(config: dict) -> DecoderConfig:
    entries.require(config, "use_bidirectional_attention", False, False)
    bias = entries.get(config, "attention_bias", bool, False)
    return _read_llama_like(
        config,
        family="gemma",
        kv_heads=entries.get(config, "num_key_value_heads", int),
        head_dim=entries.get(config, "head_dim", int, 256),
        norm="rms_offset",
        activation=_gemma_activation(config),
        scaled_embeddings=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
    )


def _gemma_activation(config: dict) -> str:
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


def _write_gemma(config: DecoderConfig) -> dict:
    written = _write_llama_like(config, attention_bias=config.qkv_bias)
    return written | {"hidden_activation": written["hidden_act"]}


def _llama_like(name: str, title: str, read: Callable, write: Callable) -> Family:
    classes = (f"{title}ForCausalLM", f"{title}Model")
    return Family(name, classes, read, write, LLAMA_MODULES, "model.", ignored=r"rotary_emb\.inv_freq$")


LLAMA = _llama_like("llama", "Llama", _read_llama, _write_llama)
MISTRAL = _llama_like("mistral", "Mistral", _read_mistral, _write_mistral)
QWEN2 = _llama_like("qwen2", "Qwen2", _read_qwen2, _write_qwen2)
GEMMA = _llama_like("gemma", "Gemma", _read_gemma, _write_gemma)
