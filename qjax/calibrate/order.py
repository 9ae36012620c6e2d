"""Orders: which inputs a layer's statistics are taken from.

    parallel     inputs of the unquantized model; all layers see the same, so a sweep captures them once
    block        inputs after the quantized blocks before it (GPTQ's code without --true-sequential)
    sequential   also after the quantized layers before it in its own block: q, k, v; then o; then gate, up; then down
                 (with --true-sequential)
    qep          as sequential, and the weight is first corrected for the error of its inputs (below)

Quantization error propagation (Arai and Ichikawa 2025, arXiv 2504.09629): with x the input in the unquantized model and x'
the one after the quantized layers, the weight that reproduces the unquantized output from x' is

    W* = argmin sum over tokens of ||x W - x' W*||^2 = W + H'^-1 D W,   H' = mean x' x'^T,   D = mean x' (x - x')^T

and W + alpha H'^-1 D W is quantized in place of W; alpha below 1 keeps the correction from fitting the calibration text.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.calibrate.statistics import read_by
from qjax.errors import QjaxError
from qjax.rounding.parts.feedback import damp_until_factored


@dataclasses.dataclass(frozen=True)
class Order:
    """prefix: inputs come from the quantized blocks before. inside: also from the quantized layers of the same block.
    alpha: share of the correction for the error of the inputs; damp: added to H' in it, relative to its mean diagonal, more
    where H' needs it.
    """

    prefix: bool
    inside: bool
    alpha: float = 0.0
    damp: float = 0.0

    @property
    def captures(self) -> tuple[str, ...]:
        """Statistics that the correction is made from."""
        return read_by(correct) if self.alpha > 0 else ()


def parallel() -> Order:
    """Inputs of the unquantized model."""
    return Order(prefix=False, inside=False)


def block() -> Order:
    """Inputs after the quantized blocks before."""
    return Order(prefix=True, inside=False)


def sequential() -> Order:
    """Inputs after all quantized layers before."""
    return Order(prefix=True, inside=True)


def qep(*, alpha: float = 0.5, damp: float = 0.01) -> Order:
    """As sequential, with weights corrected for the error of their inputs."""
    if not 0 <= alpha <= 1 or damp < 0:
        raise QjaxError(f"qep: alpha is between 0 and 1 and damp not negative, got alpha={alpha}, damp={damp}")
    return Order(prefix=True, inside=True, alpha=alpha, damp=damp)


@jax.jit
def correct(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    drift: Float[Array, "in in"],
    alpha: float,
    damp: float,
) -> Float[Array, "in out"]:
    """W + alpha (H' + damp mean(diag H') I)^-1 D W, float32.

    Where H' + damp mean(diag H') I is singular in float32, more damping is tried as for a rounding's factor (`feedback.py`).
    Inputs that calibration never moved have no part in that: their rows of D are 0.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    weight, hessian, drift = (array.astype(jnp.float32) for array in (weight, hessian, drift))
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean == 0, 1.0, mean)
    upper_factor = lambda damped: jax.scipy.linalg.cho_factor(damped)[0]  # noqa: E731
    _, upper = damp_until_factored(upper_factor, hessian, jnp.maximum(damp, 1e-6), mean, ignored=diagonal == 0)
    solve = jax.vmap(lambda column: jax.scipy.linalg.cho_solve((upper, False), column), 1, 1)
    return weight + alpha * solve(product(drift, weight))
