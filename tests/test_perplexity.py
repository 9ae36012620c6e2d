"""Perplexity: conventions against brute-force oracles, invariance to batching, errors."""

import math

import jax
import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.evaluate import perplexity as module
from qjax.evaluate.corpora import Corpus, article_starts
from qjax.evaluate.perplexity import perplexity
from qjax.evaluate.statistics import estimate
from qjax.evaluate.windows import corpus_windows, cut_windows, parse_convention, spread_windows
from qjax.models.model import apply

from .conftest import byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïveté, 漢字! " * 3
CORPUS = Corpus("test", (TEXT[:50], TEXT[50:]), "0")


def log_probabilities(model, asked: list[tuple[list[int], int]]) -> list[float]:
    """-ln p(token | context) of every (context, token), each in a row of its own, filled up behind what is read."""
    rows = np.zeros((64, 32), np.int32)  # one shape, one compilation
    for row, (context, _) in zip(rows, asked, strict=False):
        row[: len(context)] = context
    logits = np.asarray(apply(model, rows), np.float64)
    found = [(logits[i, len(context) - 1], token) for i, (context, token) in enumerate(asked)]
    return [float(np.log(np.exp(each).sum()) - each[token]) for each, token in found]


def oracle(ids: list[int], convention: str, bos: int | None) -> list[tuple[list[int], int]]:
    """(context, token) of every loss in the order of the text, by the definition of each convention."""
    kind, *sizes = convention.removesuffix("-bos").rsplit("-", 2 if convention.startswith("sliding") else 1)
    window = int(sizes[0])
    losses = []
    if kind == "sliding":
        stride, done, start = int(sizes[1]), 1, 0
        while done < len(ids):
            stop = min(start + window, len(ids))
            losses += [(ids[start:t], ids[t]) for t in range(max(done, start + 1), stop)]
            done, start = stop, start + stride
        return losses
    prefix = [bos] if convention.endswith("-bos") else []
    step = window - len(prefix)
    for start in range(0, len(ids) - step + 1, step):
        piece = prefix + ids[start : start + step]
        if kind == "llama.cpp" and bos is not None:
            piece = [bos, *piece[1:]]
        first = window // 2 + 1 if kind == "llama.cpp" else 1
        losses += [(piece[:t], piece[t]) for t in range(first, window)]
    return losses


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "name", ["windows-32", "windows-16", "windows-16-bos", "sliding-24-7", "sliding-16-16", "llama.cpp-16"]
)
def test_conventions_equal_their_definition(tiny_model, name, bos):
    if name.endswith("-bos") and not bos:
        pytest.skip("needs a beginning of text")
    tokenizer = byte_tokenizer(bos)
    model = tiny_model._replace(tokenizer=tokenizer)
    text = TEXT[:60]
    ids = tokenizer.encode(text).tolist()
    if bos and not name.endswith("-bos"):
        ids = [256, *ids]
    expected = log_probabilities(model, oracle(ids, name, 256 if bos else None))
    result = perplexity(model, Corpus("test", (text,), "0"), name)
    assert result.tokens == len(expected)
    assert result.nll == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert result.convention == name


def test_documents_are_joined_by_their_separator(tiny_model):
    joined = Corpus("test", ("\n\n".join(CORPUS.documents),), "0")
    assert perplexity(tiny_model, CORPUS, "windows-16").nll == perplexity(tiny_model, joined, "windows-16").nll
    blank = CORPUS._replace(separator=" ")
    joined = Corpus("test", (" ".join(CORPUS.documents),), "0")
    assert perplexity(tiny_model, blank, "windows-16").nll == perplexity(tiny_model, joined, "windows-16").nll


def test_bytes_are_those_of_the_scored_tokens(tiny_model):
    ids, nbytes = tiny_model.tokenizer.encode_with_bytes(TEXT)
    windows = cut_windows(ids, nbytes, parse_convention("sliding-16-4"), None, False)
    # Sliding windows score every token but the first exactly once.
    assert windows.nbytes.sum() == len(TEXT.encode()) - nbytes[0]
    assert windows.scored.sum() == len(ids) - 1
    result = perplexity(tiny_model, CORPUS, "sliding-16-4")
    assert result.bits_per_byte == pytest.approx(result.nll * result.tokens / math.log(2) / result.nbytes)


def test_windows_are_clipped_to_the_context_and_the_name_says_so(tiny_model):
    result = perplexity(tiny_model, CORPUS, "gptq-2048")
    assert result.convention == "windows-32"
    assert set(result.window_tokens) == {31}
    assert result.nll_stderr == pytest.approx(np.std(np.array(result.window_nll) / 31, ddof=1) / len(result.window_nll) ** 0.5)
    assert result.stderr == pytest.approx(result.value * result.nll_stderr)  # of exp, to first order


@pytest.mark.parametrize("tokens_at_once", [32, 96, 4096])
def test_batching_does_not_change_losses(tiny_model, monkeypatch, tokens_at_once):
    windows = corpus_windows(tiny_model, CORPUS, parse_convention("windows-32"))
    whole = module.score(tiny_model, windows.tokens)
    monkeypatch.setitem(module.BATCH_TOKENS, "cpu", tokens_at_once)
    seen = []
    losses = module.score(tiny_model, windows.tokens, on_batch=lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose(losses, whole, atol=1e-5)
    assert seen[-1] == (len(windows.tokens),) * 2
    assert np.all(losses[:, 0] == 0)


def test_losses_are_those_of_the_logits(tiny_model):
    tokens = jax.random.randint(jax.random.key(0), (5, 32), 0, 257)
    logits = np.asarray(apply(tiny_model, tokens), np.float64)
    losses = module.score(tiny_model, np.asarray(tokens))
    target = np.take_along_axis(logits[:, :-1], np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses[:, 1:], np.log(np.exp(logits[:, :-1]).sum(-1)) - target, atol=1e-5)


def test_windows_know_their_document(tiny_model):
    """Bytes are tokens here; a window is of the document that most of its scored tokens are from."""
    corpus = Corpus("test", ("a" * 40, "b" * 3, "c" * 30), "0")
    assert list(article_starts(corpus)) == [0, 42, 47]
    windows = corpus_windows(tiny_model, corpus, parse_convention("windows-16"))
    assert windows.documents.tolist() == [0, 0, 0, 2]  # of the third 8 tokens are the first document's and blank lines
    assert corpus_windows(tiny_model, corpus, parse_convention("windows-8")).documents.tolist() == [0] * 5 + [1] + [2] * 3
    result = perplexity(tiny_model, corpus, "windows-8")
    assert result.window_documents == (0,) * 5 + (1,) + (2,) * 3
    expected = estimate(np.array(result.window_nll), np.array(result.window_tokens), np.array(result.window_documents))
    assert (result.nll, result.nll_stderr) == expected[:2]
    text = " \n = One = \n\n a\n = = Part = = \n b\n = Two = \n c"
    lines = Corpus("wikitext2", tuple(text.split("\n")), "0", "\n", lines=True)
    assert [text.encode()[at:].split(b"\n")[0] for at in article_starts(lines)] == [b" ", b" = One = ", b" = Two = "]
    assert len(article_starts(lines._replace(lines=False))) == len(lines.documents)
    stories = Corpus("text:x", ("né<|endoftext|>two<|endoftext|>three",), "0")
    assert list(article_starts(stories)) == [0, 3, 3 + 13 + 3]


def test_a_draw_of_windows_is_spread_over_the_documents():
    documents = np.repeat(np.arange(20), [60, *[4] * 19])
    drawn = [spread_windows(documents, 40, seed) for seed in range(20)]
    assert all(len(set(each.tolist())) == 40 and (np.diff(each) > 0).all() for each in drawn)
    assert all(np.bincount(documents[each]).max() <= 4 for each in drawn)  # a tenth
    assert all(len(set(documents[each].tolist())) == 20 for each in drawn)
    assert len({tuple(each) for each in drawn}) > 15
    assert (spread_windows(documents, 40, 3) == drawn[3]).all()
    one = spread_windows(np.zeros(100, int), 10, 0)  # there are no others
    assert set(np.diff(one).tolist()) == {10}
    taken = np.bincount(np.concatenate([spread_windows(np.arange(30), 10, seed) for seed in range(300)]), minlength=30)
    assert taken.min() > 60  # of 100 expected: every window has its turn


@pytest.mark.parametrize(
    "name", ["windows", "windows-2", "windows-16-4", "sliding-16", "sliding-16-17", "llama.cpp-16-bos", "ppl"]
)
def test_bad_conventions(name):
    with pytest.raises(QjaxError, match="allowed are windows-N"):
        parse_convention(name)


def test_names_round_trip():
    for name in ("windows-2048", "windows-512-bos", "sliding-512-128", "llama.cpp-512"):
        assert str(parse_convention(name)) == name


def test_errors(tiny_model):
    with pytest.raises(QjaxError, match=r"test: the text has 5 tokens, fewer than one window of 32"):
        perplexity(tiny_model, Corpus("test", ("short",), "0"), "windows-2048")
    with pytest.raises(QjaxError, match="no beginning-of-text"):
        perplexity(tiny_model, CORPUS, "windows-16-bos")
    with pytest.raises(QjaxError, match=r"no tokenizer\.json"):
        perplexity(tiny_model._replace(tokenizer=None), CORPUS)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny_model.params)
    with pytest.raises(QjaxError, match="not finite"):
        perplexity(tiny_model._replace(params=broken), CORPUS, "windows-16")
    with pytest.raises(QjaxError, match="context"):
        apply(tiny_model, np.zeros((1, 33), np.int32))
