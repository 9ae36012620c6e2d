"""Llama and its relatives: Mistral, Qwen2."""

from collections.abc import Callable, Mapping

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models import layer_entries as layers
from qjax.models import rope_entries
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
ROTARY = r"rotary_emb\.inv_freq$"  # tensors of older files that are constants


def read_llama_like(config: dict, **fields) -> DecoderConfig:
    """The configuration as Llama's files say it, with fields of DecoderConfig that the family has another way."""
    hidden, heads = entries.get(config, "hidden_size", int), entries.get(config, "num_attention_heads", int)
    head_dim = entries.get(config, "head_dim", int, None)
    rope = {} if "rope_theta" in fields else rope_entries.rope(config)
    shared = dict(
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "intermediate_size", int),
        layers=entries.get(config, "num_hidden_layers", int),
        heads=heads,
        kv_heads=entries.get(config, "num_key_value_heads", int, heads),
        head_dim=entries.head_dim(hidden, heads) if head_dim is None else head_dim,
        context=rope_entries.context_of(config, (rope | fields)["rope_scaling"]),
        norm_epsilon=float(entries.get(config, "rms_norm_eps", float, 1e-6)),
        activation=entries.activation(config, "hidden_act", "silu"),
        tied=entries.get(config, "tie_word_embeddings", bool, False),
        **entries.token_ids(config),
    )
    return DecoderConfig(**shared | rope | fields)


def write_llama_like(config: DecoderConfig, **further) -> dict:
    """The inverse of `read_llama_like`, with further entries."""
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": rope_entries.written_context(config),
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": entries.ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tied,
        **rope_entries.write_rope(config),
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        **further,
    }


def _read_llama(config: dict) -> DecoderConfig:
    bias = entries.get(config, "attention_bias", bool, False)
    return read_llama_like(
        config,
        family="llama",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=entries.get(config, "mlp_bias", bool, False),
    )


def _write_llama(config: DecoderConfig) -> dict:
    return write_llama_like(config, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _read_mistral(config: dict) -> DecoderConfig:
    window = entries.window(config, None)
    if window is not None and set(map(str, entries.get(config, "layer_types", list, []))) - {"sliding_attention"}:
        raise QjaxError("'layer_types' beside 'sliding_window': the family has its window in every layer")
    return read_llama_like(config, family="mistral", sliding_window=window)


def _write_mistral(config: DecoderConfig) -> dict:
    return write_llama_like(config, sliding_window=config.sliding_window)


def _read_qwen2(config: dict) -> DecoderConfig:
    return read_llama_like(config, family="qwen2", qkv_bias=True, **read_windows(config))


def read_windows(config: dict) -> dict[str, object]:
    """The fields of DecoderConfig for Qwen's windows, which layers from max_window_layers on may have."""
    window = entries.window(config, 4096) if entries.get(config, "use_sliding_window", bool, False) else None
    first = entries.get(config, "max_window_layers", int, 28)
    return layers.with_windows(config, window, lambda number: number >= first)


def write_windows(config: DecoderConfig) -> dict:
    """The inverse of `read_windows`."""
    window = layers.window_of(config)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.layers if window is None else 0,
        **({"layer_types": layers.layer_types(config)} if config.kinds else {}),
    }


def llama_like(name: str, title: str, read: Callable, write: Callable, modules: Mapping[str, str] = LLAMA_MODULES) -> Family:
    """A family whose names of tensors, and of classes, are as Llama's."""
    return Family(name, (f"{title}ForCausalLM", f"{title}Model"), read, write, modules, "model.", ignored=ROTARY)


LLAMA = llama_like("llama", "Llama", _read_llama, _write_llama)
MISTRAL = llama_like("mistral", "Mistral", _read_mistral, _write_mistral)
QWEN2 = llama_like("qwen2", "Qwen2", _read_qwen2, lambda config: write_llama_like(config, **write_windows(config)))
