"""The unit of weights: methods work on weights of ordinary size, whatever unit they come in.

Squares of weights of 1e-25 or 1e19 are no float32 numbers, nor are sums and differences of weights of 1e38. A weight whose
largest magnitude is beyond 2^ORDINARY or below 2^-ORDINARY is multiplied by a power of two, which is exact, before a method
sees it, and its scales and minima by the inverse afterwards; others are left as they are. What their type cannot hold is then
lost, and `Info.weight_error` tells: the driver raises (`driver/scale_range.py`).
"""

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.formats import parse_format
from qjax.qtensor import QTensor, dequantize, times_power, unpack_parameters
from qjax.rounding.parts.info import Info, clipped_share, relative
from qjax.scales import times_power_of_two

ORDINARY = 16
TARGET = -3  # weights that are moved come to lie below 2^TARGET


def exponent_of(*weights: Float[Array, "in out"]) -> int | Int[Array, ""]:
    """The k for which 2^-k W is of ordinary size, one for all these weights; 0 where they are of ordinary size, all 0 or not
    finite. A Python number, or an int32 array where a weight is traced.
    """
    if not any(isinstance(weight, jax.core.Tracer) for weight in weights):
        size = float(np.max(sizes(weights)))
        exponent = math.frexp(size)[1] if size and math.isfinite(size) else 0
        return 0 if abs(exponent) <= ORDINARY else exponent - TARGET
    largest = functools.reduce(jnp.maximum, map(_largest, weights))
    exponent = binary_exponent(largest)
    ordinary = (abs(exponent) <= ORDINARY) | (largest == 0) | ~jnp.isfinite(largest)
    return jnp.where(ordinary, 0, exponent - TARGET)


def binary_exponent(x: Float[Array, ""]) -> Int[Array, ""]:
    """The e of x = m 2^e, 1/2 <= m < 1, of a normal float32 x > 0."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 126


_sizes: dict[int, tuple[weakref.ref, float]] = {}  # of arrays, which never change, by their id


def sizes(weights: Sequence[Float[Array, "in out"]]) -> list[float]:
    """The largest magnitude of each weight. Asking for several at once waits once, and later for none of them again."""
    new = [weight for weight in weights if id(weight) not in _sizes or _sizes[id(weight)][0]() is not weight]
    found = dict(zip(map(id, new), map(float, jax.device_get(_all_largest(new))), strict=True)) if new else {}
    known = [found[id(weight)] if id(weight) in found else _sizes[id(weight)][1] for weight in weights]
    for weight in new:
        if isinstance(weight, jax.Array):
            key = id(weight)
            _sizes[key] = weakref.ref(weight, lambda _, key=key: _sizes.pop(key, None)), found[key]
    return known


@jax.jit
def _all_largest(weights: Sequence[Float[Array, "in out"]]) -> list[Float[Array, ""]]:
    return [_largest(weight) for weight in weights]


def _largest(weight: Float[Array, "in out"]) -> Float[Array, ""]:
    return jnp.max(jnp.abs(weight.astype(jnp.float32)))


def in_unit(method: Callable) -> Callable:
    """A rounding or refiner, (weight, format or QTensor, *, options) -> (QTensor, Info), that sees weights of ordinary size."""

    signature = inspect.signature(method)

    @functools.wraps(method)
    def in_ordinary_unit(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        (weight, second), options = map(_single, bound.args), {name: _single(value) for name, value in bound.kwargs.items()}
        refined = isinstance(second, QTensor)
        fmt = second.format if refined else parse_format(second)
        exponent = 0 if fmt.is_float or weight.ndim != 2 or not weight.size else exponent_of(weight)
        if isinstance(exponent, int) and exponent == 0:
            return method(weight, second, **options)
        scaled = times_power_of_two(weight.astype(jnp.float32), -exponent)
        q, info = method(scaled, times_power(second, -exponent) if refined else fmt, **options)
        return _restored(scaled, q, info, exponent)

    return in_ordinary_unit


def _single(value: object) -> object:
    """float64 arrays as float32, so that what is compiled is the same."""
    return value.astype(jnp.float32) if getattr(value, "dtype", None) == np.float64 else value


@jax.jit
def _restored(scaled: Float[Array, "in out"], q: QTensor, info: Info, exponent: Int[Array, ""]) -> tuple[QTensor, Info]:
    """A result for `scaled` as that for the weight it stands for."""
    found = times_power(q, exponent)

    def of_stored():
        change = times_power_of_two(dequantize(found), -exponent) - scaled
        weight_error = relative(jnp.sum(jnp.square(change)), jnp.sum(jnp.square(scaled)))
        return weight_error, clipped_share(times_power_of_two(scaled, exponent), *unpack_parameters(found), found.format)

    known = ~jnp.isfinite(info.weight_error) | (exponent == 0)
    weight_error, clipped = jax.lax.cond(known, lambda: (info.weight_error, info.clipped), of_stored)
    info = info._replace(weight_error=weight_error, clipped=clipped)
    if info.proxy_loss is not None:
        info = info._replace(proxy_loss=times_power_of_two(times_power_of_two(info.proxy_loss, exponent), exponent))
    return found, info
