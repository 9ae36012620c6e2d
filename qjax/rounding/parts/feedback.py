"""Rounding with error feedback, input by input: the loop of GPTQ, for any grid.

    for i in order:  target_i = W_i + sum over j of feedback_ij E_j,   W'_i = nearest(target_i),   E_i = W_i - W'_i

GPTQ's feedback is strictly lower triangular, so that only errors made before count; refinement's is not.

One compiled program whatever the width: a scan over blocks of inputs, whose feedback from all earlier blocks is one matrix
product, and inside it a scan over the block's inputs. Output columns are independent of each other.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from qjax import grid
from qjax.formats import Format


class RowGrid(NamedTuple):
    """The grid of each input's weights: float32, (rows, out) or what broadcasts against it. inverse: 1 / scale, 0 for a scale
    of 0.
    """

    inverse: jax.Array
    decoded_scale: jax.Array
    zero: jax.Array  # unused for codebooks


def coded_by(fmt: Format) -> Format | None:
    """What the loop is compiled for: None for integers with whole zero points, which share one program for all widths."""
    return None if fmt.codebook is None and fmt.has_whole_zeros else fmt


def row_grid(parameters: grid.Parameters, fmt: Format) -> RowGrid:
    """The grids of groups as rows."""
    scale = parameters.scale
    inverse = jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))
    middle = jnp.full_like(scale, 2.0 ** (fmt.bits - 1))
    return RowGrid(inverse, parameters.decoded_scale, middle if parameters.zero is None else parameters.zero)


@functools.partial(jax.jit, static_argnames=("fmt", "shape"))
def row_grids(parameters: grid.Parameters, fmt: Format, shape: tuple[int, int]) -> tuple[RowGrid, Int[Array, " in"]]:
    """Grids, and which of them each input has."""
    rows, columns = shape
    grids = row_grid(parameters, fmt)
    match fmt.granularity:
        case "tensor" | "channel":
            return grids, jnp.zeros(rows, jnp.int32)
        case "block" if fmt.crosses_columns(rows):  # blocks span columns: every weight has its own row and column of the grid
            size = min(fmt.group, rows * columns)
            spread = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (len(x), size, 1)), grids)
            return jax.tree.map(lambda x: grid.from_groups(x, fmt, rows, columns), spread), jnp.arange(rows)
        case _:
            return grids, jnp.arange(rows) // min(fmt.group, rows)


def round_with_feedback(
    weight: Float[Array, "in out"],
    feedback: Float[Array, "in in"],
    find_grid: Callable[[Int[Array, ""], Callable[[], Array]], tuple[RowGrid, object]],
    coder: Format | None,
    largest: Int[Array, ""],
    block: int,
    errors: Float[Array, "in out"] | float = 0.0,
) -> tuple[UInt8[Array, "in out"], Float[Array, "in out"], Float[Array, " in"], object]:
    """Codes, errors E = W - W', sum of (target - W')^2 of each input, and what find_grid kept, stacked over blocks.

    find_grid(block number, updated) gives the grid of the block's rows and anything to keep. updated() are the block's
    weights as they make up for the errors of earlier blocks, with no errors of their own yet: W + D, D_i = sum over earlier
    blocks of feedback_ij E_j - sum over j < i in the block of feedback_ij D_j.
    coder: `coded_by` the format; where it is None codes are integers 0..largest. block: divides in. errors: those to start
    from, where feedback is not triangular: each input then makes up for the errors at hand of all others.
    """
    rows, columns = weight.shape
    blocks = rows // block
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def round_row(changes, row):  # of the block's errors: (block, out), zero from this row on
        index, weight, target, error, grids, feedback = row
        target = target + product(feedback, changes)
        codes, value = _nearest(target, grids, coder, largest)
        changes = jax.lax.dynamic_update_slice(changes, (weight - value - error)[None], (index, 0))
        return changes, (codes, jnp.sum(jnp.square(target - value)))

    def round_block(errors, xs):
        number, weight, feedback = xs
        target = weight + product(feedback, errors)
        inside = jax.lax.dynamic_slice(feedback, (0, number * block), (block, block))

        def updated():
            return weight + jax.scipy.linalg.solve_triangular(inside, target - weight, lower=True, unit_diagonal=True)

        grids, kept = find_grid(number, updated)
        grids = jax.tree.map(lambda x: jnp.broadcast_to(x, (block, x.shape[-1])), grids)
        before = jax.lax.dynamic_slice(errors, (number * block, 0), (block, columns))
        changes, (codes, losses) = jax.lax.scan(
            round_row, jnp.zeros((block, columns)), (jnp.arange(block), weight, target, before, grids, inside)
        )
        return jax.lax.dynamic_update_slice(errors, before + changes, (number * block, 0)), (codes, losses, kept)

    xs = (jnp.arange(blocks), weight.reshape(blocks, block, columns), feedback.reshape(blocks, block, rows))
    errors, (codes, losses, kept) = jax.lax.scan(round_block, jnp.broadcast_to(errors, (rows, columns)), xs)
    return codes.reshape(rows, columns), errors, losses.reshape(rows), kept


def _nearest(target: Float[Array, " out"], grids: RowGrid, coder: Format | None, largest: Int[Array, ""]):
    """Codes and values of one input's weights."""
    scaled = target * grids.inverse
    if coder is not None:
        codes = grid.nearest_codes(scaled, grids.zero, coder)
        return codes, grid.decode(codes, grids.decoded_scale, grids.zero, coder)
    codes = grid.integer_codes(scaled, grids.zero, largest)
    return codes, (codes.astype(jnp.float32) - grids.zero) * grids.decoded_scale
