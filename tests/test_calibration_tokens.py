"""qjax.calibrate.tokens: windows drawn by a seed, checks of given tokens, fingerprints."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.tokens import Calibration, as_calibration, load_calibration
from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus
from tests.conftest import byte_tokenizer, tiny_config
from tests.random_weights import weights_model

TEXT = "".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 999))
CORPUS = Corpus("letters", (TEXT[:500], TEXT[500:]), "0123456789abcdef", " ")


@pytest.fixture(scope="module")
def model():
    return weights_model(tiny_config(vocabulary_size=257), byte_tokenizer())


@pytest.mark.parametrize("name", ["c4", "python-docs", "text:novel.txt"])
def test_the_name_of_a_text_is_no_text(model, name):
    with pytest.raises(QjaxError, match=rf"'{name}' names a text; give qjax.load_calibration\(model, '{name}'\)"):
        as_calibration(model, name)


def test_windows_of_the_joined_text_without_replacement(model):
    found = load_calibration(model, CORPUS, windows=20, window=16, seed=3)
    assert found.tokens.shape == (20, 16) and found.tokens.dtype == np.int32
    assert (found.name, found.source, found.weights) == ("letters", "0123456789abcdef", None)
    ids, _ = model.tokenizer.encode_with_bytes(" ".join(CORPUS.documents))
    windows = {tuple(ids[start : start + 16]): start for start in range(0, len(ids) - 15, 16)}
    starts = [windows[tuple(row)] for row in found.tokens]
    assert len(set(starts)) == 20
    assert starts != sorted(starts)
    assert max(starts) > len(ids) // 2 > min(starts)


def test_the_seed_decides(model):
    a, b, c = (load_calibration(model, CORPUS, windows=8, window=16, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert len(a.fingerprint) == 16


def test_all_windows_and_one_too_many(model):
    ids, _ = model.tokenizer.encode_with_bytes(" ".join(CORPUS.documents))
    available = len(ids) // 32
    everything = load_calibration(model, CORPUS, windows=available, window=500)  # cut to the context of 32
    assert everything.tokens.shape == (available, 32)
    assert sorted(everything.tokens[:, 0].tolist()) == sorted(np.asarray(ids)[: available * 32 : 32].tolist())
    with pytest.raises(QjaxError, match=rf"letters has .* tokens, {available} windows of 32, but {available + 1} were asked"):
        load_calibration(model, CORPUS, windows=available + 1, window=32)
    short = Corpus("short", ("abc",), "", " ")
    with pytest.raises(QjaxError, match="short has 3 tokens, 0 windows of 32, but 128 were asked for; give more text"):
        load_calibration(model, short)


@pytest.mark.parametrize("sizes", [{"windows": 0}, {"window": 0}, {"windows": -1}])
def test_no_windows(model, sizes):
    with pytest.raises(QjaxError, match="at least one window of one token"):
        load_calibration(model, CORPUS, **sizes)


def test_a_model_without_tokenizer(model):
    with pytest.raises(QjaxError, match=r"no tokenizer.json.*give tokens instead"):
        load_calibration(model._replace(tokenizer=None), CORPUS)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, jnp.int32])
def test_tokens_of_any_integer_type(model, kind):
    tokens = np.arange(24).reshape(2, 12)
    found = as_calibration(model, jnp.asarray(tokens, kind) if kind is jnp.int32 else tokens.astype(kind))
    assert found.tokens.dtype == np.int32 and isinstance(found.tokens, np.ndarray)
    np.testing.assert_array_equal(found.tokens, tokens)
    assert as_calibration(model, found).fingerprint == found.fingerprint
    assert as_calibration(model, tokens.tolist()).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (np.zeros((2, 12)), "integer tokens .*float64 of shape"),
        (np.zeros(12, int), r"of shape \(12,\)"),
        (np.zeros((0, 12), int), r"of shape \(0, 12\)"),
        (np.zeros((2, 33), int), "windows of 33 tokens are longer than the context of random, 32"),
        (np.full((2, 12), 257), "from 257 to 257.*vocabulary of 257; was another model's tokenizer used"),
        (np.full((2, 12), -1), "from -1 to -1"),
    ],
)
def test_tokens_that_do_not_fit(model, tokens, named):
    with pytest.raises(QjaxError, match=named):
        as_calibration(model, tokens)


@pytest.mark.parametrize(
    "weights", [np.ones((2, 11)), np.zeros((2, 12)), np.full((2, 12), np.nan), -np.ones((2, 12)), np.full((2, 12), np.inf)]
)
def test_weights_that_do_not_fit(model, weights):
    with pytest.raises(QjaxError, match="weights must be finite, not negative, not all 0"):
        as_calibration(model, Calibration(np.zeros((2, 12), int), weights))


def test_weights_are_part_of_the_fingerprint(model):
    tokens = np.arange(24).reshape(2, 12)
    names = [as_calibration(model, Calibration(tokens, w)).fingerprint for w in (None, np.ones((2, 12)), 2 * np.ones((2, 12)))]
    assert len(set(names)) == 3
    assert as_calibration(model, tokens.reshape(1, 24)).fingerprint != names[0]  # so is how they are cut
    found = as_calibration(model, Calibration(tokens, np.ones((2, 12), bool)))
    assert found.weights.dtype == np.float32


ROWS = [[5, 6, 7, 8], [9, 10]]
FILLED, COUNTED = [[5, 6, 7, 8], [9, 10, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        [np.array(row) for row in ROWS],
        iter(ROWS),
        {"input_ids": ROWS},
        {"input_ids": np.array(FILLED), "attention_mask": np.array(COUNTED)},
        {"input_ids": [[5, 6, 7, 8], [0, 0, 9, 10]], "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]]},  # filled on the left
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ROWS],
    ],
)
def test_samples_of_different_lengths_are_filled_up_with_what_does_not_count(model, given):
    found = as_calibration(model, given)
    np.testing.assert_array_equal(found.tokens, FILLED)
    np.testing.assert_array_equal(found.weights, np.float32(COUNTED))
    assert found.fingerprint == Calibration(np.array(FILLED), np.array(COUNTED)).fingerprint


def test_full_samples_are_the_tokens_themselves(model):
    tokens = np.arange(24).reshape(2, 12)
    for given in ({"input_ids": tokens, "attention_mask": np.ones_like(tokens)}, [{"input_ids": row} for row in tokens]):
        found = as_calibration(model, given)
        assert found.weights is None and found.fingerprint == as_calibration(model, tokens).fingerprint


def test_texts_are_cut_into_pieces_of_the_context(model):
    text = TEXT[:70]
    found = as_calibration(model, [text, "ab"])
    assert found.tokens.shape == (4, 32) and found.weights.sum(axis=1).tolist() == [32, 32, 6, 2]
    ids = np.concatenate([row[weight > 0] for row, weight in zip(found.tokens, found.weights, strict=True)])
    np.testing.assert_array_equal(ids, np.concatenate([model.tokenizer.encode(text), model.tokenizer.encode("ab")]))
    np.testing.assert_array_equal(as_calibration(model, "ab").tokens, [model.tokenizer.encode("ab")])
    with pytest.raises(QjaxError, match=r"has no tokenizer\.json"):
        as_calibration(model._replace(tokenizer=None), ["ab"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ids": ROWS}, "a dictionary with ids; expected 'input_ids'"),
        ({"input_ids": 3}, "'input_ids' is of type int; expected tokens"),
        ({"input_ids": ROWS, "attention_mask": [[1, 1], [1, 1]]}, "different shapes"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "tokens in the middle"),
        ([[1, 2], [0.5]], "list of integer tokens"),
        ([[1, 2], ["a"]], "list of integer tokens"),
        ([1, [2, 3]], "no array"),
        ([[], []], r"of shape \(2, 0\)"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "hold no token"),
        ([[1, 2], [300]], "vocabulary of 257"),
        ([""], "hold no token"),
        ([], r"of shape \(0,\)"),
        (7, r"of shape \(\)"),
    ],
)
def test_samples_that_are_none(model, given, named):
    with pytest.raises(QjaxError, match=named):
        as_calibration(model, given)
