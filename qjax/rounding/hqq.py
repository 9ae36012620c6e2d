"""HQQ, half-quadratic quantization: zero points that make the rounding error sparse. No data.

    minimise ||W - W'||_p^p, p < 1, over the zero points z,  W' = (Q - z) s,  Q = clip(round(W / s + z)),  with the range's s

by half-quadratic splitting, in turn

    E = sign(D) relu(|D| - |D|^(p-1) / beta),  D = W - W'       the proximal step of the p-norm
    z = mean over the group of Q - (W - E) / s                  the exact minimum for this E
    beta = kappa beta

or, where the format stores minima m = -z s instead, m = mean over the group of W - E - Q s.

Badri & Shaji 2023 (https://mobiusml.github.io/hqq_blog/). z is a real number, and the format must store it as one: rounded to a
code it is worse than the zero of nearest rounding. Where we depart from the authors' library: ranges are widened to hold zero
(with minima they are not), codes are chosen for scales and zeros as they are stored, kappa counts (the solver of hqq 0.2.8
leaves it out: kappa=1), and beta is of errors in a unit in which the largest |W| is from 1/16 to 1/8, so that nothing depends
on the unit of the weights. The library's is of the errors as they are. E is 0 for those below beta^(-1/(2-p)), 0.17 by default:
by default, here always and there for weights of the usual size, z is the mean of Q - W / s.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.qtensor import QTensor
from qjax.rounding.nearest import check_shapes, round_groups
from qjax.rounding.parts.info import Info
from qjax.rounding.parts.ranges import masked
from qjax.rounding.parts.unit import binary_exponent, in_unit
from qjax.scales import times_power_of_two


@in_unit
def hqq(
    weight: Float[Array, "in out"],
    fmt: Format | str,
    *,
    lp_norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iters: int = 20,
    early_stop: bool = True,
) -> tuple[QTensor, Info]:
    """Rounds a weight (in, out), any float type, to an affine integer format with real zero points, int4-g64-z16, or minima,
    int4-g32-m16.

    iters: how many steps at most. early_stop: they end with the first that starts from no smaller mean |W - W'| than any
    before. Raises QjaxError for other formats and options out of range.
    """
    fmt = parse_format(fmt)
    check_shapes("hqq", weight, None)
    if fmt.has_whole_zeros or fmt.is_float:
        raise QjaxError(
            f"hqq: {fmt} has no real zero points to optimise; give an affine integer format with z16, as int4-g64-z16, or m16"
        )
    if not (0 < lp_norm <= 1 and beta > 0 and kappa > 0 and iters >= 1):
        raise QjaxError(
            "hqq: lp_norm must be in (0, 1], beta and kappa above 0 and iters at least 1, "
            f"got lp_norm={lp_norm}, beta={beta}, kappa={kappa}, iters={iters}"
        )
    return _hqq(weight, fmt, *map(np.float32, (lp_norm, beta, kappa)), iters, early_stop)


@functools.partial(jax.jit, static_argnames=("fmt", "early_stop"))
def _hqq(weight, fmt, lp_norm, beta, kappa, iters, early_stop) -> tuple[QTensor, Info]:
    weight = weight.astype(jnp.float32)
    groups, present = grid.weight_groups(weight, fmt)
    parameters = grid.find_parameters(groups, fmt)
    scale, decoded = parameters.scale[:, None], parameters.decoded_scale[:, None]
    inverse = jnp.where(decoded == 0, 0.0, 1 / jnp.where(decoded == 0, 1.0, decoded))

    def group_sum(x):
        return masked(x, present).sum(axis=1).reshape(*parameters.zero.shape, -1).sum(axis=-1)

    counts = group_sum(jnp.ones_like(groups))
    exponent = binary_exponent(jnp.max(jnp.abs(weight))) + 3  # of the unit of beta

    def step(state):
        count, zero, beta, best, _ = state
        codes = grid.encode(groups, scale, zero[:, None], fmt)
        error = groups - grid.decode(codes, decoded, zero[:, None], fmt)
        size = jnp.abs(error)
        units = times_power_of_two(size, -exponent)
        sparse = jnp.sign(error) * times_power_of_two(jax.nn.relu(units - units ** (lp_norm - 1) / beta), exponent)
        found = groups - sparse - codes * decoded if fmt.has_minima else codes - (groups - sparse) * inverse
        zero = group_sum(found) / counts
        mean = jnp.sum(group_sum(size)) / weight.size
        return count + 1, zero, beta * kappa, jnp.minimum(best, mean), mean < best

    def unfinished(state):
        return (state[0] < iters) & (state[-1] | (not early_stop))

    low, _ = grid.find_range(groups, fmt)
    start = (0, low if fmt.has_minima else -low * inverse[:, 0], beta, jnp.float32(jnp.inf), jnp.array(True))
    zero = jax.lax.while_loop(unfinished, step, start)[1]
    parameters = parameters._replace(zero=fmt.zero_codec.nearest(zero, fmt.largest_code))
    return round_groups(weight, parameters, fmt)
