"""Diagnostics that every rounding method returns beside its QTensor."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qjax import grid
from qjax.formats import Format
from qjax.qtensor import QTensor, from_codes
from qjax.scales import times_power_of_two


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


@jax.jit
def relative(loss: Float[Array, ""], whole: Float[Array, ""]) -> Float[Array, ""]:
    """loss / whole, and the loss itself where the whole is 0."""
    return loss / jnp.where(whole == 0, 1.0, whole)


@jax.jit
def output_loss(weight: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, ""]:
    """tr(W^T H W): the mean squared output of a layer with this weight, summed over its outputs. Of dW it is the proxy loss."""
    return jnp.sum(weight * jnp.matmul(hessian, weight, precision=jax.lax.Precision.HIGHEST))


@functools.partial(jax.jit, static_argnames="exponent")
def change_loss(
    new: Float[Array, "in out"], weight: Float[Array, "in out"], hessian: Float[Array, "in in"], *, exponent: int = 0
) -> Float[Array, ""]:
    """`output_loss` of 2^-exponent times the change of a weight."""
    return output_loss(times_power_of_two(new - weight, -exponent), hessian)


def clipped_share(
    weight: Float[Array, "in out"], scale: Float[Array, "groups channels"], zero: Float[Array, "..."] | None, fmt: Format
) -> Float[Array, ""]:
    """The fraction of weights beyond the outermost values of their group's grid."""
    groups = grid.to_groups(weight, fmt)
    present = grid.padding_mask(groups, weight.size)
    zero = None if zero is None else zero[:, None]
    ends = [grid.decode(jnp.uint8(code), scale[:, None], zero, fmt) for code in (0, fmt.largest_code)]
    clipped = (groups < jnp.minimum(*ends)) | (groups > jnp.maximum(*ends))
    clipped = clipped if present is None else clipped & present
    return jnp.sum(clipped, dtype=jnp.float32) / weight.size


@functools.partial(jax.jit, static_argnames="fmt")
def finish(
    weight: Float[Array, "in out"],
    damp: Float[Array, ""],
    added: Float[Array, " in"],
    parameters: grid.Parameters,
    codes: UInt8[Array, "in out"],
    errors: Float[Array, "in out"],
    damped_loss: Float[Array, "*in"],
    fmt: Format,
) -> tuple[QTensor, Info]:
    """The result of a method that worked against a damped Hessian. errors: W - W'; damped_loss: tr(E^T (H + diag(added)) E), or
    the part of each input.
    """
    squares = jnp.sum(jnp.square(errors), axis=1)
    proxy_loss = jnp.maximum(jnp.sum(damped_loss) - jnp.sum(added * squares), 0)
    weight_error = relative(jnp.sum(squares), jnp.sum(jnp.square(weight)))
    info = Info(
        weight_error=jnp.where(jnp.isfinite(proxy_loss), weight_error, jnp.nan),
        clipped=clipped_share(weight, parameters.decoded_scale, parameters.zero, fmt),
        proxy_loss=proxy_loss,
        damp=damp,
    )
    return from_codes(codes, parameters, fmt), info
