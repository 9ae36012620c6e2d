"""How large inputs are, in a static format's eyes: a count of magnitudes, and what range is made of it.

    max    the largest |x|
    pN     the smallest r that N percent of all |x| are within
    mse    argmin over r = max |x| * i / 100 of sum of (x - Q_r(x))^2, i = 1, ..., 100

Magnitudes are counted in bins of equal ratio, 32 to a factor of 2, so that no range has to be known before: a range is within
2.2 % of what the values themselves would give.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import grid
from qjax.formats import Format

PER_OCTAVE, LOWEST, OCTAVES = 32, -40, 80
BINS = PER_OCTAVE * OCTAVES
STEPS = 100


def count_magnitudes(x: Float[Array, "tokens in"], weights: Float[Array, " tokens"]) -> Float[Array, " bins"]:
    """The weight of all |x| in each bin; zeros and what is smaller than the lowest are in the first one."""
    place = jnp.floor((jnp.log2(jnp.maximum(jnp.abs(x), 2.0**LOWEST)) - LOWEST) * PER_OCTAVE)
    place = jnp.clip(place, 0, BINS - 1).astype(jnp.int32)
    counted = jnp.where(weights[:, None] > 0, jnp.broadcast_to(weights[:, None], x.shape), 0)
    return jnp.zeros(BINS, jnp.float32).at[place].add(counted)


def largest_of(calibration: str, abs_max: Float[Array, ""], magnitudes: Float[Array, " bins"], fmt: Format) -> Float[Array, ""]:
    """The |x| that a static scale is for; calibration: "mse" or "p99.9"."""
    if calibration == "mse":
        shares = jnp.arange(1, STEPS + 1, dtype=jnp.float32) / STEPS
        errors = jax.lax.map(lambda share: _squared_error(abs_max * share, magnitudes, fmt), shares)
        return abs_max * shares[jnp.argmin(errors)]
    share = jnp.cumsum(magnitudes) / jnp.sum(magnitudes)
    place = jnp.searchsorted(share, jnp.float32(float(calibration[1:]) / 100) * (1 - 1e-6))
    return jnp.minimum(_value(place + 1), abs_max)


def _value(place: Array) -> Array:
    return jnp.exp2(place.astype(jnp.float32) / PER_OCTAVE + LOWEST)


def _squared_error(largest, magnitudes, fmt):
    """Of values in the middle of their bins; symmetric grids round -x to -Q(x), but for the outermost code."""
    middle = _value(jnp.arange(BINS) + 0.5)
    scale = grid.find_parameters(largest.reshape(1, 1, 1), fmt).scale.reshape(())
    rounded = grid.decode(grid.encode(middle, scale, None, fmt), scale, None, fmt)
    return jnp.sum(magnitudes * jnp.square(middle - rounded))
