"""GPTQ: rounding with error feedback against the Hessian of the layer's inputs.

    minimise tr((W - W')^T H (W - W')),  H = mean of x x^T,  input by input: each input's rounding error is made up for by the
    weights that are still to be rounded

Frantar et al. 2022 (arXiv 2210.17323). The loop and the Cholesky factor it works with are in `parts/feedback.py`. Where
we depart from the paper's code:

- `static_groups` and `act_order` are on by default: grids are found on the original weight, inputs of the largest diagonal
  are rounded first. At 2 bits static groups are 6 % better in layer error, and they need no permutation in the file.
  `static_groups=false,act_order=false` is the paper's algorithm, with group parameters that have seen all earlier errors
  (those of the code have not seen the errors of the same block).
- inputs that calibration never moved are rounded to nearest instead of set to zero.
- clip=mse and clip=hessian search every group's range (`ranges.py`); hessian weighs input i by R_ii^2, what its error costs
  in the loss that feedback leaves.
- `gptq+descend` goes over scales and codes again (`refining/descend.py`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.qtensor import QTensor
from qjax.rounding.nearest import Clip, check_clip, check_shapes
from qjax.rounding.parts.feedback import Factor, coded_by, factorize, round_with_feedback, row_grid, row_grids
from qjax.rounding.parts.info import Info, finish
from qjax.rounding.parts.ranges import search_shrink
from qjax.rounding.parts.unit import in_unit


@in_unit
def gptq(
    weight: Float[Array, "in out"],
    fmt: Format | str,
    *,
    hessian: Float[Array, "in in"],
    factor: Factor | None = None,
    damp: float = 0.01,
    panel: int = 64,
    act_order: bool = True,
    static_groups: bool = True,
    clip: Clip = "none",
) -> tuple[QTensor, Info]:
    """Rounds a weight (in, out), any float type, against hessian (in, in) float32, the mean of x x^T over tokens.

    factor: `factorize(hessian, damp=damp, act_order=act_order)`, for callers that share it between formats; damp and act_order
    are then its. damp: relative to the mean diagonal; Info.damp tells what was used. panel: inputs between two large matrix
    products, which changes speed alone; of static_groups=false it is the group, or 128 where all inputs are one.
    Works under jit, and under vmap over stacked weights and Hessians.
    A weight or Hessian that is not finite gives an Info that is not. Raises QjaxError for shapes that do not fit, an unknown
    clip, options that contradict each other, and casts.
    """
    fmt = parse_format(fmt)
    check_clip("gptq", clip)
    check_shapes("gptq", weight, hessian)
    if fmt.is_float:
        raise QjaxError(f"gptq: {fmt} is a cast and has no codes to choose")
    if damp < 0 or panel < 1:
        raise QjaxError(f"gptq: damp must not be negative and panel at least 1, got damp={damp}, panel={panel}")
    if not static_groups:
        _check_dynamic(fmt, weight.shape[0], act_order)
    factor = factorize(hessian, damp=damp, act_order=act_order) if factor is None else factor
    weight = weight.astype(jnp.float32)
    largest = jnp.int32(fmt.largest_code)  # traced, so that one compiled loop serves every number of bits
    coder = coded_by(fmt)
    if static_groups:
        parameters, grids = _static_grids(weight, factor, fmt, clip)
        rounded = _round_static(weight, factor, grids, coder, largest, panel)
    else:
        parameters, rounded = _round_dynamic(weight, factor, fmt, clip, largest)
    return finish(weight, factor.damp, factor.added, parameters, rounded.codes, rounded.errors, rounded.losses, fmt)


class _Rounded(NamedTuple):
    """In the weight's own order: codes and errors W - W' (in, out), and each input's part of the damped loss (in,)."""

    codes: jax.Array
    errors: jax.Array
    losses: jax.Array


def _check_dynamic(fmt: Format, inputs: int, act_order: bool) -> None:
    if act_order:
        raise QjaxError(
            "gptq: static_groups=false with act_order=true would need a permutation in the file; turn one of them off"
        )
    if fmt.scale_codec.together:
        raise QjaxError(
            f"gptq: static_groups=false cannot go with {fmt}: {fmt.scales} quantizes all scales together, before the first code"
        )
    if fmt.crosses_columns(inputs):
        raise QjaxError(f"gptq: static_groups=false cannot go with {fmt} on {inputs} inputs: its blocks span output columns")


@functools.partial(jax.jit, static_argnames=("fmt", "clip"))
def _static_grids(weight, factor, fmt, clip) -> tuple[grid.Parameters, tuple]:
    """Every group's grid, found on the original weight, and all of them as rows."""
    parameters = _find_grids(weight, factor, fmt, clip)
    return parameters, row_grids(parameters, fmt, weight.shape)


def _find_grids(weight: Float[Array, "in out"], factor: Factor, fmt: Format, clip: Clip) -> grid.Parameters:
    groups, importance = grid.weight_groups(weight, fmt)
    if clip == "none":
        return grid.find_parameters(groups, fmt)
    if clip == "hessian":
        columns = weight.shape[1] if fmt.crosses_columns(len(weight)) else 1
        importance = grid.to_groups(jnp.broadcast_to(_costs(factor)[:, None], (len(weight), columns)), fmt)
    return grid.find_parameters(groups, fmt, search_shrink(groups, importance, fmt))


def _costs(factor: Factor) -> Float[Array, " in"]:
    """R_ii^2, what the squared difference of a target from its value costs, in the weight's own order."""
    return jnp.zeros_like(factor.pivots).at[factor.order].set(jnp.square(factor.pivots))


@functools.partial(jax.jit, static_argnames=("coder", "panel"))
def _round_static(weight, factor, grids, coder, largest, panel) -> _Rounded:
    grids, index = grids
    panel = min(panel, len(weight))
    index = jnp.pad(index[factor.order], (0, -len(weight) % panel)).reshape(-1, panel)

    def find_grid(number, updated):
        del updated
        return jax.tree.map(lambda x: x[index[number]], grids), None

    rounded, _ = _round(weight, factor, find_grid, coder, largest, panel)
    return rounded


@functools.partial(jax.jit, static_argnames=("fmt", "clip"))
def _round_dynamic(weight, factor, fmt, clip, largest) -> tuple[grid.Parameters, _Rounded]:
    """Every group's grid is found when the group is reached, on weights with all earlier feedback."""
    if fmt.granularity in ("tensor", "channel"):  # one group: nothing comes before it
        parameters, grids = _static_grids(weight, factor, fmt, clip)
        return parameters, _round_static(weight, factor, grids, coded_by(fmt), largest, 128)
    size = min(fmt.group, len(weight))
    pivots = jnp.pad(jnp.square(factor.pivots), (0, -len(weight) % size)).reshape(-1, 1, size, 1)
    one_group = Format(**{**vars(fmt), "granularity": "group"})

    def find_grid(number, updated):
        present = pivots[number] > 0
        importance = pivots[number] if clip == "hessian" else present
        group = grid.filled(updated()[None], present, fmt)
        shrink = 1.0 if clip == "none" else search_shrink(group, importance, one_group)
        parameters = grid.find_parameters(group, one_group, shrink)
        return row_grid(parameters, fmt), (parameters.scale, parameters.zero)

    rounded, (scale, zero) = _round(weight, factor, find_grid, coded_by(fmt), largest, size)
    scale = scale.reshape(-1, scale.shape[-1])
    zero = None if zero is None else zero.reshape(scale.shape)
    return grid.Parameters(scale, scale, zero, grid.store_scales(scale, fmt)), rounded


def _round(weight, factor, find_grid, coder, largest, panel):
    """Permutes, pads to whole panels, rounds and undoes both."""
    rows = len(weight)
    padding = -rows % panel
    permuted = jnp.pad(weight[factor.order], ((0, padding), (0, 0)))
    feedback = jnp.pad(factor.feedback, ((0, padding), (0, padding)))
    codes, errors, losses, kept = round_with_feedback(permuted, feedback, find_grid, coder, largest, panel)
    back = jnp.argsort(factor.order)
    return _Rounded(codes[:rows][back], errors[:rows][back], _costs(factor) * losses[:rows][back]), kept
