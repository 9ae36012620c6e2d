"""What stands in a parameter's place in the tree of any function's parameters, and how contractions with it are computed."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax import flax_state
from qjax.errors import QjaxError
from qjax.linear import Leaf, Linear, apply_linear, decode, dequantize, is_quantized
from qjax.tracing.layout import View
from qjax.tracing.product import Product


@flax_state.registered
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel(Linear):
    """A Linear, or a stack of them, that knows the array it stands for: `view` of its shape as matrices, and its type."""

    view: View | None = dataclasses.field(default=None, metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def array(self) -> Float[Array, "..."]:
        """The decoded array, in the shape and type of the parameter; activation formats are left out."""
        return self.view.to_kernel(dequantize(self, jnp.dtype(self.dtype)))


def as_kernel(leaf: Leaf, view: View, dtype: DTypeLike) -> Kernel:
    """A quantized leaf (a stack where the view is one) as a parameter of this view and type."""
    parts = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(Linear)} if isinstance(leaf, Linear) else {}
    return Kernel(**(parts or {"weight": leaf}), view=view, dtype=jnp.dtype(dtype).name)


def dequantize_function(params: object) -> object:
    """Every Kernel in a tree of parameters as the array it stands for."""
    return jax.tree.map(lambda leaf: leaf.array() if isinstance(leaf, Kernel) else leaf, params, is_leaf=is_quantized)


def multiply(
    product: Product, x: Float[Array, "..."], leaf: Leaf, sizes: Int[Array, " experts"] | None, precision: PrecisionLike
) -> Float[Array, "..."]:
    """A contraction of x, in its type, with what stands for the parameter. sizes: rows of each expert, of a ragged product."""
    x = product.spread(x)
    rows = product.to_rows(x)
    if product.ragged:
        return product.to_output(_ragged(rows, leaf, sizes, precision), x.shape)
    apply = functools.partial(apply_linear, precision=precision)
    for _ in product.batch:
        apply = jax.vmap(apply)
    return product.to_output(apply(rows, leaf), x.shape)


def _ragged(rows: Float[Array, "rows in"], leaf: Linear, sizes: Int[Array, " experts"], precision) -> Float[Array, "rows out"]:
    """Rows times the matrix of their expert; 0 for rows of none."""
    if not leaf.inputs and leaf.activation is None and leaf.outliers is None and leaf.adapter is None:
        return lax.ragged_dot(rows, decode(leaf.weight, rows.dtype), sizes, precision=precision)
    owner = experts_of(sizes, len(rows))[:, None]

    def add(total, one):
        expert, layer = one
        return total + jnp.where(owner == expert, apply_linear(rows, layer, precision=precision), 0), None

    total = jnp.zeros((len(rows), leaf.shape[-1]), rows.dtype)
    return lax.scan(add, total, (jnp.arange(math.prod(sizes.shape)), leaf))[0]


def experts_of(sizes: Int[Array, " experts"], rows: int) -> Int[Array, " rows"]:
    """The expert of each row; the number of experts for rows of none."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")


class RefusedError(QjaxError):
    """A quantized parameter reaches what is not its contraction."""

    def __init__(self, path: object, primitive: str):
        super().__init__(
            f"{path}: a quantized parameter reaches {primitive}, not the contraction it was quantized for; quantize it for "
            "this function and these arguments (qjax.coverage tells what they do with it), or leave it out with a rule "
            "'PATTERN=none'"
        )
        self.path, self.primitive = path, primitive
