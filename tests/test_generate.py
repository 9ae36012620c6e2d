"""qjax.evaluate.generate: greedy tokens are those of the whole forward pass, whatever the batch; stops, draws, refusals."""

import dataclasses
import math

import numpy as np
import pytest

from qjax.driver.decoder import quantize
from qjax.errors import QjaxError
from qjax.evaluate.generate import ends, generate, generate_text
from qjax.evaluate.likelihood import encode
from qjax.evaluate.speed import measure_speed
from qjax.models.model import apply
from qjax.qtensor import nbytes

from .conftest import FAMILY_CHANGES, byte_tokenizer, random_model, some_slow, tiny_config

PROMPTS = [np.array(list(text.encode()), np.int32) for text in ("a", "the cat", "once upon a time")]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(context=48), byte_tokenizer(bos=True))


@pytest.fixture(scope="module")
def windowed():
    return random_model(tiny_config(context=48, sliding_window=4), byte_tokenizer(bos=True))


def greedily(model, prompt, count):
    ids = prompt
    for _ in range(count):
        logits = np.asarray(apply(model, np.pad(ids, (0, 48 - len(ids)))[None]))  # one length, one compilation
        ids = np.append(ids, logits[0, len(ids) - 1].argmax()).astype(np.int32)
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["model", "windowed"])
def test_greedy_tokens(request, name):
    model = request.getfixturevalue(name)
    found = generate(model, PROMPTS, 12)
    assert [tokens.tolist() for tokens in found.tokens] == [greedily(model, prompt, 12) for prompt in PROMPTS]
    assert found.steps == 11
    alone = generate(model, PROMPTS[1:2], 12)
    assert alone.tokens[0].tolist() == found.tokens[1].tolist()


@pytest.mark.parametrize("family", some_slow(FAMILY_CHANGES))
def test_every_family_says_what_its_whole_pass_says(family):
    model = random_model(tiny_config(context=48, **FAMILY_CHANGES[family]), byte_tokenizer(bos=True))
    quantized, _ = quantize(model, "rtn:int8-g16")
    found = generate(quantized, PROMPTS, 6)
    assert [tokens.tolist() for tokens in found.tokens] == [greedily(quantized, prompt, 6) for prompt in PROMPTS]


def test_any_of_several_ends_stops(model):
    """Whatever token comes second may be an end, wherever it stands among them."""
    prompt = [encode(model.tokenizer, "the cat")]
    second = int(generate(model, prompt, 2).tokens[0][1])
    for first, others in ((second, ()), (None, (second,)), (7, (9, second)), (7, (second, 9))):
        ended = model._replace(
            config=dataclasses.replace(model.config, eos_id=first, other_eos_ids=others),
            tokenizer=dataclasses.replace(model.tokenizer, eos_id=first),
        )
        assert ends(ended) == (*(() if first is None else (first,)), *others)
        assert len(generate(ended, prompt, 6, stop=ends(ended)).tokens[0]) == 2
        assert generate_text(ended, "the cat", 6) == generate_text(model, "the cat", 2)
    assert len(generate(model, prompt, 6, stop=ends(model)).tokens[0]) == 6


def test_packed_weights_give_the_same_tokens(model):
    quantized, _ = quantize(model, "rtn:int4-g16")
    decoded, packed = (generate(quantized, PROMPTS, 12, packed=held).tokens for held in (False, True))
    assert [tokens.tolist() for tokens in packed] == [tokens.tolist() for tokens in decoded]


def test_stops(model):
    expected = greedily(model, PROMPTS[1], 12)
    found = generate(model, PROMPTS[1:2], 12, stop=expected[3:4])
    assert found.tokens[0].tolist() == expected[: expected.index(expected[3]) + 1]
    assert len(generate(model, PROMPTS[1:2], 12, finished=lambda tokens: len(tokens) == 5).tokens[0]) == 5
    steps = []
    generate(model, PROMPTS, 3, on_tokens=steps.append)
    assert np.stack(steps).shape == (3, 3)


def test_draws_follow_the_seed_and_the_temperature(model):
    draw = lambda seed, temperature: generate(model, PROMPTS[:1], 12, temperature=temperature, seed=seed).tokens[0].tolist()  # noqa: E731
    assert draw(0, 1.0) == draw(0, 1.0) != draw(1, 1.0)
    assert draw(0, 1e-4) == greedily(model, PROMPTS[0], 12)


def test_extreme_temperatures(model):
    greedy = generate(model, PROMPTS[:1], 6).tokens[0].tolist()
    assert generate(model, PROMPTS[:1], 6, temperature=1e-40).tokens[0].tolist() == greedy
    for temperature in (math.inf, math.nan, -1.0):
        with pytest.raises(QjaxError, match="temperature"):
            generate(model, PROMPTS[:1], 6, temperature=temperature)


def test_the_context_is_a_limit(model):
    assert len(generate(model, PROMPTS[:1], 48).tokens[0]) == 48  # 1 + 47 tokens are read
    with pytest.raises(
        QjaxError, match=r"prompt of 16 tokens and 34 new ones do not fit random's context of 48; ask for at most 33"
    ):
        generate(model, PROMPTS, 34)
    for prompts, count in (([], 1), ([np.zeros(0, np.int32)], 1), (PROMPTS, 0)):
        with pytest.raises(QjaxError, match="at least one"):
            generate(model, prompts, count)


def test_text(model):
    seen = []
    text = generate_text(model, "the cat", 8, on_token=seen.append)
    ids = encode(model.tokenizer, "the cat")
    assert text == model.tokenizer.decode(greedily(model, ids, 8)) == seen[-1]
    assert len(seen) == 8
    with pytest.raises(QjaxError, match="prompt is empty"):
        generate_text(model._replace(tokenizer=byte_tokenizer()), "")
    with pytest.raises(QjaxError, match="no tokenizer"):
        generate_text(model._replace(tokenizer=None), "a")


def test_speed_counts_what_is_held(model):
    quantized, _ = quantize(model, "rtn:int4-g16")
    dense, packed = (measure_speed(quantized, packed=held, new_tokens=4, repeats=1) for held in (False, True))
    assert dense.running_bytes == nbytes(model.params)
    assert packed.running_bytes == nbytes(quantized.params) < dense.running_bytes
    assert packed.prompt_tokens == 24 and packed.new_tokens == 4
    for found in (dense, packed):
        assert found.peak_bytes > found.running_bytes
        assert min(found.prefill_tokens_per_second, found.decode_tokens_per_second, found.first_token_seconds) > 0
