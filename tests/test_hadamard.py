"""Hadamard matrices, the map of layer inputs, the rotated model against float64, and the recipes that ask for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.cache_format import parse_cache_format
from qjax.checkpoints.packed import load_packed, save
from qjax.driver.decoder import quantize, quantize_to, quantize_together
from qjax.driver.layer import problem_of
from qjax.errors import QjaxError
from qjax.hadamard import hadamard, hadamard_transform, order_of
from qjax.lazy import Lazy, materialised
from qjax.linear import Linear, apply_linear, dense, dequantize
from qjax.maps import Hadamard, random_hadamard
from qjax.models.families import FAMILIES, read_config
from qjax.models.model import apply, runnable
from qjax.models.parameters import flatten, unflatten
from qjax.models.rotation import rotate
from qjax.models.walk import Decoder
from qjax.recipe import parse_recipe
from tests.conftest import BLOOM, COHERE, FALCON, GEMMA, GEMMA3, GPT2, GPT_NEOX, GPT_OSS, OLMO2, OPT, SMOLLM3, tiny_config
from tests.family_files import EVERY
from tests.float64 import in_float64
from tests.oracles import rotation as oracle
from tests.random_weights import small_model

KNOWN = (1, 2, 4, 12, 20, 24, 28, 36, 44, 48, 52, 60, 64, 84, 92, 96, 100, 108, 116, 140, 148, 156, 172, 344)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))


@pytest.mark.parametrize("size", KNOWN)
def test_matrices(size):
    matrix = hadamard(size).astype(int)
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size))
    assert set(np.unique(matrix)) <= {-1, 1}
    x = np.random.default_rng(size).standard_normal((3, size))
    found = hadamard_transform(x)
    np.testing.assert_allclose(found, x @ matrix / np.sqrt(size), atol=1e-12)
    np.testing.assert_allclose(hadamard_transform(found, transposed=True), x, atol=1e-12)
    if size in (48, 64):  # by JAX the same
        np.testing.assert_allclose(hadamard_transform(jnp.asarray(x, jnp.float32)), found, atol=1e-5)


def test_matrices_of_saved_models_stay_what_they_are():
    """Paley's where there is one; of 92, 116, 156 and 172 and what no other base gives Williamson's."""
    assert [order_of(size) for size in (344, 11008, 368, 312)] == [(344, 1), (344, 32), (368, 1), (312, 1)]
    assert [order_of(size) for size in (172, 184, 116, 156)] == [(172, 1), (92, 2), (116, 1), (156, 1)]
    assert order_of(64) == (1, 64) and order_of(576) == (36, 16) and order_of(6) is None


def test_sizes_of_real_models():
    """Llama, Mistral, Qwen, SmolLM, GPT-2: hidden sizes and those of MLPs."""
    sizes = (576, 768, 896, 960, 1536, 2560, 3584, 4864, 8960, 11008, 13824, 14336, 18944, 28672)
    assert all(order_of(size) for size in sizes)
    for size in (6, 18, 188, 127):
        with pytest.raises(QjaxError, match=f"{size} features.*block=N"):
            hadamard(size)


@pytest.mark.parametrize(("size", "block"), [(24, 0), (40, 20)])
def test_the_map_is_orthogonal(size, block):
    """The product is the same; what is rotated back is the weight; a Hessian is that of the mapped inputs."""
    generator = np.random.default_rng(size)
    x, weight = generator.standard_normal((30, size)), generator.standard_normal((size, 5))
    each = random_hadamard(size, block, seed=3)
    whole = np.asarray(each.on_input(jnp.eye(size)), float)  # diag(s) H
    np.testing.assert_allclose(whole @ whole.T, np.eye(size), atol=1e-6)
    assert np.count_nonzero(whole.round(6)) == size * (block or size)
    mapped, turned = each.on_input(jnp.asarray(x, jnp.float32)), each.on_weight(jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(np.asarray(mapped, float) @ np.asarray(turned, float), x @ weight, atol=1e-5)
    with jax.enable_x64(True):
        mapped, turned = each.on_input(jnp.asarray(x)), each.on_weight(jnp.asarray(weight))
        np.testing.assert_allclose(mapped @ turned, x @ weight, atol=1e-12)
    drift = generator.standard_normal((size, size))
    found = each.on_statistic(jnp.asarray(drift, jnp.float32), 2)
    np.testing.assert_allclose(found, whole.T @ drift @ whole, atol=1e-5)
    with pytest.raises(QjaxError, match="mixes inputs"):
        each.on_statistic(jnp.ones(size), 1)
    assert each.on_input(jnp.ones((2, size), jnp.bfloat16)).dtype == jnp.bfloat16
    assert each.signs.nbytes == -(-size // 8)


def test_seeds_and_signs():
    first, again, other = (np.asarray(random_hadamard(64, seed=seed).signs) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 16 < np.unpackbits(first).sum() < 48


def test_evaluation_keeps_the_map_where_the_input_is_rounded():
    """Decoded, a layer is one product without an activation format, else it still rotates what it rounds."""
    generator = np.random.default_rng(0)
    x, weight = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in ((7, 32), (32, 5)))
    turn = random_hadamard(32)
    leaf = Linear(turn.on_weight(weight), (turn,))
    np.testing.assert_allclose(dense(leaf), weight, atol=1e-6)
    rounding = dataclasses.replace(leaf, activation="int4-token")
    decoded = dense(rounding)
    assert isinstance(decoded, Linear) and decoded.inputs == (turn,)
    np.testing.assert_array_equal(apply_linear(x, decoded), apply_linear(x, rounding))
    spike = x.at[:, 3].multiply(20.0)  # what a rotation is for
    exact = spike @ weight
    errors = [jnp.linalg.norm(apply_linear(spike, each) - exact) for each in (rounding, Linear(weight, (), "int4-token"))]
    assert 2 * errors[0] < errors[1]


CASES = {
    "llama, tied": {"tied": True},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "attention_output_bias": True, "tied": True},
    "gemma": GEMMA,
    "smollm3": SMOLLM3,
    "gpt2": GPT2,
    "opt": OPT,
    "gpt_neox": GPT_NEOX,
    "cohere": COHERE,
    "falcon": FALCON,
    "bloom": BLOOM,
    "mixtral": {"family": "mixtral", "experts": 4, "experts_per_token": 2},
    "gpt_oss": GPT_OSS,
    "granite": {"family": "granite", "embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 0.5, "tied": True},
}


FIRST = {"qwen2", "gpt2", "cohere", "mixtral", "gpt_oss"}  # the others repeat what these show


@pytest.mark.parametrize("name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_logits_are_unchanged(name):
    """In float32 and in float64, for every structure that is not refused."""
    model = small_model(tiny_config(vocabulary_size=61, layers=1 if "kinds" not in CASES[name] else 2, **CASES[name]))
    turned = rotate(model, seed=1)
    assert not turned.config.tied and turned.config.norm in ("rms", "rms_offset")
    exact, found = (np.asarray(apply(each, TOKENS)) for each in (model, turned))
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.max(np.abs(exact)))
    leaf = "block_0/mlp/down/kernel"
    assert not np.allclose(flatten(model.params)[leaf], flatten(turned.params)[leaf])
    exact, found = rotated_in_float64(model)
    np.testing.assert_allclose(found, exact, atol=1e-9)


BEHIND = {"olmo2", "gemma2", "gemma3_text", "glm4"}  # families whose norms stand behind their branches


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_rotated_or_refused(family):
    model = small_model(read_config(EVERY[family]))
    if family in BEHIND:
        with pytest.raises(QjaxError, match="norms stand behind its branches"):
            rotate(model)
        return
    exact, found = (np.asarray(apply(each, TOKENS)) for each in (model, rotate(model, seed=1)))
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.max(np.abs(exact)))
    exact_64, found_64 = rotated_in_float64(model)
    np.testing.assert_allclose(exact_64, exact, atol=1e-5 * np.max(np.abs(exact)))
    np.testing.assert_allclose(found_64, exact_64, atol=1e-9)


def rotated_in_float64(model):
    """The logits of the model and of what it is rotated, parameters and all in float64."""
    model = model._replace(params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params))
    with jax.enable_x64(True):
        turned = rotate(model, seed=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(turned.params)} == {np.dtype(np.float64)}
    return [in_float64(Decoder(each.config).apply, {"params": each.params}, np.int32(TOKENS)) for each in (model, turned)]


def test_no_family_is_forgotten():
    assert EVERY.keys() == FAMILIES.keys()


def test_folded_weights_are_the_definitions():
    """Against matrices in float64: every leaf, and the logits of both models to 1e-9."""
    config = tiny_config(vocabulary_size=61, head_dim=12)
    model = small_model(config)
    leaves = {path: np.asarray(leaf, float) for path, leaf in flatten(model.params).items()}
    signs = np.random.default_rng(5).choice([-1.0, 1.0], 32)
    matrix = np.diag(signs) @ hadamard(32) / np.sqrt(32)
    expected = oracle.rotated(config, leaves, matrix, hadamard(12) / np.sqrt(12))
    found = flatten(rotate(model, seed=5).params)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    tokens = np.asarray(TOKENS[0])
    exact = oracle.logits(config, leaves, tokens)
    np.testing.assert_allclose(oracle.logits(config, expected, tokens), exact, atol=1e-9)
    np.testing.assert_allclose(apply(model, TOKENS[:1])[0], exact, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (OLMO2, "norms stand behind its branches"),
        (GEMMA3, "norms stand behind its branches"),
        (GPT2 | {"qk_norm": "head"}, "queries and keys have layer norms"),
        (BLOOM | {"positions": "learned"}, "a norm follows its embeddings"),
        ({"head_dim": 6}, "head of values has 6 features"),
        ({"hidden_size": 30}, "residual stream has 30 features"),
    ],
)
def test_refusals(changes, reason):
    config = tiny_config(vocabulary_size=61, **changes)
    model = small_model(config)
    for action in (rotate, lambda model: quantize(model, "hadamard+rtn:int4-g16")):
        with pytest.raises(QjaxError, match=reason):
            action(model)


def test_lazy_models_rotate_as_they_are_read():
    model = small_model(tiny_config(vocabulary_size=61, tied=True), dtype=jnp.bfloat16)
    lazy = jax.tree.map(lambda leaf: Lazy(leaf.shape, leaf.dtype, lambda: leaf), model.params)
    turned, waiting = rotate(model), rotate(model._replace(params=lazy))
    assert all(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(waiting.params))
    for a, b in zip(jax.tree.leaves(turned.params), jax.tree.leaves(materialised(waiting.params)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def spiky():
    """A model with two features of the stream that are large, which the gains of the norms make larger."""
    model = small_model(tiny_config(vocabulary_size=61, layers=1, mlp_size=32))
    leaves = flatten(model.params)
    for path in leaves:
        if path.endswith("norm/scale") and path.startswith("block"):
            leaves[path] = jnp.ones(32).at[jnp.array([3, 9])].set(30.0)
    return model._replace(params=unflatten(leaves))


def test_recipes(spiky):
    """The whole model: only o and down rotate as they run; 4-bit inputs gain; together with others each is what it is alone."""
    exact = np.asarray(apply(spiky, TOKENS))
    tokens = np.random.default_rng(1).integers(0, 61, (8, 24)).astype(np.int32)
    requests = ("rtn:int8-channel/int4-token", "hadamard+rtn:int8-channel/int4-token", "hadamard+gptq:int4-g16")
    made = quantize_together(spiky, [(each, ()) for each in requests], calibration=tokens, order="parallel")
    errors = [np.linalg.norm(np.asarray(apply(runnable(model), TOKENS)) - exact) for model, _ in made[:2]]
    assert 1.5 * errors[1] < errors[0]
    alone, _ = quantize(spiky, requests[2], calibration=tokens, order="parallel")
    assert made[2][0].config == alone.config and made[2][0].recipe == alone.recipe
    for a, b in zip(*(jax.tree.leaves(each.params) for each in (made[2][0], alone)), strict=True):
        np.testing.assert_array_equal(a, b)
    for recipe, (model, _) in zip(requests, made, strict=True):
        leaves = flatten(model.params)
        online = {path for path, leaf in leaves.items() if isinstance(leaf, Linear) and leaf.inputs}
        assert online == ({"block_0/attention/o/kernel", "block_0/mlp/down/kernel"} if "hadamard" in recipe else set())
        assert all(len(leaf.inputs) <= 1 for leaf in leaves.values() if isinstance(leaf, Linear))


def test_folders_keep_rotations(spiky, tmp_path):
    kept, _ = quantize_to(tmp_path / "packed", spiky, "hadamard(seed=4)+rtn:int8-channel/int8-token kv:int8-token")
    assert kept.config.cache_format == "int8-token(hadamard=true)"
    plain, _ = quantize(spiky, "hadamard(seed=4)+rtn:int8-channel/int8-token kv:int8-token")
    again = load_packed(tmp_path / "packed")
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_array_equal(a, b)
    save(tmp_path / "again", again)
    assert load_packed(tmp_path / "again").config == plain.config
    exact = np.asarray(apply(spiky, TOKENS))
    assert np.linalg.norm(np.asarray(apply(runnable(again), TOKENS)) - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("recipe", ["hadamard(block=16)+rtn:mxfp4/mxfp4", "hadamard(online=true)+rtn:int8-channel/int8-token"])
def test_pure_maps(recipe):
    """Every layer's own, whatever the family: the stream stays as it is."""
    model = small_model(tiny_config(vocabulary_size=61, layers=1, mlp_size=32, **OLMO2))
    quantized, _ = quantize(model, recipe)
    leaves = flatten(quantized.params)
    kernels = [leaf for path, leaf in leaves.items() if path.startswith("block") and path.endswith("kernel")]
    assert all(isinstance(leaf, Linear) and isinstance(leaf.inputs[0], Hadamard) for leaf in kernels)
    assert quantized.config == model.config
    path = "block_0/attention/q/kernel"
    np.testing.assert_allclose(
        dequantize(leaves[path]), flatten(model.params)[path], atol=0.3 * float(jnp.abs(flatten(model.params)[path]).max())
    )


def test_keys_through_a_hadamard_matrix_change_no_score():
    """Rounded to 8 bits next to nothing; an outlying channel of keys costs less at 2 bits."""
    model = small_model(tiny_config(vocabulary_size=61, layers=1))
    exact = np.asarray(apply(model, TOKENS))
    for name, most in (("int8-token(hadamard=true)", 0.02), ("int8-token", 0.02)):
        kept = model._replace(config=dataclasses.replace(model.config, cache_format=name))
        difference = np.abs(np.asarray(apply(kept, TOKENS)) - exact)
        assert 0 < difference.max() < most * np.abs(exact).max()
    with pytest.raises(QjaxError, match="a head has 6 features"):
        tiny_config(head_dim=6, cache_format="int8-token(hadamard=true)")
    with pytest.raises(QjaxError, match="keys=after"):
        parse_cache_format("int8-token(hadamard=true,keys=before)")


def test_bad_options():
    assert str(parse_recipe("hadamard(block=32,seed=0)+rtn:mxfp4")) == "hadamard(block=32):mxfp4"
    model = small_model(tiny_config(vocabulary_size=61, layers=1))
    for recipe, problem in (
        ("hadamard(block=5):int4-g16", "a block of 5 of a layer with 32 inputs"),
        ("hadamard(seed=-1,online=true):int4-g16", "seed -1"),
    ):
        with pytest.raises(QjaxError, match=problem):
            quantize(model, recipe)
    with pytest.raises(QjaxError, match="seeds 0, 1"):
        quantize(model, "hadamard:int4-g16", rules=["down=hadamard(seed=1):int8-g16"])
    assert "mixes inputs" in problem_of(parse_recipe("hadamard+awq:int8-channel"), (32, 8))
    assert problem_of(parse_recipe("hadamard+rtn:int8-channel/int8-tensor"), (32, 8)) is None
    assert problem_of(parse_recipe("hadamard+gptq:int4-g16/int4-token"), (32, 8)) is None


def test_behind_smoothing(spiky):
    """What smoothquant reads of inputs need not be known behind the rotation."""
    recipe = "smoothquant+hadamard(block=8)+rtn:int8-channel/int8-token@parallel"
    tokens = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)
    quantized, _ = quantize(spiky, recipe, calibration=tokens)
    leaf = quantized.params["block_0"]["mlp"]["down"]["kernel"]
    assert [type(each).__name__ for each in leaf.inputs] == ["Scale", "Hadamard"]
    np.testing.assert_allclose(apply(quantized, tokens), apply(spiky, tokens), atol=0.2)
