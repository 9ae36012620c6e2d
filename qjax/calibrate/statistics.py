"""Statistics of a layer's input over calibration tokens, as triples of pure functions.

    state = init(in_features);  state = update(state, x, exact, weights);  value = finalize(state)

x: (tokens, in), what the layer is given. exact: the same, what it would be given were nothing before it quantized; equal to x
but for `qep`. weights: (tokens,), how much each token counts; 0 leaves it out. Everything is float32, products at the highest
precision; states add up, so that activations need not be kept. Inputs of bfloat16 are what a model multiplies that runs in it:
their products are exact in float32, in which they are summed, so `hessian` and `drift` take them as they are (`added`);
weights other than 0 and 1 are rounded into them. XLA shares a sum over tokens out among processor cores: the last digits of
what is made of it depend on their number, which a row's device tells. A further statistic is a triple here and a line in
`STATISTICS`; `methods.register_statistic` adds one from outside.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float

from qjax.errors import QjaxError
from qjax.maps import InputMap, on_input
from qjax.ranges import BINS, count_magnitudes

STRIPS, SMALLEST_STRIP = 4, 128  # of a product of bfloat16 inputs: of 2, 3, 4 and 6 none is much faster


class Statistic(NamedTuple):
    """init, update, finalize, and how many of a value's axes, the first ones, are inputs: what a map of the inputs needs to
    know; None where the value is of all inputs together, which no map of them determines. takes_bfloat16: whether `update`
    takes inputs of bfloat16 as they are; it is given float32 otherwise.
    """

    init: Callable[[int], object]
    update: Callable[[object, Array, Array, Array], object]
    finalize: Callable[[object], Array]
    axes: int | None
    takes_bfloat16: bool = False


class Through(NamedTuple):
    """The state of a statistic of inputs through maps, which it holds."""

    maps: tuple[InputMap, ...]
    state: object


def is_mapped(statistic: Statistic) -> bool:
    """Whether maps of the inputs change it."""
    return statistic.axes != 0


@functools.cache
def through_maps(statistic: Statistic) -> Statistic:
    """The statistic of inputs through maps; its first state is Through(maps, that of the statistic) where `is_mapped`."""
    if not is_mapped(statistic):
        return statistic

    def update(s, x, exact, w):
        return s._replace(state=statistic.update(s.state, on_input(s.maps, x), on_input(s.maps, exact), w))

    finalize = lambda s: statistic.finalize(s.state)  # noqa: E731
    return statistic._replace(update=update, finalize=finalize, axes=None, takes_bfloat16=False)


def first_through(maps: tuple[InputMap, ...], states: Mapping[str, object]) -> dict[str, object]:
    """The first states of statistics, by name, of inputs through maps."""
    return {name: Through(maps, state) if is_mapped(STATISTICS[name]) else state for name, state in states.items()}


def added(statistic: Statistic, state: object, x: Array, exact: Array, weights: Array) -> object:
    """The state after more tokens, whose inputs are of any type: in float32, but of bfloat16 where the statistic takes them."""
    if not (statistic.takes_bfloat16 and x.dtype == exact.dtype == jnp.bfloat16):
        x, exact = (each.astype(jnp.float32) for each in (x, exact))
    return statistic.update(state, x, exact, weights)


class Mean(NamedTuple):
    """A weighted sum and the sum of the weights."""

    total: jax.Array
    weight: jax.Array

    def value(self) -> Array:
        """The weighted mean."""
        return self.total / self.weight


class Square(NamedTuple):
    """A weighted sum of x^T x and the sum of the weights. halved: whether what is below the diagonal does not count."""

    total: jax.Array
    weight: jax.Array
    halved: jax.Array

    @jax.jit
    def value(self) -> Array:
        """The weighted mean."""
        mirrored = lambda total: jnp.triu(total) + jnp.triu(total, 1).T  # noqa: E731
        return jax.lax.cond(self.halved, mirrored, lambda total: total, self.total) / self.weight


def _zeros(*shape: int) -> Float[Array, "..."]:
    return jax.device_put(np.zeros(shape, np.float32))  # jnp.zeros compiles a program for every shape


def _counted(x: Float[Array, "tokens in"], weights: Float[Array, " tokens"]) -> Float[Array, "tokens in"]:
    """The tokens that count, 0 for the others: 0 times nan would be nan."""
    return jnp.where(weights[:, None] > 0, x, 0)


def _add_square(s: Square, x: Float[Array, "tokens in"], weights: Float[Array, " tokens"]) -> Square:
    halved = x.dtype == jnp.bfloat16
    if halved:
        x = _rooted(x, weights)
        square = _product(x, x, symmetric=True)
    else:
        x = _counted(x, weights)
        square = jnp.matmul((x * weights[:, None]).T, x, precision=jax.lax.Precision.HIGHEST)
    return Square(s.total + square, s.weight + jnp.sum(weights), s.halved | halved)


def _drift(x: Float[Array, "tokens in"], exact: Float[Array, "tokens in"], weights: Float[Array, " tokens"]):
    """x^T diag(weights) (exact - x); of bfloat16 numbers that are not near each other the difference is rounded to that."""
    change = exact - x
    if x.dtype == jnp.bfloat16:
        return _product(_rooted(x, weights), _rooted(change, weights))
    x, change = _counted(x, weights), _counted(change, weights)
    return jnp.matmul((x * weights[:, None]).T, change, precision=jax.lax.Precision.HIGHEST)


def _rooted(x: BFloat16[Array, "tokens in"], weights: Float[Array, " tokens"]) -> BFloat16[Array, "tokens in"]:
    """x times roots of weights, so that x^T x stays symmetric whatever they are; those of 0 and 1 are exact."""
    return (_counted(x, weights) * jnp.sqrt(weights)[:, None]).astype(jnp.bfloat16)


def _product(x: BFloat16[Array, "tokens in"], y: BFloat16[Array, "tokens in"], *, symmetric: bool = False):
    """x^T y, summed in float32, in which products of bfloat16 are exact. On a CPU in strips: with JAX 0.10 to 0.12 XLA
    multiplies a slice of a transposed array in bfloat16, but the whole of it in float32. symmetric: as x^T x is, of which what
    lies below the diagonal may be left out.
    """
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    if jax.default_backend() != "cpu":
        return product(x.T, y)
    across, step, strips = x.T, max(SMALLEST_STRIP, -(-x.shape[1] // STRIPS)), []
    for start in range(0, x.shape[1], step):
        left = start if symmetric else 0
        strips.append(jnp.pad(product(across[start : start + step], y[:, left:]), ((0, 0), (left, 0))))
    return jnp.concatenate(strips)


hessian = Statistic(
    init=lambda size: Square(_zeros(size, size), _zeros(), jax.device_put(np.zeros((), bool))),
    update=lambda s, x, exact, w: _add_square(s, x, w),
    finalize=Square.value,
    axes=2,
    takes_bfloat16=True,
)

drift = Statistic(
    init=lambda size: Mean(_zeros(size, size), _zeros()),
    update=lambda s, x, exact, w: Mean(s.total + _drift(x, exact, w), s.weight + jnp.sum(w)),
    finalize=Mean.value,
    axes=2,
    takes_bfloat16=True,
)

abs_mean = Statistic(
    init=lambda size: Mean(_zeros(size), _zeros()),
    update=lambda s, x, exact, w: Mean(s.total + jnp.sum(jnp.abs(_counted(x, w)) * w[:, None], axis=0), s.weight + jnp.sum(w)),
    finalize=Mean.value,
    axes=1,
)

abs_max = Statistic(
    init=_zeros,
    update=lambda s, x, exact, w: jnp.maximum(s, jnp.max(jnp.abs(_counted(x, w)), axis=0)),
    finalize=lambda s: s,
    axes=1,
)

tokens = Statistic(
    init=lambda size: jax.device_put(np.zeros((), np.int32)),
    update=lambda s, x, exact, w: s + jnp.sum(w > 0, dtype=jnp.int32),
    finalize=lambda s: s,
    axes=0,
)

magnitudes = Statistic(
    init=lambda size: _zeros(BINS),
    update=lambda s, x, exact, w: s + count_magnitudes(_counted(x, w), w),
    finalize=lambda s: s,
    axes=None,
)


class Powers(NamedTuple):
    """Weighted sums of x^2 and x^4, and of the weights of all values."""

    squares: jax.Array
    fourths: jax.Array
    weight: jax.Array


def _add_powers(s: Powers, x: Array, weights: Array) -> Powers:
    square = jnp.square(_counted(x, weights))
    sums = (jnp.sum(each * weights[:, None]) for each in (square, jnp.square(square)))
    return Powers(*map(jnp.add, s, (*sums, jnp.sum(weights) * x.shape[1])))


kurtosis = Statistic(
    init=lambda size: Powers(_zeros(), _zeros(), _zeros()),
    update=lambda s, x, exact, w: _add_powers(s, x, w),
    finalize=lambda s: s.fourths * s.weight / jnp.where(s.squares == 0, 1, jnp.square(s.squares)),
    axes=None,
)

COUNT = "tokens"  # the statistic that every capture takes
STATISTICS: dict[str, Statistic] = {
    "hessian": hessian,  # (in, in): mean of x x^T
    "drift": drift,  # (in, in): mean of x (exact - x)^T
    "abs_mean": abs_mean,  # (in,): mean |x|
    "abs_max": abs_max,  # (in,): largest |x|
    "magnitudes": magnitudes,  # (bins,): how often |x| was of which size (`ranges.py`)
    "kurtosis": kurtosis,  # (): mean x^4 / (mean x^2)^2
    COUNT: tokens,  # (): tokens of weight above 0
}


def read_by(function: Callable) -> tuple[str, ...]:
    """The statistics that a function asks for, as methods do: by the names of its arguments, in their order."""
    return tuple(name for name in _arguments(function) if name in STATISTICS)


def given_to(function: Callable, values: Mapping[str, Array]) -> tuple[Array, ...] | None:
    """What `read_by` says of a layer's statistics; None where one of them was not taken."""
    names = read_by(function)
    return tuple(values[name] for name in names) if values.keys() >= set(names) else None


@functools.cache
def _arguments(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def mapped(values: Mapping[str, Array], by: InputMap) -> dict[str, Array]:
    """The statistics of mapped inputs from those of the inputs."""
    return {name: mapped_value(name, value, (by,)) for name, value in values.items()}


def mapped_value(name: str, value: Array, inputs: Sequence[InputMap]) -> Array:
    """A statistic of inputs through maps. Raises QjaxError for one that they do not determine."""
    axes = STATISTICS[name].axes
    if inputs and axes is None:
        raise QjaxError(f"{name} of a mapped input cannot be made from those of the input; put what reads it before the map")
    for each in inputs:
        value = each.on_statistic(value, axes)
    return value
