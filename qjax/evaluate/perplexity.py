"""Perplexity of a model on a text cut into windows by a named convention (`windows.py`).

    perplexity = exp(mean over scored tokens of -ln p(token | the tokens before it in its window))

Its standard error takes documents as independent (`statistics.py`).
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.evaluate.states import Through
from qjax.evaluate.statistics import autocorrelation, jackknife
from qjax.evaluate.windows import Convention, Windows, corpus_windows, parse_convention
from qjax.models.model import Model, hidden_batches, losses, named, require_model, runnable
from qjax.numbers import require_finite

# Tokens run at a time. On a CPU a small batch keeps the activations in its cache, which is twice as fast for small models.
BATCH_TOKENS = {"cpu": 1024, "gpu": 16384, "tpu": 16384}


class PerplexityResult(NamedTuple):
    """Perplexity and what it is made of; nll in nats per token, stderr of `value` and `nll` over documents."""

    value: float
    stderr: float
    nll: float
    nll_stderr: float
    bits_per_byte: float
    tokens: int
    nbytes: int
    window_nll: tuple[float, ...]  # summed over a window's scored tokens
    window_tokens: tuple[int, ...]
    window_documents: tuple[int, ...]
    autocorrelation: float  # lag-1, of the loss of consecutive windows; nan of fewer than three
    convention: str
    corpus: str
    fingerprint: str
    seconds: float
    tokens_per_second: float  # tokens run (not only scored) a second


def perplexity(
    model: Model,
    corpus: str | Corpus,
    convention: str | Convention = "windows-2048",
    *,
    max_windows: int | None = None,
    seed: int = 0,
    packed: bool = False,
    compute: str | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Perplexity of a model on a corpus (a `Corpus` or a name such as "python-docs", "text:PATH").

    max_windows: so many windows, spread over the text from a place that `seed` draws. packed: multiply with packed kernels as
    they are; else every kernel is decoded once first, so that all recipes of a sweep share one compiled forward pass.
    compute: float32 or bfloat16 (`models/compute.py`), None for the model's or else the device's. on_batch(done, total)
    reports windows. Raises QjaxError for an unknown convention, corpus or compute type, a model without tokenizer, a text
    shorter than a window, and losses that are not finite.
    """
    require_model("perplexity", model)
    corpus = load_corpus(corpus) if isinstance(corpus, str) else corpus
    convention = parse_convention(convention).clipped(model.config.context)
    windows = corpus_windows(model, corpus, convention, max_windows, seed=seed)
    return measure(model, windows, convention, corpus, packed=packed, compute=compute, on_batch=on_batch)


def measure(
    model: Model,
    windows: Windows,
    convention: Convention,
    corpus: Corpus,
    *,
    packed: bool = False,
    compute: str | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    through: Through = iter,
) -> PerplexityResult:
    """`perplexity` of windows that `corpus_windows` cut, for callers that measure many models on the same ones.

    through: as in `score`. Raises NotFiniteError for a scored token's loss that is NaN or infinite, and for a perplexity beyond
    all numbers.
    """
    model = runnable(model, packed, compute)
    score(model, windows.tokens[: _batch_size(windows.tokens)], packed=packed)  # compiles; the clock measures evaluation alone
    started = time.perf_counter()
    token_nll = score(model, windows.tokens, packed=packed, on_batch=on_batch, through=through)
    seconds = time.perf_counter() - started
    of = f"{corpus.name}, {convention}"
    require_finite(token_nll[windows.scored], f"losses on {of}", model=named(model))
    result = summarise(token_nll, windows, convention, corpus, seconds)
    require_finite(result.value, f"perplexities (exp of {result.nll:.0f} nats) on {of}", model=named(model))
    return result


def score(
    model: Model,
    tokens: np.ndarray,
    *,
    packed: bool = False,
    compute: str | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    through: Through = iter,
) -> np.ndarray:
    """-ln p of every token given those before it: (windows, window) int32 -> float32 of the same shape, column 0 is 0.

    All windows go through one part of a lazy model after the other (`hidden_batches`). through: what their hidden states go
    through, `States.through` where other measurements read them too.
    """
    model = runnable(model, packed, compute)
    pieces, rows = batches_of(tokens), []
    total, batch = len(tokens), len(pieces[0])
    found = through(hidden_batches(model, ((piece,) for piece in pieces)))
    for piece, (head, x) in zip(pieces, found, strict=True):
        rows.append(losses(head, x[:, :-1], piece[:, 1:]))
        if len(rows) > 1:
            rows[-2] = np.asarray(rows[-2])  # waits for the batch before this one, so that one is always in flight
        on_batch(min(len(rows) * batch, total), total)
    nll = np.concatenate([np.asarray(row) for row in rows])[:total]
    return np.pad(nll, ((0, 0), (1, 0)))


def batches_of(tokens: np.ndarray, batch_tokens: int | None = None) -> list[jax.Array]:
    """Windows (windows, window) in batches (batch, window), as they are run; the last one is filled up with the last window."""
    batch = _batch_size(tokens, batch_tokens)
    padded = np.pad(tokens, ((0, -len(tokens) % batch), (0, 0)), mode="edge")  # others might have other outliers (LLM.int8())
    return [jnp.asarray(padded[start : start + batch]) for start in range(0, len(padded), batch)]


def _batch_size(tokens: np.ndarray, batch_tokens: int | None = None) -> int:
    total, length = tokens.shape
    return min(max(1, (batch_tokens or BATCH_TOKENS[jax.default_backend()]) // length), total)


def summarise(
    token_nll: np.ndarray, windows: Windows, convention: Convention, corpus: Corpus, seconds: float
) -> PerplexityResult:
    """The result of per-token losses, finite on scored tokens, summed in float64."""
    window_nll = np.sum(np.where(windows.scored, token_nll, 0), axis=1, dtype=np.float64)
    counts = windows.scored.sum(axis=1)
    nll, nll_stderr, _ = jackknife(window_nll, counts, windows.documents)
    value = math.exp(nll) if nll < 700 else math.inf
    return PerplexityResult(
        value=value,
        stderr=value * nll_stderr,
        nll=nll,
        nll_stderr=nll_stderr,
        bits_per_byte=float(window_nll.sum() / math.log(2) / max(1, windows.nbytes.sum())),
        tokens=int(counts.sum()),
        nbytes=int(windows.nbytes.sum()),
        window_nll=tuple(window_nll.tolist()),
        window_tokens=tuple(counts.tolist()),
        window_documents=tuple(windows.documents.tolist()),
        autocorrelation=autocorrelation(window_nll - nll * counts),
        convention=str(convention),
        corpus=corpus.name,
        fingerprint=corpus.fingerprint,
        seconds=seconds,
        tokens_per_second=windows.tokens.size / seconds,
    )
