"""Refinement of a rounded weight: coordinate descent on the loss that GPTQ goes through once.

    minimise tr(E^T H E),  E = W - W',  over the codes and the scales of W' in turn

    codes    for each input i:  target_i = W_i + sum over j != i of H_ij E_j / H_ii,  W'_i = nearest(target_i)
    scales   for each group g:  s_g += v_g^T (H E)_g / v_g^T H_gg v_g,  v the values of the codes at scale 1, less any minimum

Each step is the exact minimum with everything else held, so no sweep raises the loss: GPTQ's feedback reaches the inputs that
come later, this reaches those that came before too. The codes' step is the one of QuantEase (Behdin et al. 2023, arXiv
2309.01885) and is run by the loop of `feedback.py`, with H_ij / H_ii as its feedback and the errors at hand to start from.
Zero points and minima stay; so do scales that are stored so that one of them cannot be moved alone (dq). H is damped as GPTQ
damps it, and it is the damped loss that falls. Inputs that calibration never moved weigh nothing and are rounded to nearest.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.qtensor import QTensor, unpack_codes, unpack_parameters
from qjax.rounding.parts.feedback import Factor, coded_by, factorize, round_with_feedback, row_grids
from qjax.rounding.parts.info import Info, finish
from qjax.rounding.parts.unit import in_unit

product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@in_unit
def descend(
    weight: Float[Array, "in out"],
    start: QTensor,
    *,
    hessian: Float[Array, "in in"],
    factor: Factor | None = None,
    sweeps: int = 4,
    damp: float = 0.01,
    panel: int = 64,
) -> tuple[QTensor, Info]:
    """Lowers the loss of a rounded weight: `sweeps` times its scales, then its codes; `start` is what a rounding made of it.

    hessian (in, in) float32: the mean of x x^T over tokens. factor: `factorize(hessian, damp=damp)`, where it is at hand.
    damp: relative to the mean diagonal, as gptq's. panel: as gptq's. Raises QjaxError for options out of range, casts, and
    blocks of weights that cross output columns, which have no scale of one column to fit.
    """
    fmt = start.format
    if sweeps < 1 or damp < 0 or panel < 1:
        raise QjaxError(
            f"descend: sweeps and panel are at least 1 and damp not negative, got sweeps={sweeps}, panel={panel}, damp={damp}"
        )
    if fmt.is_float:
        raise QjaxError(f"descend: {fmt} is a cast and has no codes to choose")
    if fmt.crosses_columns(len(weight)):
        raise QjaxError(
            f"descend: blocks of {fmt} cross output columns where {fmt.group} does not divide the {len(weight)} inputs"
        )
    factor = factorize(hessian, damp=damp) if factor is None else factor
    weight, hessian = weight.astype(jnp.float32), hessian.astype(jnp.float32)
    damped, added, codes, parameters = _begin(hessian, factor.added, start)
    refined = _descend(weight, damped, codes, parameters, fmt, sweeps=sweeps, panel=panel)
    return finish(weight, factor.damp, added, refined.parameters, refined.codes, refined.errors, refined.loss, fmt)


@jax.jit
def _begin(hessian, added, start) -> tuple[Array, Array, Array, grid.Parameters]:
    """The damped Hessian and what was added to its diagonal, the codes of `start` and their grids."""
    added = jnp.where(jnp.diagonal(hessian) == 0, 0.0, added)  # inputs never moved weigh nothing
    scale, zero = unpack_parameters(start)
    return hessian + jnp.diag(added), added, unpack_codes(start), grid.Parameters(scale, scale, zero, start.scales)


class _Refined(NamedTuple):
    """codes and errors W - W' (in, out), the grids they are of, and tr(E^T H E)."""

    codes: UInt8[Array, "in out"]
    errors: Float[Array, "in out"]
    parameters: grid.Parameters
    loss: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("fmt", "sweeps", "panel"))
def _descend(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    codes: UInt8[Array, "in out"],
    parameters: grid.Parameters,
    fmt: Format,
    *,
    sweeps: int,
    panel: int,
) -> _Refined:
    """On a damped Hessian. Float32 throughout."""
    inputs, diagonal = len(weight), jnp.diagonal(hessian)[:, None]
    others = hessian * (1 - jnp.eye(inputs, dtype=jnp.float32))
    feedback = _pad(jnp.where(diagonal > 0, others / jnp.where(diagonal > 0, diagonal, 1), 0), panel, both=True)
    padded = _pad(weight, panel)
    coder = coded_by(fmt)

    def sweep(state, _):
        codes, errors, parameters = state
        if fmt.scale_codec.movable:
            errors, parameters = _fit_scales(hessian, codes, errors, parameters, fmt)
        grids, index = row_grids(parameters, fmt, weight.shape)
        index = _pad(index, panel).reshape(-1, panel)

        def find_grid(number, updated):
            del updated
            return jax.tree.map(lambda x: x[index[number]], grids), None

        codes, errors, _, _ = round_with_feedback(
            padded, feedback, find_grid, coder, jnp.int32(fmt.largest_code), panel, _pad(errors, panel)
        )
        return (codes[:inputs], errors[:inputs], parameters), None

    parameters = parameters._replace(scale=parameters.decoded_scale)
    start = (codes, weight - _values(codes, parameters, fmt), parameters)
    (codes, errors, parameters), _ = jax.lax.scan(sweep, start, None, length=sweeps)
    return _Refined(codes, errors, parameters, jnp.sum(errors * product(hessian, errors)))


def _fit_scales(hessian, codes, errors, parameters, fmt):
    """The errors and grids with every group's scale where the loss is least, group after group."""
    zero = jnp.zeros_like(parameters.zero) if fmt.has_minima else parameters.zero
    unit = _values(codes, parameters._replace(decoded_scale=jnp.ones_like(parameters.scale), zero=zero), fmt)
    values = grid.to_groups(unit, fmt)
    count, size, columns = values.shape
    rows = grid.to_groups(hessian, fmt) if fmt.granularity != "tensor" else hessian[None]  # (groups, size, in)
    start = jnp.arange(count) * size

    codec = fmt.scale_codec
    common = codec.common_of(parameters.stored)

    def fit(errors, group):
        first, rows, values, scale = group
        gain = jnp.sum(values * product(rows, errors), axis=0)
        inside = jax.lax.dynamic_slice(jnp.pad(rows, ((0, 0), (0, size))), (0, first), (size, size))
        curvature = jnp.sum(values * product(inside, values), axis=0)
        if fmt.granularity == "tensor":
            gain, curvature = jnp.sum(gain, keepdims=True), jnp.sum(curvature, keepdims=True)
        best = scale + gain / jnp.where(curvature > 0, curvature, jnp.inf)
        stored = codec.nearest(best, common)
        moved = jnp.where(stored != 0 if fmt.bound == "full" else stored > 0, stored, scale)
        change = jnp.zeros((size, columns), jnp.float32) + (moved - scale) * values
        longer = jnp.pad(errors, ((0, size), (0, 0)))
        before = jax.lax.dynamic_slice(longer, (first, 0), (size, columns))
        return jax.lax.dynamic_update_slice(longer, before - change, (first, 0))[: len(errors)], moved

    errors, scale = jax.lax.scan(fit, errors, (start, rows, values, parameters.scale))
    return errors, parameters._replace(scale=scale, decoded_scale=scale, stored=grid.store_scales(scale, fmt, common))


def _values(codes, parameters, fmt):
    zero = None if parameters.zero is None else parameters.zero[:, None]
    groups = grid.decode(grid.to_groups(codes, fmt), parameters.decoded_scale[:, None], zero, fmt)
    return grid.from_groups(groups, fmt, *codes.shape)


def _pad(array, panel, *, both=False):
    """Zeros after the first axis (both: the second too), to whole panels."""
    widths = [(0, -array.shape[axis] % panel if axis == 0 or both else 0) for axis in range(array.ndim)]
    return jnp.pad(array, widths)
