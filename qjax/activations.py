"""Formats of a layer's input: what a recipe says after the slash, and LLM.int8().

    /int8-token                                  every token (a row of x) by its largest value, -127..127: dynamic W8A8
    /int4-token, /fp8_e4m3-token, /int8-g128     a weight format, one scale a token or a group of its inputs
    /mxfp8, /mxfp4                               Microscaling: groups of 32 inputs of a token, scales that are powers of two
    /int8-token-sym                              by its largest value / 127.5, -128..127: compressed-tensors' W8A8
    /int8-token-affine, /int8-g128-affine        from the smallest to the largest value, with a zero point: torchao's 8da4w
    /int8-tensor, /fp8_e4m3-tensor               one scale for all tokens, static: from calibration, by the largest value
    /int8-tensor-p99.9, /int8-tensor-mse         the same by a percentile of |x|, by the least squared error (`ranges.py`)
    /nvfp4                                       groups of 16 of a token, E4M3 scales times one float32, which is static
    llm_int8(threshold=6):FORMAT                 int8-token, but inputs with an outlier stay as they are (`outliers.py`)

A token is to its inputs what an output channel is to a weight's: the arithmetic is the weight format's, on x transposed, with
`channel` for `token`. Integers are symmetric with the bound `max`, or `edge` after sym; scales are float32. What a scale is
stored relative to cannot come from the tokens of a call, or what becomes of one would depend on which others are in it: that of
nvfp4 comes from calibration, as deployed models have it, and other such formats are refused. LLM.int8() finds its outliers in
the tokens of a call, as in the paper, or in calibration.

What comes from calibration gives its recipe an order of calibration as others that read data have, `@qep` where it
names none: rtn:int8-channel-sym/int8-tensor rounds weights that are first corrected for the error of their inputs, @parallel
leaves them as they are.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Float, Int8

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import INTEGERS, Format, parse_format
from qjax.kernels.layout import KernelWeight
from qjax.kernels.matmul import ACTIVATIONS, matmul, matmul_codes, refusal_of_int8, tokens_int8
from qjax.outliers import split_outliers
from qjax.qtensor import QTensor
from qjax.ranges import largest_of
from qjax.scales import Floats, TwoLevels

INTEGER_OPTIONS = "-sym-max-fp32"  # of a weight's format
OPTIONS = {"": INTEGER_OPTIONS, "sym": "-sym-fp32", "affine": "-fp32"}  # of integers, by what a name says
CALIBRATION = re.compile(r"max|mse|p\d+(\.\d+)?")
LLM_INT8 = re.compile(r"llm_int8(?:\(threshold=(\d+(?:\.\d*)?(?:e[-+]?\d+)?)\))?")
SMALLEST, LARGEST = (float(getattr(jnp.finfo(jnp.float32), name)) for name in ("tiny", "max"))
THRESHOLD = 6.0  # Dettmers et al. 2022


@dataclasses.dataclass(frozen=True)
class Activation:
    """How a layer's input is rounded; build it with `parse_activation`, print its name with `str`.

    format: of x transposed. calibration: what a static scale is for, the largest value "max", a percentile "p99.9" or the least
    squared error "mse". threshold: of LLM.int8(), None for others; fixed: its outliers are those of calibration.
    """

    format: Format
    calibration: str = "max"
    threshold: float | None = None
    fixed: bool = False

    @property
    def is_static(self) -> bool:
        """Whether its scale comes from calibration."""
        return self.format.granularity == "tensor" or self.format.scale_codec.together

    @property
    def is_method(self) -> bool:
        """Whether a recipe names it among its methods, not after the slash."""
        return self.threshold is not None

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the layer's input that it needs."""
        if not self.is_static:
            return ("abs_max",) if self.fixed else ()
        return ("abs_max",) if self.calibration == "max" else ("abs_max", "magnitudes")

    def __str__(self) -> str:
        if self.threshold is not None:
            options = ["outliers=calibration"] * self.fixed
            options += [f"threshold={self.threshold}"] * (self.threshold != THRESHOLD)
            return f"llm_int8({','.join(options)})" if options else "llm_int8"
        name = str(self.format).removesuffix(INTEGER_OPTIONS)
        name = name.removesuffix("-fp32") if self.format.bound == "edge" else name
        if self.format.is_affine:
            name = name.removesuffix("-fp32") + "-affine"
        return name.replace("-channel", "-token") + (f"-{self.calibration}" if self.calibration != "max" else "")


def parse_activation(text: str) -> Activation:
    """The activation format named `text`, for example "int8-token"; raises QjaxError that says what is allowed."""
    if found := LLM_INT8.fullmatch(text.strip()):  # as a folder names it
        return llm_int8(threshold=float(found[1] or THRESHOLD))
    grid_name, *parts = text.strip().lower().split("-")
    integer, option, calibration = grid_name in INTEGERS, "", "max"
    if parts[:1] == ["tensor"] and len(parts) == 2 and CALIBRATION.fullmatch(parts[1]):
        calibration = parts.pop()
    elif integer and len(parts) == 2 and (parts[1] == "sym" or (parts[1] == "affine" and parts[0] != "tensor")):
        option = parts.pop()
    name = "-".join([grid_name, *parts]).replace("-token", "-channel") + (OPTIONS[option] if integer else "")
    try:
        two_levels = not integer and parts[1:] == ["e4m3"]
        refused = (len(parts) > 1 and not two_levels) or parts in (["channel"], ["dq"]) or (integer and not parts)
        fmt = None if refused else parse_format(name)
    except QjaxError:
        fmt = None
    if fmt is None or fmt.granularity not in ("channel", "group", "tensor"):
        raise QjaxError(
            f"activation format {text!r}: expected GRID-token, GRID-gN or GRID-tensor with the grid of a weight format, for "
            "example int8-token or fp8_e4m3-token; integers may say -sym or -affine after that, GRID-tensor -p99.9 or -mse"
        )
    stands_alone = not fmt.scale_codec.together and type(fmt.scale_codec).common is Floats.common
    if not stands_alone and not isinstance(fmt.scale_codec, TwoLevels):
        raise QjaxError(
            f"activation format {text!r}: {fmt.scales} stores scales relative to those of all tokens of the call, and tokens "
            "must not act on each other; take scales that stand alone, for example mxfp4 or fp8_e4m3-token"
        )
    if calibration.startswith("p") and not 0 < float(calibration[1:]) <= 100:
        raise QjaxError(f"activation format {text!r}: a percentile is above 0 and at most 100, got {calibration[1:]}")
    return Activation(fmt, calibration)


def llm_int8(*, threshold: float = 6.0, outliers: Literal["batch", "calibration"] = "batch") -> Activation:
    """Inputs by int8-token, but those with a value as large as the threshold, in the call or in calibration, in 16 bits."""
    if not SMALLEST <= threshold <= LARGEST:
        raise QjaxError(
            f"llm_int8: threshold={threshold}; expected a number above 0 that float32 holds: inputs as large stay in 16 bits. "
            "For none that do write FORMAT/int8-token"
        )
    if outliers not in ("batch", "calibration"):
        raise QjaxError(f"llm_int8: outliers={outliers!r}; expected batch or calibration")
    return Activation(parse_activation(ACTIVATIONS).format, threshold=threshold, fixed=outliers == "calibration")


def static_scale(
    abs_max: Float[Array, " in"], activation: Activation, magnitudes: Float[Array, " bins"] | None = None
) -> Float[Array, ""]:
    """The scale of a static format for inputs as large as `abs_max`; of nvfp4, the float32 that its scales are relative to.

    magnitudes: how often |x| was of which size (`ranges.py`), for a percentile or the least squared error.
    """
    fmt = activation.format
    abs_max = abs_max.astype(jnp.float32)
    if activation.calibration != "max":
        abs_max = largest_of(activation.calibration, jnp.max(abs_max), magnitudes, fmt)[None]
    if fmt.scale_codec.together:
        return fmt.scale_codec.common(abs_max, fmt.largest_value)
    groups = grid.to_groups(abs_max[:, None], fmt)
    return grid.find_parameters(groups, fmt).scale.reshape(())


def calibrated(activation: Activation | None, statistics: Mapping[str, Array]) -> Float[Array, ""] | None:
    """The scale of a layer's activation format from the statistics of its input; None for one that needs none."""
    if activation is None or not activation.is_static:
        return None
    return static_scale(activation=activation, **{name: statistics[name] for name in activation.statistics})


def round_activation(
    x: Float[Array, "*batch in"], activation: Activation, scale: Float[Array, ""] | None = None
) -> Float[Array, "*batch in"]:
    """The values that x's codes stand for, in x's type; the gradient is that of x (straight-through).

    scale: of a static format. Raises QjaxError where it is missing, or given to a dynamic format.
    """
    _check_scale(activation, scale)
    exact = jax.lax.stop_gradient(x).astype(jnp.float32)
    if activation.threshold is not None:
        codes, found, outlying = split_outliers(exact, activation.threshold)
        values = jnp.where(outlying, exact, codes.astype(jnp.float32) * found)
    elif activation.format.granularity == "tensor":
        codes = grid.encode(exact, scale, None, activation.format)
        values = grid.decode(codes, scale, None, activation.format)
    elif str(activation) == ACTIVATIONS:
        codes, scale = tokens_int8(exact)
        values = codes.astype(jnp.float32) * scale
    else:
        values = _rounded(exact.reshape(-1, x.shape[-1]).T, activation.format, scale).T.reshape(x.shape)
    return x + jax.lax.stop_gradient(values.astype(x.dtype) - x)


def _check_scale(activation: Activation, scale: Array | None) -> None:
    if activation.is_static != (scale is not None):
        kind, found = ("static", "there is none") if activation.is_static else ("dynamic", "one was given")
        raise QjaxError(f"activation format {activation} is {kind}, but {found}: give an activation_scale to static formats")


def _rounded(columns: Float[Array, "in tokens"], fmt: Format, common: Float[Array, ""] | None) -> Float[Array, "in tokens"]:
    groups = grid.to_groups(columns, fmt)
    found = grid.find_parameters(groups, fmt, common=common)
    zero = None if found.zero is None else found.zero[:, None]
    codes = grid.encode(groups, found.scale[:, None], zero, fmt)
    return grid.from_groups(grid.decode(codes, found.decoded_scale[:, None], zero, fmt), fmt, *columns.shape)


class Codes(NamedTuple):
    """Inputs as integers: codes * scale; outlying: inputs that are left out, whose codes are 0, or None."""

    codes: Int8[Array, "*batch in"]
    scale: Float[Array, "*batch 1"]
    outlying: Array | None = None


def _codes(x: Float[Array, "*batch in"], activation: Activation, scale: Array | None) -> Codes | None:
    """x by a format whose values are integers of a token; None for others."""
    fmt, exact = activation.format, jax.lax.stop_gradient(x)
    if activation.threshold is not None:
        return Codes(*split_outliers(exact, activation.threshold))
    if str(activation) == ACTIVATIONS:
        return Codes(*tokens_int8(exact))
    if not _has_integer_codes(fmt):
        return None
    if scale is None:
        columns = exact.astype(jnp.float32).reshape(-1, x.shape[-1]).T
        scale = grid.find_parameters(columns[None], fmt).scale.reshape(*x.shape[:-1], 1)
    codes = grid.encode(exact.astype(jnp.float32), scale, None, fmt).astype(jnp.int16) - 2 ** (fmt.bits - 1)
    return Codes(codes.astype(jnp.int8), jnp.broadcast_to(scale, (*x.shape[:-1], 1)))


def _has_integer_codes(fmt: Format) -> bool:
    """Whether inputs are integers times one scale a token."""
    return fmt.grid in INTEGERS and not (fmt.codebook or fmt.is_affine or fmt.granularity == "group")


def is_integer_product(activation: Activation, weight: QTensor | KernelWeight | Array) -> bool:
    """Whether A(x) W is one product of integers, see `multiply_rounded`."""
    codes = isinstance(weight, QTensor | KernelWeight) and refusal_of_int8(weight) is None
    return codes and activation.threshold is None and _has_integer_codes(activation.format)


def multiply_rounded(
    x: Float[Array, "*batch in"],
    weight: QTensor | KernelWeight | Float[Array, "in out"],
    activation: Activation,
    scale: Float[Array, ""] | None = None,
    *,
    implementation: str = "auto",
    precision: PrecisionLike = None,
) -> Float[Array, "*batch out"]:
    """A(x) W in x's type: in integers where weight and device have such a product, with rounded values of x elsewhere.

    Integers of a token and 8-bit weights of an output channel have one (int8 x int8, sums in int32): equal but for the order of
    float32 products.
    """
    _check_scale(activation, scale)
    how = {"implementation": implementation, "precision": precision}
    if not isinstance(weight, QTensor | KernelWeight):
        return jnp.matmul(round_activation(x, activation, scale), weight.astype(x.dtype), precision=precision)
    if refusal_of_int8(weight) is None and (found := _codes(x, activation, scale)) is not None:
        rest = x if found.outlying is None else jnp.where(found.outlying, 0, x)
        y = matmul_codes(rest, found.codes, found.scale, weight, implementation=implementation)
        return y if found.outlying is None else y + matmul(jnp.where(found.outlying, x, 0), weight, **how)
    return matmul(round_activation(x, activation, scale), weight, **how)
