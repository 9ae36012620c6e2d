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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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

    def failed(state):
        tries, _, lower = state
        found = jnp.min(jnp.square(jnp.diagonal(lower))) > SMALLEST_PIVOT * mean  # false for nan
        return (tries == 0) | (tries <= ATTEMPTS) & ~found

    def attempt(state):
        tries, relative, _ = state
        relative = jnp.where(tries == 0, relative, jnp.maximum(10 * relative, FIRST_DAMP))
        damped = reversed_hessian + relative * mean * jnp.eye(count, dtype=jnp.float32)
        return tries + 1, relative, jax.lax.linalg.cholesky(damped, symmetrize_input=False)

    first = (0, jnp.asarray(damp, jnp.float32), jnp.zeros_like(reversed_hessian))
    _, damp, lower = jax.lax.while_loop(failed, attempt, first)
    root = lower[::-1, ::-1]
    pivots = jnp.diagonal(root)
    feedback = jnp.tril((root / pivots).T, -1)
    return Factor(order, feedback, pivots, damp, damp * mean + revived)
