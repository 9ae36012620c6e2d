"""A weight in training that is quantized as it is used: what stands in a kernel's place until it is a QTensor.

    W' = decode(encode(W; s', z'); s', z'),   s' = load(store(s)),   z' = nearest(z)

Everything is rounded as a QTensor stores it, also scales and zero points, with gradients that pass through (straight-through):
of W and of the scale and zero point as `grid.fake_quantize` says (LSQ: Esser et al. 2020, arXiv 1902.08153; LSQ+: Bhalgat et
al. 2020, 2004.09576). The QTensor that `finished` gives has the values of `values`.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.qtensor import QTensor, dequantize, from_codes, unpack_parameters


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weight", "scale", "zero"), meta_fields=("format", "normalised")
)
@dataclasses.dataclass(frozen=True)
class FakeWeight:
    """weight (in, out), scale and zero (groups, channels) or None, float32; all may have a leading axis of stacked layers.

    normalised: gradients of scale and zero are divided by sqrt(weights of a group * largest value of the grid), as LSQ has it.
    """

    weight: Float[Array, "*layers in out"]
    scale: Float[Array, "*layers groups channels"]
    zero: Float[Array, "*layers groups channels"] | None
    format: Format
    normalised: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., in, out)."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes while it is trained."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def parameters(self) -> grid.Parameters:
        """The grid as it is stored, differentiable by scale and zero."""
        fmt, scale, zero = self.format, self.scale, self.zero
        if self.normalised:
            groups = grid.to_groups(jax.lax.stop_gradient(self.weight), fmt)
            factor = 1 / math.sqrt(groups.size / scale.size * fmt.largest_value)
            scale, zero = _slowed(scale, factor), None if zero is None else _slowed(zero, factor)
        codec = fmt.scale_codec
        exact = jax.lax.stop_gradient(scale)
        stored = grid.store_scales(exact, fmt, codec.common(exact * fmt.largest_value, fmt.largest_value))
        scale = _as(scale, grid.load_scales(stored, fmt, scale.shape))
        if zero is not None:
            zero = _as(zero, fmt.zero_codec.nearest(jax.lax.stop_gradient(zero), fmt.largest_code))
        return grid.Parameters(scale, scale, zero, stored)

    def values(self) -> Float[Array, "in out"]:
        """What the codes stand for, straight-through."""
        found = self.parameters()
        groups = grid.to_groups(self.weight, self.format)
        zero = None if found.zero is None else found.zero[:, None]
        fake = grid.fake_quantize(groups, found.scale[:, None], zero, self.format)
        return grid.from_groups(fake, self.format, *self.weight.shape)


def begin(q: QTensor, weight: Float[Array, "in out"], *, normalised: bool = False) -> FakeWeight:
    """A weight to train that starts with the codes of q: each number is about the nearest to `weight` that rounds to its code.

    Where scales are stored relative to each other (dq, nvfp4) some codes at an edge may differ. Raises QjaxError for formats
    that nothing is rounded to.
    """
    require_trainable(q.format)
    scale, zero = unpack_parameters(q)
    values = grid.to_groups(dequantize(q), q.format)
    step = jnp.abs(scale)[:, None] * jnp.float32(_half_step(q.format))
    moved = values + jnp.clip(grid.to_groups(weight.astype(jnp.float32), q.format) - values, -step, step)
    return FakeWeight(grid.from_groups(moved, q.format, *q.shape), scale, zero, q.format, normalised)


def require_trainable(fmt: Format) -> None:
    """Raises QjaxError for formats that cannot be trained."""
    if fmt.is_float or fmt.is_read_only:
        raise QjaxError(f"training in {fmt}: it has no grid that weights are rounded to; take another format, as int4-g128")


def finished(fake: FakeWeight) -> QTensor:
    """The QTensor with the values of `fake.values()`, bit for bit; of nested scales (`-dq`) to rounding, as XLA fuses."""
    found = fake.parameters()
    groups = grid.to_groups(fake.weight, fake.format)
    zero = None if found.zero is None else found.zero[:, None]
    codes = grid.encode(groups, found.scale[:, None], zero, fake.format)
    return from_codes(grid.from_groups(codes, fake.format, *fake.weight.shape), found, fake.format)


def _half_step(fmt: Format) -> float:
    """How far from a value a weight divided by its scale surely rounds to it: less than half the smallest step."""
    if fmt.codebook is None:
        return 0.49
    values = sorted(fmt.codebook.values)
    return 0.49 * min(b - a for a, b in itertools.pairwise(values))


def _slowed(x: Array, factor: float) -> Array:
    """x, with `factor` times its gradient."""
    still = jax.lax.stop_gradient(x)
    return still + factor * (x - still)


def _as(x: Array, value: Array) -> Array:
    """value, with the gradient of x: exactly, as x - x is 0."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))
