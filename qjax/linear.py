"""What stands in a kernel's place: a Linear says all that the layer does, and one function knows the order.

    x' = maps(x);   y = A(x') W' + x'_o W_o + s (x a) b

maps: exact maps of the input (`maps.py`). A: the activation format (`activations.py`), identity where there is none. W': the
quantized weight. o: inputs whose rows stay in 16 bits (LLM.int8(): Dettmers et al. 2022, arXiv 2208.07339); A and W' see
0 there. a b: a low-rank adapter of the input as it comes (LoRA: Hu et al. 2021, 2106.09685).

A weight for which nothing more is said is a bare QTensor; a table of embeddings is a Table. To run a model its leaves are
decoded once (`dense`) or laid out for the device's kernels (`prepare`): whatever else a layer does to its input is kept. Codes
that are multiplied in integers (`runs_in_integers`) stay.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from qjax import flax_state, maps, qtensor
from qjax.activations import Activation, is_integer_product, multiply_rounded, parse_activation
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.kernels import integers, layout
from qjax.kernels.layout import KernelWeight
from qjax.kernels.matmul import KERNELS, choose, matmul
from qjax.maps import InputMap
from qjax.qtensor import QTensor, nbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outliers:
    """Rows of a weight kept in 16 bits: `weight` (k, out) for the distinct inputs `index` (k,) int32, after the maps."""

    index: Int[Array, " k"]
    weight: Float[Array, "k out"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """An adapter: scaling * (x a) b is added to the output; a (in, r), b (r, out)."""

    a: Float[Array, "in r"]
    b: Float[Array, "r out"]
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})


@flax_state.registered
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer's (in, out) weight, quantized, decoded (an array) or laid out for a kernel, and all else that the layer does.

    activation: a name is parsed. activation_scale: of a static activation format, from calibration; None for a dynamic one.
    """

    weight: QTensor | KernelWeight | Float[Array, "in out"]
    inputs: tuple[InputMap, ...] = ()
    activation: Activation | None = dataclasses.field(default=None, metadata={"static": True})
    activation_scale: Float[Array, ""] | None = None
    outliers: Outliers | None = None
    adapter: LowRank | None = None

    def __post_init__(self):
        if isinstance(self.activation, str):
            object.__setattr__(self, "activation", parse_activation(self.activation))

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., in, out) of the weight that this stands for."""
        return self.weight.shape

    @property
    def format(self) -> Format | None:
        """Format of the codes; None where the weight is an array."""
        return self.weight.format if isinstance(self.weight, QTensor | KernelWeight) else None

    @property
    def nbytes(self) -> int:
        """Exact bytes of all parts."""
        return nbytes(self)

    @property
    def bits_per_weight(self) -> float:
        """Exact bits per weight, all parts included."""
        return 8 * self.weight.nbytes / math.prod(self.shape) * self.nbytes / self.weight.nbytes


@flax_state.registered
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """A quantized table (rows, columns), of embeddings: row i is output i of `weight` (columns, rows)."""

    weight: QTensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the table that this stands for."""
        columns, rows = self.weight.shape
        return rows, columns

    @property
    def format(self) -> Format:
        """Format of the codes."""
        return self.weight.format

    @property
    def nbytes(self) -> int:
        """Exact bytes of codes, scales and zero points."""
        return self.weight.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Exact bits per weight, everything included."""
        return self.weight.bits_per_weight


Leaf = Linear | QTensor | KernelWeight | Table | Array


def apply_linear(
    x: Float[Array, "*batch in"],
    leaf: Leaf,
    *,
    implementation: str = "auto",
    precision: PrecisionLike = None,
    products: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """What the layer makes of x (..., in), in x's type. implementation, precision: as in `qjax.matmul`, where there are codes.
    products: what x and a decoded weight are cast to before they are multiplied, where the layer does not round its input.

    Raises QjaxError for what `qjax.matmul` refuses, and a stack of Linears, which goes through jax.vmap or a scan.
    """
    x = jnp.asarray(x)
    if not isinstance(leaf, Linear):
        leaf = Linear(leaf)
    elif len(leaf.shape) != 2:
        raise QjaxError(f"apply_linear: got a stack of shape {leaf.shape}; use jax.vmap, which takes its layers one by one")
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim or x.shape[-1] != leaf.shape[-2]:
        raise QjaxError(
            f"apply_linear: x is {x.dtype} {x.shape}, the weight {leaf.shape} expects floats (..., {leaf.shape[-2]})"
        )
    given, x = x, maps.on_input(leaf.inputs, x)
    kept = leaf.outliers
    rest = x if kept is None else x.at[..., kept.index].set(0)
    how = {"implementation": implementation, "precision": precision}
    product = functools.partial(_product, precision=precision, products=products)
    if leaf.activation is not None:
        y = multiply_rounded(rest, leaf.weight, leaf.activation, leaf.activation_scale, **how)
    elif isinstance(leaf.weight, QTensor | KernelWeight):
        y = matmul(rest, leaf.weight, **how)
    else:
        y = product(rest, leaf.weight)
    if kept is not None:
        y += product(x[..., kept.index], kept.weight)
    if leaf.adapter is not None:
        y += leaf.adapter.scaling * product(product(given, leaf.adapter.a), leaf.adapter.b)
    return y


def _product(x: Array, weight: Array, precision: PrecisionLike, products: DTypeLike | None) -> Array:
    if products is None:
        return jnp.matmul(x, weight.astype(x.dtype), precision=precision)
    both = x.astype(products), weight.astype(products)
    return jnp.matmul(*both, precision=precision, preferred_element_type=x.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(leaf: Leaf, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (..., in, out) weight for the input as it comes, in floating point: codes, maps, outlier rows and adapter together;
    what an activation format does is no part of a weight. Of a Table its rows. Values are computed in float32, then cast to
    `dtype`.
    """
    if not isinstance(leaf, Linear):
        return decode(leaf, dtype)
    if len(leaf.shape) > 2:
        return jax.vmap(functools.partial(dequantize, dtype=dtype))(leaf)
    weight = decode(leaf.weight)
    if leaf.outliers is not None:
        weight = weight.at[leaf.outliers.index].set(leaf.outliers.weight.astype(jnp.float32))
    weight = maps.merged(leaf.inputs, weight)
    if leaf.adapter is not None:
        a, b = (part.astype(jnp.float32) for part in (leaf.adapter.a, leaf.adapter.b))
        weight += leaf.adapter.scaling * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return weight.astype(dtype)


def decode(weight: QTensor | KernelWeight | Table | Array, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in out"]:
    """The weight of a leaf alone, in floating point; of a Table its rows."""
    if isinstance(weight, Table):
        return qtensor.dequantize(weight.weight, dtype).T
    if isinstance(weight, QTensor):
        return qtensor.dequantize(weight, dtype)
    return layout.dequantize(weight, dtype) if isinstance(weight, KernelWeight) else weight.astype(dtype)


def dense(leaf: Leaf, dtype: DTypeLike = jnp.float32) -> Linear | Float[Array, "*batch in out"]:
    """The leaf with its weight decoded, for speed: an array where the layer is one product, else a Linear that does to its
    input all that the leaf does.
    """
    if isinstance(leaf, Linear) and leaf.activation is not None:
        return dataclasses.replace(leaf, weight=decode(leaf.weight, dtype))
    return dequantize(leaf, dtype)


def runs_in_integers(leaf: Linear) -> bool:
    """Whether its product, of an input that it rounds, is one of integers and on this machine faster than that of floats."""
    return len(leaf.shape) == 2 and is_integer_product(leaf.activation, leaf.weight) and integers.pays_decoded()


def columns(leaf: Linear | QTensor, index: np.ndarray) -> Linear | QTensor:
    """The layer of some outputs, or a stack of them, see `qtensor.columns`; of a Linear without outliers and adapter."""
    if len(leaf.shape) > 2:
        return jax.vmap(functools.partial(columns, index=index))(leaf)
    if isinstance(leaf, Linear):
        return dataclasses.replace(leaf, weight=columns(leaf.weight, index))
    return qtensor.columns(leaf, index)


def prepare(leaf: Linear | QTensor) -> Linear | KernelWeight:
    """The leaf with its weight laid out for kernels, see `kernels.layout.prepare`; it stands for the same layer."""
    if isinstance(leaf, Linear):
        return dataclasses.replace(leaf, weight=layout.prepare(leaf.weight))
    return layout.prepare(leaf)


def is_quantized(leaf: object) -> bool:
    """True for what stands for a weight and is no array: use as `is_leaf` when mapping over a tree of parameters."""
    return isinstance(leaf, Linear | QTensor | KernelWeight | Table)


def dequantize_tree(tree: PyTree, dtype: DTypeLike | None = jnp.float32) -> PyTree:
    """Every quantized leaf of a tree as a floating-point array, other leaves cast too (dtype None leaves them as they are)."""
    return _convert(tree, dtype, dequantize)


def dense_tree(tree: PyTree, dtype: DTypeLike | None = jnp.float32) -> PyTree:
    """A tree to run: every quantized leaf `dense`, other leaves cast (dtype None leaves them as they are)."""
    return _convert(tree, dtype, dense)


def without_activations(tree: PyTree) -> PyTree:
    """The tree with layers that do not round their inputs."""

    def convert(leaf):
        return dataclasses.replace(leaf, activation=None, activation_scale=None) if isinstance(leaf, Linear) else leaf

    return jax.tree.map(convert, tree, is_leaf=is_quantized)


def cast_tree(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """The tree with the leaves that are not quantized cast."""
    return _convert(tree, dtype, lambda leaf, _: leaf)


def prepare_tree(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """A tree to run packed: quantized weights laid out, once, for the kernels of JAX's default device and inputs of `dtype`.

    Where `auto` would not take a kernel (on CPU never) a leaf stays as it is; so do stacks of weights. Tables, of which
    rows are taken, are decoded.
    """

    def convert(leaf):
        if isinstance(leaf, Table):
            return dequantize(leaf, dtype)
        weight = leaf.weight if isinstance(leaf, Linear) else leaf
        fits = isinstance(weight, QTensor) and len(weight.shape) == 2 and choose("auto", dtype, weight) in KERNELS
        return prepare(leaf) if fits else leaf

    return jax.tree.map(convert, tree, is_leaf=is_quantized)


def _convert(tree, dtype, decoded):
    def convert(leaf):
        if is_quantized(leaf):
            return decoded(leaf, jnp.float32 if dtype is None else dtype)
        return leaf if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(dtype)

    return jax.tree.map(convert, tree, is_leaf=is_quantized)
