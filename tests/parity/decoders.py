"""A decoder of the transformers library and ours, from the same folder, both in float32: what the tests of families share.

The measure is the largest difference of any logit divided by the largest logit. In float64 terms both libraries are about
equally far from the truth (1e-6 root mean square here, a few times that at worst), so more agreement cannot be asked for.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from qjax.checkpoints.huggingface import load_huggingface, save_huggingface
from qjax.evaluate.generate import generate
from qjax.models.model import Model, apply

TOLERANCE = 1e-5
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 48**-0.5,  # logits of order one, as a trained model has them
}
TOKENS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 40))


def logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Of a model of theirs."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def difference(ours, reference: np.ndarray) -> float:
    return np.max(np.abs(np.asarray(ours) - reference)) / np.max(np.abs(reference))


def reload(folder: Path, way: str = "eager"):
    """A folder as a model of theirs. way: how it attends."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, attn_implementation=way, dtype=torch.float32).eval()


def assert_same_weights(a, b) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_tokens(model: Model, peer, prompts: tuple[np.ndarray, ...] = (TOKENS[0, :12], TOKENS[1, :5])) -> None:
    """Sixteen of greedy generation with cached keys and values; ours in one batch of unequal lengths."""
    found = generate(model, [prompt.astype(np.int32) for prompt in prompts], 16).tokens
    for prompt, tokens in zip(prompts, found, strict=True):
        ids, ends = torch.tensor(prompt[None]), {"eos_token_id": None, "pad_token_id": 0}
        seen = torch.ones_like(ids)  # else a token that stands for padding is taken for it
        expected = peer.generate(ids, attention_mask=seen, max_new_tokens=16, do_sample=False, **ends)
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()


def assert_same_decoder(name: str, peer, folder: Path, way: str = "eager") -> None:
    """Equal logits, also of what we write, whose weights are the same, and equal tokens."""
    reference = logits(peer)
    peer.save_pretrained(folder / "theirs")
    model = load_huggingface(folder / "theirs")
    error = difference(apply(model, jnp.asarray(TOKENS)), reference)
    print(f"{name}: {error:.2e}")
    assert error < TOLERANCE
    save_huggingface(folder / "ours", model)
    back = reload(folder / "ours", way)
    assert_same_weights(back, peer)
    assert difference(logits(back), reference) < TOLERANCE / 10
    assert_same_tokens(model, peer)
