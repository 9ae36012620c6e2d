"""What stands in a kernel's place: a Linear says all that the layer does, and one function knows the order.

    x' = maps(x);   y = A(x') W' + x'_o W_o + s (x a) b

maps: exact maps of the input (`maps.py`). A: the activation format (`activations.py`), identity where there is none. W': the
quantized weight. o: inputs whose rows stay in 16 bits (LLM.int8(): Dettmers et al. 2022, arXiv 2208.07339); A and W' see
0 there. a b: a low-rank adapter of the input as it comes (LoRA: Hu et al. 2021, 2106.09685).

A weight for which nothing more is said is a bare QTensor. Evaluation decodes weights once (`dense`): whatever else a layer does
to its input is kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from qjax import maps, qtensor
from qjax.activations import Activation, multiply_rounded
from qjax.formats import Format
from qjax.kernels import layout
from qjax.kernels.layout import KernelWeight
from qjax.kernels.matmul import matmul
from qjax.maps import InputMap
from qjax.qtensor import QTensor, nbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outliers:
    """Rows of a weight kept in 16 bits: `weight` (k, out) for the inputs `index` (k,) int32, after the maps."""

    index: Int[Array, " k"]
    weight: Float[Array, "k out"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scaling",))
@dataclasses.dataclass(frozen=True)
class LowRank:
    """An adapter: scaling * (x a) b is added to the output; a (in, r), b (r, out)."""

    a: Float[Array, "in r"]
    b: Float[Array, "r out"]
    scaling: float = 1.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "inputs", "activation_scale", "outliers", "adapter"),
    meta_fields=("activation",),
)
@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer's (in, out) weight, quantized, decoded (an array) or laid out for a kernel, and all else that the layer does.

    activation_scale: of a static activation format, from calibration; None for a dynamic one.
    """

    weight: QTensor | KernelWeight | Float[Array, "in out"]
    inputs: tuple[InputMap, ...] = ()
    activation: Activation | None = None
    activation_scale: Array | None = None
    outliers: Outliers | None = None
    adapter: LowRank | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., in, out) of the weight that this stands for."""
        return self.weight.shape

    @property
    def format(self) -> Format:
        """Format of the codes."""
        return self.weight.format

    @property
    def in_features(self) -> int:
        """Length of the input axis."""
        return self.shape[-2]

    @property
    def nbytes(self) -> int:
        """Exact bytes of all parts."""
        return nbytes(self)

    @property
    def bits_per_weight(self) -> float:
        """Exact bits per weight, all parts included."""
        return self.weight.bits_per_weight * self.nbytes / self.weight.nbytes


Leaf = Linear | QTensor | KernelWeight | Array


def apply_linear(
    x: Float[Array, "*batch in"], leaf: Leaf, *, implementation: str = "auto", precision: PrecisionLike = None
) -> Float[Array, "*batch out"]:
    """What the layer makes of x (..., in), in x's type. implementation, precision and errors: as `qjax.matmul`."""
    if not isinstance(leaf, Linear):
        leaf = Linear(leaf)
    given, x = x, maps.on_input(leaf.inputs, x)
    kept = leaf.outliers
    rest = x if kept is None else x.at[..., kept.index].set(0)
    how = {"implementation": implementation, "precision": precision}
    if leaf.activation is not None:
        y = multiply_rounded(rest, leaf.weight, leaf.activation, **how)
    elif isinstance(leaf.weight, jax.Array):
        y = jnp.matmul(rest, leaf.weight.astype(x.dtype), precision=precision)
    else:
        y = matmul(rest, leaf.weight, **how)
    if kept is not None:
        y += jnp.matmul(x[..., kept.index], kept.weight.astype(x.dtype), precision=precision)
    if leaf.adapter is not None:
        a, b = (part.astype(x.dtype) for part in (leaf.adapter.a, leaf.adapter.b))
        y += leaf.adapter.scaling * jnp.matmul(jnp.matmul(given, a, precision=precision), b, precision=precision)
    return y


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(leaf: Leaf, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (..., in, out) weight for the input as it comes, in floating point: codes, maps, outlier rows and adapter together;
    what an activation format does is no part of a weight. Values are computed in float32, then cast to `dtype`.
    """
    if not isinstance(leaf, Linear):
        return decode(leaf, dtype)
    if len(leaf.shape) > 2:
        return jax.vmap(functools.partial(dequantize, dtype=dtype))(leaf)
    weight = decode(leaf.weight, jnp.float32)
    if leaf.outliers is not None:
        weight = weight.at[leaf.outliers.index].set(leaf.outliers.weight.astype(jnp.float32))
    weight = maps.merged(leaf.inputs, weight)
    if leaf.adapter is not None:
        a, b = (part.astype(jnp.float32) for part in (leaf.adapter.a, leaf.adapter.b))
        weight += leaf.adapter.scaling * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return weight.astype(dtype)


def decode(weight: QTensor | KernelWeight | Array, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in out"]:
    """The weight of a leaf alone, in floating point."""
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


def is_quantized(leaf: object) -> bool:
    """True for a QTensor or Linear: use as `is_leaf` when mapping over a tree of parameters."""
    return isinstance(leaf, (QTensor, Linear))


def dequantize_tree(tree: PyTree, dtype: DTypeLike | None = jnp.float32) -> PyTree:
    """Every quantized leaf of a tree as a floating-point array, other leaves cast too (dtype None leaves them as they are)."""
    return _convert(tree, dtype, dequantize)


def dense_tree(tree: PyTree, dtype: DTypeLike | None = jnp.float32) -> PyTree:
    """A tree to evaluate: every quantized leaf `dense`, other leaves cast (dtype None leaves them as they are)."""
    return _convert(tree, dtype, dense)


def _convert(tree, dtype, decoded):
    def convert(leaf):
        if is_quantized(leaf):
            return decoded(leaf, jnp.float32 if dtype is None else dtype)
        return leaf if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(dtype)

    return jax.tree.map(convert, tree, is_leaf=is_quantized)
