"""A model as a value (configuration, parameters, tokenizer) and its forward pass.

Parameters stay in the type they were stored in, so bytes are exact; they are cast to the compute type (`compute.py`) inside the
compiled parts. Each part (embed, block, head) is compiled once per configuration and kernel formats and serves every layer.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from qjax.errors import QjaxError
from qjax.interception.linen import quantized_kernels
from qjax.lazy import is_lazy, map_lazily
from qjax.linear import Linear, dense_tree, is_quantized, prepare_tree, runs_in_integers
from qjax.models import vocabulary, walk
from qjax.models.compute import Compute, compute_of
from qjax.models.config import DecoderConfig
from qjax.models.decoder import products_of
from qjax.models.kv_cache import PackedCache, empty_cache
from qjax.models.layout import Cache, Layout
from qjax.models.tokenizer import Tokenizer

LOGITS_AT_ONCE = 2**23  # elements
HELD_STATES = 2**30  # elements of hidden states at a time, where all batches go through a part before the next is read


class Model(NamedTuple):
    """A decoder with its weights. `recipe` is what its kernels were quantized with; "none" for the unquantized model.
    `compute`: what it runs in, of `compute.NAMES`; None is the device's own.
    """

    config: DecoderConfig
    params: PyTree
    tokenizer: Tokenizer | None
    name: str
    recipe: str = "none"
    compute: str | None = None


def require_model(function: str, model: object) -> None:
    """Raises QjaxError for what is no Model; names and parameters of a Flax module are told another way."""
    if isinstance(model, str | os.PathLike):
        raise QjaxError(f"{function}: expected a Model, got the name {str(model)!r}; give qjax.load({str(model)!r})")
    if not isinstance(model, Model):
        raise QjaxError(
            f"{function}: expected a Model, got {type(model).__name__}; parameters of a Flax module are kept by Orbax "
            "(orbax.checkpoint.StandardCheckpointer), see the README"
        )


def named(model: Model) -> str:
    """A model in messages: its name, and what it was quantized with."""
    return model.name if model.recipe == "none" else f"{model.name} ({model.recipe})"


def compute_dtype() -> DTypeLike:
    """What training computes in: float32 on CPU, bfloat16 on accelerators."""
    return compute_of(None).dtype


def runnable(model: Model, packed: bool = False, compute: str | None = None) -> Model:
    """The model with its kernels decoded to the compute type, once; packed: laid out for the device's kernels instead. A
    quantized table of embeddings is decoded either way, and codes whose products of integers are fast stay as they are.

    What its layers do to their inputs, activation formats for example, they do either way. compute: None leaves the model's.
    Raises QjaxError for a type that is none.
    """
    model = model._replace(compute=compute or model.compute)
    dtype, products = compute_of(model.compute)

    def convert(path: tuple[str, ...], leaf: object) -> object:
        rounds = isinstance(leaf, Linear) and leaf.activation is not None  # and multiplies in float32
        held = products if products and path[-1] == "kernel" and not rounds else dtype
        as_codes = packed or (rounds and runs_in_integers(leaf))
        change = functools.partial(prepare_tree if as_codes else dense_tree, dtype=held)
        return map_lazily(change, leaf, dtype=held, is_leaf=is_quantized)

    leaves = flatten_dict(model.params)
    return model._replace(params=unflatten_dict({path: convert(path, leaf) for path, leaf in leaves.items()}))


@functools.lru_cache(maxsize=16)
def cached(block: nn.Module) -> Callable[..., tuple[Array, Cache]]:
    """(params, hidden, layout, cache) -> (hidden, cache) of a block; the cache given is used up."""

    @functools.partial(jax.jit, donate_argnums=3)
    def run(params, x, layout, cache):
        with quantized_kernels(products_of(block)):
            return block.apply({"params": params}, x, layout, cache)

    return run


def computing(model: Model) -> Compute:
    """What a model runs in."""
    return compute_of(model.compute)


def head_of(model: Model) -> vocabulary.BoundHead:
    """The model's head with what it reads."""
    part = walk.head(model.config, *computing(model))
    return vocabulary.BoundHead(part.module, walk.params_of(part, model.params), *walk.further_arguments(part, model.params))


def hidden_states(
    model: Model, tokens: Int[Array, "batch time"], layout: Layout | None = None
) -> Float[Array, "batch time hidden"]:
    """Hidden states before the head, layer by layer through one compiled block.

    layout: positions and what is visible, where a row is not one sequence; its positions must be below the model's context.
    """
    placed = _placed(model, tokens, layout)
    x = tokens
    for part in walk.body(model.config, *computing(model)):
        x = walk.run(part, model.params, x, *placed)
    return x


def hidden_batches(
    model: Model, batches: Iterable[tuple[Array, ...]]
) -> Iterator[tuple[Model, Float[Array, "batch time hidden"]]]:
    """(model whose head is in memory, hidden states before it) of each batch (tokens, optional layout), in order.

    A model in memory runs batch by batch. Of a lazy one, all batches go through a part before the next is read: one part's
    parameters are held at a time, and the hidden states of as many batches as fit HELD_STATES.
    """
    if not is_lazy(model.params):
        head = _head_alone(model)  # who keeps what is yielded keeps no more
        for args in batches:
            yield head, hidden_states(model, *args)
        return
    *body, last = walk.parts(model.config, *computing(model))
    for group in _groups(batches, HELD_STATES // model.config.hidden_size):
        placed = [_placed(model, *args) for args in group]
        states = [args[0] for args in group]
        for part in body:
            walk.advance(part.module, walk.params_of(part, model.params), states, placed)
        head = model._replace(params=walk.loaded(last, model.params))
        while states:
            yield head, states.pop(0)


def _head_alone(model: Model) -> Model:
    """The model with the parameters that its head reads."""
    part = walk.head(model.config)
    tied = {"embed": {"tokens": model.params["embed"]["tokens"]}} if model.config.tied else {}
    return model._replace(params={part.name: model.params[part.name], **tied})


def _groups(batches: Iterable[tuple[Array, ...]], tokens: int) -> Iterator[list[tuple[Array, ...]]]:
    """Runs of batches with so many tokens, the last batch of each counted to it."""
    group, held = [], 0
    for args in batches:
        group.append(args)
        held += args[0].size
        if held >= tokens:
            yield group
            group, held = [], 0
    if group:
        yield group


def _placed(model: Model, tokens: Int[Array, "batch time"], layout: Layout | None = None) -> tuple[Layout, ...]:
    """A part's arguments besides its states; raises QjaxError for tokens that are no batch or longer than the context."""
    if tokens.ndim != 2 or (tokens.shape[1] > model.config.context and layout is None):
        raise QjaxError(
            f"tokens of shape {tokens.shape}: expected (batch, time) with time at most {model.config.context}, "
            f"the context of {model.name}"
        )
    return () if layout is None else (layout,)


def hidden_states_cached(
    model: Model, tokens: Int[Array, "batch time"], layout: Layout, caches: list[Cache] | list[PackedCache]
) -> tuple[Float[Array, "batch time hidden"], list[Cache] | list[PackedCache]]:
    """Hidden states of new tokens and the caches (one a block) with their keys and values; the caches given are used up. The
    model's parameters are in memory.

    layout: `layout.cache_layout` of the tokens, whose positions must be below the model's context and the caches' capacity.
    """
    kept = []
    embed, *blocks = walk.body(model.config, *computing(model))
    x = walk.run(embed, model.params, tokens, layout)
    for block, cache in zip(blocks, caches, strict=True):
        x, cache = cached(block.module)(walk.subtree(block, model.params), x, layout, cache)  # noqa: PLW2901
        kept.append(cache)
    return x, kept


def empty_caches(model: Model, batch: int, capacity: int) -> list[Cache] | list[PackedCache]:
    """A cache for each block, of `capacity` positions; zeros, in the compute type or the configuration's cache format."""
    c = model.config
    if c.cache is not None:
        return [empty_cache(c.cache, batch, c.kv_heads, capacity, c.head_dim) for _ in range(c.layers)]
    shape = (batch, c.kv_heads, capacity, c.head_dim)
    dtype, products = computing(model)
    return [Cache(*(jnp.zeros(shape, products or dtype) for _ in range(2))) for _ in range(c.layers)]


def apply(model: Model, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocabulary"]:
    """Float32 logits (batch, time, vocabulary) of int32 tokens (batch, time); quantized kernels run as they are.

    Raises QjaxError when the time is longer than the model's context.
    """
    return apply_head(model, hidden_states(model, jnp.asarray(tokens)))


def apply_head(model: Model, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time vocabulary"]:
    """Float32 logits of hidden states."""
    return logits_of(head_of(model), x)


def logits_of(head: vocabulary.BoundHead, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time vocabulary"]:
    """Float32 logits of hidden states."""
    return walk.compiled(head.module)(head.params, x, head.table)


def scores(
    model: Model, x: Float[Array, "batch time hidden"], places: Int[Array, " n"], targets: Int[Array, " n"]
) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """ln p of target tokens at `places` (indices into batch * time), and whether each is the likeliest token there."""
    return _scores(head_of(model), x.reshape(-1, x.shape[-1])[places], targets, LOGITS_AT_ONCE)


@functools.partial(jax.jit, static_argnames="at_once")
def _scores(head: vocabulary.BoundHead, x: Float[Array, "n hidden"], targets: Int[Array, " n"], at_once: int):
    words = vocabulary.words_at_once(head, len(x), at_once)
    found = vocabulary.over_pieces(head, x, targets, words=words, likeliest=True)
    return found.logit - found.log_sum, found.likeliest == targets


def losses(model: Model, x: Float[Array, "batch time hidden"], targets: Int[Array, "batch time"]) -> Float[Array, "batch time"]:
    """-ln p of the target tokens (batch, time) at hidden states (batch, time, hidden), in nats, float32."""
    return losses_of(head_of(model), x, targets, LOGITS_AT_ONCE)


@functools.partial(jax.jit, static_argnames="at_once")
def losses_of(
    head: vocabulary.BoundHead, x: Float[Array, "batch time hidden"], targets: Int[Array, "batch time"], at_once: int
) -> Float[Array, "batch time"]:
    """`losses` by so many logits at once: those of a whole batch would be the largest array of the program."""

    def piece_losses(piece):  # hidden (batch, time, hidden), targets (batch, time)
        logits = logits_of(head, piece[0])
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, piece[1][..., None], axis=-1)[..., 0]

    tokens = targets.size
    pieces = -(-tokens // max(1, at_once // head.words))
    if pieces <= 1:
        return piece_losses((x, targets))
    if head.in_pieces:
        words = vocabulary.words_at_once(head, tokens, at_once)
        found = vocabulary.over_pieces(head, x.reshape(tokens, -1), targets.reshape(-1), words=words)
        return (found.log_sum - found.logit).reshape(targets.shape)

    def split(array):  # (batch, time, ...) -> (pieces, 1, tokens of a piece, ...), the last one padded
        flat = array.reshape(tokens, *array.shape[2:])
        padding = [(0, -tokens % pieces)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(pieces, 1, -1, *flat.shape[1:])

    return jax.lax.map(piece_losses, (split(x), split(targets))).reshape(-1)[:tokens].reshape(targets.shape)
