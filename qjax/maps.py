"""Exact maps of a layer's input: x W = M(x) M'(W), so that what is rounded is easier to round.

    Divide    x / s,          diag(s) W     what AWQ and SmoothQuant find; folded into the layer before where it can be
    Scale     x * s,          diag(1/s) W   the same as a leaf stores it, s in float16
    Permute   x[..., index],  W[index]      inputs in another order (`g_idx` of GPTQ's files); `permute` checks the index
    Hadamard  x diag(s) H,    H^T diag(s) W a rotation, s random signs, H orthogonal and of +-1/sqrt(n) (`hadamard.py`), whole
                                            or the same in every block of inputs

A map is a pytree with the methods of `InputMap`; one from outside the package is a class of one's own with `@register_map`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from qjax.errors import QjaxError
from qjax.hadamard import hadamard_transform

LARGEST = 1e4  # a scale and its inverse stay normal numbers of float16
MAPS: dict[str, type] = {}  # what folders may hold, by name
_pytrees: set[type] = set()  # JAX takes a class once


class InputMap(Protocol):
    """A linear map of a layer's input that keeps its length, and what makes up for it in the weight; a pytree of arrays."""

    def on_input(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """M(x), in x's type; linear in x."""

    def on_weight(self, weight: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The float32 weight for mapped inputs: on_input(x) @ on_weight(W) = x @ W."""

    def on_statistic(self, value: Array, axes: int) -> Array:
        """A statistic of mapped inputs from that of x; `axes` (0, 1 or 2) of its axes, the first ones, are inputs.

        Raises QjaxError for one that the map does not determine.
        """

    def stored(self) -> "InputMap":
        """The map as a leaf holds it; its `on_weight` makes up for what storing changed."""


def register_map(cls: type) -> type:
    """Makes a class with annotated fields a frozen dataclass and a pytree that folders hold under its name; returns it.

    Fields are arrays, or static where declared `dataclasses.field(metadata={"static": True})`. Raises QjaxError for a name of
    qjax's own; a name of one's own may be registered again.
    """
    name = cls.__name__
    if name in MAPS and MAPS[name].__module__ == __name__ and MAPS[name] is not cls:
        raise QjaxError(f"register_map: {name} is a map of qjax already; give the class another name")
    if cls not in _pytrees:
        _pytrees.add(jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls)))
    MAPS[name] = cls
    return cls


@register_map
class Divide:
    """The input is divided by `scale` (in,) float32, a weight's rows are multiplied by it."""

    scale: Float[Array, " in"]

    def on_input(self, x):
        return (x / self.scale).astype(x.dtype)

    def on_weight(self, weight):
        return weight * self.scale[:, None]

    def on_statistic(self, value, axes):
        return _divided(value, self.scale, axes)

    def stored(self):
        return Scale(jnp.clip(1 / self.scale, 1 / LARGEST, LARGEST).astype(jnp.float16))


@register_map
class Scale:
    """The input is multiplied by `scale` (in,) float16, a weight's rows by exactly its inverse in float32."""

    scale: Float[Array, " in"]

    def on_input(self, x):
        return (x * self.scale.astype(jnp.float32)).astype(x.dtype)

    def on_weight(self, weight):
        return weight * self._rows()[:, None]

    def on_statistic(self, value, axes):
        return _divided(value, self._rows(), axes)

    def stored(self):
        return self

    def _rows(self):
        return 1 / self.scale.astype(jnp.float32)


@register_map
class Permute:
    """The inputs in another order: input i of the weight is input index[i] of the layer; `index` (in,) int32."""

    index: Int[Array, " in"]

    def on_input(self, x):
        return jnp.take(x, self.index, axis=-1)

    def on_weight(self, weight):
        return jnp.take(weight, self.index, axis=0)

    def on_statistic(self, value, axes):
        for axis in range(axes):
            value = jnp.take(value, self.index, axis=axis)
        return value

    def stored(self):
        return self


@register_map
class Hadamard:
    """The inputs, the sign of each turned where its bit of `signs` (in / 8 bytes) is set, through a Hadamard matrix; in blocks
    of `block` neighbours, or all together where it is 0.
    """

    signs: UInt8[Array, " bytes"]
    block: int = dataclasses.field(default=0, metadata={"static": True})

    def on_input(self, x):
        size = x.shape[-1]
        turned = jnp.unpackbits(self.signs)[:size].astype(bool)
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        blocks = jnp.where(turned, -exact, exact).reshape(*x.shape[:-1], -1, self.block or size)
        return hadamard_transform(blocks).reshape(x.shape).astype(x.dtype)

    def on_weight(self, weight):
        return self.on_input(weight.T).T

    def on_statistic(self, value, axes):
        if axes == 1:
            raise QjaxError(
                "hadamard mixes inputs: statistics of single inputs, which awq and smoothquant read, are not known behind it; "
                "put it last of the transforms"
            )
        return value if axes == 0 else self.on_input(self.on_input(value).T).T

    def stored(self):
        return self


def random_hadamard(size: int, block: int = 0, seed: int = 0) -> Hadamard:
    """The map of `size` inputs with signs that the seed draws."""
    signs = np.random.default_rng([seed, size]).integers(0, 2, size, np.uint8)
    return Hadamard(jnp.asarray(np.packbits(signs)), block)


def permute(index: Sequence[int] | Int[Array, " in"]) -> Permute:
    """The map to inputs in the order of `index`. Raises QjaxError unless it holds every number from 0 on once.

    Permute itself checks nothing: it is made anew by every jax.tree.map, of values that need not be an order.
    """
    order = np.asarray(index)
    if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
        raise QjaxError(f"permute: {order.dtype} {order.shape} is no order of inputs; expected 0 to in - 1, each once")
    return Permute(jnp.asarray(order, jnp.int32))


@functools.partial(jax.jit, static_argnames="axes")
def _divided(value: Array, rows: Float[Array, " in"], axes: int) -> Array:
    """A statistic of x / rows."""
    return value if axes == 0 else value / rows if axes == 1 else value / (rows[:, None] * rows)


def on_input(maps: tuple[InputMap, ...], x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
    """x through all maps, the first one first."""
    for each in maps:
        x = each.on_input(x)
    return x


def on_weight(maps: tuple[InputMap, ...], weight: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The weight for inputs through all maps."""
    for each in maps:
        weight = each.on_weight(weight)
    return weight


def composed(maps: Sequence[InputMap]) -> tuple[InputMap, ...]:
    """The same maps, neighbours that divide as one."""
    found: list[InputMap] = []
    for each in maps:
        both_divide = found and isinstance(each, Divide) and isinstance(found[-1], Divide)
        found.append(Divide(found.pop().scale * each.scale) if both_divide else each)
    return tuple(found)


def merged(maps: tuple[InputMap, ...], weight: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The float32 weight for the input as it comes, of one for mapped inputs: x @ merged(W') = on_input(x) @ W'."""
    return _merged(maps, weight) if maps else weight


@jax.jit
def _merged(maps, weight):
    rows = jax.ShapeDtypeStruct(weight.T.shape, jnp.float32)
    (result,) = jax.linear_transpose(lambda x: on_input(maps, x), rows)(weight.T.astype(jnp.float32))
    return result.T
