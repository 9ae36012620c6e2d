"""qjax.evaluate.likelihood: sums of log-probabilities, the same however rows are batched, padded and shared."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.evaluate import likelihood
from qjax.evaluate.likelihood import Pair, bucket, cut, encode, likelihoods, make_pair, rolling_pairs
from qjax.models.model import apply

from .conftest import byte_tokenizer, random_model, tiny_config


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(context=48), byte_tokenizer(bos=True))


def directly(model, pair):
    """ln p and greediness from the whole logits, in float64."""
    read = len(pair.tokens) - 1
    padded = np.pad(pair.tokens[:-1], (0, 48 - read))  # one length, one compilation; nothing sees what is behind it
    logits = np.asarray(apply(model, padded[None]), np.float64)[0, :read]
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = pair.tokens[1:]
    chosen = logp[np.arange(len(targets)), targets][-pair.continuation :]
    return chosen.sum(), bool(np.all(logp.argmax(axis=1)[-pair.continuation :] == targets[-pair.continuation :]))


TEXT = st.text(alphabet="abc de", min_size=1, max_size=12)


@given(groups=st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=5))
@settings(max_examples=12, deadline=None)
def test_sums_of_log_probabilities_whatever_the_batch(model, groups):
    pairs = [[make_pair(model, context, end) for end in ends] for context, ends in groups]
    expected = [directly(model, pair) for group in pairs for pair in group]
    for batch_tokens in (32, 512):
        for arranged in (pairs, [[pair] for group in pairs for pair in group]):
            found = likelihoods(model, arranged, batch_tokens=batch_tokens)
            np.testing.assert_allclose(found.value, [value for value, _ in expected], rtol=1e-5, atol=1e-5)
            assert found.greedy.tolist() == [greedy for _, greedy in expected]


def test_greedy_continuations_are_found(model):
    pair = make_pair(model, "what is likeliest", "x")
    ids = pair.tokens[:-1]
    for _ in range(4):
        logits = np.asarray(apply(model, np.pad(ids, (0, 48 - len(ids)))[None]))
        ids = np.append(ids, logits[0, len(ids) - 1].argmax()).astype(np.int32)
    found = likelihoods(model, [[Pair(ids, 4), Pair(np.append(ids[:-1], (ids[-1] + 1) % 256).astype(np.int32), 4)]])
    assert found.greedy.tolist() == [True, False]


def test_white_space_at_the_end_of_a_context_counts_to_the_continuation(model):
    spaced, plain = make_pair(model, "a b ", "c"), make_pair(model, "a b", " c")
    assert (spaced.tokens.tolist(), spaced.continuation) == (plain.tokens.tolist(), plain.continuation)
    assert make_pair(model, "  ", "c").continuation == 3


def test_an_empty_context_is_the_beginning_of_text(model):
    pair = make_pair(model, "", "abc")
    assert (pair.tokens[0], len(pair.tokens), pair.continuation) == (256, 4, 3)
    assert encode(model.tokenizer, "<s>abc").tolist() == encode(model.tokenizer, "abc").tolist()
    no_beginning = model._replace(tokenizer=byte_tokenizer())
    assert make_pair(no_beginning, "a", "bc").tokens.tolist() == pair.tokens[1:].tolist()
    with pytest.raises(QjaxError, match="neither"):
        make_pair(no_beginning, "", "abc")


def test_long_pairs_lose_tokens_from_the_left(model):
    pair = make_pair(model, "x" * 100, "end")
    assert (len(pair.tokens), pair.continuation, pair.truncated) == (49, 3, True)
    assert not make_pair(model, "x" * 45, "end").truncated  # 49 tokens with the beginning of text: all but the last are read
    assert make_pair(model, "x" * 46, "end").truncated
    longest = cut(model, np.array([1]), np.full(60, 2, np.int32))
    assert (len(longest.tokens), longest.continuation, longest.truncated) == (49, 48, True)
    with pytest.raises(QjaxError, match="no tokens of its own"):
        cut(model, np.array([1]), np.array([], np.int32), "nothing")
    with pytest.raises(QjaxError, match="has no tokenizer"):
        make_pair(model._replace(tokenizer=None), "a", "b")


@pytest.mark.parametrize("length", [1, 47, 48, 49, 96, 120])
def test_rolling_windows_score_every_token_once(model, length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    pairs = rolling_pairs(model, text)
    ids = encode(model.tokenizer, text)  # with the beginning of text, which is scored as the harness does
    assert sum(pair.continuation for pair in pairs) == len(ids)
    assert np.concatenate([pair.tokens[-pair.continuation :] for pair in pairs]).tolist() == ids.tolist()
    text_ids = [256, *ids]  # behind the token of an empty context
    ends = np.cumsum([pair.continuation for pair in pairs]) + 1
    assert [pair.tokens.tolist() for pair in pairs] == [text_ids[max(0, end - 49) : end] for end in ends]  # full: 48 are read
    found = likelihoods(model, [[pair] for pair in pairs]).value
    np.testing.assert_allclose(found, [directly(model, pair)[0] for pair in pairs], rtol=1e-5)


def test_lengths_have_few_buckets():
    lengths = sorted({bucket(length) for length in range(1, 513)})
    assert lengths == [32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(bucket(length) >= length for length in range(1, 2000))


def test_one_compilation_serves_every_recipe(model):
    from qjax.driver.decoder import quantize
    from qjax.models import walk
    from qjax.models.model import compute_dtype

    groups = [[make_pair(model, "a common beginning", end) for end in ("x", "yz")]]
    likelihoods(model, groups)
    block = walk.compiled(walk.parts(model.config, compute_dtype())[1].module)
    before = block._cache_size()
    quantized, _ = quantize(model, "rtn:int4-g16")
    found = likelihoods(quantized, groups)
    assert block._cache_size() == before
    packed = likelihoods(quantized, groups, packed=True)
    np.testing.assert_allclose(packed.value, found.value, rtol=1e-5)
    assert jax.default_backend() != "cpu" or found.value[0] != likelihoods(model, groups).value[0]


def test_many_choices_are_several_rows(model, monkeypatch):
    """Attention's memory grows with the square of a row."""
    draw = np.random.default_rng(0)
    context = draw.integers(0, 61, 12)
    group = [Pair(np.concatenate([context, draw.integers(0, 61, 3)]), 3) for _ in range(40)]
    whole = likelihoods(model, [group])
    monkeypatch.setattr(likelihood, "LONGEST_ROW", 48)
    rows = list(likelihood._rows(group, range(len(group))))
    assert len(rows) == 4 and max(len(row.tokens) for row in rows) <= 48
    found = likelihoods(model, [group])
    np.testing.assert_allclose(found.value, whole.value, rtol=1e-5)
    np.testing.assert_array_equal(found.greedy, whole.greedy)
