"""Diagnostics that every rounding method returns beside its QTensor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Info(NamedTuple):
    """How good a quantized weight is; float32 scalars, None where the method had nothing to measure it with.

    weight_error: ||W' - W||^2 / ||W||^2. clipped: the fraction of weights beyond the outermost values of their group's grid.
    proxy_loss: tr(dW^T H dW). output_error: proxy_loss / tr(W^T H W). damp: the damping used.
    """

    weight_error: jax.Array
    clipped: jax.Array
    proxy_loss: jax.Array | None = None
    output_error: jax.Array | None = None
    damp: jax.Array | None = None


def relative(loss: Float[Array, ""], whole: Float[Array, ""]) -> Float[Array, ""]:
    """loss / whole, and the loss itself where the whole is 0."""
    return loss / jnp.where(whole == 0, 1.0, whole)


@jax.jit
def output_loss(weight: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, ""]:
    """tr(W^T H W): the mean squared output of a layer with this weight, summed over its outputs. Of dW it is the proxy loss."""
    return jnp.sum(weight * jnp.matmul(hessian, weight, precision=jax.lax.Precision.HIGHEST))
