"""Divergence of a model from a baseline, mostly itself unquantized: what perplexity, a mean of gains and losses, does not show.

Over the scored tokens of a convention's windows, P the baseline's distribution of the next token and Q the model's:

    kl       KL(P || Q) = sum over the vocabulary of P ln(P / Q), nats: mean, median and 99th percentile
    top1     share of tokens whose likeliest next token is the same
    rms_dp   root mean square of Q(true token) - P(true token)

as llama.cpp's perplexity tool defines them. Standard errors take documents as independent, as perplexity's do.
Flips of answers are in `statistics.py`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.evaluate.perplexity import batches_of
from qjax.evaluate.states import Through
from qjax.evaluate.statistics import estimate
from qjax.evaluate.windows import Convention, Windows, corpus_windows, parse_convention
from qjax.models import vocabulary
from qjax.models.compute import compute_name
from qjax.models.model import Model, head_of, hidden_batches, named, require_model, runnable
from qjax.numbers import require_finite

LOGITS_AT_ONCE = {"cpu": 2**22, "gpu": 2**28, "tpu": 2**28}  # of each model's: on a CPU they fit into its cache
WHOLE_LOGITS = 2**26  # where a head has all words or none: fewer would read a large one once for every few tokens


class Divergence(NamedTuple):
    """Distance of a model from its baseline over the scored tokens; KL in nats, rms_dp a probability."""

    kl: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    top1: float
    top1_stderr: float
    rms_dp: float
    rms_dp_stderr: float
    tokens: int


def divergence(
    model: Model,
    baseline: Model,
    corpus: str | Corpus,
    convention: str | Convention = "windows-2048",
    *,
    max_windows: int | None = None,
    seed: int = 0,
    packed: bool = False,
    compute: str | None = None,
    batch_tokens: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Divergence:
    """Divergence of a model from a baseline with the same vocabulary, on the windows that perplexity would measure, both
    computed in one type: `compute`, or the model's.

    Raises QjaxError for models of different configurations, divergences that are not finite, and whatever `perplexity` raises.
    """
    require_model("divergence", model)
    require_model("divergence", baseline)
    corpus = load_corpus(corpus) if isinstance(corpus, str) else corpus
    windows = corpus_windows(model, corpus, parse_convention(convention).clipped(model.config.context), max_windows, seed=seed)
    return measure_divergence(
        model, baseline, windows, packed=packed, compute=compute, batch_tokens=batch_tokens, on_batch=on_batch
    )


def measure_divergence(
    model: Model,
    baseline: Model,
    windows: Windows,
    *,
    packed: bool = False,
    compute: str | None = None,
    batch_tokens: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    through: Through = iter,
    through_baseline: Through = iter,
) -> Divergence:
    """`divergence` on windows that are cut already. through, through_baseline: what the hidden states of the two go through
    (`perplexity.score`).
    """
    if model.config.vocabulary_size != baseline.config.vocabulary_size or model.config.context != baseline.config.context:
        raise QjaxError(f"divergence of {model.name} from {baseline.name}: expected models of one vocabulary and context")
    model = runnable(model, packed, compute)
    baseline = runnable(baseline, compute=compute_name(model.compute))
    pieces, total, found = batches_of(windows.tokens, batch_tokens), len(windows.tokens), []
    ours, theirs = (hidden_batches(each, ((piece,) for piece in pieces)) for each in (model, baseline))
    ours, theirs = through(ours), through_baseline(theirs)
    for piece, one, other in zip(pieces, ours, theirs, strict=True):
        found.append(_compare(one, other, piece[:, 1:]))
        if len(found) > 1:
            found[-2] = np.asarray(found[-2])  # waits for the batch before this one, so that one is always in flight
        on_batch(min(len(found) * len(piece), total), total)
    kl, same, change = np.concatenate([np.asarray(part) for part in found], axis=1)[:, :total].astype(np.float64)
    scored = windows.scored[:, 1:]
    pair = f"{named(model)} against {named(baseline)}"
    require_finite(np.stack([kl[scored], change[scored]]), "divergences", model=pair)
    return summarise(kl, same, change, scored, windows.documents)


def _compare(ours: tuple[Model, jax.Array], theirs: tuple[Model, jax.Array], targets: jax.Array) -> jax.Array:
    """(3, batch, time): KL, whether the likeliest tokens agree, change of the true token's probability.

    ours, theirs: a model whose head is in memory, and hidden states (batch, time + 1, hidden) before it.
    """
    heads = tuple(head_of(model) for model, _ in (ours, theirs))
    states = [x[:, :-1].reshape(targets.size, -1) for _, x in (ours, theirs)]
    at_once = LOGITS_AT_ONCE[jax.default_backend()]
    words = max(vocabulary.words_at_once(head, targets.size, at_once) for head in heads)
    tokens = targets.size if all(head.in_pieces for head in heads) else max(1, WHOLE_LOGITS // words)
    flat, parts = targets.reshape(-1), []
    for start in range(0, targets.size, tokens):
        piece = slice(start, start + tokens)
        parts.append(vocabulary.distances(heads, tuple(x[piece] for x in states), flat[piece], words=words))
    return jnp.concatenate(parts, axis=1).reshape(3, *targets.shape)


def summarise(
    kl: np.ndarray, same: np.ndarray, change: np.ndarray, scored: np.ndarray, documents: np.ndarray | None = None
) -> Divergence:
    """The result of per-token figures, all (windows, time), finite where they are scored.

    documents: of each window (`statistics.estimate`).
    """
    counts = scored.sum(axis=1)
    kl = np.maximum(kl, 0)  # rounding can leave a negative zero-ish sum

    def mean(values: np.ndarray) -> tuple[float, float]:
        totals = np.sum(np.where(scored, values, 0), axis=1)
        found = estimate(totals, counts, documents)
        return found.value, found.stderr

    tokens = np.sort(kl[scored])
    (average, error), (top1, top1_error), (square, square_error) = mean(kl), mean(same), mean(change**2)
    return Divergence(
        kl=average,
        kl_stderr=error,
        kl_median=_quantile(tokens, 0.5),
        kl_p99=_quantile(tokens, 0.99),
        top1=top1,
        top1_stderr=top1_error,
        rms_dp=math.sqrt(square),
        rms_dp_stderr=square_error / (2 * math.sqrt(square)) if square else 0.0,  # of a square root, to first order
        tokens=len(tokens),
    )


def _quantile(ordered: np.ndarray, fraction: float) -> float:
    """Linear between neighbours."""
    place = fraction * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return float(low if low == high else low + (place % 1) * (high - low))
