"""Perplexity under a named convention.

    perplexity = exp(mean over scored tokens of -ln p(token | the tokens before it in its window))

How a text is joined, cut into windows and scored changes the figure more than a 4-bit weight does, so it has a name,
which every row carries, and figures of different conventions are never put in one table:

    windows-2048       documents joined by the corpus's separator; non-overlapping windows; every token but a window's first is
                       scored; the tail is dropped. GPTQ's and most papers' WikiText-2 (Frantar et al. 2022, 2210.17323)
    windows-2048-bos   the same with the beginning-of-text token put before each window
    sliding-2048-512   windows every 512 tokens, each scores what no earlier window scored (Hugging Face's documentation)
    llama.cpp-512      non-overlapping windows, the first token replaced by the beginning of text where the tokenizer adds
                       one, the second half scored (llama.cpp's perplexity tool)

A window longer than the model's context is cut to it, and the name says so: windows-2048 on a model of 512 tokens is
windows-512. Without -bos one beginning of text stands before the whole text where the tokenizer puts it, as in the
originals. The standard error treats windows as independent clusters (ratio estimator).
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.evaluate.statistics import ratio_stderr
from qjax.models.model import Model, hidden_batches, losses, named, runnable
from qjax.numbers import require_finite

# Tokens run at a time. On a CPU a small batch keeps the activations in its cache, which is twice as fast for small models.
BATCH_TOKENS = {"cpu": 1024, "gpu": 16384, "tpu": 16384}


@dataclasses.dataclass(frozen=True)
class Convention:
    """How perplexity is measured; build it with `parse_convention`. window, stride: tokens; stride 0 where none applies."""

    kind: str  # windows | sliding | llama.cpp
    window: int
    stride: int = 0
    bos: bool = False  # before each window

    def __str__(self) -> str:
        stride = f"-{self.stride}" if self.kind == "sliding" else ""
        return f"{self.kind}-{self.window}{stride}{'-bos' if self.bos else ''}"

    def clipped(self, context: int) -> "Convention":
        """The same convention with windows that fit a model's context."""
        window = min(self.window, context)
        return dataclasses.replace(self, window=window, stride=min(self.stride, window))


def parse_convention(text: str | Convention) -> Convention:
    """The convention named `text`; raises QjaxError that lists what is allowed. "gptq-N" is another name of "windows-N"."""
    if isinstance(text, Convention):
        return text
    match = re.fullmatch(r"(windows|gptq|sliding|llama\.cpp)-(\d+)(?:-(\d+))?(-bos)?", text.strip())
    if match:
        kind, window, stride, bos = match.groups()
        kind = "windows" if kind == "gptq" else kind
        sizes = int(window) >= 4 and (1 <= int(stride) <= int(window) if stride else True)
        if sizes and (stride is not None) == (kind == "sliding") and not (bos and kind != "windows"):
            return Convention(kind, int(window), int(stride or 0), bos is not None)
    raise QjaxError(
        f"convention {text!r}: allowed are windows-N, windows-N-bos, sliding-N-STRIDE and llama.cpp-N, "
        "with windows of N >= 4 tokens and a stride of 1 to N"
    )


class Windows(NamedTuple):
    """Tokens to run and which of them to score."""

    tokens: np.ndarray  # (windows, window) int32
    scored: np.ndarray  # (windows, window) bool; scored[i, t]: the prediction of tokens[i, t] counts
    nbytes: np.ndarray  # (windows,) UTF-8 bytes of the scored tokens


class PerplexityResult(NamedTuple):
    """Perplexity and what it is made of; nll in nats per token, stderr of `value` and `nll` over windows."""

    value: float
    stderr: float
    nll: float
    nll_stderr: float
    bits_per_byte: float
    tokens: int
    nbytes: int
    window_nll: tuple[float, ...]  # summed over a window's scored tokens
    window_tokens: tuple[int, ...]
    convention: str
    corpus: str
    fingerprint: str
    seconds: float
    tokens_per_second: float  # tokens run (not only scored) a second


def cut_windows(ids: np.ndarray, nbytes: np.ndarray, convention: Convention, bos: int | None, adds_bos: bool) -> Windows:
    """Cuts token ids (with the bytes each stands for) into a convention's windows.

    Raises QjaxError when the text is shorter than a window or the convention needs a beginning-of-text token and there is none.
    """
    if convention.bos and bos is None:
        raise QjaxError(f"convention {convention}: the tokenizer has no beginning-of-text token; use windows-N")
    window = convention.window - convention.bos
    if adds_bos and not convention.bos:
        ids, nbytes = np.concatenate([[bos], ids]), np.concatenate([[0], nbytes])
    if len(ids) < window:
        raise QjaxError(
            f"the text has {len(ids)} tokens, fewer than one window of {window} ({convention}); "
            f"give more text or a smaller window"
        )
    if convention.kind == "sliding":
        starts = np.arange(math.ceil((len(ids) - window) / convention.stride) + 1) * convention.stride
    else:
        starts = np.arange(len(ids) // window) * window
    index = starts[:, None] + np.arange(window)
    scored = index < len(ids)  # the last sliding window may run over the end
    index = np.minimum(index, len(ids) - 1)
    tokens = ids[index].astype(np.int32)
    if convention.kind == "sliding":
        scored[1:] &= index[1:] > index[:-1, -1:]
    if convention.kind == "llama.cpp":
        scored[:, : window // 2 + 1] = False
        if adds_bos:
            tokens[:, 0] = bos
    if convention.bos:
        tokens = np.concatenate([np.full((len(tokens), 1), bos, np.int32), tokens], axis=1)
        scored = np.concatenate([np.zeros((len(scored), 1), bool), scored], axis=1)
        return Windows(tokens, scored, nbytes[index].sum(axis=1))
    scored[:, 0] = False
    return Windows(tokens, scored, (nbytes[index] * scored).sum(axis=1))


def corpus_windows(model: Model, corpus: Corpus, convention: Convention, max_windows: int | None = None) -> Windows:
    """A corpus as windows of a model's tokens; the first `max_windows` of them."""
    if max_windows is not None and max_windows < 1:
        raise QjaxError(f"max_windows {max_windows}: expected at least 1, or None for all")
    if model.tokenizer is None:
        raise QjaxError(f"{model.name} has no tokenizer.json, which measuring perplexity on text needs")
    ids, nbytes = model.tokenizer.encode_with_bytes(corpus.separator.join(corpus.documents))
    try:
        windows = cut_windows(ids, nbytes, convention, model.tokenizer.bos_id, model.tokenizer.adds_bos)
    except QjaxError as error:
        raise QjaxError(f"{corpus.name}: {error}") from None
    return windows if max_windows is None else Windows(*(field[:max_windows] for field in windows))


def perplexity(
    model: Model,
    corpus: str | Corpus,
    convention: str | Convention = "windows-2048",
    *,
    max_windows: int | None = None,
    packed: bool = False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Perplexity of a model on a corpus (a `Corpus` or a name such as "python-docs", "text:PATH").

    packed: multiply with packed kernels as they are; else every kernel is decoded once first, so that all recipes of a
    sweep share one compiled forward pass. on_batch(done, total) reports windows. Raises QjaxError for an unknown convention
    or corpus, a model without tokenizer, a text shorter than a window, and losses that are not finite.
    """
    corpus = load_corpus(corpus) if isinstance(corpus, str) else corpus
    convention = parse_convention(convention).clipped(model.config.context)
    windows = corpus_windows(model, corpus, convention, max_windows)
    return measure(model, windows, convention, corpus, packed=packed, on_batch=on_batch)


def measure(
    model: Model,
    windows: Windows,
    convention: Convention,
    corpus: Corpus,
    *,
    packed: bool = False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """`perplexity` of windows that `corpus_windows` cut, for callers that measure many models on the same ones.

    Raises NotFiniteError for a scored token's loss that is NaN or infinite, and for a perplexity beyond all numbers.
    """
    model = runnable(model, packed)
    score(model, windows.tokens[: _batch_size(windows.tokens)], packed=packed)  # compiles; the clock measures evaluation alone
    started = time.perf_counter()
    token_nll = score(model, windows.tokens, packed=packed, on_batch=on_batch)
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
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """-ln p of every token given those before it: (windows, window) int32 -> float32 of the same shape, column 0 is 0.

    All windows go through one part of a lazy model after the other (`hidden_batches`).
    """
    model = runnable(model, packed)
    total, length = tokens.shape
    batch = _batch_size(tokens)
    padded = np.concatenate([tokens, np.zeros((-total % batch, length), np.int32)])
    pieces = [jnp.asarray(padded[start : start + batch]) for start in range(0, len(padded), batch)]
    rows = []
    for piece, (head, x) in zip(pieces, hidden_batches(model, ((piece,) for piece in pieces)), strict=True):
        rows.append(losses(head, x[:, :-1], piece[:, 1:]))
        if len(rows) > 1:
            rows[-2] = np.asarray(rows[-2])  # waits for the batch before this one, so that one is always in flight
        on_batch(min(len(rows) * batch, total), total)
    nll = np.concatenate([np.asarray(row) for row in rows])[:total]
    return np.pad(nll, ((0, 0), (1, 0)))


def _batch_size(tokens: np.ndarray) -> int:
    total, length = tokens.shape
    return min(max(1, BATCH_TOKENS[jax.default_backend()] // length), total)


def summarise(
    token_nll: np.ndarray, windows: Windows, convention: Convention, corpus: Corpus, seconds: float
) -> PerplexityResult:
    """The result of per-token losses, finite on scored tokens, summed in float64."""
    window_nll = np.sum(np.where(windows.scored, token_nll, 0), axis=1, dtype=np.float64)
    counts = windows.scored.sum(axis=1)
    nll = float(window_nll.sum() / counts.sum())
    nll_stderr = ratio_stderr(window_nll, counts)
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
        convention=str(convention),
        corpus=corpus.name,
        fingerprint=corpus.fingerprint,
        seconds=seconds,
        tokens_per_second=windows.tokens.size / seconds,
    )
