"""A Llama in float64 numpy, and its rotation by matrices: the definition of QuaRot's offline part."""

import numpy as np
import scipy.linalg

from qjax.models.config import DecoderConfig


def logits(config: DecoderConfig, leaves: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """(time, vocabulary) of one text: RMS norms, rotary positions, grouped heads, silu."""
    x = leaves["embed/tokens/embedding"][tokens]
    for number in range(config.layers):
        block = {path.removeprefix(f"block_{number}/"): leaf for path, leaf in leaves.items()}
        n = _norm(config, x) * block["attention_norm/scale"]
        x = x + _attention(config, block, n)
        m = _norm(config, x) * block["mlp_norm/scale"]
        gate = m @ block["mlp/gate/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (m @ block["mlp/up/kernel"])) @ block["mlp/down/kernel"]
    return (_norm(config, x) * leaves["head/norm/scale"]) @ leaves["head/output/kernel"]


def _norm(config, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)


def _attention(config, block, n):
    time, d = len(n), config.head_dim
    q, k, v = ((n @ block[f"attention/{name}/kernel"]).reshape(time, -1, d).transpose(1, 0, 2) for name in ("q", "k", "v"))
    angles = np.arange(time)[:, None] * config.rope_theta ** (-np.arange(d // 2) / (d // 2))
    cos, sin = np.cos(angles), np.sin(angles)
    q, k = (
        np.concatenate([x[..., : d // 2] * cos - x[..., d // 2 :] * sin, x[..., d // 2 :] * cos + x[..., : d // 2] * sin], -1)
        for x in (q, k)
    )
    k, v = (np.repeat(x, config.heads // config.kv_heads, axis=0) for x in (k, v))
    scores = np.where(np.tri(time, dtype=bool), q @ k.transpose(0, 2, 1) / np.sqrt(d), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    return mixed.transpose(1, 0, 2).reshape(time, -1) @ block["attention/o/kernel"]


def rotated(config: DecoderConfig, leaves: dict[str, np.ndarray], rotation: np.ndarray, head: np.ndarray) -> dict:
    """The leaves of a Llama by an orthogonal matrix of the stream (hidden, hidden) and one of each head's values (dim, dim)."""
    found = dict(leaves)
    for path, leaf in leaves.items():
        layer = path.split("/", 1)[1].removesuffix("/kernel")
        norm = {"q": "attention_norm", "k": "attention_norm", "v": "attention_norm", "gate": "mlp_norm", "up": "mlp_norm"}
        name = layer.split("/")[-1]
        if path.endswith("norm/scale"):
            found[path] = np.ones_like(leaf)
        elif layer == "output" or name in norm:
            gain = leaves["head/norm/scale" if layer == "output" else f"{path.split('/')[0]}/{norm[name]}/scale"]
            found[path] = rotation.T @ np.diag(gain) @ leaf
        else:  # embedding, o, down
            found[path] = leaf @ rotation
        heads = scipy.linalg.block_diag(*[head] * (leaf.shape[-1 if name == "v" else 0] // len(head)))
        if name == "v":
            found[path] = found[path] @ heads
        if name == "o":
            found[path] = heads.T @ found[path]
    return found
