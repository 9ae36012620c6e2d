"""AWQ: inputs that are large get a finer grid, by a scale per input channel that the layer before undoes.

    W' = Q(diag(s) W),   y = (x / s) W'     minimise over r the error of the output,   s = s(r) / sqrt(max s(r) min s(r))

    scaling=reference   s(r) = m^r,                         m = mean |x| of each channel           (the paper's code)
    scaling=duo         s(r) = m^r / (v^(1-r) + 1e-4),      v = mean over outputs of |W| / max of its group   (AutoAWQ's)
    scaling=both        the better of the two
    loss=hessian        error = sum over the linears that share the input of tr(dW^T H dW), their own squared output error
    loss=module         error = squared change of the output of the module they are in (attention, MLP), as in the paper's code

r = 0, 1/20, ..., 19/20 as in the paper's code, and s = 1 is always among the candidates. Lin et al. 2023 (arXiv 2306.00978).
Of layers with 512 inputs or more all candidates are looked at in bfloat16 first, and those far from the best left at that.
The search rounds to nearest, as the paper's code does; what follows may be another rounding, which has no use for the scale it
found. So the scale is kept only where that rounding loses less with it than without (guard=false: always), which costs two
more roundings. Of a chain of transforms each looks at its own scale and those before it.
The search of ranges that belongs to AWQ is the rounding's: `awq` alone in a recipe is followed by rtn(clip=hessian), and
awq+rtn leaves it out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.linear import Linear, dequantize
from qjax.maps import LARGEST, Divide, InputMap
from qjax.rounding.nearest import Clip, check_shapes, nearest_values, rtn
from qjax.rounding.parts.info import Info, change_loss, output_loss, relative
from qjax.rounding.parts.unit import exponent_of
from qjax.scales import times_power_of_two

Scaling = Literal["reference", "duo", "both"]
Loss = Literal["hessian", "module"]
MARGIN = 2.0**-4  # of the least error; bfloat16 tells those of SmolLM2's layers to 2^-12, at worst 2^-7
WORTH_A_LOOK = 512  # inputs from which on two programs are worth their compilation
SMALL = 2.0**-12  # of the largest |W|: what is added to a group's is AutoAWQ's 1e-6, but no more than this


def awq_scale(
    weights: Sequence[Float[Array, "in out"]],
    fmt: Format | str,
    *,
    abs_mean: Float[Array, " in"],
    hessian: Float[Array, "in in"] | None = None,
    module: Callable[[Sequence[Array]], Array] | None = None,
    loss: Loss = "hessian",
    scaling: Scaling = "both",
    ratios: int = 20,
    rounded: Callable[[InputMap | None], Sequence[Array]] | None = None,
    guard: bool = True,
    once: Callable | None = None,
) -> Divide:
    """The map, with a scale (in,) float32, of the input that weights (in, out_k) share: it is divided, and the rows of the
    weights are multiplied before rounding.

    abs_mean (in,): mean |x|. hessian (in, in): mean of x x^T, for loss="hessian". module: for loss="module", the error of the
    parent module's output with these weights in place. rounded: what the weights become by the rounding that follows, as they
    are, rounded(None), or with their input mapped, which is undone, rounded(map); with guard, the scale found must lose less
    than none. once: calls a function of arrays, once for all who ask for the same.
    Weights, statistics or a module's error that are not finite give a scale that is not. Raises QjaxError for an unknown loss
    or scaling, and a missing statistic.
    """
    fmt = parse_format(fmt)
    given = {"hessian": hessian, "module": module}
    if loss not in given or scaling not in get_args(Scaling) or ratios < 1:
        raise QjaxError(
            f"awq: loss is one of {', '.join(given)}, scaling one of {', '.join(get_args(Scaling))}, ratios at least 1; "
            f"got loss={loss!r}, scaling={scaling!r}, ratios={ratios}"
        )
    if given[loss] is None:
        raise QjaxError(f"awq: loss={loss!r} needs {loss}=")
    if any(abs_mean.shape != weight.shape[:1] for weight in weights):
        shapes = ", ".join(str(weight.shape) for weight in weights)
        raise QjaxError(f"awq: abs_mean has shape {abs_mean.shape}, weights (in, out) = {shapes} go with (in,)")
    for weight in weights:
        check_shapes("awq", weight, hessian)
    options = {"fmt": fmt, "scaling": scaling, "ratios": ratios}
    if loss == "module":
        errors = functools.partial(_module_errors, exponent_of(*weights), module)
        found, known = _search(errors, abs_mean, _in_unit(weights), **options)
    else:
        found, known = (once or _call)(_search_by_hessian, abs_mean, hessian, *weights, **options)
    if rounded is None or not guard:
        return Divide(jnp.where(known, found, jnp.nan))
    exponent, weights = exponent_of(*weights), _in_unit(weights)

    def error(new):
        if loss == "module":
            return [module(new)]
        ours = [times_power_of_two(weight, -exponent) for weight in new]
        return [change_loss(after, before, hessian) for after, before in zip(ours, weights, strict=True)]

    return Divide(_kept(found, known, error(rounded(Divide(found))), error(rounded(None))))


def _call(function, *arrays, **options):
    return function(*arrays, **options)


def _in_unit(weights: Sequence[Float[Array, "in out"]]) -> list[Float[Array, "in out"]]:
    """Weights of ordinary size, by one factor for them all: their errors are summed."""
    exponent = exponent_of(*weights)
    return [times_power_of_two(weight.astype(jnp.float32), -exponent) for weight in weights]


def _search_by_hessian(abs_mean, hessian, *weights, **options):
    return _search(functools.partial(_hessian_errors, hessian), abs_mean, _in_unit(weights), **options)


def _search(errors, abs_mean, weights, *, fmt, scaling, ratios) -> tuple[Float[Array, " in"], Bool[Array, ""]]:
    """The candidate of the least error, and whether it was found among numbers. weights: in their unit; errors(weights,
    candidates, fmt): of each candidate.
    """
    candidates = _candidates(weights, abs_mean, fmt, scaling, ratios)
    return _best(candidates, errors(weights, candidates, fmt), abs_mean)


@jax.jit
def _best(candidates, errors, abs_mean) -> tuple[Float[Array, " in"], Bool[Array, ""]]:
    """The first candidate is that of no scale."""
    return candidates[jnp.argmin(errors)], jnp.isfinite(errors[0]) & jnp.all(jnp.isfinite(abs_mean))


@jax.jit
def _kept(found, known, mapped, unmapped) -> Float[Array, " in"]:
    """The scale found where the errors with it are less than those without, else 1."""
    kept = jnp.where(sum(mapped) < sum(unmapped), found, jnp.ones_like(found))
    return jnp.where(known, kept, jnp.nan)


def awq(
    weight: Float[Array, "in out"],
    fmt: Format | str,
    *,
    hessian: Float[Array, "in in"],
    abs_mean: Float[Array, " in"],
    scaling: Scaling = "both",
    ratios: int = 20,
    clip: Clip = "hessian",
    guard: bool = True,
) -> tuple[Linear, Info]:
    """One weight (in, out) by AWQ: the Linear holds the rounded diag(s) W and the input's Scale 1 / s.

    Weights or statistics that are not finite give an Info that is not. Raises QjaxError for shapes that do not fit and unknown
    options. In a model, where the layer before can take the scale, use
    `qjax.quantize`.
    """
    check_shapes("awq", weight, hessian)
    weight, hessian, abs_mean = (jnp.asarray(array).astype(jnp.float32) for array in (weight, hessian, abs_mean))

    def mapped_rtn(mapped):
        return rtn(mapped.on_weight(weight), fmt, hessian=mapped.on_statistic(hessian, 2), clip=clip)

    def rounded(divide):
        divide = Divide(jnp.ones_like(abs_mean)) if divide is None else divide
        return [dequantize(mapped_rtn(divide)[0]) / divide.scale[:, None]]

    options = {"scaling": scaling, "ratios": ratios, "guard": guard}
    divide = awq_scale([weight], fmt, abs_mean=abs_mean, hessian=hessian, rounded=rounded, **options)
    stored = divide.stored()
    q, info = mapped_rtn(stored)
    result = Linear(q, (stored,))
    exponent = exponent_of(weight)
    change, whole = (times_power_of_two(matrix, -exponent) for matrix in (dequantize(result) - weight, weight))
    loss = output_loss(change, hessian)
    output_error = relative(loss, output_loss(whole, hessian))
    return result, info._replace(
        proxy_loss=times_power_of_two(times_power_of_two(loss, exponent), exponent), output_error=output_error
    )


@functools.partial(jax.jit, static_argnames=("fmt", "scaling", "ratios"))
def _candidates(weights, abs_mean, fmt, scaling, ratios) -> Float[Array, "candidates in"]:
    ratio = (jnp.arange(ratios, dtype=jnp.int32).astype(jnp.float32) / ratios)[:, None]
    by_input = abs_mean**ratio
    found = [jnp.ones((1, len(abs_mean)), jnp.float32)]
    if scaling != "duo":
        found.append(_normalised(by_input))
    if scaling != "reference":
        magnitude = jnp.mean(jnp.concatenate([_relative_magnitude(weight, fmt) for weight in weights], axis=1), axis=1)
        found.append(_normalised(by_input / (magnitude ** (1 - ratio) + 1e-4)))
    return jnp.concatenate(found)


def _normalised(scale: Float[Array, "candidates in"]) -> Float[Array, "candidates in"]:
    scale = jnp.maximum(scale, 1e-4)
    scale = scale / jnp.sqrt(jnp.max(scale, axis=1, keepdims=True) * jnp.min(scale, axis=1, keepdims=True))
    return jnp.clip(scale, 1 / LARGEST, LARGEST)


def _relative_magnitude(weight: Float[Array, "in out"], fmt: Format) -> Float[Array, "in out"]:
    """|W| over the largest |W| of its group along the input axis."""
    size = fmt.group if fmt.granularity in ("group", "flat") else len(weight)
    along_input = Format("int8", "group", size)
    groups = jnp.abs(grid.to_groups(weight, along_input))
    least = jnp.minimum(jnp.max(groups) * SMALL, 1e-6)
    relative = groups / (jnp.max(groups, axis=1, keepdims=True) + least)
    return grid.from_groups(relative, along_input, *weight.shape)


@functools.partial(jax.jit, static_argnames="fmt")
def _scaled_rounding(weight: Float[Array, "in out"], scale: Float[Array, " in"], fmt: Format) -> Float[Array, "in out"]:
    """The weight, in its unit, that diag(s) W, rounded to nearest, stands for."""
    return nearest_values(weight * scale[:, None], fmt) / scale[:, None]


def _module_errors(exponent, module, weights, candidates, fmt) -> Float[Array, " candidates"]:
    """exponent: of the weights' unit."""

    def error(scale):
        return module([times_power_of_two(_scaled_rounding(weight, scale, fmt), exponent) for weight in weights])

    return jnp.stack([error(scale) for scale in candidates])


@functools.partial(jax.jit, static_argnames="fmt")
def _hessian_errors(hessian, weights, candidates, fmt) -> Float[Array, " candidates"]:
    """Summed over the weights; infinite where a first look, in bfloat16, is more than MARGIN from the least."""

    def changes(scale):
        return [_scaled_rounding(weight, scale, fmt) - weight for weight in weights]

    def error(scale):
        return sum(output_loss(change, hessian) for change in changes(scale))

    if len(hessian) < WORTH_A_LOOK:
        return jax.lax.map(error, candidates)
    half = hessian.astype(jnp.bfloat16)

    def look(change):
        return jnp.sum(change * jnp.matmul(half, change.astype(half.dtype), preferred_element_type=jnp.float32))

    seen = jax.lax.map(lambda scale: sum(map(look, changes(scale))), candidates)
    least = jnp.min(seen)
    far = ((least > 0) & (seen > (1 + MARGIN) * least)).at[0].set(False)  # none where one is nan, or all cancels
    return jax.lax.map(lambda each: jax.lax.cond(each[0], lambda _: jnp.inf, error, each[1]), (far, candidates))
