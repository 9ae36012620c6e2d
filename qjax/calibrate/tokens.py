"""Calibration tokens: windows drawn at random from a text, or given as they are.

The text's documents are joined, tokenized and cut into windows one after the other; `windows` of them are drawn without
replacement by a JAX key made from the seed, a tenth of them from one document at most where the others have enough. GPTQ's code
draws 128 windows of 2048 tokens from C4; so does the default here, with windows that fit the model.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.calibrate.samples import tokens_of
from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus, article_starts, is_spec, load_corpus
from qjax.evaluate.kept_tokens import encode_kept
from qjax.evaluate.windows import within_share
from qjax.models.compute import require_compute
from qjax.models.model import Model, require_model

WINDOWS, WINDOW = 128, 2048
BATCH_TOKENS = {"cpu": 2048, "gpu": 16384, "tpu": 16384}  # calibration tokens run at a time


class Calibration(NamedTuple):
    """tokens (windows, time) int32; weights of the same shape, how much each counts (0 leaves it out), None for all equal.
    name, source: where they are from, and the fingerprint of that text. compute: what the model is run in, float32 or bfloat16
    (`models/compute.py`), None for the device's own; statistics and rounding are float32 in any case.
    """

    tokens: Int[np.ndarray, "windows time"]
    weights: Float[np.ndarray, "windows time"] | None = None
    name: str = "given tokens"
    source: str = ""
    compute: str | None = None

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of tokens and weights."""
        total = hashlib.sha256(repr(self.tokens.shape).encode() + np.asarray(self.tokens, np.int32).tobytes())
        if self.weights is not None:
            total.update(np.asarray(self.weights, np.float32).tobytes())
        return total.hexdigest()[:16]


def weighted_batches(calibration: Calibration) -> Iterator[tuple[Array, Array | None]]:
    """(tokens, weights), all of one shape: the last is filled up with windows that do not count. Weights are None where every
    token counts as one, so that nothing is multiplied by them.
    """
    tokens, weights = calibration.tokens, calibration.weights
    size = min(len(tokens), max(1, BATCH_TOKENS[jax.default_backend()] // tokens.shape[1]))
    filling = -len(tokens) % size
    weights = np.ones(tokens.shape, np.float32) if weights is None and filling else weights
    if filling:
        tokens, weights = (np.pad(each, ((0, filling), (0, 0))) for each in (tokens, weights))
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        yield jnp.asarray(tokens[part]), None if weights is None else jnp.asarray(weights[part])


def load_calibration(
    model: Model,
    corpus: str | Corpus,
    *,
    windows: int = WINDOWS,
    window: int = WINDOW,
    seed: int = 0,
    compute: str | None = None,
) -> Calibration:
    """Windows of a corpus's calibration part (a `Corpus` or a name such as "python-docs", "text:PATH"), drawn by `seed`.

    window: tokens, cut to the model's context. compute: as in `Calibration`. Raises QjaxError for an unknown corpus or compute
    type, a model without tokenizer, and a text with fewer windows than asked for.
    """
    require_model("load_calibration", model)
    require_compute(compute)
    corpus = load_corpus(corpus, "calibration") if isinstance(corpus, str) else corpus
    if model.tokenizer is None:
        raise QjaxError(f"{model.name} has no tokenizer.json, which calibrating on text needs; give tokens instead")
    if windows < 1 or window < 1:
        raise QjaxError(f"calibration: expected at least one window of one token, got {windows} of {window}")
    window = min(window, model.config.context)
    ids, nbytes = encode_kept(model.tokenizer, corpus.separator.join(corpus.documents))
    available = len(ids) // window
    if available < windows:
        raise QjaxError(
            f"calibration text {corpus.name} has {len(ids):,} tokens, {available} windows of {window}, but {windows} were "
            "asked for; give more text, or fewer or shorter windows"
        )
    order = np.asarray(jax.random.choice(jax.random.key(seed), available, (available,), replace=False))
    middles = (np.cumsum(nbytes) - nbytes)[window // 2 :: window][:available]
    documents = np.searchsorted(article_starts(corpus), middles, "right") - 1
    chosen = within_share(order, documents, windows)[:windows]
    tokens = np.asarray(ids[: available * window]).reshape(available, window)[chosen]
    return Calibration(tokens.astype(np.int32), None, corpus.name, corpus.fingerprint, compute)


def as_calibration(model: Model, calibration: object) -> Calibration:
    """Tokens, samples (`samples.py`), a `Corpus` or a `Calibration`, checked against a model; raises QjaxError for wrong
    shapes, types and tokens.
    """
    if isinstance(calibration, str) and is_spec(calibration):
        raise QjaxError(f"calibration: {calibration!r} names a text; give qjax.load_calibration(model, {calibration!r})")
    if isinstance(calibration, Corpus):
        calibration = load_calibration(model, calibration)
    if not isinstance(calibration, Calibration):
        calibration = Calibration(*tokens_of(model, calibration))
    require_compute(calibration.compute)
    tokens, weights = np.asarray(calibration.tokens), calibration.weights
    config = model.config
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise QjaxError(f"calibration: expected integer tokens (windows, time), got {tokens.dtype} of shape {tokens.shape}")
    if tokens.shape[1] > config.context:
        raise QjaxError(
            f"calibration: windows of {tokens.shape[1]} tokens are longer than the context of {model.name}, {config.context}"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocabulary_size:
        raise QjaxError(
            f"calibration: tokens from {tokens.min()} to {tokens.max()}, but {model.name} has a vocabulary of "
            f"{config.vocabulary_size}; was another model's tokenizer used?"
        )
    if weights is not None:
        (weights,) = as_weights([weights], tokens.shape)
    return calibration._replace(tokens=tokens.astype(np.int32), weights=weights)


def as_weights(given: Iterable[object], shape: tuple[int, ...] | None = None) -> list[Float[np.ndarray, "..."]]:
    """Weights of tokens as float32 arrays, checked; shape: the tokens', where it is known. Raises QjaxError."""
    try:
        found = [np.asarray(each, np.float32) for each in given]
    except (TypeError, ValueError):
        raise QjaxError("calibration: weights must be arrays of numbers") from None
    fit = all(np.isfinite(each).all() and (each >= 0).all() and shape in (None, each.shape) for each in found)
    if not fit or not any(each.any() for each in found):
        expected = "" if shape is None else f" and of the tokens' shape {shape}"
        shapes = ", ".join(str(each.shape) for each in found)
        raise QjaxError(f"calibration: weights must be finite, not negative, not all 0{expected}, got shape {shapes}")
    return found
