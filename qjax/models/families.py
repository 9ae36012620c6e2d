"""Model families as data: how a family's config.json reads as a DecoderConfig, and what its checkpoints call our parameters.

A further family is one entry of FAMILIES: a function from config.json to DecoderConfig, its inverse, and a table of module
names. What a file asks for and the decoder cannot do is an error, never ignored.
The names are those of Hugging Face's transformers library.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models.config import DecoderConfig

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One architecture. `name` is config.json's model_type.

    architectures: config.json's class names, the first is the one we write.
    read: config.json -> DecoderConfig; write: its inverse.
    modules: our module path -> theirs, {i} the layer. Modules with the same name there are stored as one tensor, side by
        side along the output axis in the table's order.
    prefix: starts all names but the head's; some checkpoints leave it out.
    kernels_in_out: the blocks' kernels are stored (in, out), as ours, rather than (out, in).
    ignored: regular expression of stored tensors that are constants, not weights.
    """

    name: str
    architectures: tuple[str, ...]
    read: Callable[[dict], DecoderConfig]
    write: Callable[[DecoderConfig], dict]
    modules: Mapping[str, str]
    prefix: str
    kernels_in_out: bool = False
    ignored: str = r"$^"


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint and the parameters of ours that it holds, (path, shape), side by side on the last axis."""

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        first = self.parts[0][1]
        shape = (*first[:-1], sum(shape[-1] for _, shape in self.parts))
        return shape[::-1] if self.transposed else shape


def stored_tensors(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[StoredTensor]:
    """What a checkpoint of the family must hold for parameters of these shapes (`parameters.parameter_shapes`)."""
    parts, transposed = collections.defaultdict(list), {}
    for layer, ours, theirs in _modules(family, shapes):
        for leaf, stored in LEAF_NAMES.items():
            path, name = f"{ours}/{leaf}", f"{theirs}.{stored}"
            if path in shapes:
                parts[name].append((path, shapes[path]))
                transposed[name] = leaf == "kernel" and not (family.kernels_in_out and layer is not None)
    return [StoredTensor(name, tuple(held), transposed[name]) for name, held in parts.items()]


def _modules(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int | None, str, str]]:
    """(layer or None, our module, their module) for every row of the table and every layer."""
    layers = sum(1 for path in shapes if re.fullmatch(r"block_\d+/attention_norm/scale", path))
    for ours, theirs in family.modules.items():
        for layer in range(layers) if "{i}" in ours else [None]:
            yield layer, ours.replace("{i}", str(layer)), theirs.replace("{i}", str(layer))


def head_name(family: Family) -> str:
    """The stored name of the head's weight, which a tied checkpoint may repeat."""
    return family.modules["head/output"] + ".weight"


def find_family(config: dict) -> Family:
    """The family that a config.json describes. Raises QjaxError that lists what is supported."""
    name, architectures = config.get("model_type"), config.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    by_class = {each.lower(): family for family in FAMILIES.values() for each in family.architectures}
    found = {by_class.get(str(each).lower()) for each in architectures}
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if name is None and len(found) == 1:
        family = found.pop()
    elif architectures and family not in found:
        family = None
    if family is None:
        raise QjaxError(
            f"unknown architecture: model_type {name!r}, architectures {architectures}; "
            f"supported: {', '.join(f'{each.name} ({each.architectures[0]})' for each in FAMILIES.values())}"
        )
    return family


def read_config(config: dict) -> DecoderConfig:
    """The DecoderConfig of a config.json. Raises QjaxError for what is missing, malformed or cannot be done."""
    family = find_family(config)
    if config.get("quantization_config"):
        method = entries.get(config["quantization_config"], "quant_method", str, "an unnamed method")
        raise QjaxError(f"the weights are already quantized ({method}); give the checkpoint they were made from")
    return family.read(config)


def write_config(config: DecoderConfig) -> dict:
    """A config.json that reads back as `config`. Raises QjaxError when its family has no words for some field."""
    if config.family not in FAMILIES:
        raise QjaxError(f"unknown family {config.family!r}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    written = {"architectures": [family.architectures[0]], "model_type": family.name, **family.write(config)}
    back = dataclasses.asdict(family.read(written))
    lost = {key: value for key, value in dataclasses.asdict(config).items() if back[key] != value}
    if lost:
        raise QjaxError(f"a config.json of the family {family.name} cannot say {lost}")
    return written


# Llama and its relatives


def _read_llama_like(config: dict, **fields) -> DecoderConfig:
    hidden, heads = entries.get(config, "hidden_size", int), entries.get(config, "num_attention_heads", int)
    head_dim = entries.get(config, "head_dim", int, None)
    return DecoderConfig(
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
        **fields,
    )


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
    if window is not None and set(entries.get(config, "layer_types", list, [])) - {"sliding_attention"}:
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


# GPT-2


def _read_gpt2(config: dict) -> DecoderConfig:
    entries.require(config, "scale_attn_weights", True, True)
    entries.require(config, "scale_attn_by_inverse_layer_idx", False, False)
    entries.require(config, "add_cross_attention", False, False)
    # reorder_and_upcast_attn is about precision alone: the decoder's softmax is in float32 in any case.
    hidden, heads = entries.get(config, "n_embd", int), entries.get(config, "n_head", int)
    return DecoderConfig(
        family="gpt2",
        vocabulary_size=entries.get(config, "vocab_size", int),
        hidden_size=hidden,
        mlp_size=entries.get(config, "n_inner", int, 4 * hidden),
        layers=entries.get(config, "n_layer", int),
        heads=heads,
        kv_heads=heads,
        head_dim=entries.head_dim(hidden, heads),
        context=entries.get(config, "n_positions", int),
        norm="layer",
        norm_epsilon=float(entries.get(config, "layer_norm_epsilon", float, 1e-5)),
        activation=entries.activation(config, "activation_function", "gelu_new"),
        gated=False,
        positions="learned",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied=entries.get(config, "tie_word_embeddings", bool, True),
        **entries.token_ids(config),
    )


def _write_gpt2(config: DecoderConfig) -> dict:
    return {
        "vocab_size": config.vocabulary_size,
        "n_embd": config.hidden_size,
        "n_inner": config.mlp_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": entries.ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }


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
GPT2_MODULES = {
    "embed/tokens": "transformer.wte",
    "embed/positions": "transformer.wpe",
    "block_{i}/attention_norm": "transformer.h.{i}.ln_1",
    "block_{i}/attention/q": "transformer.h.{i}.attn.c_attn",
    "block_{i}/attention/k": "transformer.h.{i}.attn.c_attn",
    "block_{i}/attention/v": "transformer.h.{i}.attn.c_attn",
    "block_{i}/attention/o": "transformer.h.{i}.attn.c_proj",
    "block_{i}/mlp_norm": "transformer.h.{i}.ln_2",
    "block_{i}/mlp/up": "transformer.h.{i}.mlp.c_fc",
    "block_{i}/mlp/down": "transformer.h.{i}.mlp.c_proj",
    "head/norm": "transformer.ln_f",
    "head/output": "lm_head",
}


def _llama_like(name: str, title: str, read: Callable, write: Callable) -> Family:
    classes = (f"{title}ForCausalLM", f"{title}Model")
    return Family(name, classes, read, write, LLAMA_MODULES, "model.", ignored=r"rotary_emb\.inv_freq$")


FAMILIES = {
    family.name: family
    for family in (
        _llama_like("llama", "Llama", _read_llama, _write_llama),
        _llama_like("mistral", "Mistral", _read_mistral, _write_mistral),
        _llama_like("qwen2", "Qwen2", _read_qwen2, _write_qwen2),
        Family(
            "gpt2",
            ("GPT2LMHeadModel", "GPT2Model"),
            _read_gpt2,
            _write_gpt2,
            GPT2_MODULES,
            "transformer.",
            kernels_in_out=True,
            ignored=r"h\.\d+\.attn\.(masked_)?bias$",
        ),
    )
}
