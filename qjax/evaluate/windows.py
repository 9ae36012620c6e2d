"""A text as windows of tokens, by a named convention.

How a text is joined, cut into windows and scored changes perplexity more than a 4-bit weight does, so it has a name,
which every row carries, and figures of different conventions are never put in one table:

    windows-2048       documents joined by the corpus's separator; non-overlapping windows; every token but a window's first is
                       scored; the tail is dropped. GPTQ's and most papers' WikiText-2 (Frantar et al. 2022, 2210.17323)
    windows-2048-bos   the same with the beginning-of-text token put before each window
    sliding-2048-512   windows every 512 tokens, each scores what no earlier window scored (Hugging Face's documentation)
    llama.cpp-512      non-overlapping windows, the first token replaced by the beginning of text where the tokenizer adds
                       one, the second half scored (llama.cpp's perplexity tool)

A window longer than the model's context is cut to it, and the name says so: windows-2048 on a model of 512 tokens is
windows-512. Without -bos one beginning of text stands before the whole text where the tokenizer puts it, as in the
originals. A window belongs to the document that most of its scored tokens are from: documents, not windows, are independent
(`statistics.py`). Where fewer windows are asked for than there are, they are spread over the text (`spread_windows`).
"""

import dataclasses
import math
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus, article_starts
from qjax.evaluate.kept_tokens import encode_kept

if TYPE_CHECKING:  # a convention is known without JAX
    from qjax.models.model import Model

LARGEST_SHARE = 0.1  # of the windows of a draw that one document may give


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
    documents: np.ndarray  # (windows,) int32 document that most scored tokens are from


def cut_windows(
    ids: np.ndarray,
    nbytes: np.ndarray,
    convention: Convention,
    bos: int | None,
    adds_bos: bool,
    starts_at: np.ndarray | None = None,
) -> Windows:
    """Cuts token ids (with the bytes each stands for) into a convention's windows.

    starts_at: where each document begins, in bytes; None for one document. Raises QjaxError when the text is shorter than a
    window or the convention needs a beginning-of-text token and there is none.
    """
    if convention.bos and bos is None:
        raise QjaxError(f"convention {convention}: the tokenizer has no beginning-of-text token; use windows-N")
    window = convention.window - convention.bos
    documents = (
        np.searchsorted([0] if starts_at is None else starts_at, np.cumsum(nbytes) - nbytes, "right").astype(np.int32) - 1
    )
    if adds_bos and not convention.bos:
        documents = np.concatenate([documents[:1], documents])
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
        counted = scored[:, 1:]
    else:
        scored[:, 0] = False
        counted = scored
    of = np.array(
        [np.bincount(row[kept], minlength=1).argmax() for row, kept in zip(documents[index], counted, strict=True)], np.int32
    )
    return Windows(tokens, scored, (nbytes[index] * counted).sum(axis=1), of)


def spread_windows(documents: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Indices, in order, of `wanted` windows at even distances over a text from a place drawn by the seed.

    documents: (windows,) of each window; a document's share is bounded (`within_share`).
    """
    generator = np.random.default_rng(seed)
    allowed = np.sort(within_share(generator.permutation(len(documents)), documents, wanted))
    return allowed[((np.arange(wanted) + generator.random()) * len(allowed) / wanted).astype(int)]


def within_share(order: np.ndarray, documents: np.ndarray, wanted: int) -> np.ndarray:
    """An order of windows less those by which a document would give more than LARGEST_SHARE of `wanted` windows.

    The order as it is where the other documents have too few.
    """
    most, given, kept = math.ceil(LARGEST_SHARE * wanted), dict.fromkeys(documents.tolist(), 0), []
    for window, document in zip(order, documents[order].tolist(), strict=True):
        given[document] += 1
        if given[document] <= most:
            kept.append(window)
    return np.array(kept) if len(kept) >= wanted else order


def corpus_windows(
    model: "Model", corpus: Corpus, convention: Convention, max_windows: int | None = None, *, seed: int = 0
) -> Windows:
    """A corpus as windows of a model's tokens; `max_windows` of them, drawn by seed and spread over its documents."""
    if max_windows is not None and max_windows < 1:
        raise QjaxError(f"max_windows {max_windows}: expected at least 1, or None for all")
    if model.tokenizer is None:
        raise QjaxError(f"{model.name} has no tokenizer.json, which measuring perplexity on text needs")
    ids, nbytes = encode_kept(model.tokenizer, corpus.separator.join(corpus.documents))
    starts = article_starts(corpus)
    try:
        windows = cut_windows(ids, nbytes, convention, model.tokenizer.bos_id, model.tokenizer.adds_bos, starts)
    except QjaxError as error:
        raise QjaxError(f"{corpus.name}: {error}") from None
    if max_windows is None or max_windows >= len(windows.tokens):
        return windows
    chosen = spread_windows(windows.documents, max_windows, seed)
    return Windows(*(field[chosen] for field in windows))
