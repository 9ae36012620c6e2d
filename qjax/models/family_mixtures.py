"""Families with a mixture of experts in every layer: Mixtral, Qwen3-MoE."""

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models import rope_entries
from qjax.models.config import DecoderConfig
from qjax.models.family_llama import LLAMA_MODULES, llama_like, read_llama_like, write_llama_like
from qjax.models.family_relatives import QK_NORMS, attention_bias

WITHOUT_MLP = {ours: theirs for ours, theirs in LLAMA_MODULES.items() if "/mlp/" not in ours}


def _mixture(router: str, experts: str, names: tuple[str, str, str]) -> dict[str, str]:
    """Rows of a family's table. names: of gate, up and down within an expert."""
    layers = zip(("gate", "up", "down"), names, strict=True)
    return {"block_{i}/mlp/router": router} | {f"block_{{i}}/mlp/{ours}/{{e}}": f"{experts}.{name}" for ours, name in layers}


MIXTRAL_MODULES = WITHOUT_MLP | _mixture(
    "model.layers.{i}.block_sparse_moe.gate", "model.layers.{i}.block_sparse_moe.experts.{e}", ("w1", "w3", "w2")
)
QWEN_MODULES = (
    WITHOUT_MLP
    | QK_NORMS
    | _mixture("model.layers.{i}.mlp.gate", "model.layers.{i}.mlp.experts.{e}", ("gate_proj", "up_proj", "down_proj"))
)


def experts_of(config: dict, default: int, per_token: int) -> dict[str, int]:
    """The fields of DecoderConfig for how many experts there are; default, per_token: where config.json is silent."""
    count = entries.get(config, "num_local_experts", int, entries.get(config, "num_experts", int, default))
    if count < 1:
        raise QjaxError(f"'num_experts' is {count}; a mixture has at least 1")
    return {"experts": count, "experts_per_token": entries.get(config, "num_experts_per_tok", int, per_token)}


def _read_mixtral(config: dict) -> DecoderConfig:
    return read_llama_like(
        config,
        family="mixtral",
        norm_epsilon=float(entries.get(config, "rms_norm_eps", float, 1e-5)),
        sliding_window=entries.window(config, None),
        **experts_of(config, 8, 2),
        **rope_entries.rope(config, theta=1e6),
    )


def _write_mixtral(config: DecoderConfig) -> dict:
    return write_llama_like(
        config,
        sliding_window=config.sliding_window,
        num_local_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
    )


def _read_qwen3_moe(config: dict) -> DecoderConfig:
    entries.require(config, "decoder_sparse_step", 1, 1)
    entries.require(config, "mlp_only_layers", [], [])
    window = entries.window(config, 4096) if entries.get(config, "use_sliding_window", bool, False) else None
    return read_llama_like(
        config,
        family="qwen3_moe",
        mlp_size=entries.get(config, "moe_intermediate_size", int, 768),
        qk_norm="head",
        normalised_shares=entries.get(config, "norm_topk_prob", bool, False),
        sliding_window=window,  # in every layer, whatever max_window_layers says
        **experts_of(config, 128, 8),
        **attention_bias(config),
    )


def _write_qwen3_moe(config: DecoderConfig) -> dict:
    return write_llama_like(
        config,
        attention_bias=config.qkv_bias,
        moe_intermediate_size=config.mlp_size,
        num_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=config.normalised_shares,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
    )


MIXTRAL = llama_like("mixtral", "Mixtral", _read_mixtral, _write_mixtral, MIXTRAL_MODULES)
QWEN3_MOE = llama_like("qwen3_moe", "Qwen3Moe", _read_qwen3_moe, _write_qwen3_moe, QWEN_MODULES)
