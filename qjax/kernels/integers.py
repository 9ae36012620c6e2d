"""Multiplying with packed integer weights through int8 x int8 -> int32, on processors that have fast products of it.

    y = sum over groups g of inputs: s_g a_g (X_g C_g - (z_g - m) rowsum(X_g)),    x_g = a_g X_g,    m = 2^(bits - 1)

The codes C of a group, less m, are int8; an input becomes a whole number X of a_g, which is found by row and group, of two int8
digits, 256 hi + lo: 16 bits. The rows [hi; lo] are multiplied with C, so that weights are read once. Weights and products are
exact, on normal inputs the error is 0.01 of that of a product of bfloat16 numbers, and a whole weight is never unpacked.

When it pays was measured on processors with AVX-512 VNNI and JAX 0.12, int4-g128, 4096 x 4096: 2, 8, 32 and 128 rows take 0.9,
0.7, 0.7 and 0.6 to 1.0 of the time that they take in floats (`xla`; against the dense product: `results/kernels/`). With more
rows int32 sums of every group take longer than their products; more than 32 rows of bfloat16 are as fast in that where a
processor multiplies it. Three designs at 512 rows, in times the dense float32 product's speed, 0.7 to 1.2 for all in noisy
runs: as here, at best 0.9; 12 bits of an input, [hi lo] times [16 C; C], which leaves no sums of digits, 1.2, but less exact
than bfloat16 where one input is 300 times the others; both sides in two digits for all inputs at once, without groups, 1.2. JAX
0.10 takes two to five times as long as in float32 for all of it.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from qjax import packing
from qjax.qtensor import QTensor, unpack_parameters

CPUINFO = Path("/proc/cpuinfo")
SETS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # one of them multiplies int8 numbers at several times the rate of float32
NARROW = {"avx512_bf16"}  # the same of bfloat16; processors with amx_bf16 have it too
SINCE = (0, 12)  # the version of JAX from which its products of int8 use them for any shape
SMALLEST_GROUP = 64  # smaller ones add up more sums than they save products
LEAST = 2**18  # weights of a group: fewer take less time than starting the work on them
MOST, MOST_NARROW = 128, 32  # rows: more are as fast in float32, or of bfloat16 in that
MOST_CODES = 64  # the same of inputs that are int8, with an older JAX
PIECE = 2**21  # weights decoded at a time


def fast() -> bool:
    """Whether this machine multiplies int8 faster than float32: the same for every process on the same kind of machine."""
    return jax.default_backend() == "cpu" and not SETS.isdisjoint(_instructions())


def has_bfloat16() -> bool:
    """The same of bfloat16."""
    return jax.default_backend() == "cpu" and not NARROW.isdisjoint(_instructions())


@functools.cache
def _instructions() -> frozenset[str]:
    told = CPUINFO.read_text() if CPUINFO.exists() else ""
    flags = next((line for line in told.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.split())


def pays(x: Float[Array, "rows in"], q: QTensor) -> bool:
    """Whether x is multiplied faster this way than in floats, by a weight that `xla` does not refuse."""
    group = min(q.format.group or q.in_features, q.in_features)
    large = group >= SMALLEST_GROUP and group * q.shape[1] >= LEAST
    few = len(x) <= (MOST_NARROW if x.dtype == jnp.bfloat16 and has_bfloat16() else MOST)
    return not q.format.codebook and large and few and jax.__version_info__ >= SINCE and fast()


def pays_for_codes(rows: int) -> bool:
    """Whether inputs that are int8 themselves meet 8-bit weights of an output channel as int8, not as floats."""
    return fast() and (jax.__version_info__ >= SINCE or (rows <= MOST_CODES and not has_bfloat16()))


def pays_decoded() -> bool:
    """Whether many rows of int8 meet such weights faster, as either, than in float32 weights that were decoded before."""
    return has_bfloat16() or (fast() and jax.__version_info__ >= SINCE)


def multiply(x: Float[Array, "rows in"], q: QTensor) -> Float[Array, "rows out"]:
    """x W in float32 for finite x; NaN and infinity give some number."""
    rows, (count, width) = len(x), packing.unit(q.format.bits)
    x = jnp.pad(x.astype(jnp.float32), ((0, -rows % 4), (0, 0)))
    size = _piece(q, count)
    units = q.codes.reshape(-1, width, q.shape[1])
    scale, zero = unpack_parameters(q)
    group = q.format.group if len(scale) > 1 else q.in_features

    def add(total, start, length, inputs):
        of_piece = (None if p is None else jax.lax.dynamic_index_in_dim(p, start // group) for p in (scale, zero))
        held = jax.lax.dynamic_slice_in_dim(units, start // count, -(-length // count))
        return total + _of_piece(inputs, _weights(held, q.format.bits), *of_piece, q.format.bits)

    whole, rest = divmod(q.in_features, size)
    total = jnp.zeros_like(x[:, :1] * q.codes[:1].astype(jnp.float32))
    if whole:
        pieces = x[:, : whole * size].reshape(len(x), whole, size).swapaxes(0, 1)
        inputs = _digits(pieces, count)

        def step(number, total):
            each = (jax.lax.dynamic_index_in_dim(part, number, keepdims=False) for part in inputs)
            return add(total, number * size, size, tuple(each))

        total = jax.lax.fori_loop(0, whole, step, total)
    total = add(total, whole * size, rest, _digits(x[:, whole * size :], count)) if rest else total
    return total[:rows]


def _piece(q: QTensor, count: int) -> int:
    """Inputs at a time: a group, or part of one that is large, in whole units that divide it."""
    group = min(q.format.group or q.in_features, q.in_features)
    most = max(PIECE // q.shape[1], SMALLEST_GROUP) // count * count
    if group <= most:
        return group
    return most if group >= q.in_features else max(size for size in range(count, most + 1, count) if group % size == 0)


def _digits(x: Float[Array, "*pieces rows in"], count: int):
    """(int8 digits of every row, what 1 is worth in it, its sum): high digits above low ones, inputs as in `_weights`."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % count)])
    x = x.reshape(*x.shape[:-1], -1, count).swapaxes(-1, -2).reshape(x.shape)
    one = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / (127 * 256 + 127)
    one = jnp.where(one == 0, 1.0, one)
    whole = jnp.round(x / one).astype(jnp.int32)
    high = whole + 128 >> 8
    digits = jnp.concatenate([high, whole - 256 * high], axis=-2).astype(jnp.int8)
    return digits, one, jnp.sum(whole, axis=-1, keepdims=True)


def _weights(units, bits: int) -> Int8[Array, "inputs out"]:
    """Codes of packing units less 2^(bits - 1): the first codes of all units, then the second ones."""
    count, _ = packing.unit(bits)
    codes = jnp.concatenate([packing.take(units, bits, index) for index in range(count)])
    return centred(codes, bits)


def centred(codes: UInt8[Array, "..."], bits: int) -> Int8[Array, "..."]:
    """Codes less 2^(bits - 1)."""
    return jax.lax.bitcast_convert_type(codes - jnp.uint8(2 ** (bits - 1)), jnp.int8)


def _of_piece(inputs, weights: Int8[Array, "inputs out"], scale, zero, bits: int) -> Float[Array, "rows out"]:
    digits, one, rowsum = inputs
    high, low = jnp.split(dot(digits, weights).astype(jnp.float32), 2)
    found = 256 * high + low
    if zero is not None:
        found -= (zero - 2 ** (bits - 1)) * rowsum.astype(jnp.float32)
    return found * one * scale


def dot(x: Int8[Array, "rows in"], weights: Int8[Array, "in out"]) -> Int[Array, "rows out"]:
    """x W in int32."""
    return jnp.matmul(x, weights, preferred_element_type=jnp.int32)
