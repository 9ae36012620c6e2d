"""A decoder to train: its forward pass in little memory, and losses as functions of what is trained and what is frozen.

    next token   mean_t  -log p(token_t+1 | tokens_<=t)
    divergence   mean_t  KL(p_teacher || p)  of the next token's distributions: distillation

Consecutive blocks of one kind are stacked and run by one scan whose body is rematerialised: of a block only the input is kept
for the backward pass. Quantized weights are decoded inside the body, so that no more than one block is ever held in floating
point. Logits are made for a few tokens at a time.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from qjax.errors import QjaxError
from qjax.interception.linen import quantized_kernels
from qjax.lazy import is_lazy, materialised
from qjax.linear import Linear, decode, is_quantized
from qjax.models import walk
from qjax.models.config import DecoderConfig
from qjax.models.model import LOGITS_AT_ONCE, Model, compute_dtype
from qjax.refining.fake import FakeWeight

Runs = tuple[tuple[walk.Part, ...], ...]


class Stack(NamedTuple):
    """A decoder to train. tree: {"embed", "head", "runs"}, the last a tuple of stacked blocks. The rest is static."""

    config: DecoderConfig
    dtype: DTypeLike
    runs: Runs
    tree: PyTree


def stack(model: Model) -> Stack:
    """The model with consecutive blocks of one kind, of equal modules and leaves, stacked; lazy parameters are read."""
    dtype, params = compute_dtype(), materialised(model.params) if is_lazy(model.params) else model.params

    def kind(part: walk.Part) -> tuple:
        leaves, structure = jax.tree.flatten(walk.subtree(part, params))
        return part.module, structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    blocks = [part for part in walk.parts(model.config, dtype) if part.kind == "block"]
    runs = tuple(tuple(run) for _, run in itertools.groupby(blocks, kind))
    stacked = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(walk.subtree(p, params) for p in run)) for run in runs)
    return Stack(model.config, dtype, runs, {"embed": params["embed"], "head": params["head"], "runs": stacked})


def unstack(runs: Runs, tree: PyTree) -> PyTree:
    """A model's parameters from a stack's tree."""
    blocks = {
        part.name: jax.tree.map(lambda leaf, place=place: leaf[place], stacked)
        for run, stacked in zip(runs, tree["runs"], strict=True)
        for place, part in enumerate(run)
    }
    return {"embed": tree["embed"], **blocks, "head": tree["head"]}


def split(tree: PyTree, trains: Callable[[str], bool]) -> tuple[dict[str, Array], dict[str, Array], Callable]:
    """(trained, frozen, joined): arrays by their path in the tree, and joined(trained, frozen), the tree again.

    Raises QjaxError where nothing is trained.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    trained = {key: array for key, array in arrays.items() if trains(key)}
    if not trained:
        raise QjaxError("training: none of the model's arrays is to be trained; name modules that it has")
    frozen = {key: array for key, array in arrays.items() if key not in trained}

    def joined(trained: Mapping[str, Array], frozen: Mapping[str, Array]) -> PyTree:
        both = {**frozen, **trained}
        return jax.tree.unflatten(structure, [both[key] for key in arrays])

    return trained, frozen, joined


# --- the forward pass ----------------------------------------------------------------------------------------------------


def hidden_states(stack: Stack, tree: PyTree, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time hidden"]:
    """Hidden states before the head."""
    x = run(walk.parts(stack.config, stack.dtype)[0], tree["embed"], tokens)
    for blocks, stacked in zip(stack.runs, tree["runs"], strict=True):

        def body(x: Array, params: PyTree, part: walk.Part = blocks[0]) -> tuple[Array, None]:
            return run(part, params, x), None

        x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, stacked)
    return x


def run(part: walk.Part, params: PyTree, *args: object) -> Array:
    """What a part makes of its input; weights are decoded here, and adapters stay beside them."""
    with quantized_kernels():
        return part.module.apply({"params": jax.tree.map(_to_run, params, is_leaf=_is_leaf)}, *args)


def _is_leaf(leaf: object) -> bool:
    return is_quantized(leaf) or isinstance(leaf, FakeWeight)


def _to_run(leaf: object) -> object:
    if isinstance(leaf, Linear):
        return dataclasses.replace(leaf, weight=_to_run(leaf.weight))
    if isinstance(leaf, FakeWeight):
        return leaf.values()
    return decode(leaf) if is_quantized(leaf) else leaf


def logits_of(stack: Stack, tree: PyTree, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time vocabulary"]:
    """Float32 logits of hidden states."""
    head = walk.head(stack.config, stack.dtype)
    table = tree["embed"]["tokens"]["embedding"] if stack.config.tied else None
    return run(head, tree["head"], x, table)


def _with_table(tree: PyTree) -> PyTree:
    """The tree with its embeddings decoded: once, where logits are made of a few tokens at a time."""
    return {**tree, "embed": jax.tree.map(_to_run, tree["embed"], is_leaf=_is_leaf)}


# --- losses --------------------------------------------------------------------------------------------------------------


def next_token_loss(stack: Stack, tree: PyTree, tokens: Int[Array, "batch time_plus_1"]) -> Float[Array, ""]:
    """Mean negative log-likelihood of tokens[:, 1:], in nats."""
    tree = _with_table(tree)

    def losses(x, targets):  # (1, n, hidden), (1, n)
        logits = logits_of(stack, tree, x)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    return _mean_over_tokens(losses, stack.config, hidden_states(stack, tree, tokens[:, :-1]), tokens[:, 1:])


def divergence_loss(
    stack: Stack, tree: PyTree, teacher: Stack, teacher_tree: PyTree, tokens: Int[Array, "batch time_plus_1"]
) -> Float[Array, ""]:
    """Mean KL(teacher || model) of the next token at tokens[:, :-1], in nats."""
    tree, teacher_tree = _with_table(tree), _with_table(teacher_tree)

    def losses(x, theirs):
        log_p = jax.nn.log_softmax(logits_of(stack, tree, x))
        log_q = jax.nn.log_softmax(jax.lax.stop_gradient(logits_of(teacher, teacher_tree, theirs)))
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)

    given = tokens[:, :-1]
    right = jax.lax.stop_gradient(hidden_states(teacher, teacher_tree, given))
    return _mean_over_tokens(losses, stack.config, hidden_states(stack, tree, given), right)


def _mean_over_tokens(losses: Callable[..., Array], config: DecoderConfig, *arrays: Array) -> Float[Array, ""]:
    """The mean of losses(arrays) over (batch, time), of so many tokens at a time that their logits are few."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    pieces = -(-tokens // max(1, LOGITS_AT_ONCE // config.vocabulary_size))
    if pieces <= 1:
        return losses(*arrays).mean()

    def cut(array):  # (batch, time, ...) -> (pieces, 1, tokens of a piece, ...), the last one padded
        flat = array.reshape(tokens, *array.shape[2:])
        return jnp.pad(flat, [(0, -tokens % pieces)] + [(0, 0)] * (flat.ndim - 1)).reshape(pieces, 1, -1, *flat.shape[1:])

    found = jax.lax.map(jax.checkpoint(lambda piece: losses(*piece), prevent_cse=False), tuple(map(cut, arrays)))
    return found.reshape(-1)[:tokens].mean()
