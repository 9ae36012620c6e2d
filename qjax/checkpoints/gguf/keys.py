"""What a GGUF file says of a model: the inverse of `config.py`, proven by reading it again.

What an architecture has no key for (a window of Llama's, another activation) llama.cpp would not do: it is refused.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from qjax.checkpoints.gguf.architectures import FAMILIES
from qjax.checkpoints.gguf.config import (
    AMPLITUDE,
    BETAS,
    ENDS,
    FREQUENCIES,
    LLAMA3,
    LONG,
    ORIGINAL,
    SHORT,
    config_of,
    llama3_factors,
    long_amplitude,
)
from qjax.checkpoints.gguf.container import TensorInfo
from qjax.checkpoints.target import RefusedError
from qjax.models.config import DecoderConfig
from qjax.models.families import read_config, write_config

ARCHITECTURES = {family: name for name, (family, *_) in FAMILIES.items()} | {
    **dict.fromkeys(("mistral", "mixtral"), "llama"),
    "falcon2": "falcon",
}
FIELDS = {  # of DecoderConfig, where a config.json of the family has no entry for a key
    "context_length": "context",
    "embedding_length": "hidden_size",
    "block_count": "layers",
    "feed_forward_length": "mlp_size",
    "expert_feed_forward_length": "mlp_size",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "rope.freq_base": "rope_theta",
}
WANTED = {  # architecture -> what llama.cpp loads alone, though a file could say otherwise: of DecoderConfig
    **{name: {"tied": False} for name in ("gptneox", "olmo2", "stablelm")},
    **{name: {"tied": True} for name in ("gemma", "gemma2")},
    "command-r": {"tied": True, "qkv_bias": False},
    "gpt-oss": {"tied": False, "qkv_bias": True},
}
NORMED = 64  # layers of Command R+: llama.cpp wants norms of queries and keys from there on, and none before
FLOATS = r"(epsilon|freq_base|freq_base_swa|scale|softcapping|factor|beta_fast|beta_slow)$"  # of numbers that are no counts


def architecture_of(config: DecoderConfig) -> str:
    """llama.cpp's name. Raises RefusedError for a family without one here."""
    if config.family not in ARCHITECTURES:
        raise RefusedError(
            f"no GGUF files of the family {config.family} are written; families with such files: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[config.family]


def require_loadable(config: DecoderConfig) -> None:
    """Raises RefusedError for what llama.cpp has no layer for: it counts an architecture's tensors, and stops at others."""
    name = architecture_of(config)
    wanted = WANTED.get(name, {})
    if name == "command-r":
        wanted = wanted | {"qk_norm": "each_head" if config.layers >= NORMED else "none"}
    wrong = [f"{key} {found}, not {value}" for key, value in wanted.items() if (found := getattr(config, key)) != value]
    if wrong:
        said = f"llama.cpp does not load models of the architecture {name} with {', '.join(wrong)}"
        raise RefusedError(f"{said}; export it to another target, or save a folder")


def model_keys(config: DecoderConfig) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """The keys of a model, and the tensors that say how positions are scaled (`config.CONSTANTS`)."""
    name, content = architecture_of(config), write_config(config)
    names = {entry: key for key, entry in FAMILIES[name][2].items()}
    fields = {key: getattr(config, field) for key, field in FIELDS.items() if key in names.values()}
    own = fields | {key: content[entry] for entry, key in names.items() if content.get(entry) is not None}
    if "head_dim" in names:
        own |= {f"attention.{part}_length": config.head_dim for part in ("key", "value")}
    if config.positions == "rope":
        own["rope.dimension_count"] = config.rotary_dim
    scaling, constants = _scaling(config, content)
    own = {key: float(value) if re.search(FLOATS, key) else value for key, value in (own | scaling).items()}
    ids = [config.eos_id, *config.other_eos_ids]
    tokens = {"bos": config.bos_id} | dict(zip(ENDS, (i for i in ids if i is not None), strict=False))
    values = {"general.architecture": name} | {f"{name}.{key}": value for key, value in own.items()}
    values[f"{name}.vocab_size"] = config.vocabulary_size
    return values | {f"tokenizer.ggml.{kind}_token_id": i for kind, i in tokens.items() if i is not None}, constants


def _scaling(config: DecoderConfig, content: Mapping) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Keys and tensors of a scaling that files have words for; none for others."""
    said = content.get("rope_scaling") or {}
    kind = said.get("rope_type", said.get("type"))
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": said["factor"]}, {}
    if kind == "yarn":
        scaling = config.rope_scaling
        keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling.factor, ORIGINAL: scaling.original_context}
        return keys | dict(zip(BETAS, (scaling.fast_turns, scaling.slow_turns), strict=True)), {}
    if kind == "longrope":
        original, context = config.rope_scaling.original_context, config.rope_scaling.context
        keys = {ORIGINAL: original, AMPLITUDE: long_amplitude(context, original)}
        return keys, {LONG: np.float32(said["long_factor"]), SHORT: np.float32(said["short_factor"])}
    if said.items() >= LLAMA3.items():
        factors = llama3_factors(config.rope_theta, config.rotary_dim // 2, said["factor"])
        return {}, {FREQUENCIES: factors.astype(np.float32)}
    return {}, {}


def require_same(
    config: DecoderConfig, values: Mapping[str, object], tensors: Mapping[str, TensorInfo], constants: Mapping[str, np.ndarray]
) -> None:
    """Raises RefusedError where a file with these keys describes another model, as far as float32 tells."""
    back = dataclasses.asdict(read_config(config_of(values, tensors, constants)))
    lost = {key: value for key, value in dataclasses.asdict(config).items() if key != "family" and not _same(value, back[key])}
    if lost:
        said = ", ".join(f"{key} {value}" for key, value in lost.items())
        raise RefusedError(f"a GGUF file of the architecture {values['general.architecture']} cannot say {said}")


def _same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
