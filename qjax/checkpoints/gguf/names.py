"""What GGUF files call our parameters, and in which order their rows stand.

llama.cpp rotates neighbouring features of a head where Hugging Face's files, and we, rotate i and i + half: for the
architectures of PERMUTED its converter moved the rows of q and k, and they are moved back: whole rows of codes, none of which
is decoded. (Families that rotate neighbours themselves, GLM-4 and Cohere, have their rows as they are.) Where q, k and v are
one tensor they follow each other, whatever order of heads Hugging Face's files have.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qjax.models.config import DecoderConfig
from qjax.models.family import LEAF_NAMES
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


class Piece(NamedTuple):
    """A parameter of ours: path and shape, and the rows of the stored tensor that it is; None for all, in order."""

    path: str
    shape: tuple[int, ...]
    rows: np.ndarray | None


def stored_pieces(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], architecture: str
) -> dict[str, tuple[Piece, ...]]:
    """What a file of the architecture must hold: each tensor by name, and the parameters that it is made of."""
    found = {}
    layers = len({block_of(path) for path in shapes} - {None})
    for theirs, ours in _table(architecture, shapes).items():
        for layer in range(layers) if "{i}" in theirs else [0]:
            mine = [module.replace("{i}", str(layer)) for module in ours]
            for leaf, stored in LEAF_NAMES.items():
                paths = [path for path in (f"{module}/{leaf}" for module in mine) if path in shapes]
                if len(paths) == len(ours):
                    found[f"{theirs.replace('{i}', str(layer))}.{stored}"] = _pieces(paths, shapes, config, architecture)
    return found


def _table(architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """MODULES as an architecture has them."""
    apart = [f"blk.{{i}}.attn_{name}" for name in "qkv"] if architecture in FUSED else ["blk.{i}.attn_qkv"]
    table = {theirs: ours for theirs, ours in MODULES.items() if theirs not in apart}
    if architecture in FUSED_GATE:
        table["blk.{i}.ffn_up"] = table.pop("blk.{i}.ffn_gate") + table["blk.{i}.ffn_up"]
    if architecture == "falcon" and "block_0/mlp_norm/scale" in shapes:  # parallel branches, each with a norm
        table["blk.{i}.attn_norm_2"] = table["blk.{i}.attn_norm"]
        table["blk.{i}.attn_norm"] = table.pop("blk.{i}.ffn_norm")
    return table


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
