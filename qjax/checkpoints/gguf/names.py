"""What GGUF files call our parameters, and in which order their rows stand.

llama.cpp rotates neighbouring features of a head where Hugging Face's files, and we, rotate i and i + half: for the
architectures of PERMUTED its converter moved the rows of q and k, and they are moved back: whole rows of codes, none of which
is decoded. (Families that rotate neighbours themselves, GLM-4 and Cohere, have their rows as they are.) Where q, k and v are
one tensor they follow each other, whatever order of heads Hugging Face's files have.

The experts of a mixture's layer are one tensor, (experts, out, in), a stack as it is here; files of Mixtral from before April
2024 have one for each expert, `blk.0.ffn_gate.3.weight`.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from qjax.models.config import DecoderConfig
from qjax.models.family import LEAF_NAMES
from qjax.models.stacks import member
from qjax.models.walk import block_of

MODULES = {  # their module -> ours, of one tensor side by side along the output axis; {i} the layer
    "token_embd": ("embed/tokens",),
    "token_embd_norm": ("embed/norm",),
    "position_embd": ("embed/positions",),
    "blk.{i}.attn_norm": ("block_{i}/attention_norm",),
    "blk.{i}.attn_q": ("block_{i}/attention/q",),
    "blk.{i}.attn_k": ("block_{i}/attention/k",),
    "blk.{i}.attn_v": ("block_{i}/attention/v",),
    "blk.{i}.attn_qkv": ("block_{i}/attention/q", "block_{i}/attention/k", "block_{i}/attention/v"),
    "blk.{i}.attn_output": ("block_{i}/attention/o",),
    "blk.{i}.attn_q_norm": ("block_{i}/attention/q_norm",),
    "blk.{i}.attn_k_norm": ("block_{i}/attention/k_norm",),
    "blk.{i}.post_attention_norm": ("block_{i}/attention_post_norm",),
    "blk.{i}.ffn_norm": ("block_{i}/mlp_norm",),
    "blk.{i}.post_ffw_norm": ("block_{i}/mlp_post_norm",),
    "blk.{i}.ffn_gate": ("block_{i}/mlp/gate",),
    "blk.{i}.ffn_up": ("block_{i}/mlp/up",),
    "blk.{i}.ffn_down": ("block_{i}/mlp/down",),
    "output_norm": ("head/norm",),
    "output": ("head/output",),
}
FUSED = ("gpt2", "gptneox", "falcon", "bloom", "phi3")  # architectures whose files hold q, k and v as one tensor
FUSED_GATE = ("phi3", "glm4")  # and gate and up
PERMUTED = ("llama", "smollm3", "granite")
STORED_NAMES = LEAF_NAMES | {"sinks": "weight"}  # which have a module of their own
ONE_BY_ONE = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")


class Piece(NamedTuple):
    """A parameter of ours: path and shape, and the rows of the stored tensor that it is; None for all, in order."""

    path: str
    shape: tuple[int, ...]
    rows: np.ndarray | None

    @property
    def transposed(self) -> bool:
        """Whether files hold it (out, in)."""
        return self.path.endswith(("/kernel", "/matrix"))


def stored_pieces(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], architecture: str
) -> dict[str, tuple[Piece, ...]]:
    """What a file of the architecture must hold: each tensor by name, and the parameters that it is made of.

    shapes: of our parameters, or of single experts where a file holds these.
    """
    found = {}
    layers = len({block_of(path) for path in shapes} - {None})
    for theirs, ours in _table(config, architecture, shapes).items():
        for layer in range(layers) if "{i}" in theirs else [0]:
            mine = [module.replace("{i}", str(layer)) for module in ours]
            for leaf, stored in STORED_NAMES.items():
                paths = [path for path in (f"{module}/{leaf}" for module in mine) if path in shapes]
                if len(paths) == len(ours):
                    found[f"{theirs.replace('{i}', str(layer))}.{stored}"] = _pieces(paths, shapes, config, architecture)
    return found


def experts_apart(tensors: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The stacks of which a file holds the members one by one, and how many each has."""
    if not any(map(ONE_BY_ONE.fullmatch, tensors)):
        return {}
    return {path: shape[0] for path, shape in shapes.items() if path.endswith("/kernel") and len(shape) == 3}


def stored_shape(parts: tuple[Piece, ...]) -> tuple[int, ...]:
    """Of the tensor that they are, slowest axis first."""
    first = parts[0]
    if first.transposed:
        *stack, inputs, _ = first.shape
        return (*stack, sum(part.shape[-1] for part in parts), inputs)
    return first.shape if len(first.shape) > 1 else (sum(part.shape[0] for part in parts),)


def _table(config: DecoderConfig, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """MODULES as an architecture has them."""
    apart = [f"blk.{{i}}.attn_{name}" for name in "qkv"] if architecture in FUSED else ["blk.{i}.attn_qkv"]
    table = {theirs: ours for theirs, ours in MODULES.items() if theirs not in apart}
    if architecture in FUSED_GATE:
        table["blk.{i}.ffn_up"] = table.pop("blk.{i}.ffn_gate") + table["blk.{i}.ffn_up"]
    if architecture == "falcon" and "block_0/mlp_norm/scale" in shapes:  # parallel branches, each with a norm
        table["blk.{i}.attn_norm_2"] = table["blk.{i}.attn_norm"]
        table["blk.{i}.attn_norm"] = table.pop("blk.{i}.ffn_norm")
    if architecture == "gpt-oss":
        table["blk.{i}.post_attention_norm"] = table.pop("blk.{i}.ffn_norm")
        table["blk.{i}.attn_sinks"] = ("block_{i}/attention",)
    if config.experts:
        table |= _experts(config.experts, table, member("block_0/mlp/gate/kernel", 0) in shapes)
    return table


def _experts(count: int, table: dict[str, tuple[str, ...]], one_by_one: bool) -> dict[str, tuple[str, ...]]:
    """A mixture's rows; those of an MLP are taken out of the table."""
    found = {"blk.{i}.ffn_gate_inp": ("block_{i}/mlp/router",)}
    for name in ("gate", "up", "down"):
        (ours,) = table.pop(f"blk.{{i}}.ffn_{name}")
        each = {f"blk.{{i}}.ffn_{name}.{number}": (f"{ours}/{number}",) for number in range(count)}
        found |= each if one_by_one else {f"blk.{{i}}.ffn_{name}_exps": (ours,)}
    return found


def _pieces(paths: list[str], shapes: Mapping, config: DecoderConfig, architecture: str) -> tuple[Piece, ...]:
    pieces, start = [], 0
    for path in paths:
        rows, count = None, shapes[path][-1]
        if len(paths) > 1:
            rows = np.arange(start, start + count)
            start += count
        if architecture in PERMUTED and path.split("/")[-2] in ("q", "k"):
            order = unpermuted(count, count // config.head_dim)
            rows = order if rows is None else rows[order]
        pieces.append(Piece(path, shapes[path], rows))
    return tuple(pieces)


def unpermuted(count: int, heads: int) -> np.ndarray:
    """Where each row of q or k stands in the file: of a head's rows 0, half, 1, half + 1, ..."""
    return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
