"""What GGUF files call our parameters, and in which order their rows stand.

llama.cpp rotates neighbouring features of a head where Hugging Face's files, and we, rotate i and i + half: for the
architectures of PERMUTED its converter moved the rows of q and k, and they are moved back: whole rows of codes, none of which
is decoded.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from qjax.models.config import DecoderConfig
from qjax.models.family import LEAF_NAMES
from qjax.models.walk import block_of

MODULES = {  # their module -> ours, of one tensor side by side along the output axis; {i} the layer
    "token_embd": ("embed/tokens",),
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
FUSED = ("gpt2",)  # families whose files hold q, k and v as one tensor
PERMUTED = ("llama", "smollm3", "granite")  # architectures


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
    for theirs, ours in _modules(shapes, config.family in FUSED):
        for leaf, stored in LEAF_NAMES.items():
            paths = [path for path in (f"{module}/{leaf}" for module in ours) if path in shapes]
            if len(paths) == len(ours):
                found[f"{theirs}.{stored}"] = _pieces(paths, shapes, config, architecture)
    return found


def _modules(shapes: Mapping[str, tuple[int, ...]], fused: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    layers = len({block_of(path) for path in shapes} - {None})
    apart = {module for modules in MODULES.values() if len(modules) > 1 for module in modules}
    for theirs, ours in MODULES.items():
        if (len(ours) > 1) == fused or not apart & set(ours):
            for layer in range(layers) if "{i}" in theirs else [0]:
                yield theirs.replace("{i}", str(layer)), tuple(module.replace("{i}", str(layer)) for module in ours)


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
