"""The triangular factor of a Hessian that error feedback works with.

    H' + damp * mean(diag H) * I = R R^T,  R upper triangular,  H' = H with its inputs in the order they are rounded

The loss of rounding errors E = W - W' (in, out) is then tr(E^T H E) = ||R^T E||^2 less the damping's part, a sum of one term
an input:

    (R^T E)_i = R_ii (E_i + sum over j < i of feedback_ij E_j),     feedback_ij = R_ji / R_ii

so the value to round at input i is W_i plus the feedback of the errors before it, and R_ii^2 weighs what rounding then costs.
GPTQ's own code takes U, the upper Cholesky factor of the inverse; U = R^-1, so R gives the same codes without the inverse
(the equivalence is the one of QuIP: Chee et al. 2023, arXiv 2307.13304, theorem 6). R is the lower Cholesky factor of the
Hessian with its inputs in reverse, read backwards.

An input that calibration never moved (diag H = 0, "dead") is given the mean diagonal. It is then alone in its row of H, so it
is rounded to nearest; GPTQ's code sets its weights to zero, which costs nothing on the calibration text but may on others.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
