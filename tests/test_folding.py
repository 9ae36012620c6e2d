"""qjax.models.folding: what the decoder computes does not change when scales are folded, for every family and every fold."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.maps import Divide
from qjax.models.families import FAMILIES
from qjax.models.folding import FOLDS, fold_map, fold_members, folds
from qjax.models.model import apply
from qjax.models.parameters import flatten, unflatten
from qjax.models.stacks import apart, stack_of, together, with_biases
from tests.conftest import (
    BLOOM,
    COHERE,
    FALCON,
    GEMMA,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    GPT_OSS,
    MIXTRAL,
    OLMO2,
    OPT,
    SMOLLM3,
    tiny_config,
)
from tests.random_weights import small_model

GEMMA2 = GEMMA3 | {"family": "gemma2", "kv_heads": 4, "qk_norm": "none", "attention_softcap": 8.0}
CASES = {
    "llama, grouped heads": ({}, {"attention/q", "mlp/gate", "mlp/down"}),
    "llama, all heads": ({"kv_heads": 4}, {"attention/q", "attention/o", "mlp/gate", "mlp/down"}),
    "llama, biases": (
        {"kv_heads": 4, "qkv_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"attention/q", "attention/o", "mlp/gate", "mlp/down"},
    ),
    "llama, relu, one head of keys": ({"kv_heads": 1, "activation": "relu"}, {"attention/q", "mlp/gate", "mlp/down"}),
    "mistral, window, wide heads": (
        {"family": "mistral", "sliding_window": 4, "kv_heads": 4, "head_dim": 12},
        {"attention/q", "attention/o", "mlp/gate", "mlp/down"},
    ),
    "qwen2": ({"family": "qwen2", "qkv_bias": True, "tied": True}, {"attention/q", "mlp/gate", "mlp/down"}),
    "gpt2": (GPT2, {"attention/q", "attention/o", "mlp/up"}),
    "gpt2, relu": (GPT2 | {"activation": "relu"}, {"attention/q", "attention/o", "mlp/up", "mlp/down"}),
    "gpt2, silu": (GPT2 | {"activation": "silu"}, {"attention/q", "attention/o", "mlp/up"}),
    "gpt_neox": (GPT_NEOX, {"attention/q", "attention/o", "mlp/up"}),
    "gpt_neox, one after the other": (GPT_NEOX | {"parallel_residual": False}, {"attention/q", "attention/o", "mlp/up"}),
    "gpt_neox, relu, no biases": (
        GPT_NEOX | {"activation": "relu", "qkv_bias": False, "attention_output_bias": False, "rotary_fraction": 1.0},
        {"attention/q", "attention/o", "mlp/up", "mlp/down"},
    ),
    "opt": (OPT, {"attention/q", "attention/o", "mlp/up", "mlp/down"}),
    "gemma": (GEMMA, {"attention/q", "mlp/gate", "mlp/down"}),
    "gemma, all heads, biases": (
        GEMMA | {"kv_heads": 4, "qkv_bias": True, "attention_output_bias": True},
        {"attention/q", "attention/o", "mlp/gate", "mlp/down"},
    ),
    "gemma2": (GEMMA2, {"attention/q", "attention/o", "mlp/gate", "mlp/down"}),
    "gemma3": (GEMMA3, {"attention/q", "mlp/gate", "mlp/down"}),
    "olmo2": (OLMO2 | {"kv_heads": 4}, {"attention/o", "mlp/down"}),
    "cohere": (COHERE, {"mlp/down"}),
    "bloom": (BLOOM, {"attention/q", "attention/o", "mlp/up"}),
    "falcon": (FALCON, set()),
    "smollm3": (SMOLLM3, {"attention/q", "mlp/gate", "mlp/down"}),
    "mixtral": (MIXTRAL, {"attention/q", "mlp/down"}),
    "mixtral, biases": (MIXTRAL | {"mlp_bias": True}, {"attention/q", "mlp/down"}),
    "gpt_oss": (GPT_OSS | {"kv_heads": 4}, {"attention/q", "attention/o"}),
    "opt, gelu": (OPT | {"activation": "gelu"}, {"attention/q", "attention/o", "mlp/up"}),
}
LIKE_OTHERS = {  # in all that folds ask for
    *("qwen3", "qwen3_moe", "granite", "stablelm", "phi3", "glm", "glm4", "gpt_neo", "falcon2"),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))


def test_no_family_is_forgotten():
    assert {changes.get("family", "llama") for changes, _ in CASES.values()} == set(FAMILIES) - LIKE_OTHERS


def folded(model, draw):
    """The model with scales by draw(inputs) folded wherever they can be, and the paths of what changed in a block."""
    leaves, moved = flatten(model.params), set()
    for number in range(model.config.layers):
        prefix = f"block_{number}/"
        block = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
        stacks = with_biases({path: len(leaf) for path, leaf in block.items() if leaf.ndim == 3}, block)
        block = apart(block, stacks)
        for fold in itertools.chain(*(fold_members(each, stacks) for each in folds(model.config))):
            scale = jnp.asarray(draw(len(block[f"{fold.layers[0]}/kernel"])), jnp.float32)
            changed = fold_map(block, fold, Divide(scale))
            assert all(changed[path].dtype == jnp.float32 for path in changed)
            assert {f"{layer}/kernel" for layer in fold.layers} < changed.keys() <= block.keys()
            moved |= set(map(stack_of, changed))
            block |= changed
        leaves |= {prefix + path: leaf for path, leaf in together(block, stacks).items()}
    return model._replace(params=unflatten(leaves)), moved


@pytest.mark.parametrize("name", CASES)
def test_logits_are_unchanged(name):
    """By powers of two, by which float32 multiplies and divides exactly, to the last bit: nothing but rounding is left over."""
    changes, expected = CASES[name]
    config = tiny_config(vocabulary_size=61, **changes)
    assert {fold.layers[0] for fold in folds(config)} == expected
    generator = np.random.default_rng(1)
    model = small_model(config)
    exact = np.asarray(apply(model, TOKENS))
    changed, moved = folded(model, lambda size: 10.0 ** generator.uniform(-1, 1, size))
    np.testing.assert_allclose(apply(changed, TOKENS), exact, atol=1e-5 * np.max(np.abs(exact)))
    for path in moved:
        assert not np.allclose(flatten(changed.params)[f"block_0/{path}"], flatten(model.params)[f"block_0/{path}"]), path
    leaves = flatten(model.params)  # 1 + offset, of norms that have one, is rounded: of few digits it is not
    few = {path: jnp.round(leaf * 1024) / 1024 for path, leaf in leaves.items() if path.endswith("offset")}
    model = model._replace(params=unflatten(leaves | few))
    changed, _ = folded(model, lambda size: 2.0 ** generator.integers(-3, 4, size))
    np.testing.assert_array_equal(apply(changed, TOKENS), apply(model, TOKENS))


@pytest.mark.parametrize(
    ("source", "changes"),
    [("attention/v", {}), ("mlp/up", GPT2 | {"activation": "gelu_tanh"}), ("mlp/up", GPT2 | {"activation": "silu"})],
)
def test_what_the_table_forbids_would_change_them(source, changes):
    """Heads that share values have no room for o's scale; nothing passes through gelu or silu."""
    config = tiny_config(vocabulary_size=61, **changes)
    (forbidden,) = (fold for fold in FOLDS if fold.source == source)
    assert forbidden not in folds(config)
    model = small_model(config)
    block = flatten(model.params["block_0"])
    inputs, outputs = len(block[f"{forbidden.layers[0]}/kernel"]), block[f"{source}/kernel"].shape[1]
    if inputs != outputs:
        return  # it could not even be written down
    scale = jnp.asarray(10.0 ** np.random.default_rng(1).uniform(-1, 1, inputs), jnp.float32)
    params = model.params | {"block_0": unflatten(block | fold_map(block, forbidden, Divide(scale)))}
    exact = np.asarray(apply(model, TOKENS))
    assert np.max(np.abs(np.asarray(apply(model._replace(params=params), TOKENS)) - exact)) > 1e-2


def test_half_precision_leaves_become_float32():
    model = small_model(tiny_config(vocabulary_size=61), dtype=jnp.bfloat16)
    block = flatten(model.params["block_0"])
    changed = fold_map(block, folds(model.config)[0], Divide(jnp.full(32, 3.0)))
    assert {leaf.dtype for leaf in changed.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(changed["attention_norm/scale"], np.asarray(block["attention_norm/scale"], np.float32) / 3)
