"""Stacks: parameters of one kind in one array with a leading axis, and each by itself.

    block_0/mlp/gate/kernel     (experts, in, out)    as a model holds the experts of a mixture
    block_0/mlp/gate/3/kernel   (in, out)             the fourth, as files of other libraries hold it, and as methods round it

A stack of quantized leaves is one leaf whose arrays are stacked, and all that it is besides is the same for all.
"""

import functools
import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.lazy import Lazy, materialised

T = TypeVar("T")


def member(path: str, number: int) -> str:
    """The path of one of a stack."""
    module, _, leaf = path.rpartition("/")
    return f"{module}/{number}/{leaf}"


def stack_of(path: str) -> str:
    """The path of the stack that a path may be a member of: itself without a number before its end."""
    return re.sub(r"/\d+(/\w+)$", r"\1", path)


def with_biases(stacks: Mapping[str, int], leaves: Mapping[str, object]) -> dict[str, int]:
    """The stacks of kernels and, where the leaves have them, of their biases."""
    beside = {re.sub(r"kernel$", "bias", path): count for path, count in stacks.items()}
    return {**stacks, **{path: count for path, count in beside.items() if path in leaves}}


def spread(values: Mapping[str, T], stacks: Mapping[str, int]) -> dict[str, T]:
    """The same value for each member, in the stack's place."""
    return {
        each: value
        for path, value in values.items()
        for each in ([member(path, number) for number in range(stacks[path])] if path in stacks else [path])
    }


def apart(leaves: Mapping[str, object], stacks: Mapping[str, int]) -> dict[str, object]:
    """The leaves with the members of the stacks, path -> how many, in their places."""
    found = {}
    for path, leaf in leaves.items():
        if path not in stacks:
            found[path] = leaf
            continue
        parts, tree = jax.tree.flatten(leaf)
        parts = [_once(part) for part in parts]
        for number in range(stacks[path]):
            found[member(path, number)] = jax.tree.unflatten(tree, [_of(part, number) for part in parts])
    return found


def together(leaves: Mapping[str, object], stacks: Mapping[str, int]) -> dict[str, object]:
    """The inverse of `apart`; stacks that are there already stay. Raises QjaxError for members that are not of one kind."""
    left, found = dict(leaves), {}
    whole = {member(path, number): path for path in stacks for number in range(stacks[path])}
    for path in leaves:
        if (stack := whole.get(path, path)) in found:
            continue
        if path not in whole:
            found[path] = left.pop(path)
            continue
        members = [left.pop(member(stack, number)) for number in range(stacks[stack])]
        trees = {jax.tree.structure(each) for each in members}
        shapes = {tuple(part.shape for part in jax.tree.leaves(each)) for each in members}
        if len(trees) > 1 or len(shapes) > 1:
            raise QjaxError(f"{stack}: its {len(members)} members are not of one format and kind; treat all of them alike")
        found[stack] = jax.tree.map(lambda *parts: _stacked(parts), *members)
        del members
    return found


def _stacked(parts: tuple) -> object:
    if not any(isinstance(part, Lazy) for part in parts):
        return jnp.stack(parts)
    dtype = np.result_type(*(part.dtype for part in parts))
    return Lazy((len(parts), *parts[0].shape), dtype, lambda: jnp.stack([materialised(part) for part in parts]), parts[0].file)


def _once(part: object) -> object:
    """A lazy stack that is read once for all of its members that are asked for one after the other."""
    if not isinstance(part, Lazy):
        return part
    return Lazy(part.shape, part.dtype, functools.lru_cache(maxsize=1)(part.read), part.file)


def _of(part: object, number: int) -> object:
    if not isinstance(part, Lazy):
        return part[number]
    return Lazy(part.shape[1:], part.dtype, lambda: part.read()[number], part.file)
