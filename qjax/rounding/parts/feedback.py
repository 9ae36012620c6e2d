"""Error feedback: the factor of the Hessian, and the loop of GPTQ that works with it, for any grid.

    for i in order:  target_i = W_i + sum over j of feedback_ij E_j,   W'_i = nearest(target_i),   E_i = W_i - W'_i

The factor. H' + damp * mean(diag H) * I = R R^T,  R upper triangular,  H' = H with its inputs in the order they are rounded.
The loss of rounding errors E = W - W' (in, out) is then tr(E^T H E) = ||R^T E||^2 less the damping's part, a sum of one term
an input:

    (R^T E)_i = R_ii (E_i + sum over j < i of feedback_ij E_j),     feedback_ij = R_ji / R_ii

so the value to round at input i is W_i plus the feedback of the errors before it, and R_ii^2 weighs what rounding then costs.
GPTQ's own code takes U, the upper Cholesky factor of the inverse; U = R^-1, so R gives the same codes without the inverse
(the equivalence is the one of QuIP: Chee et al. 2023, arXiv 2307.13304, theorem 6). R is the lower Cholesky factor of the
Hessian with its inputs in reverse, read backwards.

An input that calibration never moved (diag H = 0, "dead") is given the mean diagonal. It is then alone in its row of H, so it
is rounded to nearest; GPTQ's code sets its weights to zero, which costs nothing on the calibration text but may on others.

The loop. GPTQ's feedback is strictly lower triangular, so that only errors made before count; coordinate descent's is not. One
compiled program whatever the width: a scan over panels of inputs, whose feedback from all earlier panels is one matrix product,
and inside it a scan over the panel's inputs. Output columns are independent of each other.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from qjax import grid
from qjax.formats import Format

SMALLEST_PIVOT = 1e-6  # of the mean diagonal: below it a pivot is rounding noise of float32
FIRST_DAMP = 1e-3  # what the escalation starts from when no damping was asked for
ATTEMPTS = 8


class Factor(NamedTuple):
    """A damped Hessian's factor.

    order (in,): the inputs in the order they are rounded. feedback (in, in), strictly lower triangular, and pivots (in,), R_ii:
    in that order. damp: the relative damping used, more than asked for where the Hessian needed it. added (in,): what was put
    on the diagonal in all, in the Hessian's own order.
    """

    order: Int[Array, " in"]
    feedback: Float[Array, "in in"]
    pivots: Float[Array, " in"]
    damp: Float[Array, ""]
    added: Float[Array, " in"]


@functools.partial(jax.jit, static_argnames="act_order")
def factorize(hessian: Float[Array, "in in"], *, damp: float | Float[Array, ""] = 0.01, act_order: bool = True) -> Factor:
    """Factor of a Hessian (in, in), float32, the mean of x x^T.

    damp: added to the diagonal, relative to its mean; until the factor exists ten times as much is tried, and at least
    FIRST_DAMP, up to ATTEMPTS times.
    act_order: inputs of the largest diagonal first. A Hessian that is not finite gives a factor that is not.
    """
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean == 0, 1.0, mean)
    count = len(diagonal)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(count)
    backwards = order[::-1]
    revived = jnp.where(dead, mean, 0.0)
    alive = hessian + jnp.diag(revived)
    reversed_hessian = alive[backwards][:, backwards]

    lower_factor = functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False)
    damp, lower = damp_until_factored(lower_factor, reversed_hessian, damp, mean)
    root = lower[::-1, ::-1]
    pivots = jnp.diagonal(root)
    feedback = jnp.tril((root / pivots).T, -1)
    return Factor(order, feedback, pivots, damp, damp * mean + revived)


def damp_until_factored(
    cholesky: Callable[[Array], Array],
    hessian: Float[Array, "in in"],
    damp: float | Float[Array, ""],
    mean: Float[Array, ""],
    ignored: Bool[Array, " in"] | bool = False,
) -> tuple[Float[Array, ""], Float[Array, "in in"]]:
    """(relative damping used, Cholesky factor of hessian + damping * mean * I), float32: of the first damping from `damp` on
    whose pivots, but for those ignored, are more than rounding noise; of the last one tried where none has such.
    """

    def failed(state):
        tries, _, root = state
        pivots = jnp.where(ignored, mean, jnp.square(jnp.diagonal(root)))
        found = jnp.min(pivots) > SMALLEST_PIVOT * mean  # false for nan
        return (tries == 0) | (tries <= ATTEMPTS) & ~found

    def attempt(state):
        tries, relative, _ = state
        relative = jnp.where(tries == 0, relative, jnp.maximum(10 * relative, FIRST_DAMP))
        return tries + 1, relative, cholesky(hessian + relative * mean * jnp.eye(len(hessian), dtype=jnp.float32))

    first = (0, jnp.asarray(damp, jnp.float32), jnp.zeros_like(hessian))
    return jax.lax.while_loop(failed, attempt, first)[1:]


class RowGrid(NamedTuple):
    """The grid of each input's weights: float32, (rows, out) or what broadcasts against it. inverse: 1 / scale, 0 for a scale
    of 0.
    """

    inverse: jax.Array
    decoded_scale: jax.Array
    zero: jax.Array  # or minimum; unused for codebooks


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
        case "flat" if fmt.crosses_columns(rows):  # blocks span columns: every weight has its own row and column of the grid
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
    panel: int,
    errors: Float[Array, "in out"] | float = 0.0,
) -> tuple[UInt8[Array, "in out"], Float[Array, "in out"], Float[Array, " in"], object]:
    """Codes, errors E = W - W', sum of (target - W')^2 of each input, and what find_grid kept, stacked over panels.

    find_grid(panel number, updated) gives the grid of the panel's rows and anything to keep. updated() are the panel's
    weights as they make up for the errors of earlier panels, with no errors of their own yet: W + D, D_i = sum over earlier
    panels of feedback_ij E_j - sum over j < i in the panel of feedback_ij D_j.
    coder: `coded_by` the format; where it is None codes are integers 0..largest. panel: divides in. errors: those to start
    from, where feedback is not triangular: each input then makes up for the errors at hand of all others.
    """
    rows, columns = weight.shape
    panels = rows // panel
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def round_row(changes, row):  # of the panel's errors: (panel, out), zero from this row on
        index, weight, target, error, grids, feedback = row
        target = target + product(feedback, changes)
        codes, value = _nearest(target, grids, coder, largest)
        changes = jax.lax.dynamic_update_slice(changes, (weight - value - error)[None], (index, 0))
        return changes, (codes, jnp.sum(jnp.square(target - value)))

    def round_panel(errors, xs):
        number, weight, feedback = xs
        target = weight + product(feedback, errors)
        inside = jax.lax.dynamic_slice(feedback, (0, number * panel), (panel, panel))

        def updated():
            return weight + jax.scipy.linalg.solve_triangular(inside, target - weight, lower=True, unit_diagonal=True)

        grids, kept = find_grid(number, updated)
        grids = jax.tree.map(lambda x: jnp.broadcast_to(x, (panel, x.shape[-1])), grids)
        before = jax.lax.dynamic_slice(errors, (number * panel, 0), (panel, columns))
        changes, (codes, losses) = jax.lax.scan(
            round_row, jnp.zeros((panel, columns), jnp.float32), (jnp.arange(panel), weight, target, before, grids, inside)
        )
        return jax.lax.dynamic_update_slice(errors, before + changes, (number * panel, 0)), (codes, losses, kept)

    xs = (jnp.arange(panels), weight.reshape(panels, panel, columns), feedback.reshape(panels, panel, rows))
    start = jnp.broadcast_to(jnp.asarray(errors, jnp.float32), (rows, columns))
    errors, (codes, losses, kept) = jax.lax.scan(round_panel, start, xs)
    return codes.reshape(rows, columns), errors, losses.reshape(rows), kept


def _nearest(target: Float[Array, " out"], grids: RowGrid, coder: Format | None, largest: Int[Array, ""]):
    """Codes and values of one input's weights."""
    if coder is not None:
        scaled = grid.above_minimum(target, grids.zero, coder) * grids.inverse
        codes = grid.nearest_codes(scaled, grids.zero, coder)
        return codes, grid.decode(codes, grids.decoded_scale, grids.zero, coder)
    codes = grid.integer_codes(target * grids.inverse, grids.zero, largest)
    return codes, (codes.astype(jnp.float32) - grids.zero) * grids.decoded_scale
