"""Text from a model, a token at a time, with the keys and values of earlier tokens kept, packed where the model names a format.

Prompts of any lengths run as one batch, padded on the right: a sequence's next token is written over its padding before
anything sees it. The next token is the likeliest one (temperature 0), or drawn from softmax(logits / temperature).
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.likelihood import bucket, encode, require_tokenizer
from qjax.lazy import materialised
from qjax.models.layout import cache_layout
from qjax.models.model import Model, apply_head, empty_caches, hidden_states_cached, named, require_model, runnable
from qjax.numbers import require_finite

NEW_TOKENS = 100
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
layout_of = jax.jit(cache_layout, static_argnums=(1, 2))


class Generation(NamedTuple):
    """What a batch of prompts was continued with. Seconds are of the whole batch, compilation included unless warmed up."""

    tokens: tuple[np.ndarray, ...]  # int32, of each prompt, without the prompt; ends with the stop token where one came
    seconds_first: float  # until the first new token of every prompt
    seconds_rest: float
    steps: int  # tokens after the first


def generate_text(
    model: Model,
    prompt: str,
    max_new_tokens: int = NEW_TOKENS,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    packed: bool = False,
    compute: str | None = None,
    on_token: Callable[[str], None] = lambda text: None,
) -> str:
    """The continuation of a prompt; stops at the end of text. on_token(text) gets the whole continuation after each token.

    Raises QjaxError where prompt and new tokens do not fit the model's context, and for a model without tokenizer.
    """
    require_model("generate_text", model)
    tokenizer = require_tokenizer(model)
    ids = encode(tokenizer, prompt)
    if not len(ids):
        raise QjaxError("the prompt is empty and the tokenizer puts no beginning of text; give at least one character")
    shown = []

    def collect(tokens: np.ndarray) -> None:
        shown.append(int(tokens[0]))
        on_token(_behind(tokenizer, ids, shown))

    found = generate(
        model,
        [ids],
        max_new_tokens,
        stop=ends(model),
        temperature=temperature,
        seed=seed,
        packed=packed,
        compute=compute,
        on_tokens=collect,
    )
    return _behind(tokenizer, ids, found.tokens[0])


def ends(model: Model) -> tuple[int, ...]:
    """The tokens that end a text."""
    first = require_tokenizer(model).eos_id
    return (*(() if first is None else (first,)), *model.config.other_eos_ids)


def _behind(tokenizer, prompt: np.ndarray, new: Sequence[int]) -> str:
    """Text of the new tokens, decoded with the prompt: some tokenizers drop a blank at the beginning of a text."""
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


def generate(
    model: Model,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int = NEW_TOKENS,
    *,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    packed: bool = False,
    compute: str | None = None,
    finished: Callable[[list[int]], bool] | None = None,
    on_tokens: Callable[[np.ndarray], None] = lambda tokens: None,
) -> Generation:
    """Up to max_new_tokens tokens behind each prompt (int32 ids, at least one).

    stop: tokens that end a sequence, as does finished(its new tokens) being true. packed: multiply with packed kernels as they
    are. compute: as in `perplexity`; caches follow it. on_tokens gets every step's tokens, one of each prompt.

    Raises QjaxError where prompt and new tokens do not fit the model's context, and for a temperature or logits that are not
    finite.
    """
    require_model("generate", model)
    lengths = np.array([len(prompt) for prompt in prompts])
    limit = model.config.context
    if not 0 <= temperature < math.inf:
        raise QjaxError(f"temperature {temperature}: expected a finite number, 0 (the likeliest token) or above")
    if not len(prompts) or not lengths.min() or max_new_tokens < 1:
        raise QjaxError(f"prompts of {lengths.tolist()} tokens, {max_new_tokens} new: expected at least one of each")
    if lengths.max() + max_new_tokens - 1 > limit:
        raise QjaxError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones do not fit {model.name}'s context of {limit}; "
            f"ask for at most {max(0, limit - lengths.max() + 1)} or shorten the prompt"
        )
    model = runnable(model._replace(params=materialised(model.params)), packed, compute)  # every token needs all of it
    time_in, capacity = min(bucket(lengths.max()), limit), min(bucket(lengths.max() + max_new_tokens), limit)
    tokens = np.zeros((len(prompts), time_in), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    caches = empty_caches(model, len(prompts), capacity)
    key = jax.random.key(seed)

    started = time.perf_counter()
    behind = None if model.config.cache is None else jnp.asarray(lengths, jnp.int32)
    layout = layout_of(jnp.zeros(len(prompts), jnp.int32), time_in, capacity, behind)
    x, caches = hidden_states_cached(model, jnp.asarray(tokens), layout, caches)
    last = x[jnp.arange(len(prompts)), jnp.asarray(lengths - 1)][:, None]
    chosen = _chosen(model, apply_head(model, last), temperature, jax.random.fold_in(key, 0))
    first = time.perf_counter() - started
    steps, done = [chosen], _done([chosen], stop, finished)
    on_tokens(chosen)
    while len(steps) < max_new_tokens and not done.all():
        layout = layout_of(jnp.asarray(lengths + len(steps) - 1, jnp.int32), 1, capacity)
        x, caches = hidden_states_cached(model, jnp.asarray(chosen[:, None]), layout, caches)
        chosen = _chosen(model, apply_head(model, x), temperature, jax.random.fold_in(key, len(steps)))
        steps.append(chosen)
        done |= _done(steps, stop, finished)
        on_tokens(chosen)
    rest = time.perf_counter() - started - first
    return Generation(tuple(_until(row, stop) for row in np.stack(steps, axis=1)), first, rest, len(steps) - 1)


def _chosen(model: Model, logits: jax.Array, temperature: float, key: jax.Array) -> np.ndarray:
    """The next token of each sequence. Raises NotFiniteError for logits that are not finite."""
    chosen, best = map(np.asarray, _choose(logits, temperature, key))
    require_finite(best, "next tokens' largest logits", model=named(model))
    return chosen


@functools.partial(jax.jit, static_argnums=1)
def _choose(logits: jax.Array, temperature: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(batch, 1, vocabulary) -> tokens, int32 (batch,), and the largest logit of each, nan where any is."""
    logits = logits[:, 0]
    best = jnp.max(logits, axis=-1)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), best
    below_best = logits - best[:, None]  # a small temperature makes it -inf, never nan
    return jax.random.categorical(key, below_best / max(temperature, SMALLEST_TEMPERATURE)).astype(jnp.int32), best


def _done(steps: list[np.ndarray], stop: Sequence[int], finished: Callable[[list[int]], bool] | None) -> np.ndarray:
    done = np.isin(steps[-1], stop)
    if finished is not None:
        done |= [finished(row.tolist()) for row in np.stack(steps, axis=1)]
    return done


def _until(tokens: np.ndarray, stop: Sequence[int]) -> np.ndarray:
    ends = np.nonzero(np.isin(tokens, stop))[0]
    return tokens[: ends[0] + 1] if len(ends) else tokens
