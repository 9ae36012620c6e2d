"""The walk over a decoder: its parts in order, and the parameters of each, which may still lie in files (`lazy.py`).

    embed               tokens -> hidden states
    block_0, block_1    hidden states -> hidden states, or each in two halves, a residual branch each
    head                hidden states -> logits; when tied it also reads the embedding's table

This is the only file that knows these names. Whoever goes over a model takes its `parts` and holds the parameters of one of
them at a time (`params_of`).
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from qjax.interception.linen import quantized_kernels
from qjax.lazy import materialised
from qjax.linear import Table
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block, Embed, Head, branches, products_of

TABLE = "embed/tokens/embedding"  # path of what a tied head multiplies with


class Part(NamedTuple):
    """A piece of a decoder that runs on its own: module.apply({"params": params_of(part, params)}, x).

    name: of its parameters in the model's tree, for example "block_3", which two halves share. kind: "embed", "block" or
    "head". children: the parameters under the name that it reads.
    """

    name: str
    kind: str
    module: nn.Module
    children: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """What the paths of its parameters begin with: "block_3/"."""
        return f"{self.name}/"


@functools.lru_cache(maxsize=32)
def parts(
    config: DecoderConfig, dtype: DTypeLike = jnp.float32, products: DTypeLike | None = None, *, halves: bool = False
) -> tuple[Part, ...]:
    """The parts of a decoder that computes in `dtype`, in order: embed, blocks, head. Blocks of one kind have equal modules.

    products: of what goes into products, where that is another type. halves: two parts a block, attention and MLP,
    where one reads what the other makes (not where they are parallel).
    """
    positions = ("positions",) if config.positions == "learned" else ()
    norm = ("norm",) if config.embedding_norm else ()
    output = () if config.tied else ("output",)
    names = branches(config)
    pieces = names.items() if halves and not config.parallel_residual else [(None, tuple(itertools.chain(*names.values())))]
    blocks = [
        Part(block_name(number), "block", Block(config.of_layer(number), dtype, half, products), children)
        for number in range(config.layers)
        for half, children in pieces
    ]
    return (
        Part("embed", "embed", Embed(config, dtype), ("tokens", *positions, *norm)),
        *blocks,
        Part("head", "head", Head(config, dtype, products), ("norm", *output)),
    )


def body(config: DecoderConfig, dtype: DTypeLike = jnp.float32, products: DTypeLike | None = None) -> tuple[Part, ...]:
    """The parts that make hidden states: all but the head."""
    return parts(config, dtype, products)[:-1]


def head(config: DecoderConfig, dtype: DTypeLike = jnp.float32, products: DTypeLike | None = None) -> Part:
    """The last part."""
    return parts(config, dtype, products)[-1]


def subtree(part: Part, params: PyTree) -> PyTree:
    """The parameters that a part's module takes, of a model's, as they are."""
    return {child: params[part.name][child] for child in part.children}


def params_of(part: Part, params: PyTree) -> PyTree:
    """The parameters that a part's module takes, of a model's; lazy ones are read, and nothing else is."""
    return materialised(subtree(part, params))


def further_arguments(part: Part, params: PyTree) -> tuple[Float[Array, "vocabulary hidden"] | Table | None, ...]:
    """What a part takes besides hidden states: (table,) for the head, the embedding's where it is tied, else None."""
    if part.kind != "head":
        return ()
    return (materialised(params["embed"]["tokens"]["embedding"]) if part.module.config.tied else None,)


def loaded(part: Part, params: PyTree) -> PyTree:
    """A model's parameters with all that the part reads in memory, others as they are."""
    tree = {**params, part.name: {**params[part.name], **params_of(part, params)}}
    for table in further_arguments(part, params):
        if table is not None:
            tree["embed"] = {**tree["embed"], "tokens": {"embedding": table}}
    return tree


@functools.lru_cache(maxsize=64)
def compiled(module: nn.Module) -> Callable[..., object]:
    """(params, *args) -> what the module returns, for float and quantized kernels."""

    @jax.jit
    def run(params, *args):
        with quantized_kernels(products_of(module)):
            return module.apply({"params": params}, *args)

    return run


def run(part: Part, params: PyTree, x: Array, *args: object) -> Array:
    """What a part makes of x (tokens, hidden states) with its parameters of a model's. args: a layout, or the head's table."""
    return compiled(part.module)(params_of(part, params), x, *args)


def advance(module: nn.Module, params: PyTree, states: list[Array], further: list[tuple] | None = None) -> None:
    """Replaces each batch of states by what the module, with parameters of its own, makes of it, one after the other.

    further: each batch's further arguments. What is given is let go as its successor is there.
    """
    for number, args in enumerate(further or [()] * len(states)):
        after = compiled(module)(params, states[number], *args)
        states[number] = jax.block_until_ready(after)  # else inputs whose runs wait are held beside the outputs


def block_name(number: int) -> str:
    """Name of a block's parameters."""
    return f"block_{number}"


def block_of(path: str) -> int | None:
    """The number of the block that a parameter belongs to, of its path; None for those of embed and head."""
    found = re.match(r"block_(\d+)/", path)
    return int(found[1]) if found else None


def matrix_axes(path: str) -> tuple[int, int]:
    """Which of a leaf's last two axes is (in, out) of the matrix that is quantized: a table's rows are outputs."""
    return (1, 0) if path == TABLE else (0, 1)


def matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(in, out) of that matrix."""
    given, made = matrix_axes(path)
    return shape[-2:][given], shape[-2:][made]


def in_blocks(path: str) -> bool:
    """Whether a parameter belongs to a block."""
    return block_of(path) is not None


class Decoder(nn.Module):
    """The whole model, tokens (batch, time) int32 -> logits (batch, time, vocabulary) float32: for training and tests."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        self.embed = Embed(c, self.dtype)
        self.blocks = [Block(c.of_layer(i), self.dtype, name=block_name(i)) for i in range(c.layers)]
        self.head = Head(c, self.dtype)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocabulary"]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        table = self.embed.variables["params"]["tokens"]["embedding"] if self.config.tied else None
        return self.head(x, table)
