"""What a GGUF file says of a model, as the config.json that a family reads.

Architectures are those of llama.cpp with a family here. A key of the architecture that is neither read nor known to change
nothing is an error: what a file asks for is done, or refused.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from qjax.checkpoints.gguf.architectures import FAMILIES, PARTIAL, WINDOW, told_by_experts, told_by_tensors
from qjax.checkpoints.gguf.container import TensorInfo
from qjax.errors import QjaxError
from qjax.files import listing
from qjax.untrusted import quoted

# Layers of the models of 27 billions, whose scores are scaled by hidden / heads; those of others by the size of a head.
LARGEST = {"gemma2": 46, "gemma3": 62}
BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
READ_HERE = ("attention.value_length", "rope.dimension_count", "vocab_size", "rope.scaling.type", "rope.scaling.factor", *BETAS)
ORIGINAL = "rope.scaling.original_context_length"
AMPLITUDE = "rope.scaling.attn_factor"
HARMLESS = (ORIGINAL, "rope.scaling.finetuned", "tensor_data_layout")
CAUSAL = "attention.causal"
FACTORS = (  # keys that at 1 ask for nothing
    *("residual_scale", "embedding_scale", "logit_scale", "expert_weights_scale", AMPLITUDE),
    *("expert_group_count", "expert_group_used_count", "expert_gating_func", "moe_every_n_layers"),
)
FREQUENCIES = "rope_freqs.weight"  # a tensor of factors: Llama 3's scaling, as numbers
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # longrope's
CONSTANTS = (FREQUENCIES, LONG, SHORT)
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ENDS = ("eos", "eot", "eom")


def config_of(
    values: Mapping[str, object], tensors: Mapping[str, TensorInfo], constants: Mapping[str, np.ndarray] = MappingProxyType({})
) -> dict:
    """A config.json. constants: those of CONSTANTS that the file has. Raises QjaxError for an architecture that no family is
    for, and for keys that are unknown, missing or malformed.
    """
    name = values.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise QjaxError(f"the architecture {quoted(name)} is not read; read are {', '.join(FAMILIES)}")
    own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    family, implied, names = FAMILIES[name]
    known = {*names, *READ_HERE, *HARMLESS}
    if str(own.get("rope.scaling.type")) == "yarn" or LONG in constants:
        known.add(AMPLITUDE)
    unknown = [f"{name}.{key} = {quoted(own[key])}" for key in own.keys() - known if _asks(key, own[key])]
    if unknown:
        raise QjaxError(f"keys that are not understood: {listing(sorted(unknown))}; convert the model anew, without them")
    said = {key: _number(f"{name}.{key}", value) for key, value in own.items() if key in names}
    config = implied | {names[key]: value for key, value in said.items() if not (key in WINDOW and value == 0)}
    config |= told_by_tensors(name, tensors, config)
    config |= {"model_type": family, "vocab_size": _vocabulary(tensors), "tie_word_embeddings": "output.weight" not in tensors}
    config |= told_by_experts(name, own, config)
    config |= _rotary(name, own, config, constants)
    if name in LARGEST and {"head_dim", "num_hidden_layers", "hidden_size", "num_attention_heads"} <= config.keys():
        by_heads = config["num_hidden_layers"] == LARGEST[name] and config["num_attention_heads"]
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] / config["num_attention_heads"] if by_heads else config["head_dim"]
        )
    ids = {kind: values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", *ENDS)}
    ends = list(dict.fromkeys(ids[kind] for kind in ENDS if type(ids[kind]) is int))
    return config | {"bos_token_id": ids["bos"], "eos_token_id": ends or None}


def _asks(key: str, value: object) -> bool:
    """Whether a value could ask for anything but the usual."""
    if isinstance(value, np.ndarray | list) or key == CAUSAL:
        return value is not True
    return value not in (0, False, "") and not (key in FACTORS and type(value) is not bool and value == 1)


def _number(key: str, value: object) -> object:
    """A number, of a list that has one for every layer the one of them all."""
    if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
        value = value.flat[0].item()
    if type(value) not in (int, float, bool) or not math.isfinite(value):
        raise QjaxError(f"{key} is {quoted(value)}, expected a number that all layers share")
    return value


def _vocabulary(tensors: Mapping[str, TensorInfo]) -> int:
    info = tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise QjaxError("it has no token_embd.weight, which says the number of tokens: it is no language model")
    return info.shape[0]


def _rotary(name: str, own: Mapping[str, object], config: Mapping[str, object], constants: Mapping) -> dict:
    """rope_scaling, and what must agree with the size of a head."""
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    length, of_values, turned = (_number(f"{name}.{key}", own[key]) if key in own else None for key in keys)
    if of_values not in (None, length):
        raise QjaxError(f"{name}: keys and values of different lengths are not supported")
    found, heads = {}, config.get("num_attention_heads")
    if name in PARTIAL:
        found["partial_rotary_factor"] = 1.0
    if turned is not None and type(heads) is int and heads and type(config.get("hidden_size")) is int:
        whole = config.get("head_dim", config["hidden_size"] // heads)
        if turned != whole and whole:
            found["partial_rotary_factor"] = turned / whole
    kind = str(own.get("rope.scaling.type", "none"))
    if kind == "linear":
        found["rope_scaling"] = {
            "rope_type": "linear",
            "factor": _number("rope.scaling.factor", own.get("rope.scaling.factor")),
        }
    elif kind == "yarn":
        found["rope_scaling"] = _yarn(name, own)
    elif kind != "none":
        raise QjaxError(
            f"{name}.rope.scaling.type is {quoted(kind)}; supported: none, linear, yarn, and the tensor {FREQUENCIES}"
        )
    if FREQUENCIES in constants:
        found["rope_scaling"] = llama3_scaling(constants[FREQUENCIES], config)
    if LONG in constants or SHORT in constants:
        found |= _long_scaling(name, own, config, constants)
    return found


def _yarn(name: str, own: Mapping[str, object]) -> dict:
    """YaRN's settings. gpt-oss was trained without the rounding of the ramp's ends, which files have no key for."""
    if _asks(AMPLITUDE, own.get(AMPLITUDE, 1.0)):
        raise QjaxError(f"{name}.{AMPLITUDE} is {quoted(own[AMPLITUDE])}; with yarn only 1 is supported")
    said = {"factor": "rope.scaling.factor"} | {entry: key for key, entry in BETAS.items() if key in own}
    said |= {"original_max_position_embeddings": ORIGINAL} if ORIGINAL in own else {}
    found = {entry: _number(f"{name}.{key}", own.get(key)) for entry, key in said.items()}
    return {"rope_type": "yarn"} | found | ({"truncate": False} if name == "gpt-oss" else {})


def _long_scaling(name: str, own: Mapping, config: Mapping, constants: Mapping[str, np.ndarray]) -> dict:
    """longrope's entries. Raises QjaxError where a part is missing, or its amplitude is another than the usual."""
    original, context = own.get(ORIGINAL), config.get("max_position_embeddings")
    if not (LONG in constants and SHORT in constants and type(original) is int and type(context) is int and original > 1):
        raise QjaxError(f"{LONG} and {SHORT} belong together, with {name}.{ORIGINAL}; get the file that belongs to the model")
    usual = long_amplitude(context, original)
    amplitude = _number(f"{name}.{AMPLITUDE}", own.get(AMPLITUDE, usual))
    if not math.isclose(amplitude, usual, rel_tol=1e-4):
        raise QjaxError(f"{name}.{AMPLITUDE} is {amplitude}, expected {usual:.6g}")
    short, long = (constants[each].astype(float).tolist() for each in (SHORT, LONG))
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def long_amplitude(context: int, original: int) -> float:
    """Of cosines and sines with longrope."""
    return math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0


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
