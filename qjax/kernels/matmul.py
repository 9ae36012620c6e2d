"""y = x W with a quantized W: the public multiply, and its choice of implementation.

`reference` decodes the weight and multiplies; it serves every format, device and shape, and is the oracle for others.
"""

import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Float

from qjax.errors import QjaxError
from qjax.qtensor import QLinear, QTensor, dequantize

IMPLEMENTATIONS = ("auto", "reference")


def matmul(
    x: Float[Array, "*batch in"], q: QTensor | QLinear, *, implementation: str = "auto", precision: PrecisionLike = None
) -> Float[Array, "*batch out"]:
    """x (..., in) times a quantized (in, out) weight, in x's type. precision: as in jnp.matmul.

    Raises QjaxError for an unknown implementation or when x's last axis is not the weight's input axis.
    """
    if implementation not in IMPLEMENTATIONS:
        raise QjaxError(f"matmul: unknown implementation {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
    if x.shape[-1] != q.in_features:
        raise QjaxError(f"matmul: x has {x.shape[-1]} features, the weight {q.shape} expects {q.in_features}")
    if isinstance(q, QLinear):
        return matmul(x * q.input_scale.astype(x.dtype), q.weight, implementation=implementation, precision=precision)
    return jnp.matmul(x, dequantize(q, x.dtype), precision=precision)
