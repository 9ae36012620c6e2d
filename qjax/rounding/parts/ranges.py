"""The search of a group's range: a smaller range costs the outermost weights and pays with a finer grid for the rest.

    shrink_g = argmin over p of error_g(p),  p in {1, 0.99, ..., 0.2}, of equals the largest

    importance   error_g = sum over the group of importance_i (Q_p(w_i) - w_i)^2
    hessian      error_g = e^T H_gg e,  e = Q_p(w_g) - w_g: the output error of the group alone, as AWQ's clip search has it
                 (Lin et al. 2023, arXiv 2306.00978), from the Hessian in place of sampled tokens

At 2 bits the search leaves 0.54, 0.60 and 0.68 of the squared error of Gaussian weights in groups of 128, 64 and 32. The steps
are those of GPTQ's code (Frantar et al. 2022, arXiv 2210.17323), which goes to 0.2 too; its error is the power 2.4 of the
difference, ours is the square, so that what is minimised is what is reported. Double quantization comes after the search.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.rounding.parts.pieces import map_pieces
from qjax.rounding.parts.unit import binary_exponent
from qjax.scales import times_power_of_two

SHRINKS = 81  # 1.00, 0.99, ..., 0.20
HESSIAN_STEP = 3  # the quadratic form costs a matrix product a step: every third shrink is tried
SMALLEST = -8  # binary exponent of weights whose scales are normal float16 numbers, with some to spare
UNROLLED = 16  # parts of a Hessian's diagonal in a turn of a loop: up to twice as fast on two cores
WORTH_UNROLLING = 2**15  # weights in a part; a longer program takes longer to compile
LARGEST_PART = 256  # inputs of a Hessian's diagonal block; larger groups are the sum of such parts


def search_shrink(
    groups: Float[Array, "groups size columns"], importance: Shaped[Array, "groups size _"] | None, fmt: Format
) -> Float[Array, "groups channels"]:
    """Shrink of every group with the least sum of importance * error^2.

    importance: (groups, size, columns) or (groups, size, 1), None for all equal.
    """

    groups = _in_range(groups, fmt)

    def piece_error(piece, importance, scale, zero, fmt):
        return jnp.sum(masked(jnp.square(_difference(piece, scale, zero, fmt)), importance), axis=0)

    def errors(parameters, fmt):
        function = functools.partial(piece_error, fmt=fmt)
        return map_pieces(function, (groups, importance), (parameters.scale, parameters.zero)).sum(axis=1)

    return _search(groups, fmt, errors, range(SHRINKS))


def search_shrink_hessian(
    groups: Float[Array, "groups size columns"], hessian: Float[Array, "in in"], fmt: Format
) -> Float[Array, "groups channels"]:
    """Shrink of every group with the least e^T H_gg e; raises QjaxError for blocks that cross output columns."""
    groups = _in_range(groups, fmt)
    count, size, columns = groups.shape
    if fmt.crosses_columns(len(hessian)):
        raise QjaxError(
            f"{fmt}: a block of {fmt.group} weights spans several output columns when the layer has {len(hessian)} inputs, "
            f"so a search of ranges by the Hessian has no group to look at; use clip=mse, or g{fmt.group} for b{fmt.group}"
        )
    rows = min(size, LARGEST_PART)
    parts = -(-size // rows)
    padding = (0, parts * rows - size)
    by_group = jnp.pad(hessian, [(0, count * size - len(hessian))] * 2).reshape(count, size, count, size)
    by_group = jnp.pad(by_group[jnp.arange(count), :, jnp.arange(count), :], [(0, 0), padding, padding])
    by_part = by_group.reshape(count, parts, rows, parts, rows)[:, jnp.arange(parts), :, jnp.arange(parts), :]
    diagonal = by_part.swapaxes(0, 1).reshape(count * parts, rows, rows)
    pieces = jnp.pad(groups, [(0, 0), padding, (0, 0)]).reshape(count * parts, rows, columns)

    def errors(parameters, fmt):
        scale, zero = jax.tree.map(lambda x: x.repeat(parts, axis=0)[:, None], (parameters.scale, parameters.zero))
        changes = _difference(pieces, scale, zero, fmt)

        def part_error(_, part):
            change, block = part
            return None, jnp.sum(change * jnp.matmul(block, change, precision=jax.lax.Precision.HIGHEST), axis=0)

        unroll = min(UNROLLED, len(pieces)) if rows * columns >= WORTH_UNROLLING else 1
        return jax.lax.scan(part_error, None, (changes, diagonal), unroll=unroll)[1].reshape(count, -1, columns).sum(axis=1)

    return _search(groups, fmt, errors, range(0, SHRINKS, HESSIAN_STEP))


def masked(error: Float[Array, "..."], importance: Shaped[Array, "..."] | None) -> Float[Array, "..."]:
    """The error times the importance, where there is one."""
    return error if importance is None else error * importance


def _in_range(groups: Float[Array, "groups size columns"], fmt: Format) -> Float[Array, "groups size columns"]:
    """Groups of a size whose scales the type that they are searched in holds, where they are not stored in it."""
    if fmt.searched == fmt:
        return groups
    largest = jnp.max(jnp.abs(groups))
    exponent = binary_exponent(largest)
    return times_power_of_two(groups, jnp.where((exponent < SMALLEST) & (largest > 0), -exponent, 0))


def _difference(piece, scale, zero, fmt):
    return grid.decode(grid.encode(piece, scale, zero, fmt), scale, zero, fmt) - piece


def _search(groups: Array, fmt: Format, errors: Callable, steps: range) -> Float[Array, "groups channels"]:
    """errors(parameters, format) of shape (groups, columns) is minimised, summed over all columns where they share a scale."""
    low, high = grid.find_range(groups, fmt)
    searched = fmt.searched

    def try_shrink(best, step):
        shrink = 1 - step.astype(jnp.float32) / 100
        error = errors(grid.range_parameters(low, high, searched, shrink), searched)
        error = error.reshape(*low.shape, -1).sum(axis=-1)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, shrink, best[1])), None

    start = (jnp.full_like(low, jnp.inf), jnp.ones_like(low))
    (_, shrink), _ = jax.lax.scan(try_shrink, start, jnp.array(steps, jnp.int32))
    return shrink
