"""qjax.models.decoder: what the parity tests against other libraries do not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from qjax.models import attention
from qjax.models.attention import Attention
from qjax.models.decoder import MLP, Block, Embed, Head
from qjax.models.norms import make_norm
from qjax.models.rope import cos_sin, fixed_cos_sin, rope_frequencies, rotate
from qjax.models.scalings import LinearScaling, Llama3Scaling

from .conftest import FAMILY_CHANGES, tiny_config
from .random_weights import small_model

HALF = 64


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [None, LinearScaling(3.0), Llama3Scaling(8.0, 1.0, 4.0, 8192)])
def test_rotary_frequencies_are_the_nearest_float32(theta, scaling):
    """To the last bit, whatever the backend: one bit of frequency is a visible angle at position 10^5."""
    expected = np.array([theta ** (-i / HALF) for i in range(HALF)])
    if isinstance(scaling, LinearScaling):
        expected /= 3
    if scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192):
        keep = np.clip((8192 * expected / (2 * np.pi) - 1) / 3, 0, 1)
        expected *= keep + (1 - keep) / 8
    found = rope_frequencies(tiny_config(head_dim=2 * HALF, rope_theta=theta, rope_scaling=scaling))
    assert not isinstance(found, jax.Array)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2**-24)


def test_tables_of_a_program_are_those_it_would_compute():
    config = tiny_config()
    fixed = jax.jit(lambda: fixed_cos_sin(config, 40))
    for found, expected in zip(fixed(), jax.jit(cos_sin, static_argnums=0)(config, jnp.arange(40)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert " cos " not in str(fixed.trace().jaxpr)


def test_positions_rotate_the_first_features_of_a_head_alone():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 16)), jnp.float32)
    config = tiny_config(head_dim=16, rotary_fraction=0.5)
    frequencies = rope_frequencies(config)
    np.testing.assert_array_equal(frequencies, rope_frequencies(tiny_config(head_dim=8)))
    angles = jnp.arange(5)[:, None] * frequencies
    rotated = rotate(x, jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_array_equal(rotated[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(rotated[..., :8], rotate(x[..., :8], jnp.cos(angles), jnp.sin(angles)))


def test_learned_positions_begin_behind_their_offset():
    config = tiny_config(**FAMILY_CHANGES["opt"])
    params, tokens = small_model(config).params["embed"], jnp.arange(12).reshape(2, 6)
    expected = params["tokens"]["embedding"][tokens] + params["positions"]["embedding"][2:8]
    np.testing.assert_array_equal(Embed(config).apply({"params": params}, tokens), expected)
    assert params["positions"]["embedding"].shape == (config.context + 2, 32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_offset_norm_is_the_norm_by_one_more(dtype):
    offset = jnp.asarray(np.random.default_rng(0).standard_normal(32), jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 32)), dtype)
    norms = [make_norm(tiny_config(norm=name), dtype, "norm") for name in ("rms_offset", "rms")]
    got = norms[0].apply({"params": {"offset": offset}}, x)
    expected = norms[1].apply({"params": {"scale": 1 + offset.astype(jnp.float32)}}, x)
    assert got.dtype == expected.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), rtol=float(jnp.finfo(dtype).eps))


def test_scaled_embeddings_do_not_scale_the_tied_head():
    plain, scaled = (tiny_config(tied=True, scaled_embeddings=on) for on in (False, True))
    params, tokens = small_model(plain).params, jnp.arange(12).reshape(2, 6)
    once, more = (Embed(config).apply({"params": params["embed"]}, tokens) for config in (plain, scaled))
    np.testing.assert_allclose(more, once * 32**0.5, rtol=1e-6)
    table = params["embed"]["tokens"]["embedding"]
    heads = [Head(config).apply({"params": params["head"]}, once, table) for config in (plain, scaled)]
    np.testing.assert_array_equal(*heads)


def test_a_parallel_residual_is_the_sum_of_both_branches():
    """x + attention(norm(x)) + mlp(norm(x)): what either branch adds does not depend on the other's weights."""
    model = small_model(tiny_config(**FAMILY_CHANGES["gpt_neox"]))
    params, block = model.params["block_0"], Block(model.config)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 32)), jnp.float32)
    silent = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("attention", "mlp")}
    added = [block.apply({"params": params | {name: silent[name]}}, x) - x for name in silent]
    np.testing.assert_allclose(block.apply({"params": params}, x), x + sum(added), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 70])
def test_pieces_of_a_long_sequence_see_what_the_whole_sees(window, monkeypatch):
    """Queries go piece by piece, with the keys up to the last of the piece; the last piece is shorter."""
    config = tiny_config(context=256, sliding_window=window)
    model = small_model(config)
    size, keys, attend = attention.SMALLEST_PIECE, [], attention.attend
    shape = (2, 3 * size - 5, config.hidden_size)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    monkeypatch.setattr(attention, "attend", lambda q, k, *rest: keys.append(k.shape[2]) or attend(q, k, *rest))
    pieces = Block(config).apply({"params": model.params["block_0"]}, x)
    monkeypatch.setattr(attention, "QUERY_PIECES", 1)
    whole = Block(config).apply({"params": model.params["block_0"]}, x)
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    assert keys == [size, 2 * size, shape[1], shape[1]]


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def float64_parameters(module, *args):
    """Random parameters of a module, and the same in float64; kernels keep the size of what they are given."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    generator = np.random.default_rng(0)
    wide = jax.tree.map(lambda s: generator.standard_normal(s.shape).astype(np.float32) / s.shape[0] ** 0.5, shapes)
    return jax.tree.map(jnp.asarray, wide), jax.tree.map(np.float64, wide)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_mlp_is_its_formula(name, gated):
    """The exact gelu and its tanh form differ in the fourth digit: they are not taken for each other."""
    module = MLP(tiny_config(activation=name, gated=gated, mlp_bias=True))
    x = np.random.default_rng(1).standard_normal((1, 5, 32)).astype(np.float32)
    params, p = float64_parameters(module, x)
    up = x @ p["up"]["kernel"] + p["up"]["bias"]
    inner = ACTIVATIONS[name](x @ p["gate"]["kernel"] + p["gate"]["bias"]) * up if gated else ACTIVATIONS[name](up)
    expected = inner @ p["down"]["kernel"] + p["down"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=2e-5)


SLOPES = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # of six heads: those of four, then every other one of eight


def normed(y, config, norm):
    """(batch, time, heads, dim), normalised if there is a norm."""
    if norm is None:
        return y.reshape(*y.shape[:2], -1, config.head_dim)
    if config.qk_norm != "width":
        y = y.reshape(*y.shape[:2], -1, config.head_dim)
    if config.norm == "layer_scale":
        y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + config.norm_epsilon)
    y = y * (norm["scale"] if "scale" in norm else 1 + norm["offset"])
    return y.reshape(*y.shape[:2], -1, config.head_dim)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # two heads of queries for each of keys
        {"heads": 6, "kv_heads": 2, "head_dim": 4, "sliding_window": 3},
        {"kv_heads": 1, "rotary_fraction": 0.5, "qkv_bias": True, "attention_output_bias": True},
        {"kv_heads": 4, "positions": "learned"},
        {"attention_softcap": 0.5, "attention_scale": 0.3, "rope_interleaved": True, "rotary_fraction": 0.5},
        {"positions": "alibi", "heads": 6, "kv_heads": 3},
        {"positions": "none", "qk_norm": "head", "norm": "rms_offset"},
        {"qk_norm": "width"},
        {"qk_norm": "each_head", "norm": "layer_scale"},
    ],
)
def test_attention_is_its_formula(changes):
    """Head by head in float64: heads of queries g n to g n + n - 1 read head g of keys and values."""
    config = tiny_config(**changes)
    module, time = Attention(config), 7
    x = np.random.default_rng(1).standard_normal((2, time, 32)).astype(np.float32)
    params, p = float64_parameters(module, x)
    q, k, v = (normed(x @ p[name]["kernel"] + p[name].get("bias", 0), config, p.get(f"{name}_norm")) for name in "qkv")
    half = config.rotary_dim // 2 if config.positions == "rope" else 0

    def turned(head, angles):  # (time, dim): pairs (i, i + half) as complex numbers
        if config.rope_interleaved:
            pair = (head[:, : 2 * half : 2] + 1j * head[:, 1 : 2 * half : 2]) * np.exp(1j * angles)
            return np.concatenate([np.stack([pair.real, pair.imag], axis=2).reshape(time, -1), head[:, 2 * half :]], axis=1)
        pair = (head[:, :half] + 1j * head[:, half : 2 * half]) * np.exp(1j * angles)
        return np.concatenate([pair.real, pair.imag, head[:, 2 * half :]], axis=1)

    angles = np.arange(time)[:, None] * rope_frequencies(config)[:half].astype(np.float64)
    distance = np.arange(time)[:, None] - np.arange(time)
    seen = (distance >= 0) & (distance < (config.sliding_window or time))
    mixed = np.zeros((2, time, config.heads, config.head_dim))
    for batch in range(2):
        for head in range(config.heads):
            of_keys = head // (config.heads // config.kv_heads)
            ours, theirs = turned(q[batch, :, head], angles), turned(k[batch, :, of_keys], angles)
            scores = ours @ theirs.T * (config.attention_scale or config.head_dim**-0.5)
            if cap := config.attention_softcap:
                scores = cap * np.tanh(scores / cap)
            if config.positions == "alibi":
                scores -= SLOPES[head] * distance
            scores = np.where(seen, np.exp(scores), 0)
            mixed[batch, :, head] = scores / scores.sum(axis=1, keepdims=True) @ v[batch, :, of_keys]
    expected = mixed.reshape(2, time, -1) @ p["o"]["kernel"] + p["o"].get("bias", 0)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=2e-5)
