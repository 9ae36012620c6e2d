"""Round to nearest (RTN): every weight gets the nearest value of its group's grid. No data.

    clip=none   the grid spans the group's range
    clip=mse    argmin over shrink p of sum (Q_p(w) - w)^2, p in {1, 0.99, ..., 0.2}, per group: a smaller range costs the
                outermost weights and pays with a finer grid for the rest; at 2 bits it halves the error

The range search is the one of GPTQ's code (Frantar et al. 2022, arXiv 2210.17323) with squared error instead of its power 2.4,
so that what is minimised is what is reported.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.qtensor import FLOAT_DTYPES, QTensor, from_codes
from qjax.rounding.info import Info
from qjax.rounding.pieces import map_pieces

Clip = Literal["none", "mse"]
SHRINKS = 81  # 1.00, 0.99, ..., 0.20


def rtn(weight: Float[Array, "in out"], fmt: Format | str, *, clip: Clip = "none") -> tuple[QTensor, Info]:
    """Rounds a weight (in, out), any float type, to the nearest codes of `fmt`.

    Raises QjaxError for an unknown clip and for a weight that is empty or not two-dimensional.
    """
    fmt = parse_format(fmt)
    if clip not in get_args(Clip):
        raise QjaxError(f"rtn: unknown clip {clip!r}; allowed: {', '.join(get_args(Clip))}")
    if weight.ndim != 2 or not weight.size:
        raise QjaxError(f"rtn: expected a weight (in, out), got shape {weight.shape}")
    return _rtn(weight, fmt, clip)


@functools.partial(jax.jit, static_argnames=("fmt", "clip"))
def _rtn(weight: Float[Array, "in out"], fmt: Format, clip: Clip) -> tuple[QTensor, Info]:
    weight = weight.astype(jnp.float32)
    if fmt.is_float:
        return _cast(weight, fmt)
    groups = grid.to_groups(weight, fmt)
    present = grid.padding_mask(groups, weight.size)
    shrink = search_shrink(groups, present, fmt) if clip == "mse" else 1.0
    parameters = grid.find_parameters(groups, fmt, shrink)
    low, high = grid.find_range(groups, fmt)
    per_unit = _per_unit(jnp.maximum(jnp.max(high), -jnp.min(low)))

    def round_piece(piece, present, scale, decoded, zero):
        codes = grid.encode(piece, scale, zero, fmt)
        error = _masked(jnp.square((grid.decode(codes, decoded, zero, fmt) - piece) * per_unit), present)
        ends = [grid.decode(jnp.uint8(code), decoded, zero, fmt) for code in (0, fmt.largest_code)]
        clipped = (piece < jnp.minimum(*ends)) | (piece > jnp.maximum(*ends))
        sums = jnp.sum(error), jnp.sum(jnp.square(piece * per_unit)), jnp.sum(clipped, dtype=jnp.float32)
        return codes, sums

    codes, sums = map_pieces(round_piece, (groups, present), (parameters.scale, parameters.decoded_scale, parameters.zero))
    error, total, clipped = (jnp.sum(part) for part in sums)
    codes = grid.from_groups(codes.reshape(groups.shape), fmt, *weight.shape)
    return from_codes(codes, parameters, fmt), Info(error / _nonzero(total), clipped / weight.size)


def search_shrink(
    groups: Float[Array, "groups size columns"], importance: Shaped[Array, "groups size _"] | None, fmt: Format
) -> Float[Array, "groups channels"]:
    """The shrink of every group's range with the least sum(importance * error^2), of equals the largest.

    importance: (groups, size, columns) or (groups, size, 1), None for all equal. Double quantization comes after the search.
    """
    low, high = grid.find_range(groups, fmt)
    searched = dataclasses.replace(fmt, double_quantized=False)

    def piece_error(piece, importance, scale, zero):
        codes = grid.encode(piece, scale, zero, searched)
        return jnp.sum(_masked(jnp.square(grid.decode(codes, scale, zero, searched) - piece), importance), axis=0)

    def try_shrink(best, step):
        shrink = 1 - step / 100
        parameters = grid.range_parameters(low, high, searched, shrink)
        error = map_pieces(piece_error, (groups, importance), (parameters.scale, parameters.zero)).sum(axis=1)
        error = error.reshape(*low.shape, -1).sum(axis=-1)  # over all columns where they share a scale
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, shrink, best[1])), None

    start = (jnp.full(low.shape, jnp.inf), jnp.ones(low.shape))
    (_, shrink), _ = jax.lax.scan(try_shrink, start, jnp.arange(SHRINKS))
    return shrink


def _cast(weight: Float[Array, "in out"], fmt: Format) -> tuple[QTensor, Info]:
    """The weight in another floating-point type, as it is where the type holds it and clipped to its range elsewhere."""
    dtype = FLOAT_DTYPES[fmt.grid]
    largest = float(jnp.finfo(dtype).max)
    cast = jnp.clip(weight, -largest, largest).astype(dtype)
    per_unit = _per_unit(jnp.max(jnp.abs(weight)))
    error = jnp.sum(jnp.square((cast.astype(jnp.float32) - weight) * per_unit))
    total = jnp.sum(jnp.square(weight * per_unit))
    clipped = jnp.sum(jnp.abs(weight) > largest, dtype=jnp.float32) / weight.size
    return QTensor(cast, None, None, fmt, weight.shape[0]), Info(error / _nonzero(total), clipped)


def _per_unit(largest: Float[Array, ""]) -> Float[Array, ""]:
    """A factor that brings weights up to `largest` to a size whose square is a normal float32."""
    return jnp.minimum(16 / _nonzero(largest), 1e38)


def _masked(error: Float[Array, "..."], importance: Shaped[Array, "..."] | None) -> Float[Array, "..."]:
    return error if importance is None else error * importance


def _nonzero(x: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(x == 0, 1.0, x)
