"""Formats of a layer's input: what a recipe says after the slash.

    /int8-token                                  every token (a row of x) by its largest value, -127..127: dynamic W8A8
    /int4-token, /fp8_e4m3-token, /int8-g128     a weight format, one scale a token or a group of its inputs
    /int8-token-sym                              by its largest value / 127.5, -128..127: compressed-tensors' W8A8
    /int8-tensor, /fp8_e4m3-tensor               one scale for all tokens, static: from calibration (`static_scale`)

A token is to its inputs what an output channel is to a weight's: the arithmetic is the weight format's, on x transposed, with
`channel` for `token`. Integers are symmetric with the bound `max`, or `edge` after sym; scales are float32. Formats that store
scales relative to all others (nvfp4) are refused: what becomes of a token would depend on which others are in the call.

A static format reads calibration data, so its recipe has an order of calibration as others that read data do, `@qep` where it
names none: rtn:int8-channel-sym/int8-tensor rounds weights that are first corrected for the error of their inputs, @parallel
leaves them as they are.
"""

import dataclasses

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
from qjax.scales import Floats

INTEGER_OPTIONS = "-sym-max-fp32"  # of a weight's format


@dataclasses.dataclass(frozen=True)
class Activation:
    """How a layer's input is rounded; build it with `parse_activation`, print its name with `str`. format: of x transposed."""

    format: Format

    @property
    def is_static(self) -> bool:
        """Whether its scale comes from calibration."""
        return self.format.granularity == "tensor"

    def __str__(self) -> str:
        name = str(self.format).removesuffix(INTEGER_OPTIONS)
        return (name.removesuffix("-fp32") if self.format.bound == "edge" else name).replace("-channel", "-token")


def parse_activation(text: str) -> Activation:
    """The activation format named `text`, for example "int8-token"; raises QjaxError that says what is allowed."""
    grid_name, *parts = text.strip().lower().split("-")
    edge = grid_name in INTEGERS and parts[1:] == ["sym"]
    parts = parts[:1] if edge else parts
    options = "" if grid_name not in INTEGERS else "-sym-fp32" if edge else INTEGER_OPTIONS
    name = "-".join([grid_name, *parts]).replace("-token", "-channel") + options
    try:
        refused = len(parts) > 1 or parts in (["channel"], ["dq"]) or (grid_name in INTEGERS and not parts)
        fmt = None if refused else parse_format(name)
    except QjaxError:
        fmt = None
    if fmt is None or fmt.granularity not in ("channel", "group", "tensor"):
        raise QjaxError(
            f"activation format {text!r}: expected GRID-token, GRID-gN or GRID-tensor with the grid of a weight format, for "
            "example int8-token or fp8_e4m3-token"
        )
    if fmt.scale_codec.together or type(fmt.scale_codec).common is not Floats.common:
        raise QjaxError(
            f"activation format {text!r}: {fmt.scales} stores scales relative to those of all tokens of the call, and tokens "
            "must not act on each other; take scales that stand alone, for example mxfp4 or fp8_e4m3-token"
        )
    return Activation(fmt)


def static_scale(abs_max: Float[Array, " in"], activation: Activation) -> Float[Array, ""]:
    """The scale of a static format for inputs as large as `abs_max`."""
    groups = grid.to_groups(abs_max.astype(jnp.float32)[:, None], activation.format)
    return grid.find_parameters(groups, activation.format).scale.reshape(())


def round_activation(
    x: Float[Array, "*batch in"], activation: Activation, scale: Float[Array, ""] | None = None
) -> Float[Array, "*batch in"]:
    """The values that x's codes stand for, in x's type; the gradient is that of x (straight-through).

    scale: of a static format. Raises QjaxError where it is missing, or given to a dynamic format.
    """
    if activation.is_static != (scale is not None):
        kind, found = ("static", "there is none") if activation.is_static else ("dynamic", "one was given")
        raise QjaxError(f"activation format {activation} is {kind}, but {found}: give an activation_scale to static formats")
    exact = jax.lax.stop_gradient(x).astype(jnp.float32)
    if activation.is_static:
        codes = grid.encode(exact, scale, None, activation.format)
        values = grid.decode(codes, scale, None, activation.format)
    elif str(activation) == ACTIVATIONS:
        codes, scale = tokens_int8(exact)
        values = codes.astype(jnp.float32) * scale
    else:
        values = _rounded(exact.reshape(-1, x.shape[-1]).T, activation.format).T.reshape(x.shape)
    return x + jax.lax.stop_gradient(values.astype(x.dtype) - x)


def _rounded(columns: Float[Array, "in tokens"], fmt: Format) -> Float[Array, "in tokens"]:
    groups = grid.to_groups(columns, fmt)
    found = grid.find_parameters(groups, fmt)
    codes = grid.encode(groups, found.scale[:, None], None, fmt)
    return grid.from_groups(grid.decode(codes, found.decoded_scale[:, None], None, fmt), fmt, *columns.shape)


def multiply_rounded(
    x: Float[Array, "*batch in"],
    weight: QTensor | KernelWeight | Float[Array, "in out"],
    activation: Activation,
    scale: Float[Array, ""] | None = None,
    *,
    implementation: str = "auto",
    precision: PrecisionLike = None,
) -> Float[Array, "*batch out"]:
    """A(x) W in x's type: in integers where weight and device have such a product, with rounded values of x elsewhere."""
    if isinstance(weight, QTensor | KernelWeight):
        if scale is None and str(activation) == ACTIVATIONS and refusal_of_int8(weight) is None:
            return matmul(x, weight, implementation=implementation, activations=ACTIVATIONS)
        return matmul(round_activation(x, activation, scale), weight, implementation=implementation, precision=precision)
    return jnp.matmul(round_activation(x, activation, scale), weight.astype(x.dtype), precision=precision)
