"""Multiplication with packed weights on TPUs: Pallas kernels for Mosaic.

    y (M, out) = x W        multiply
    z (M, in)  = y W^T      multiply_transposed, the backward pass with respect to x
    y (M, out) = (x * x_scale) W with int8 x and W and int32 sums, multiply_int8

A grid step reads a tile of words, decodes it in vector registers to (inputs, columns), and gives it to the matrix unit; the sum
over tiles is a float32 (int32) scratch in VMEM. Pallas pipelines the reads. The kernel takes code c of all units of a tile at
once, a (units, columns) matrix, and stacks these for all c. So inside a tile the inputs are in the order c-th of every unit,
then the next c, and x is brought into this order outside (`_to_tiles`), which is cheap as x is small next to W.

Two shape classes, see TABLE. Up to 16 rows are bound by reading words: tiles are large, x stays in VMEM as a whole, and with
integers bfloat16 x takes the shorter way of tpu_pairs. More rows are bound by the matrix unit: a tile that is decoded once
serves up to 512 rows.

float32 x multiplies with full float32 products (Precision.HIGHEST); bfloat16 x with weights decoded in float32 and rounded to
bfloat16 once. What a tile reads beyond the weight's edge may be anything: there x is zero and the scale is set to zero.

Needs a TPU v4 or newer, and JAX without 64-bit types (jax_enable_x64); compiled ahead of time for v5e and v6e in
tests/parity/test_tpu_compiled.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8

from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.kernels import layout, tpu_pairs
from qjax.kernels.decode import decode, float16_values
from qjax.kernels.layout import KernelWeight, code, result, unit

LANES, SUBLANES = 128, 8
TOO_OLD = ("TPU v2", "TPU v3")  # their matrix units and memories do not take these kernels
FEW_ROWS = 16  # up to so many, reading words is the bound
VMEM_BYTES = 48 * 2**20  # what a kernel may use; v5e and v6e have 128 MiB, the compiler's own limit is 16 or 32
RESIDENT_BYTES = 4 * 2**20  # x of a few rows is held whole in VMEM up to this size


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The largest tile of a shape class: `rows` of x, `inputs` by `columns` of W.

    device: start of jax.Device.device_kind, "" for any. most_rows: the largest M of the class.
    """

    device: str
    most_rows: int
    rows: int
    inputs: int
    columns: int


# The first row that fits is used. Chosen for VMEM and long reads, not timed: experiments/tune_kernels.py prints rows.
TABLE = (
    Blocks("", 16, rows=16, inputs=4096, columns=256),
    Blocks("", 2**31, rows=512, inputs=1024, columns=512),
)


def pick_blocks(rows: int, device: str) -> Blocks:
    """The first row of TABLE for so many rows of x on a device kind."""
    return next(b for b in TABLE if device.startswith(b.device) and rows <= b.most_rows)


def refusal(x_dtype: jax.typing.DTypeLike, weight: KernelWeight) -> str | None:
    """Why these kernels cannot multiply x of this type with this weight, or None."""
    x_dtype, device = jnp.dtype(x_dtype), jax.devices()[0].device_kind
    if device.startswith(TOO_OLD):
        return f"a TPU v4 or newer is served, this one is a {device}"
    if jax.config.jax_enable_x64:
        return "jax_enable_x64 is on, which Mosaic does not compile; turn it off"
    if weight.words.ndim != 3:
        return f"one (in, out) weight at a time, got a stack of shape {weight.shape}: use vmap"
    if x_dtype == jnp.int8:
        return layout.refusal_int8(weight)
    if x_dtype not in (jnp.float32, jnp.bfloat16):
        return f"inputs are float32, bfloat16 or int8, got {x_dtype}"
    return None


def multiply(x: Float[Array, "rows in"], weight: KernelWeight, *, interpret=False, blocks=None) -> Float[Array, "rows out"]:
    """x W in x's type, float32 or bfloat16, summed in float32.

    interpret: False, True or pltpu.InterpretParams, as for pallas_call. blocks: a Blocks in place of the table's. Raises
    QjaxError for what `refusal` names.
    """
    plan = _plan(x, weight, 0, blocks)
    return _run(_to_tiles(x, plan), weight, plan, x.dtype, interpret)[: len(x)]


def multiply_transposed(
    y: Float[Array, "rows out"], weight: KernelWeight, *, interpret=False, blocks=None
) -> Float[Array, "rows in"]:
    """y W^T in y's type, float32 or bfloat16, summed in float32; otherwise as `multiply`."""
    plan = _plan(y, weight, 1, blocks)
    total = _run(_pad(y, plan.rows, plan.columns), weight, plan, y.dtype, interpret)
    return _from_tiles(total, plan)[: len(y), : weight.in_features]


def multiply_int8(
    x: Int8[Array, "rows in"], x_scale: Float[Array, "rows 1"], weight: KernelWeight, *, interpret=False, blocks=None
) -> Float[Array, "rows out"]:
    """(x * x_scale) W in float32 for a symmetric int8 weight of one scale per channel, summed in int32; else as `multiply`."""
    plan = _plan(x, weight, 0, blocks)
    total = _run(_to_tiles(x, plan), weight, plan, jnp.int32, interpret)[: len(x)]
    return total.astype(jnp.float32) * x_scale * weight.scales.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The tiles of one product.

    axis: of W that is summed over, 0 or 1. rows, columns: of a tile. units: of a tile, each `count` inputs. part: units
    that share a row of scales. limit: units (axis 0) or columns (axis 1) of the whole W.
    """

    axis: int
    rows: int
    units: int
    columns: int
    part: int
    limit: int
    count: int
    format: Format
    pairs: bool

    @property
    def inputs(self) -> int:
        return self.units * self.count


def _plan(x, weight: KernelWeight, axis: int, blocks: Blocks | None) -> _Plan:
    if reason := refusal(x.dtype, weight):
        raise QjaxError(f"pallas_tpu: {reason}")
    if x.shape[1] != weight.shape[axis]:
        raise QjaxError(f"pallas_tpu: inputs of shape {x.shape} do not fit axis {axis} of a weight of shape {weight.shape}")
    blocks = blocks or pick_blocks(len(x), jax.devices()[0].device_kind)
    (_, units, out), (count, _) = weight.words.shape, unit(weight.format.bits)
    part = weight.group // count if len(weight.scales) > 1 else units
    # Where several tiles are needed, each has a multiple of 128 inputs and whole rows of scales, a multiple of 8 or, where
    # there are zeros in uint8, of 32.
    scale_rows = SUBLANES if weight.zeros is None else 4 * SUBLANES
    wanted = max(blocks.inputs // count, SUBLANES)
    if units <= wanted:
        tile = units
    elif len(weight.scales) == 1:
        tile = _multiple_below(wanted, max(SUBLANES, LANES // count))
    else:
        part = max(d for d in range(1, max(wanted // scale_rows, 1) + 1) if part % d == 0)
        tile = _multiple_below(wanted, math.lcm(scale_rows * part, LANES // math.gcd(LANES, count)))
    rows = pl.cdiv(len(x), pl.cdiv(len(x), blocks.rows))  # of equal tiles
    rows += -rows % (4 * SUBLANES // x.dtype.itemsize) if rows < len(x) else 0
    tile = min(tile, units)
    part = tile if len(weight.scales) == 1 else part
    pairs = axis == 0 and x.dtype == jnp.bfloat16 and len(x) <= FEW_ROWS and tpu_pairs.serves(weight.format, part, tile)
    return _Plan(axis, rows, tile, min(out, blocks.columns), part, (units, out)[axis], count, weight.format, pairs)


def _multiple_below(size: int, step: int) -> int:
    """The largest multiple of `step` up to `size`, at least `step`."""
    return max(size // step, 1) * step


def _pad(x: Array, rows: int, columns: int) -> Array:
    """x with zeros up to multiples of `rows` and `columns`."""
    return jnp.pad(x, ((0, -len(x) % rows), (0, -x.shape[1] % columns)))


def _to_tiles(x: Array, plan: _Plan) -> Array:
    """x with the inputs of every tile in the order of its decoded rows, padded with zeros to whole tiles."""
    x = _pad(x, plan.rows, plan.inputs)
    if plan.pairs:
        return tpu_pairs.order_inputs(x, plan.format.bits, plan.part)
    return x.reshape(len(x), -1, plan.units, plan.count).swapaxes(2, 3).reshape(x.shape)


def _from_tiles(x: Array, plan: _Plan) -> Array:
    """The inverse of `_to_tiles`, padding included."""
    return x.reshape(len(x), -1, plan.count, plan.units).swapaxes(2, 3).reshape(x.shape)


def _run(x: Array, weight: KernelWeight, plan: _Plan, dtype, interpret) -> Array:
    """The sum over tiles; x is padded to whole tiles, and so is what comes back, except for columns of axis 0."""
    width, units, out = weight.words.shape
    unit_tiles, column_tiles = pl.cdiv(units, plan.units), pl.cdiv(out, plan.columns)
    # Grid: tiles of rows, of the result's other axis, of the axis that is summed over; the last one changes fastest.
    grid = (len(x) // plan.rows, *((column_tiles, unit_tiles) if plan.axis == 0 else (unit_tiles, column_tiles)))
    by_weight = (lambda i, j, k: (k, j)) if plan.axis == 0 else (lambda i, j, k: (j, k))
    x_columns, out_columns = (plan.inputs, plan.columns) if plan.axis == 0 else (plan.columns, plan.inputs)
    resident = plan.rows * x.shape[1] * x.dtype.itemsize <= RESIDENT_BYTES and grid[0] == 1
    x_spec = (
        pl.BlockSpec((plan.rows, x.shape[1]), lambda i, j, k: (i, 0))
        if resident
        else pl.BlockSpec((plan.rows, x_columns), lambda i, j, k: (i, k))
    )
    parameters = [_scale_rows(p, weight, plan) for p in (_loadable(weight.scales), weight.zeros) if p is not None]
    parameter_rows = min(pl.cdiv(plan.units, plan.part), len(parameters[0]))
    one = len(parameters[0]) == 1
    parameter_spec = pl.BlockSpec(
        (parameter_rows, plan.columns), lambda *at: (0 if one else by_weight(*at)[0], by_weight(*at)[1])
    )
    shape = (len(x), out if plan.axis == 0 else unit_tiles * plan.inputs)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, resident=resident),
        out_shape=result(shape, dtype, (x, weight)),
        grid=grid,
        in_specs=[
            x_spec,
            pl.BlockSpec((width, plan.units, plan.columns), lambda *at: (0, *by_weight(*at))),
            *[parameter_spec] * len(parameters),
        ],
        out_specs=pl.BlockSpec((plan.rows, out_columns), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((plan.rows, out_columns), jnp.int32 if dtype == jnp.int32 else jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(x) * weight.in_features * out,
            bytes_accessed=weight.nbytes + x.nbytes + math.prod(shape) * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="qjax_multiply" if plan.axis == 0 else "qjax_multiply_transposed",
    )(x, weight.words, *parameters)


def _loadable(scales: Array) -> Array:
    """float16 as its bits: Mosaic has no float16."""
    return jax.lax.bitcast_convert_type(scales, jnp.int16) if scales.dtype == jnp.float16 else scales


def _scale_rows(parameter: Array, weight: KernelWeight, plan: _Plan) -> Array:
    """A row for every `part` units: rows of groups longer than that are repeated."""
    if len(parameter) == 1:
        return parameter
    return jnp.repeat(parameter, weight.group // plan.count // plan.part, axis=0)


def _kernel(x_ref, words_ref, *refs, plan: _Plan, resident: bool):
    """One grid step: adds the product with one tile of W to the sum."""
    *parameter_refs, out_ref, sum_ref = refs
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    width = plan.inputs if plan.axis == 0 else plan.columns
    whole = not resident or x_ref.shape[1] == width
    x = x_ref[...] if whole else x_ref[:, pl.ds(pl.multiple_of(step * width, LANES), width)]
    scale, zero = _read_parameters(*(ref[...] for ref in parameter_refs))
    if plan.pairs:
        rows = len(scale)
        if len(parameter_refs[0]) > 1 and plan.limit % plan.units:
            group = step * rows + jax.lax.broadcasted_iota(jnp.int32, scale.shape, 0)
            scale = jnp.where(group < pl.cdiv(plan.limit, plan.part), scale, 0.0)
        sum_ref[...] += tpu_pairs.product(x, words_ref[...], scale, zero, plan.format.bits)
    else:
        sum_ref[...] += _product(x, words_ref[...], scale, zero, plan, step)

    @pl.when(step == steps - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _product(x, words, scale, zero, plan: _Plan, step):
    """x times one tile of W, or its transpose, in float32, or int32 for int8."""
    return jax.lax.dot_general(
        x,
        _decode_tile(words, scale, zero, plan, step, x.dtype),
        (((1,), (plan.axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
    )


def _read_parameters(scale, zero=None):
    """Scales and zero points as float32."""
    scale = float16_values(scale) if scale.dtype == jnp.int16 else scale.astype(jnp.float32)
    return scale, None if zero is None else zero.astype(jnp.int32).astype(jnp.float32)


def _decode_tile(words, scale, zero, plan: _Plan, step, dtype):
    """The (inputs, columns) tile of W in the type of x, code after code; integers without their scale for int8."""
    codes = [code(words, plan.format.bits, c) for c in range(plan.count)]
    if dtype == jnp.int8:
        return jnp.concatenate([c - 128 for c in codes]).astype(jnp.int8)
    scale, zero = _spread(scale, plan), None if zero is None else _spread(zero, plan)
    size = words.shape[1 + plan.axis]
    if plan.limit % size:  # the last tile hangs over the edge of W
        index = step * size + jax.lax.broadcasted_iota(jnp.int32, words.shape[1:], plan.axis)
        scale = jnp.where(index < plan.limit, scale, 0.0)
    return jnp.concatenate([decode(c, scale, zero, plan.format) for c in codes]).astype(dtype)


def _spread(parameter, plan: _Plan):
    """(rows, columns) -> (units, columns): each row for the units that share it; a single row as it is."""
    rows, columns = parameter.shape
    if rows == 1:
        return parameter
    share = SUBLANES // plan.part  # rows that meet in one register, which Mosaic would put together in memory
    if share < 2 or SUBLANES % plan.part or rows % share:
        spread = jnp.broadcast_to(parameter[:, None], (rows, plan.part, columns))
    else:
        alone = jnp.broadcast_to(parameter[:, None], (rows, SUBLANES, columns)).reshape(-1, share, SUBLANES, columns)
        spread = alone[:, 0]
        row = jax.lax.broadcasted_iota(jnp.int32, spread.shape, 1)
        for i in range(1, share):
            spread = jnp.where(row >= i * plan.part, alone[:, i], spread)
    return spread.reshape(rows * plan.part, columns)[: plan.units]
