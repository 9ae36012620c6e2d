"""What a GGUF file says of a model, as the config.json that a family reads.

Architectures are those of llama.cpp with a family here. A key of the architecture that is neither read nor known to change
nothing is an error: what a file asks for is done, or refused.
"""

import math
from collections.abc import Mapping

import numpy as np

from qjax.checkpoints.gguf.container import TensorInfo
from qjax.errors import QjaxError
from qjax.files import listing
from qjax.untrusted import quoted

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
}
# Layers of the models of 27 billions, whose scores are scaled by hidden / heads; those of others by the size of a head.
LARGEST = {"gemma2": 46, "gemma3": 62}
READ_HERE = ("attention.value_length", "rope.dimension_count", "vocab_size", "rope.scaling.type", "rope.scaling.factor")
HARMLESS = ("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout", "rope.scaling.attn_factor")
FREQUENCIES = "rope_freqs.weight"  # a tensor of factors: Llama 3's scaling, as numbers
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ENDS = ("eos", "eot", "eom")


def config_of(values: Mapping[str, object], tensors: Mapping[str, TensorInfo], factors: np.ndarray | None) -> dict:
    """A config.json. factors: the tensor `rope_freqs.weight`. Raises QjaxError for an architecture that no family is for, and
    for keys that are unknown, missing or malformed.
    """
    name = values.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise QjaxError(f"the architecture {quoted(name)} is not read; read are {', '.join(FAMILIES)}")
    own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    family, implied, names = FAMILIES[name]
    unknown = [f"{name}.{key} = {quoted(own[key])}" for key in own.keys() - {*names, *READ_HERE, *HARMLESS} if _says(own[key])]
    if unknown:
        raise QjaxError(f"keys that are not understood: {listing(sorted(unknown))}; convert the model anew, without them")
    config = implied | {names[key]: _number(f"{name}.{key}", value) for key, value in own.items() if key in names}
    config |= {"model_type": family, "vocab_size": _vocabulary(tensors), "tie_word_embeddings": "output.weight" not in tensors}
    config |= _rotary(name, own, config, factors)
    if name in LARGEST and {"head_dim", "num_hidden_layers", "hidden_size", "num_attention_heads"} <= config.keys():
        by_heads = config["num_hidden_layers"] == LARGEST[name] and config["num_attention_heads"]
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] / config["num_attention_heads"] if by_heads else config["head_dim"]
        )
    if f"{NAME_OF_BIAS}.bias" in tensors and family == "llama":
        config["attention_bias"] = True
    ids = {kind: values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", *ENDS)}
    ends = list(dict.fromkeys(ids[kind] for kind in ENDS if type(ids[kind]) is int))
    return config | {"bos_token_id": ids["bos"], "eos_token_id": ends or None}


NAME_OF_BIAS = "blk.0.attn_q"


def _says(value: object) -> bool:
    """Whether a value could ask for anything."""
    return isinstance(value, np.ndarray | list) or value not in (0, False, "", 1.0)


def _number(key: str, value: object) -> object:
    """A number, of a list that has one for every layer the one of them all."""
    if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
        value = value.flat[0].item()
    if type(value) not in (int, float) or not math.isfinite(value):
        raise QjaxError(f"{key} is {quoted(value)}, expected a number that all layers share")
    return value


def _vocabulary(tensors: Mapping[str, TensorInfo]) -> int:
    info = tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise QjaxError("it has no token_embd.weight, which says the number of tokens: it is no language model")
    return info.shape[0]


def _rotary(name: str, own: Mapping[str, object], config: Mapping[str, object], factors: np.ndarray | None) -> dict:
    """rope_scaling, and what must agree with the size of a head."""
    if own.get("attention.value_length", own.get("attention.key_length")) != own.get("attention.key_length"):
        raise QjaxError(f"{name}: keys and values of different lengths are not supported")
    found, heads = {}, config.get("num_attention_heads")
    turned = own.get("rope.dimension_count")
    if turned is not None and type(heads) is int and heads and type(config.get("hidden_size")) is int:
        whole = config.get("head_dim", config["hidden_size"] // heads)
        if turned != whole and whole:
            found["partial_rotary_factor"] = _number(f"{name}.rope.dimension_count", turned) / whole
    kind = own.get("rope.scaling.type", "none")
    if kind == "linear":
        found["rope_scaling"] = {
            "rope_type": "linear",
            "factor": _number("rope.scaling.factor", own.get("rope.scaling.factor")),
        }
    elif kind != "none":
        raise QjaxError(f"{name}.rope.scaling.type is {quoted(kind)}; supported: none, linear, and the tensor {FREQUENCIES}")
    if factors is not None:
        found["rope_scaling"] = llama3_scaling(factors, config)
    return found


def llama3_scaling(factors: np.ndarray, config: Mapping[str, object]) -> dict:
    """Llama 3's scaling whose factors these are. Raises QjaxError where there is none with its usual settings."""
    factor = float(factors.max(initial=0.0))
    theta = float(config.get("rope_theta", 10000.0))
    if not factor >= 1 or not np.allclose(factors, llama3_factors(theta, factors.size, factor), rtol=1e-4):
        raise QjaxError(f"{FREQUENCIES} is not Llama 3's scaling of 8192 positions, the one that is read")
    return {**LLAMA3, "factor": factor}


def llama3_factors(theta: float, half: int, factor: float) -> np.ndarray:
    """What the wavelengths of `half` pairs of features are divided by."""
    turns = 8192 * max(theta, 1.0) ** (-np.arange(half) / half) / (2 * np.pi)
    keep = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    return 1 / (keep + (1 - keep) / factor)
