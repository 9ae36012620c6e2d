"""Linear layers of one shape side by side, as the experts of a mixture are: what a Dense is to one of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from qjax.linear import apply_linear


class StackedDense(nn.Module):
    """y_e = x_e W_e for `count` layers, or x W_e where all are given the same x; the kernel is (count, in, out), or a stack of
    quantized leaves in its place. use_bias: with (count, out) biases, each layer's own.

    routed: the tokens that each layer is for. Every layer multiplies all tokens, whatever it is for, and whoever reads the
    output leaves out the others, as calibration does. products: as in `apply_linear`.
    """

    count: int
    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    products: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... in"], routed: Bool[Array, "count ..."]) -> Float[Array, "count ... out"]:
        if self.has_variable("params", "kernel"):  # which may be of other shapes than the weight
            kernel = self.get_variable("params", "kernel")
        else:
            shape = (self.count, x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=0), shape)
        axes = 0 if is_own(x, routed) else None
        apply = functools.partial(apply_linear, products=self.products)
        y = jax.vmap(apply, in_axes=(axes, 0))(x.astype(self.dtype), kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), (self.count, self.features))
        return y + bias.astype(y.dtype).reshape(self.count, *[1] * (y.ndim - 2), self.features)


def is_own(x: Float[Array, "... in"], routed: Bool[Array, "count ..."]) -> bool:
    """Whether x is (count, *tokens, in), each layer's own, rather than (*tokens, in), one for all."""
    return x.ndim > routed.ndim
