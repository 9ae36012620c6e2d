"""Formats of a layer's input: what a recipe says after the slash.

    /int8-token                                  every token (a row of x) by its largest value, -127..127: dynamic W8A8
    /int4-token, /fp8_e4m3-token, /int8-g128     any weight format, one scale a token or a group of its inputs

A token is to its inputs what an output channel is to a weight's: the arithmetic is the weight format's, on x transposed, with
`channel` for `token`. Integers are symmetric with the bound `max`, scales are float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Float

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import INTEGERS, Format, parse_format
from qjax.kernels.layout import KernelWeight
from qjax.kernels.matmul import ACTIVATIONS, matmul, refusal_of_int8, tokens_int8
from qjax.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Activation:
    """How a layer's input is rounded; build it with `parse_activation`, print its name with `str`. format: of x transposed."""

    name: str
    format: Format

    def __str__(self) -> str:
        return self.name


@functools.lru_cache(maxsize=256)
def parse_activation(text: str) -> Activation:
    """The activation format named `text`, for example "int8-token"; raises QjaxError that says what is allowed."""
    grid_name, _, sharing = text.strip().partition("-")
    if not sharing or "channel" in sharing or sharing.startswith(("b", "tensor")):
        raise QjaxError(f"activation format {text!r}: expected GRID-token or GRID-gN, for example int8-token or fp8_e4m3-token")
    symmetric = "-sym-max" if grid_name in INTEGERS else ""
    wanted = f"{grid_name}-{sharing.replace('token', 'channel')}{symmetric}"
    try:
        return Activation(text.strip(), parse_format(wanted if grid_name not in INTEGERS else f"{wanted}-fp32"))
    except QjaxError as error:
        raise QjaxError(f"activation format {text!r}: {error}") from None


def round_activation(x: Float[Array, "*batch in"], activation: Activation) -> Float[Array, "*batch in"]:
    """The values that x's codes stand for, in x's type; the gradient is that of x (straight-through)."""
    if activation.name == ACTIVATIONS:
        codes, scale = tokens_int8(jax.lax.stop_gradient(x))
        values = codes.astype(jnp.float32) * scale
    else:
        values = _rounded(jax.lax.stop_gradient(x).reshape(-1, x.shape[-1]).T.astype(jnp.float32), activation.format)
        values = values.T.reshape(x.shape)
    return x + jax.lax.stop_gradient(values.astype(x.dtype) - x)


def _rounded(columns: Float[Array, "in tokens"], fmt: Format) -> Float[Array, "in tokens"]:
    groups = grid.to_groups(columns, fmt)
    found = grid.find_parameters(groups, fmt)
    zero = None if found.zero is None else found.zero[:, None]
    codes = grid.encode(groups, found.scale[:, None], zero, fmt)
    return grid.from_groups(grid.decode(codes, found.decoded_scale[:, None], zero, fmt), fmt, *columns.shape)


def multiply_rounded(
    x: Float[Array, "*batch in"],
    weight: QTensor | KernelWeight | Float[Array, "in out"],
    activation: Activation,
    *,
    implementation: str = "auto",
    precision: PrecisionLike = None,
) -> Float[Array, "*batch out"]:
    """A(x) W in x's type: in integers where weight and device have such a product, with rounded values of x elsewhere."""
    if isinstance(weight, jax.Array):
        return jnp.matmul(round_activation(x, activation), weight.astype(x.dtype), precision=precision)
    if activation.name == ACTIVATIONS and refusal_of_int8(weight) is None:
        return matmul(x, weight, implementation=implementation, activations=ACTIVATIONS)
    return matmul(round_activation(x, activation), weight, implementation=implementation, precision=precision)
