"""Round to nearest (RTN): every weight gets the nearest value of its group's grid. No data but for clip=hessian.

clip=none      the grid spans the group's range
clip=mse       it spans the part of the range with the least squared error of the weights (`ranges.py`)
clip=hessian   the part with the least squared error of the group's output on calibration data
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.qtensor import FLOAT_DTYPES, QTensor, from_codes
from qjax.rounding.parts.info import Info
from qjax.rounding.parts.pieces import map_pieces
from qjax.rounding.parts.ranges import masked, search_shrink, search_shrink_hessian
from qjax.rounding.parts.unit import in_unit
from qjax.scales import nonzero

Clip = Literal["none", "mse", "hessian"]


@in_unit
def rtn(
    weight: Float[Array, "in out"], fmt: Format | str, *, hessian: Float[Array, "in in"] | None = None, clip: Clip = "none"
) -> tuple[QTensor, Info]:
    """Rounds a weight (in, out), any float type, to the nearest codes of `fmt`.

    hessian: the mean of x x^T over tokens, read by clip="hessian" alone. Where the type of the scales does not hold those of
    the weight, Info's weight_error tells, up to 1.
    Raises QjaxError for an unknown clip, a missing Hessian, and a weight that is empty or not two-dimensional.
    """
    fmt = parse_format(fmt)
    check_clip("rtn", clip)
    check_shapes("rtn", weight, hessian)
    if clip == "hessian" and hessian is None:
        raise QjaxError("rtn: clip='hessian' needs the Hessian of the layer's input; give hessian=")
    return _rtn(weight, hessian if clip == "hessian" else None, fmt, clip)


def check_clip(method: str, clip: str) -> None:
    """Raises QjaxError for an unknown clip."""
    if clip not in get_args(Clip):
        raise QjaxError(f"{method}: unknown clip {clip!r}; allowed: {', '.join(get_args(Clip))}")


def check_shapes(method: str, weight: Float[Array, "in out"], hessian: Float[Array, "in in"] | None) -> None:
    """Raises QjaxError unless these are a weight and the Hessian of its inputs."""
    if weight.ndim != 2 or not weight.size:
        raise QjaxError(f"{method}: expected a weight (in, out), got shape {weight.shape}")
    if hessian is not None and hessian.shape != (weight.shape[0],) * 2:
        raise QjaxError(
            f"{method}: the Hessian has shape {hessian.shape}, a weight (in, out) = {weight.shape} goes with "
            f"{(weight.shape[0],) * 2}"
        )


@functools.partial(jax.jit, static_argnames=("fmt", "clip"))
def _rtn(
    weight: Float[Array, "in out"], hessian: Float[Array, "in in"] | None, fmt: Format, clip: Clip
) -> tuple[QTensor, Info]:
    weight = weight.astype(jnp.float32)
    if fmt.is_float:
        return _cast(weight, fmt)
    groups, present = grid.weight_groups(weight, fmt)
    match clip:
        case "mse":
            shrink = search_shrink(groups, present, fmt)
        case "hessian":
            shrink = search_shrink_hessian(groups, hessian, fmt)
        case _:
            shrink = 1.0
    return round_groups(weight, grid.find_parameters(groups, fmt, shrink), fmt)


def round_groups(weight: Float[Array, "in out"], parameters: grid.Parameters, fmt: Format) -> tuple[QTensor, Info]:
    """A float32 weight rounded to the nearest codes of these grids, piece by piece; for use inside a compiled function."""
    groups = grid.to_groups(weight, fmt)
    present = grid.padding_mask(groups, weight.size)
    low, high = grid.find_range(groups, fmt)
    per_unit = _per_unit(jnp.maximum(jnp.max(high), -jnp.min(low)))

    def round_piece(piece, present, scale, decoded, zero):
        codes = grid.encode(piece, scale, zero, fmt)
        error = masked(jnp.square((grid.decode(codes, decoded, zero, fmt) - piece) * per_unit), present)
        ends = [grid.decode(jnp.uint8(code), decoded, zero, fmt) for code in (0, fmt.largest_code)]
        clipped = masked((piece < jnp.minimum(*ends)) | (piece > jnp.maximum(*ends)), present)
        sums = jnp.sum(error), jnp.sum(jnp.square(piece * per_unit)), jnp.sum(clipped, dtype=jnp.float32)
        return codes, sums

    codes, sums = map_pieces(round_piece, (groups, present), (parameters.scale, parameters.decoded_scale, parameters.zero))
    error, total, clipped = (jnp.sum(part) for part in sums)
    codes = grid.from_groups(codes.reshape(groups.shape), fmt, *weight.shape)
    return from_codes(codes, parameters, fmt), Info(error / nonzero(total), clipped / weight.size)


def nearest_values(weight: Float[Array, "in out"], fmt: Format) -> Float[Array, "in out"]:
    """What a float32 weight of ordinary size, rounded to nearest, stands for: for searches, which need no codes. It is that to
    the bit, but for scales that are quantized together.
    """
    if fmt.is_float:
        return _cast(weight, fmt)[0].codes.astype(jnp.float32)
    groups, _ = grid.weight_groups(weight, fmt)
    parameters = grid.find_parameters(groups, fmt)
    scale, decoded, zero = (
        None if x is None else x[:, None] for x in (parameters.scale, parameters.decoded_scale, parameters.zero)
    )
    values = grid.decode(grid.encode(groups, scale, zero, fmt), decoded, zero, fmt)
    return grid.from_groups(values, fmt, *weight.shape)


def _cast(weight: Float[Array, "in out"], fmt: Format) -> tuple[QTensor, Info]:
    """The weight in another floating-point type, as it is where the type holds it and clipped to its range elsewhere."""
    dtype = FLOAT_DTYPES[fmt.grid]
    largest = float(jnp.finfo(dtype).max)
    cast = jnp.clip(weight, -largest, largest).astype(dtype)
    per_unit = _per_unit(jnp.max(jnp.abs(weight)))
    error = jnp.sum(jnp.square((cast.astype(jnp.float32) - weight) * per_unit))
    total = jnp.sum(jnp.square(weight * per_unit))
    clipped = jnp.sum(jnp.abs(weight) > largest, dtype=jnp.float32) / weight.size
    return QTensor(cast, None, None, fmt, weight.shape[0]), Info(error / nonzero(total), clipped)


def _per_unit(largest: Float[Array, ""]) -> Float[Array, ""]:
    """A factor that brings weights up to `largest` to a size whose square is a normal float32."""
    return jnp.minimum(16 / nonzero(largest), 1e38)
