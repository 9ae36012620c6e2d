"""A function's trace: its jaxpr over the leaves of its parameters and the arrays of its arguments, made once per shape."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, PyTree

from qjax.calibrate.capture import merge_arguments, split_arguments
from qjax.errors import QjaxError
from qjax.linear import is_quantized
from qjax.tracing.kernel import Kernel

REMEMBERED = 128  # traces


class Traced(NamedTuple):
    """jaxpr: of the parameters in `paths`, in this order, then the arrays of the arguments; output: the result's tree."""

    jaxpr: ClosedJaxpr
    paths: tuple[str, ...]
    output: object

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters' shapes and types, by path."""
        avals = self.jaxpr.in_avals[: len(self.paths)]
        return {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in zip(self.paths, avals, strict=True)}


class Leaves(NamedTuple):
    """A tree of parameters taken apart: leaves that are arrays or stand for one, by path, and all that is needed to build it
    again.
    """

    arrays: dict[str, object]
    others: tuple[object, ...]  # None where an array belongs
    tree: object

    def rebuilt(self, arrays: Sequence[object]) -> PyTree:
        """The tree with these in the arrays' places, in order."""
        left = iter(arrays)
        return jax.tree.unflatten(self.tree, [next(left) if other is _ARRAY else other for other in self.others])


class _Array:
    def __repr__(self) -> str:
        return "an array"


_ARRAY = _Array()


def leaves_of(params: PyTree) -> Leaves:
    """Parameters taken apart; leaves that are no arrays, as functions in an Equinox module, stay what they are."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    is_array = [is_quantized(leaf) or isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for _, leaf in flat]
    names = _paths([keys for keys, _ in flat])
    arrays = {path: leaf for path, (_, leaf), array in zip(names, flat, is_array, strict=True) if array}
    if len(arrays) != sum(is_array):
        raise QjaxError(f"two parameters have the path {next(name for name in names if names.count(name) > 1)}; rename one")
    return Leaves(arrays, tuple(_ARRAY if array else leaf for (_, leaf), array in zip(flat, is_array, strict=True)), tree)


def _paths(keys: Sequence[tuple[object, ...]]) -> list[str]:
    """Paths of leaves, "layers/0/kernel"; without the "value" of boxes of Flax, which hold nothing else."""
    siblings = Counter(each[:-1] for each in keys)
    name = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))  # noqa: E731
    is_box = lambda each: each and each[-1] == jax.tree_util.GetAttrKey("value") and siblings[each[:-1]] == 1  # noqa: E731
    return ["/".join(map(name, each[:-1] if is_box(each) else each)) for each in keys]


def closed_over(jaxpr: ClosedJaxpr) -> list[Array]:
    """The arrays that a program closes over, and those that programs inside it do."""
    found = list(getattr(jaxpr, "consts", ()))
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            found += closed_over(value) if hasattr(value, "eqns") else []
    return found


_traces: OrderedDict[tuple, Traced] = OrderedDict()
_lock = threading.Lock()
_context = jax.jit(lambda: ())  # JAX traces it anew, which gives another object, wherever other axes, meshes or settings hold


def trace(fn: Callable, leaves: Leaves, args: tuple, kwargs: dict) -> tuple[Traced, list[Array]]:
    """fn(params, *args, **kwargs) as traced, once for parameters and arguments of these shapes where the same named axes, mesh
    and settings of JAX hold, and the arguments' arrays.

    Arguments that are no arrays are part of the trace. Raises QjaxError for quantized leaves that are no Kernel: only these
    know the shape that fn expects.
    """
    static, arrays = split_arguments((args, kwargs))
    values = [
        leaf if not isinstance(leaf, Kernel) else jax.ShapeDtypeStruct(leaf.view.shape, leaf.dtype)
        for leaf in leaves.arrays.values()
    ]
    if wrong := [path for path, leaf in leaves.arrays.items() if is_quantized(leaf) and not isinstance(leaf, Kernel)]:
        raise QjaxError(f"{', '.join(wrong)}: quantized, but not by qjax.quantize_function, whose leaves know their shape")
    try:
        others = leaves.others, tuple(map(type, leaves.others))
        key = (fn, leaves.tree, others, static, tuple(map(_kind, (*values, *arrays))), _context.trace().jaxpr)
        hash(key)
    except TypeError:
        return _traced(fn, leaves, static, values, arrays), arrays
    with _lock:
        if key in _traces:
            _traces.move_to_end(key)
            return _traces[key], arrays
    made = _traced(fn, leaves, static, values, arrays)
    if not any(isinstance(const, jax.core.Tracer) for const in made.jaxpr.consts):  # what lives in one transformation alone
        with _lock:
            _traces[key] = made
            while len(_traces) > REMEMBERED:
                _traces.popitem(last=False)
    return made, arrays


def _kind(value: object) -> object:
    return jax.typeof(value) if isinstance(value, jax.Array) else jax.core.ShapedArray(value.shape, np.dtype(value.dtype))


def _traced(fn, leaves: Leaves, static, values, arrays) -> Traced:
    def flat(leaf_values, array_values):
        args, kwargs = merge_arguments(static, array_values)
        return fn(leaves.rebuilt(leaf_values), *args, **kwargs)

    jaxpr, shape = jax.make_jaxpr(flat, return_shape=True)(values, arrays)
    return Traced(jaxpr, tuple(leaves.arrays), jax.tree.structure(shape))
