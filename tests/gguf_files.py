"""GGUF files made for tests: a writer, random blocks, and a model as such a file."""

import struct
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from qjax.checkpoints.gguf.blocks import FLOATS, KINDS
from qjax.checkpoints.gguf.names import stored_pieces
from qjax.models.config import LayerKind
from qjax.models.model import Model
from qjax.models.parameters import parameter_shapes
from qjax.models.scalings import LinearScaling, Llama3Scaling, LongScaling, YarnScaling
from tests.conftest import FAMILY_CHANGES, FURTHER_CHANGES, GPT_OSS, MIXTRAL

HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))}
LARGEST = {"Q8_0": 127, "IQ4_NL": 127, "Q6_K": 2_000, "Q2_K": 30, **dict.fromkeys(("Q4_K", "Q5_K"), 500)}  # value, in scales
NUMBERS = {name: number for number, (name, *_) in {**FLOATS, **KINDS}.items()}

GEMMA3_LAYERS = (*[LayerKind(sliding_window=5)] * 5, LayerKind(rope_theta=1e6))
GEMMA3 = FAMILY_CHANGES["gemma3_text"] | {
    "layers": 6,
    "kinds": GEMMA3_LAYERS,
    "logit_softcap": None,
    "attention_scale": 12**-0.5,
}
SMOLLM3 = {"layers": 4, "kinds": (*[LayerKind(rope_theta=1e4)] * 3, LayerKind(positions="none", rope_theta=1e4))}
SCALES = {"embedding_scale": 2.0, "residual_scale": 0.5, "attention_scale": 0.25, "logit_scale": 0.125}
LLAMA_LIKE = {
    **{name: FAMILY_CHANGES[name] for name in ("llama", "qwen2", "gemma", "gpt2")},
    "gemma3": GEMMA3,
    "qwen3": {"family": "qwen3", "qk_norm": "head"},
    "olmo2": FURTHER_CHANGES["olmo2"],
    "smollm3": {"family": "smollm3", "tied": True} | SMOLLM3,
    "granite": {"family": "granite", "mlp_bias": False} | SCALES,
}
LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
LONGROPE = LongScaling((1.0, 1.5, 2.0), (2.0, 4.0, 8.0), 32, 128)
FALCON = FURTHER_CHANGES["falcon"] | {"positions": "rope"}
STABLELM = {"family": "stablelm", "norm": "layer", "rotary_fraction": 0.25, "qkv_bias": True, "gated": True}
FURTHER = {
    "gptneox": FAMILY_CHANGES["gpt_neox"],
    "phi3": {"family": "phi3", "sliding_window": 7},
    "phi3, longrope": {"family": "phi3", "rotary_fraction": 0.75, "rope_scaling": LONGROPE, "tied": True},
    "stablelm": STABLELM,
    "stablelm, parallel": STABLELM | {"qkv_bias": False, "parallel_residual": True, "shared_norm": True},
    "command-r": FURTHER_CHANGES["cohere"] | {"qk_norm": "none"},
    "command-r, 64 layers": FURTHER_CHANGES["cohere"] | {"layers": 64},
    "glm4": {"family": "glm4", "norm_places": "both", "qkv_bias": True, "rope_interleaved": True, "rotary_fraction": 0.5},
    "falcon": FALCON,
    "falcon, two norms": FALCON | {"family": "falcon2", "kv_heads": 2, "shared_norm": False},
    "bloom": FURTHER_CHANGES["bloom"],
}
MIXTURES = {
    "llama, experts": MIXTRAL,
    "qwen3moe": MIXTRAL | {"family": "qwen3_moe", "qk_norm": "head"},
    "gpt-oss": GPT_OSS,
}
ARCHITECTURES = (  # architecture, and how it differs -> changes of `tiny_config`
    LLAMA_LIKE
    | FURTHER
    | MIXTURES
    | {
        "mistral": FAMILY_CHANGES["mistral"] | {"sliding_window": None},
        "llama, scaled": {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "context": 32768, "tied": True, "head_dim": 128},
        "llama, yarn": {"rope_scaling": YarnScaling(4.0, 8, slow_turns=2.0)},
        "llama, linear": {"rope_scaling": LinearScaling(4.0), "qkv_bias": True, "attention_output_bias": True},
    }
)


def file_bytes(
    values: Mapping[str, object], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], version: int = 3
) -> bytes:
    """A file. tensors: by name the type's name, the shape (slowest axis first) and the bytes."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    header += b"".join(_text(name) + _value(value) for name, value in values.items())
    alignment, data = values.get("general.alignment", 32) or 1, b""
    for name, (kind, shape, content) in tensors.items():
        header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], NUMBERS[kind], len(data))
        data += content + bytes(-len(content) % alignment)
    return header + bytes(-len(header) % alignment) + data


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _value(value: object) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value) if value < 2**32 else struct.pack("<IQ", 10, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case np.ndarray():
            code = {"int32": 5, "float32": 6}[value.dtype.name]
            return struct.pack("<IIQ", 9, code, value.size) + value.tobytes()
        case _:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))


def random_rows(name: str, rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """uint8 (rows, bytes) of random blocks whose scales are finite, of a size that gives weights of order 0.1."""
    kind, rng = KINDS[NUMBERS[name]], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, inputs // kind.weights, kind.nbytes), np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(121, 125, blocks.shape[:2])
        return blocks.reshape(rows, -1)
    for at in HALVES.get(name, (0,)):
        size = rng.uniform(0.05, 0.1, (*blocks.shape[:2], 1)) / LARGEST.get(name, 60)
        signed = size * rng.choice([-1, 1], size.shape)
        blocks[..., at : at + 2] = signed.astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def model_values(model: Model, architecture: str = "llama") -> dict[str, object]:
    """The keys of a Llama-like model, or of GPT-2."""
    c = model.config
    own = {
        "context_length": c.context,
        "embedding_length": c.hidden_size,
        "block_count": c.layers,
        "feed_forward_length": c.mlp_size,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_epsilon,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.head_dim,
    }
    if architecture == "gpt2":
        known = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
        own = {key: own[key] for key in known} | {"attention.layer_norm_epsilon": c.norm_epsilon}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in own.items()}


def model_tensors(model: Model, architecture: str = "llama") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A model's float32 parameters as tensors of a file of the architecture, in the order of rows that these have."""
    leaves, found = flatten_dict(model.params, sep="/"), {}
    for name, pieces in stored_pieces(model.config, parameter_shapes(model.config), architecture).items():
        arrays = [np.asarray(leaves[piece.path], np.float32) for piece in pieces]
        arrays = [array.T if pieces[0].path.endswith("kernel") else array for array in arrays]
        if architecture in ("llama", "smollm3", "granite") and (".attn_q." in name or ".attn_k." in name):
            arrays = [rotated(array, model.config.head_dim) for array in arrays]
        array = np.concatenate(arrays)
        array = array + 1 if pieces[0].path.endswith("/offset") else array
        found[name] = ("F32", array.shape, array.tobytes())
    return found


def rotated(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter moves them: its `permute`."""
    heads = len(array) // head_dim
    return array.reshape(heads, 2, head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
