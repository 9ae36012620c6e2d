"""The cache of keys and values: formats, arithmetic against float64, packed generation against the whole pass, exact bytes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.cache_format import parse_cache_format
from qjax.checkpoints.packed import load_packed, save
from qjax.driver.decoder import quantize, quantize_to
from qjax.driver.function import quantize_flax
from qjax.driver.traced import quantize_function
from qjax.errors import QjaxError
from qjax.evaluate.generate import generate
from qjax.evaluate.likelihood import likelihoods, make_pair
from qjax.evaluate.perplexity import score
from qjax.models import kv_cache
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import apply, empty_caches
from qjax.qtensor import nbytes
from qjax.recipe import parse_recipe
from qjax.report.figures import with_share
from qjax.report.series import by_method
from qjax.sweep.cells import canonical
from qjax.sweep.rows import recipe_columns
from tests.conftest import FAMILY_CHANGES, FURTHER_CHANGES, byte_tokenizer, random_model, tiny_config
from tests.oracles.kivi import rounded_group, seen_by

PROMPTS = [np.array(list(text.encode()), np.int32) for text in ("a", "the cat", "once upon a time")]


def with_cache(model, name):
    return model._replace(config=dataclasses.replace(model.config, cache_format=name))


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(context=48, layers=1), byte_tokenizer(bos=True))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int4-g32", "int4-g32"),
        (" INT2-g32 (residual=128, keys=after)", "int2-g32"),
        ("int8-token(residual=0)", "int8-token"),
        ("fp8-token(residual=7)", "fp8_e4m3-token(residual=7)"),
        ("int2-g16(residual=16,keys=before)", "int2-g16(residual=16,keys=before)"),
    ],
)
def test_names(text, name):
    assert str(parse_cache_format(text)) == name
    assert parse_cache_format(name) == parse_cache_format(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("int4", "expected int2"),
        ("int1-token", "expected int2"),
        ("nf4-g64", "expected int2"),
        ("fp8_e4m3-g32", "expected int2"),
        ("int4-g32(residual=48)", "multiple of 32"),
        ("int4-g12(residual=12)", "multiple of 24"),
        ("int4-g32(residual=0)", "multiple of 32"),
        ("int4-g32(window=32)", "is no option"),
        ("int4-g32(keys=late)", "expected int2"),
    ],
)
def test_mistakes(text, problem):
    with pytest.raises(QjaxError, match=problem):
        parse_cache_format(text)


def test_recipes():
    recipe = parse_recipe("gptq:int4-g128@parallel  KV:int4-g32(residual=64)")
    assert str(recipe) == "gptq:int4-g128@parallel kv:int4-g32(residual=64)"
    assert parse_recipe(str(recipe)) == recipe != recipe.of_weights == parse_recipe("gptq:int4-g128@parallel")
    assert str(parse_recipe("none kv:int8-token")) == "kv:int8-token" == str(parse_recipe("kv:int8-token"))
    assert parse_recipe("kv:int8-token").of_weights is None
    assert str(parse_recipe("bf16 kv:int8-token")) == "bf16 kv:int8-token"
    for text, problem in (
        ("rtn:int4-g32 kv:int9-g32", "cache format"),
        ("kv:", "cache format"),
        ("rtn kv:int8-token", "needs a format"),
    ):
        with pytest.raises(QjaxError, match=problem):
            parse_recipe(text)


@pytest.mark.parametrize("group", [4, 8])
def test_what_each_token_sees_is_what_kivi_would_hold(group):
    """Masks and values of a whole text, against a cache that grows by a token a step."""
    cache = parse_cache_format(f"int2-g{group}(residual=8)")
    generator = np.random.default_rng(0)
    keys, values = (generator.standard_normal((21, 8)) * generator.uniform(0.1, 9, (1, 8)) for _ in range(2))
    places = jnp.arange(21)
    for x, by_channel, number in ((keys, True, 0), (values, False, 1)):
        found = kv_cache.simulated(jnp.asarray(x, jnp.float32)[None, None], cache, by_channel=by_channel)
        rounded, exact = (np.asarray(each)[0, 0] for each in found)
        old = np.asarray(kv_cache.old(places, places, cache, by_channel=by_channel))
        for t in range(21):
            expected = seen_by(t, keys, values, 2, group, 8)[number]
            np.testing.assert_allclose(np.where(old[t][:, None], rounded, exact)[: t + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_tokens_alone_are_rounded_by_head(bits):
    x = np.random.default_rng(bits).standard_normal((1, 2, 3, 8)).astype(np.float16)
    rounded, _ = kv_cache.simulated(jnp.asarray(x), parse_cache_format(f"int{bits}-token"), by_channel=False)
    expected = np.stack([rounded_group(row.astype(float), bits) for row in x.reshape(-1, 8)]).reshape(x.shape)
    np.testing.assert_allclose(np.asarray(rounded, float), expected.astype(np.float16), rtol=2e-3, atol=1e-6)
    codes = kv_cache.encode(jnp.asarray(x).swapaxes(-1, -2), parse_cache_format(f"int{bits}-token"), 8).codes
    assert codes.shape == (1, 2, bits, 3)


@pytest.mark.parametrize("name", ["int2-token", "int4-g16(residual=16)", "fp8_e4m3-token"])
def test_gradients_pass_through_rounding(name):
    cache = parse_cache_format(name)
    x = jax.random.normal(jax.random.key(0), (1, 2, 32, 16))
    for by_channel in (False, cache.group is not None):
        slopes = jax.grad(lambda x, by=by_channel: jnp.sum(2 * kv_cache.simulated(x, cache, by_channel=by)[0]))(x)
        np.testing.assert_array_equal(slopes, jnp.full(x.shape, 2.0))


def test_floats_reach_their_largest_value():
    x = jnp.asarray([[[[3.0, -448.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]]])
    rounded, _ = kv_cache.simulated(x, parse_cache_format("fp8_e4m3-token"), by_channel=False)
    np.testing.assert_array_equal(rounded, x)


def test_a_key_that_float16_does_not_hold_is_cut_off():
    x = jnp.full((1, 1, 2, 8), 1e6)
    for name in ("int4-token", "fp8_e4m3-token"):
        rounded, exact = kv_cache.simulated(x, parse_cache_format(name), by_channel=False)
        np.testing.assert_allclose(rounded, 65504, rtol=1e-3)
        assert float(exact.max()) == 65504


def greedily(model, prompt, count):
    ids, size = prompt, model.config.context
    for _ in range(count):
        logits = np.asarray(apply(model, np.pad(ids, (0, size - len(ids)))[None]))  # one length, one compilation
        ids = np.append(ids, logits[0, len(ids) - 1].argmax()).astype(np.int32)
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name", ["int2-g8(residual=8)", "int2-token(residual=5)", pytest.param("int3-token", marks=pytest.mark.slow)]
)
def test_packed_generation_is_the_simulated_one(model, name):
    """Token for token, also at 2 bits, whatever the batch; long enough that residuals fill and are emptied."""
    kept = with_cache(model, name)
    expected = [greedily(kept, prompt, 20) for prompt in PROMPTS]
    assert [tokens.tolist() for tokens in generate(kept, PROMPTS, 20).tokens] == expected


@pytest.mark.parametrize(
    "family",
    ["mistral", "falcon", "gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "smollm3"))],
)
def test_families(family):
    """Windows and heads that share keys, biases of scores, sinks, layers without positions, keys turned as they are read.

    Texts of more than 64 tokens attend in pieces.
    """
    changes = (FAMILY_CHANGES | FURTHER_CHANGES)[family]
    config = tiny_config(context=80, layers=2 if "kinds" in changes else 1, **changes)
    kept = with_cache(random_model(config), "int2-g4(residual=8,keys=before)")
    prompt = np.random.default_rng(0).integers(0, 257, 60).astype(np.int32)
    assert generate(kept, [prompt], 10).tokens[0].tolist() == greedily(kept, prompt, 10)


@pytest.mark.parametrize(
    "name",
    ["int2-g8(residual=16)", "int4-g4(residual=8,keys=before)", "int3-token", "int8-token(residual=5)", "fp8_e5m2-token"],
)
def test_bytes_are_what_the_formula_says(model, name):
    cache = parse_cache_format(name)
    caches = empty_caches(with_cache(model, name), 3, 48)
    each, window = with_cache(model, name).config.cache_bytes
    assert nbytes(caches) == 3 * (48 * each + window)
    assert all(held.new_keys.shape[2] == cache.residual for held in caches)


def test_bytes_by_hand():
    """KIVI at 2 bits of Llama-2-7B: 128 channels of 32 heads; 2.25 bits a number and 64 KiB of window... in one layer."""
    cache = parse_cache_format("int2-g32")
    assert cache.bytes_per_token(32, 128) == 2 * 32 * (128 * 2 / 8 + 128 / 32 * 4) == 3072
    assert cache.window_bytes(32, 128) == 2 * 32 * 128 * 128 * 2
    assert parse_cache_format("int8-token").bytes_per_token(1, 64) == 2 * (64 + 4)
    assert parse_cache_format("int3-token").bytes_per_token(1, 12) == 2 * (6 + 4)  # 8 codes of 3 bits fill 3 bytes


def test_eight_bits_are_nearly_exact(model):
    tokens = np.random.default_rng(0).integers(0, 257, (2, 48)).astype(np.int32)
    exact = score(model, tokens)
    errors = [
        np.abs(score(with_cache(model, name), tokens) - exact).mean() for name in ("int8-token", "int4-token", "int2-token")
    ]
    assert 0 < errors[0] < 0.01 and 8 * errors[0] < errors[1] and 3 * errors[1] < errors[2]


def test_likelihoods_are_those_of_each_text_alone(model):
    """Where groups go along tokens, choices of a question share no row; elsewhere they may."""
    context = "once upon a time there was a cat that"
    for name in ("int2-g4(residual=8)", "int2-token"):
        kept = with_cache(model, name)
        pairs = [make_pair(kept, context, choice) for choice in (" sat", " ran off")]
        found = likelihoods(kept, [pairs])
        for pair, value in zip(pairs, found.value, strict=True):
            nll = score(kept, pair.tokens[None])[0]
            np.testing.assert_allclose(value, -nll[-pair.continuation :].sum(), rtol=1e-4)


def test_in_a_model(model, tmp_path):
    """The format is the configuration's: folders keep it, calibration ignores it, what runs the model honours it."""
    tokens = np.random.default_rng(0).integers(0, 257, (4, 24)).astype(np.int32)
    plain, _ = quantize(model, "gptq:int4-g16", calibration=tokens)
    kept, _ = quantize(model, "gptq:int4-g16 kv:int2-token", calibration=tokens)
    assert kept.recipe == "gptq:int4-g16 kv:int2-token" and kept.config.cache_format == "int2-token"
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (plain.params, kept.params)), strict=True))
    assert model_fingerprint(kept) != model_fingerprint(plain)
    save(tmp_path / "packed", kept)
    again = load_packed(tmp_path / "packed")
    assert again.config == kept.config
    assert not np.array_equal(score(again, tokens), score(plain, tokens))
    np.testing.assert_array_equal(score(again, tokens), score(kept, tokens))
    alone, report = quantize_to(tmp_path / "alone", plain, "kv:int8-token")
    assert (alone.config.cache_format, alone.recipe) == ("int8-token", "kv:int8-token, after gptq:int4-g16")
    assert report.size_bytes == nbytes(plain.params)


def test_refusals(model):
    with pytest.raises(QjaxError, match=r"8 channels 3 does not divide; take g[24]"):
        quantize(model, "kv:int4-g3(residual=24)")
    with pytest.raises(QjaxError, match="the cache of the whole model"):
        quantize(model, "rtn:int4-g16", rules=["down=rtn:int8-g16 kv:int8-token"])
    with pytest.raises(QjaxError, match="kv:int8-token already"):
        quantize(with_cache(model, "int8-token"), "kv:int4-token")
    dense, x = nn.Dense(4), jnp.ones((2, 8))
    params = dense.init(jax.random.key(0), x)["params"]
    for refused in (
        lambda: quantize_flax(dense, params, "kv:int8-token", batches=[(x,)]),
        lambda: quantize_function(lambda p, x: x @ p["kernel"], params, "rtn:int4-g8 kv:int8-token", batches=[(x,)]),
    ):
        with pytest.raises(QjaxError, match="no cache that is known here"):
            refused()
    with pytest.raises(QjaxError, match="cache format 'int99'"):
        with_cache(model, "int99")


def test_rows():
    """What a row says of a recipe with a cache; an order stands before the cache; rows without one say nothing of it."""
    found = recipe_columns("awq+gptq:int4-g16 kv:int4-g32")
    assert found["cache"] == "int4-g32" and found["recipe_alone"] == "awq+gptq:int4-g16 kv:int4-g32"
    assert (found["method"], found["format"], found["bits"]) == ("awq+gptq kv:int4-g32", "int4-g16", 4)
    alone = recipe_columns("kv:int8-token")
    assert (alone["method"], alone["format"], alone["bits"], alone["rounding"]) == ("kv:int8-token", "none", None, "")
    assert "cache" not in recipe_columns("rtn:int4-g16") and "cache" not in recipe_columns("none")
    names = canonical(["gptq:int4-g16 KV:int8-token", "gptq:int4-g16@qep kv:int8-token", "none kv:int8-token"], "parallel")
    assert names == ["gptq:int4-g16@parallel kv:int8-token", "gptq:int4-g16@qep kv:int8-token", "kv:int8-token"]


def test_names_of_lines_in_figures():
    """A cache is said behind what a recipe does to weights and inputs, and tells lines, and what is a share of what, apart."""

    def row(recipe):
        recipe, *rules = recipe.split("; ")
        return {"model": "toy", "recipe": "; ".join([recipe, *rules]), **recipe_columns(recipe, rules)}

    names = {
        "none": "toy",
        "kv:int8-token": "kv:int8-token",
        "kv:int8-token; mlp/down=rtn:int8-channel": "kv:int8-token with mlp/down=rtn:int8-channel",
        "rtn:int8-channel/int8-token kv:int4-token": "rtn/int8-token kv:int4-token",
        "gptq:int4-g16/int8-token@parallel kv:int4-token": "gptq/int8-token@parallel kv:int4-token",
    }
    assert {recipe: by_method(row(recipe)) for recipe in names} == names
    loss = {"fingerprint": "a", "nll_delta": 0.1, "nll_delta_stderr": 0.001}
    plain, cached = with_share([row(recipe) | loss for recipe in ("rtn:int4-g16", "gptq:int4-g16 kv:int4-token")])
    assert "share_of" in plain and "share_of" not in cached
