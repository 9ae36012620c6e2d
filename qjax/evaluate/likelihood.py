"""Log-likelihood of continuations given contexts: what every accuracy task rests on.

    ln p(continuation | context) = sum over its tokens of ln p(token | context and the tokens before it)

The rules are lm-evaluation-harness's (Gao et al. 2021, zenodo.5371628), so that figures agree with published ones:

    * context and continuation are tokenized together; the continuation is what is behind the context's own tokens, and white
      space at the context's end counts to it
    * a beginning of text stands before a context where the tokenizer puts it; an empty context is that token, or end of text
    * a pair longer than the model's context loses tokens from the left

Candidates that begin alike (the choices of a question) run in one row that holds their common beginning once, see
`models/layout.py`. Rows are padded to a few lengths, one compilation each; only scored tokens pass through the head.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.perplexity import BATCH_TOKENS
from qjax.models.layout import Layout, tree_layout
from qjax.models.model import Model, hidden_batches, named, runnable, scores
from qjax.models.tokenizer import Tokenizer
from qjax.numbers import require_finite

LONGEST_ROW = 4096  # tokens of several texts that share a beginning: what attention holds grows with their square
WORTH_SHARING = 8  # tokens saved by sharing a beginning, fewer than which rows of their own are cheaper
PICKS = 256  # scored tokens that go through the head at a time
FEW_PICKS = 64  # the last ones of a batch are filled up to a multiple of this
tree = jax.jit(tree_layout)


class Pair(NamedTuple):
    """A context and its continuation as token ids; `truncated`: it lost tokens from the left."""

    tokens: np.ndarray  # int32, both; what the model reads are all but the last
    continuation: int  # how many of them are the continuation's
    truncated: bool = False


class Likelihood(NamedTuple):
    """Of each pair: ln p of the continuation (float64) and whether each of its tokens is the likeliest one."""

    value: np.ndarray
    greedy: np.ndarray


def beginning(tokenizer: Tokenizer) -> int:
    """The token an empty context stands for."""
    token = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if token is None:
        raise QjaxError("an empty context needs a beginning or end of text, and the tokenizer has neither; give a context")
    return token


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text, behind the beginning of text where the tokenizer puts it and the text does not bring it."""
    ids = tokenizer.encode(text, special_tokens=True)
    doubled = tokenizer.adds_bos and len(ids) > 1 and ids[1] == tokenizer.bos_id
    return ids[1:] if doubled else ids


def make_pair(model: Model, context: str, continuation: str) -> Pair:
    """A pair cut to the model's context; raises QjaxError for a continuation without tokens."""
    tokenizer = require_tokenizer(model)
    if not context:
        tail = tokenizer.encode(continuation)
        first = beginning(tokenizer)
        head = tail[:1] if len(tail) and tail[0] == first else np.array([first], np.int32)
        tail = tail[1:] if len(tail) and tail[0] == first else tail
        return cut(model, head, tail, continuation)
    stripped = context.rstrip()
    whole = encode(tokenizer, context + continuation)
    # A context of white space alone has nothing in front of the continuation but the beginning of text.
    head = encode(tokenizer, stripped) if stripped else whole[: int(tokenizer.adds_bos)]
    if not len(head):
        return make_pair(model, "", context + continuation)
    return cut(model, whole[: len(head)], whole[len(head) :], continuation)


def cut(model: Model, context: np.ndarray, continuation: np.ndarray, shown: str = "") -> Pair:
    """A pair of token ids; the model reads all but the last token, so one more than its context is kept, from the right.

    Of a continuation longer than the context, which the harness refuses, the end is scored.
    """
    limit = model.config.context
    if not len(continuation):
        raise QjaxError(f"continuation {shown[:40]!r} has no tokens of its own behind its context, expected at least one")
    tokens = np.concatenate([context, continuation]).astype(np.int32)
    return Pair(tokens[-(limit + 1) :], min(len(continuation), limit), len(tokens) > limit + 1)


def require_tokenizer(model: Model) -> Tokenizer:
    """The model's tokenizer; raises QjaxError where it has none."""
    if model.tokenizer is None:
        raise QjaxError(f"{model.name} has no tokenizer.json, by which texts are read; put it into the model's folder")
    return model.tokenizer


class _Row(NamedTuple):
    """One row of the forward pass, and which of its tokens predict what: (place, target, pair) of each scored token."""

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    scored: list[tuple[int, int, int]]


def likelihoods(
    model: Model,
    groups: Sequence[Sequence[Pair]],
    *,
    packed: bool = False,
    compute: str | None = None,
    batch_tokens: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Likelihood:
    """Likelihood of every pair, in order; pairs of a group may share a row.

    packed: multiply with packed kernels as they are. compute: as in `perplexity`. batch_tokens: tokens run at a time.
    on_batch(done, total) reports rows.
    Raises NotFiniteError where one is NaN or infinite.
    """
    model = runnable(model, packed, compute)
    count = sum(len(group) for group in groups)
    value, greedy = np.zeros(count), np.ones(count, bool)
    numbers = itertools.count()
    shares = model.config.cache is None or model.config.cache.group is None  # groups of tokens are one text's own
    groups = groups if shares else [[pair] for group in groups for pair in group]
    rows = [row for group in groups for row in _rows(group, [next(numbers) for _ in group])]
    rows.sort(key=lambda row: len(row.tokens), reverse=True)
    batch_tokens = batch_tokens or BATCH_TOKENS[jax.default_backend()]
    batches = list(_batches(rows, batch_tokens))
    inputs = (_inputs(batch, length, max(1, batch_tokens // length)) for length, batch in batches)
    pending, done = [], 0
    for (length, batch), (head, x) in zip(batches, hidden_batches(model, inputs), strict=True):
        pending += _score(head, x, batch, length)
        while len(pending) > 2:  # waits for batches before the last, so that one is always in flight
            _collect(pending.pop(0), value, greedy)
        done += len(batch)
        on_batch(done, len(rows))
    for result in pending:
        _collect(result, value, greedy)
    require_finite(value, "likelihoods", model=named(model))
    return Likelihood(value, greedy)


def _rows(group: Sequence[Pair], numbers: Sequence[int]) -> Iterator[_Row]:
    """The group in one row if its common beginning is worth it, else a row each; in several rows where one would be long."""
    shared = _common([pair.tokens[:-1] for pair in group])
    if len(group) > 1 and shared + sum(len(pair.tokens) - 1 - shared for pair in group) > LONGEST_ROW:
        middle = len(group) // 2
        for part in (slice(middle), slice(middle, None)):
            yield from _rows(group[part], numbers[part])
        return
    if len(group) > 1 and shared * (len(group) - 1) < WORTH_SHARING:
        for pair, number in zip(group, numbers, strict=True):
            yield from _rows([pair], [number])
        return
    tokens, positions, branches, scored = [group[0].tokens[:shared]], [np.arange(shared)], [np.zeros(shared, int)], []
    offset = shared
    for branch, (pair, number) in enumerate(zip(group, numbers, strict=True), start=1):
        read = len(pair.tokens) - 1
        tokens.append(pair.tokens[shared:read])
        positions.append(np.arange(shared, read))
        branches.append(np.full(read - shared, branch))
        for at in range(read - pair.continuation, read):
            place = at if at < shared else offset + at - shared
            scored.append((place, int(pair.tokens[at + 1]), number))
        offset += read - shared
    yield _Row(np.concatenate(tokens), np.concatenate(positions), np.concatenate(branches), scored)


def _common(sequences: Iterable[np.ndarray]) -> int:
    """Length of the common beginning."""
    first, *others = sequences
    shared = len(first)
    for other in others:
        size = min(shared, len(other))
        differ = np.nonzero(first[:size] != other[:size])[0]
        shared = int(differ[0]) if len(differ) else size
    return shared


def bucket(length: int) -> int:
    """The length a row is padded to: the next of 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, ..."""
    if length > 256:
        return -(-length // 128) * 128
    size = 32
    while size < length:
        size *= 2
    return size * 3 // 4 if size > 32 and length <= size * 3 // 4 else size


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[tuple[int, list[_Row]]]:
    """(length, rows) of each batch, of rows from the longest on: one as full as the others, but for the last."""
    start = 0
    while start < len(rows):
        length = bucket(len(rows[start].tokens))
        size = max(1, batch_tokens // length)
        yield length, list(rows[start : start + size])
        start += size


def _inputs(rows: Sequence[_Row], length: int, size: int) -> tuple[jax.Array, Layout]:
    """One batch padded to (size, length)."""
    tokens, positions, branches = (np.zeros((size, length), np.int32) for _ in range(3))
    for i, row in enumerate(rows):
        used = len(row.tokens)
        tokens[i, :used], positions[i, :used], branches[i, :used] = row.tokens, row.positions, row.branches
        branches[i, used:] = -1  # padding sees the beginning and itself, and nothing sees it
    layout = tree(jnp.asarray(positions), jnp.asarray(branches))
    return jnp.asarray(tokens), layout


def _score(model: Model, x: jax.Array, rows: Sequence[_Row], length: int) -> list[tuple]:
    """(pairs, ln p, likeliest) of up to PICKS scored tokens each, from the hidden states of one batch."""
    scored = np.array([(i * length + place, target, pair) for i, row in enumerate(rows) for place, target, pair in row.scored])
    results = []
    for start in range(0, len(scored), PICKS):
        piece = scored[start : start + PICKS]
        padded = np.pad(piece, ((0, -len(piece) % FEW_PICKS), (0, 0))).astype(np.int32)
        results.append((piece[:, 2], *scores(model, x, jnp.asarray(padded[:, 0]), jnp.asarray(padded[:, 1]))))
    return results


def _collect(result: tuple, value: np.ndarray, greedy: np.ndarray) -> None:
    pairs, likelihood, likeliest = result
    np.add.at(value, pairs, np.asarray(likelihood, np.float64)[: len(pairs)])
    np.logical_and.at(greedy, pairs, np.asarray(likeliest)[: len(pairs)])


def rolling_pairs(model: Model, text: str) -> list[Pair]:
    """A whole text as pairs that score each of its tokens once: windows of the model's context, the last one overlapping.

    The text stands behind the token of an empty context, as in lm-evaluation-harness's rolling log-likelihood.
    """
    tokenizer = require_tokenizer(model)
    ids, window = encode(tokenizer, text), model.config.context
    ids = np.concatenate([[beginning(tokenizer)], ids])
    pairs = []
    for start in range(1, len(ids), window):
        end = min(start + window, len(ids))
        pairs.append(Pair(ids[max(0, end - window - 1) : end].astype(np.int32), end - start))
    return pairs
