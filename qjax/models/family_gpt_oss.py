"""gpt-oss (OpenAI 2025, arXiv 2508.10925): a mixture in every layer, biases everywhere, and heads with a sink.

Layers see a window and everything by turns, rotary positions are stretched by YaRN. Files hold all experts of a layer as one
tensor, (experts, in, out), gate and up by turns along its outputs; in MXFP4 as blocks (`checkpoints/mxfp4.py`).
"""

from qjax.models import config_entries as entries
from qjax.models import layer_entries as layers
from qjax.models import rope_entries
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.family_llama import llama_like, read_llama_like, write_llama_like
from qjax.models.family_mixtures import WITHOUT_MLP, experts_of
from qjax.models.mlp import LIMIT

MODULES = WITHOUT_MLP | {
    "block_{i}/attention": "model.layers.{i}.self_attn",  # which has the sinks
    "block_{i}/mlp/router": "model.layers.{i}.mlp.router",
    "block_{i}/mlp/gate": "model.layers.{i}.mlp.experts.gate_up_proj",
    "block_{i}/mlp/up": "model.layers.{i}.mlp.experts.gate_up_proj",
    "block_{i}/mlp/down": "model.layers.{i}.mlp.experts.down_proj",
}
THETA, WINDOW = 150000.0, 128
YARN = {  # where config.json is silent
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    rope_entries.ORIGINAL: 4096,
}


def _read(config: dict) -> DecoderConfig:
    entries.require(config, "hidden_act", "silu", "silu")
    entries.require(config, "swiglu_limit", LIMIT, LIMIT)
    experts = experts_of(config, 128, 4)
    entries.require(config, "experts_per_token", None, experts["experts_per_token"])
    said = any(config.get(name) for name in ("rope_parameters", "rope_scaling"))
    rope = rope_entries.rope(config if said else {**config, "rope_scaling": YARN}, theta=THETA)
    sliding = layers.sliding_layers(config, lambda number: number % 2 == 0)
    window = entries.window(config, WINDOW)
    bias = entries.get(config, "attention_bias", bool, True)
    return read_llama_like(
        config,
        family="gpt_oss",
        kv_heads=entries.get(config, "num_key_value_heads", int, 8),
        head_dim=entries.get(config, "head_dim", int, 64),
        norm_epsilon=float(entries.get(config, "rms_norm_eps", float, 1e-5)),
        activation="swiglu_oai",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        attention_sinks=True,
        **experts,
        **layers.by_layer([LayerKind(sliding_window=window if each else None, **rope) for each in sliding]),
    )


def _write(config: DecoderConfig) -> dict:
    written = write_llama_like(
        config,
        attention_bias=config.qkv_bias,
        sliding_window=layers.window_of(config) or WINDOW,
        layer_types=layers.layer_types(config),
        num_local_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
        swiglu_limit=LIMIT,
    )
    return written | {"rope_scaling": written["rope_scaling"] or {"rope_type": "default"}}


GPT_OSS = llama_like("gpt_oss", "GptOss", _read, _write, MODULES)
