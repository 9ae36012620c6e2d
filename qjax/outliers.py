"""LLM.int8(): inputs of a layer with large values are left out of its integers (Dettmers et al. 2022, arXiv 2208.07339).

    y = s_t sum over inputs without an outlier of q_ti W_i   +   sum over inputs with one of x_ti W_i

An input (a channel of x) is left out for all tokens of a call where |x| reaches the threshold for one of them. As bitsandbytes
has it: a token's scale s_t is its largest |x| below the threshold / 127, inputs that are left out included; W is the int8
weight, decoded, for both sums (the paper keeps 16-bit rows of the original). Shapes do not depend on the outliers: they are
masked, not gathered, so that one program serves every batch. In a mixture of experts the tokens of a call are all of them,
whichever expert they are routed to.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8


def split_outliers(
    x: Float[Array, "*batch in"], threshold: float
) -> tuple[Int8[Array, "*batch in"], Float[Array, "*batch 1"], Bool[Array, " in"]]:
    """(codes, float32 scale of each token, inputs that are left out, whose codes are 0)."""
    x = x.astype(jnp.float32)
    large = jnp.abs(x) >= threshold
    outlying = jnp.any(large, axis=tuple(range(x.ndim - 1)))
    largest = jnp.max(jnp.abs(jnp.where(large, 0, x)), axis=-1, keepdims=True)
    largest = jnp.where(largest == 0, 1.0, largest)
    codes = jnp.round(jnp.where(outlying, 0, x) * (127 * (1 / largest)))  # torch's 127 / largest
    return codes.astype(jnp.int8), largest / 127, outlying
