"""Multiplying with packed weights in plain XLA: some inputs at a time, so that the whole weight is never unpacked.

    y = sum over chunks of inputs, sum over c of x[:, c::count] @ decode(code c of every packing unit)

A chunk's weights stay in the cache between being decoded and being multiplied, and nothing is interleaved: code c of all units
meets every count-th input. One row of x is multiplied a few inputs at a time instead, in one elementwise loop over the output
columns that writes no decoded weight at all: on CPU faster than the dense float32 product, which has four to eight times the
bytes to read, for most formats (`results/kernels/`). Sums are float32. Rows of bfloat16 meet weights rounded to bfloat16, which
processors with instructions for it multiply at twice the rate of float32. A single row, and all of float32, meets float32
weights, but where a processor has fast products of int8: `integers`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Float, Int8

from qjax import grid, packing
from qjax.formats import Format
from qjax.kernels import integers
from qjax.kernels.layout import uneven
from qjax.qtensor import QTensor, unpack_parameters

CHUNK = 2**21  # weights decoded at a time: 8 MB of float32
INTEGERS = 2**23  # the same of int8, where both sides are: 8 MB; glibc hands 16 MB back, and getting them again takes time
NEW = jax.__version_info__ >= (0, 12)
CODES = 8 if NEW else 32  # of a column that one row of x meets at a time: of 8, 16, 32 and 64 the fastest
FEWEST = 4 if NEW else 8  # so many at least, or the loop goes over its sums too often
EXACT_ROWS = 1024  # so many products of -128..127 add up to at most 2^24: exact in float32


def refusal(q: QTensor) -> str | None:
    """Why a weight cannot be multiplied this way, or None."""
    fmt = q.format
    if fmt.is_float:
        return f"{fmt} is a cast and holds no codes"
    if fmt.has_minima:
        return f"{fmt} has minima instead of zero points"
    return uneven(q, packing.unit(fmt.bits)[0], "bytes")


@functools.partial(jax.jit, static_argnames="precision")
def multiply(x: Float[Array, "rows in"], q: QTensor, *, precision: PrecisionLike = None) -> Float[Array, "rows out"]:
    """x W in x's type, for weights that are not refused. precision "highest": in float32 on every machine."""
    size = _row_step(q)
    if len(x) == 1 and size * packing.unit(q.format.bits)[0] >= FEWEST:
        return _together(lambda x, q: _row_product(x[0].astype(jnp.float32), q, size)[None], x, q, precision)
    if _may_round(precision) and integers.pays(x, q) and not (_is_laid(x) or _is_laid(q.codes)):
        return _together(_by_integers, x, q, precision)
    return _by_floats(x, q, precision)


def _by_floats(x: Float[Array, "rows in"], q: QTensor, precision: PrecisionLike = None) -> Float[Array, "rows out"]:
    wide, product = x.astype(_multiplied_in(x, precision)), _product(precision)

    def add(total, start, count, decoded):
        inputs = jax.lax.dynamic_slice_in_dim(wide, start, count, axis=1)
        for part, weights in zip(_split(inputs, q), decoded, strict=True):
            total += product(part, weights.astype(wide.dtype))
        return total

    return _over_chunks(add, _zeros(x[:, :1], q.codes[:1]), q).astype(x.dtype)


def _by_integers(x: Float[Array, "rows in"], q: QTensor) -> Float[Array, "rows out"]:
    """By `integers`; rows of NaN or infinity as floats have them."""
    return jax.lax.cond(jnp.all(jnp.isfinite(x)), lambda x, q: integers.multiply(x, q).astype(x.dtype), _by_floats, x, q)


def _multiplied_in(x: Float[Array, "..."], precision: PrecisionLike) -> jnp.dtype:
    """The type in which rows meet weights."""
    return jnp.dtype(jnp.bfloat16 if x.dtype == jnp.bfloat16 and _may_round(precision) else jnp.float32)


def _product(precision: PrecisionLike):
    return functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)


def _may_round(precision: PrecisionLike) -> bool:
    """Whether inputs may be rounded to half of float32's bits: what JAX calls its default precision."""
    asked = jax.config.jax_default_matmul_precision if precision is None else precision
    return asked in (None, "default", "bfloat16", "fastest", jax.lax.Precision.DEFAULT)


def _is_laid(array: Array) -> bool:
    """Whether JAX's types say that an array lies in parts on a mesh, which reshapes cannot cut."""
    return any(part is not None for part in jax.typeof(array).sharding.spec)


@functools.partial(jax.jit, static_argnames="precision")
def multiply_transposed(y: Float[Array, "rows out"], q: QTensor, *, precision: PrecisionLike = None) -> Float[Array, "rows in"]:
    """y W^T in y's type, the gradient with respect to x, for weights that are not refused."""
    wide, product = y.astype(_multiplied_in(y, precision)), _product(precision)

    def put(result, start, count, decoded):
        parts = jnp.stack([product(wide, weights.astype(wide.dtype).T) for weights in decoded], axis=-1)
        inputs = parts.reshape(len(y), parts.shape[1] * parts.shape[2])[:, :count]
        return jax.lax.dynamic_update_slice_in_dim(result, inputs, start, axis=1)

    return _over_chunks(put, _zeros(y[:, :1], jnp.sum(q.codes[:0]) + jnp.zeros(q.in_features)), q).astype(y.dtype)


@jax.jit
def multiply_int8(x: Int8[Array, "rows in"], scale: Float[Array, "rows 1"], q: QTensor) -> Float[Array, "rows out"]:
    """(scale x) W in float32, for 8-bit symmetric weights with one scale a channel; products are summed exactly.

    As products of int8 where the machine has fast ones. Elsewhere of bfloat16, which holds every code, where it has fast ones
    of that, or of float32; both with float32 sums, in which EXACT_ROWS products of int8 are exact. Sums of sums are int32.
    """
    given, as_int8, as_bfloat16 = len(x), integers.pays_for_codes(len(x)), integers.has_bfloat16()
    floats = jnp.bfloat16 if as_bfloat16 else jnp.float32
    if (as_int8 or as_bfloat16) and given < 8 and not _is_laid(x):  # XLA is slow with one row of either
        x = jnp.pad(x, ((0, -given % 8), (0, 0)))

    def add(total, start, count):
        inputs = jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)
        codes = jax.lax.dynamic_slice_in_dim(q.codes, start, count)
        if as_int8:
            return total + integers.dot(inputs, integers.centred(codes, 8))
        weights = integers.centred(codes, 8).astype(floats)
        found = jnp.matmul(inputs.astype(floats), weights, precision="highest", preferred_element_type=jnp.float32)
        return total + found.astype(jnp.int32)

    total = _zeros(x[:, :1], q.codes[:1]).astype(jnp.int32)
    rows = min(max(INTEGERS // q.shape[-1], EXACT_ROWS) if as_int8 else EXACT_ROWS, q.in_features)
    whole, rest = divmod(q.in_features, rows)
    total = jax.lax.fori_loop(0, whole, lambda number, total: add(total, number * rows, rows), total)
    total = add(total, whole * rows, rest) if rest else total
    return total[:given] * scale * unpack_parameters(q)[0]


def _over_chunks(step, carry, q: QTensor):
    """carry = step(carry, first input, inputs, decoded parts) over all chunks; the last one may be smaller."""
    count, width = packing.unit(q.format.bits)
    group = _group(q)
    grain = group or count
    rows = min(max(CHUNK // q.shape[-1] // grain, 1) * grain, q.in_features)
    units = q.codes.reshape(-1, width, q.shape[-1])
    scale, zero = unpack_parameters(q)

    def chunk(carry, start, inputs):
        def of_chunk(array):
            if array is None or not group:
                return array if array is None else array[:, None]
            return jax.lax.dynamic_slice_in_dim(array, start // group, -(-inputs // group))[:, None]

        held = jax.lax.dynamic_slice_in_dim(units, start // count, -(-inputs // count))
        codes = (packing.take(held, q.format.bits, index) for index in range(count))
        decoded = [_decode(part, of_chunk(scale), of_chunk(zero), q.format, group // count) for part in codes]
        return step(carry, start, inputs, decoded)

    whole, rest = divmod(q.in_features, rows)
    carry = jax.lax.fori_loop(0, whole, lambda number, carry: chunk(carry, number * rows, rows), carry)
    return chunk(carry, whole * rows, rest) if rest else carry


def _row_step(q: QTensor) -> int:
    """Packing units that one row meets at a time: at most CODES codes, in units that divide those of a group."""
    count, width = packing.unit(q.format.bits)
    most, each = max(CODES // count, 1), _group(q) // count
    return max(size for size in range(1, most + 1) if each % size == 0) if each else min(most, len(q.codes) // width)


def _together(multiply_one, x: Float[Array, "rows in"], q: QTensor, precision: PrecisionLike) -> Float[Array, "rows out"]:
    """multiply_one(x, q), but rows that vmap makes are multiplied together."""

    @jax.custom_batching.custom_vmap
    def one(x, q):
        return multiply_one(x, q).astype(x.dtype)

    @one.def_vmap
    def many(count, batched, x, q):
        if not any(jax.tree.leaves(batched[1])):
            return multiply(x.reshape(-1, x.shape[-1]), q, precision=precision).reshape(*x.shape[:2], -1), True
        every = [
            jax.tree.map(lambda leaf, has: leaf if has else jnp.broadcast_to(leaf, (count, *leaf.shape)), part, axes)
            for part, axes in zip((x, q), batched, strict=True)
        ]
        alone = multiply_one if x.shape[-2] == 1 else functools.partial(_by_floats, precision=precision)
        return jax.vmap(lambda x, q: alone(x, q).astype(x.dtype))(*every), True

    return one(x, q)


def _row_product(x: Float[Array, " in"], q: QTensor, size: int) -> Float[Array, " out"]:
    """x W, `size` packing units of a column at a time. The scale is applied to their sum, which inputs of 1e33 overflow; an
    infinite input may make NaN of every output.
    """
    count, width = packing.unit(q.format.bits)
    units = q.codes.reshape(-1, width, q.shape[-1])
    inputs = jnp.pad(x, (0, -len(x) % count)).reshape(-1, count)
    each = _group(q) // count or len(units)  # units that share a scale
    parameters = unpack_parameters(q)
    as_bytes = width == 1 and count in (2, 4) and not q.format.codebook  # eight differences of inputs lose digits
    sum_of = _sum_of_bytes if as_bytes else _sum_of_codes

    def add(total, start, size):
        of_step = (jax.lax.dynamic_slice_in_dim(array, start, size) for array in (inputs, units))
        scale, zero = (
            None if p is None else jax.lax.dynamic_index_in_dim(p, start // each, keepdims=False) for p in parameters
        )
        return total + scale * sum_of(*of_step, zero, q.format)

    whole, rest = divmod(len(units), size)
    total = jax.lax.fori_loop(0, whole, lambda number, total: add(total, number * size, size), _zeros(x[0], q.codes[0]))
    return add(total, whole * size, rest) if rest else total


def _sum_of_codes(inputs: Float[Array, "units count"], units, zero, fmt: Format) -> Float[Array, " out"]:
    """The sum of inputs times grid values."""
    partial = jnp.zeros((), jnp.float32)
    for held, unit in zip(inputs, units, strict=True):
        for index, x in enumerate(held):
            partial += x * grid.decode(packing.take(unit, fmt.bits, index), 1.0, zero, fmt)
    return partial


def _sum_of_bytes(inputs: Float[Array, "units count"], units, zero, fmt: Format) -> Float[Array, " out"]:
    """The same for integers that do not straddle bytes, which are not taken apart: with u_k = x_k / 2^(k bits),

    sum over k of x_k c_k = sum over k of (byte mod 2^((k + 1) bits)) (u_k - u_(k + 1)).
    """
    count = inputs.shape[1]
    scaled = inputs / jnp.asarray([2.0 ** (index * fmt.bits) for index in range(count)], jnp.float32)
    steps = scaled - jnp.pad(scaled[:, 1:], ((0, 0), (0, 1)))
    partial = -(2 ** (fmt.bits - 1) if zero is None else zero) * jnp.sum(inputs)
    for held, unit in zip(steps, units, strict=True):
        for index, x in enumerate(held):
            partial += x * (unit[0] & jnp.uint8(2 ** ((index + 1) * fmt.bits) - 1)).astype(jnp.float32)
    return partial


def _zeros(rows: Array, columns: Array):
    """Where a loop starts: float32 zeros of the shape of the product of both, laid over a mesh as it is."""
    return jnp.zeros_like(rows.astype(jnp.float32) * columns.astype(jnp.float32))


def _group(q: QTensor) -> int:
    """Inputs that share a scale, 0 where all of them do."""
    return 0 if (q.format.group or q.in_features) >= q.in_features else q.format.group


def _decode(codes, scale, zero, fmt, each):
    """float32 weights (units, out) of codes (units, out), `each` units (0: all) sharing a scale; the last group may be cut."""
    each = each or len(codes)
    groups = jnp.pad(codes, ((0, -len(codes) % each), (0, 0))).reshape(-1, each, codes.shape[1])
    return grid.decode(groups, scale, zero, fmt).reshape(-1, codes.shape[1])[: len(codes)]


def _split(x: Float[Array, "rows in"], q: QTensor) -> list[Float[Array, "rows units"]]:
    count, _ = packing.unit(q.format.bits)
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count)))
    return [padded[:, index::count] for index in range(count)]
