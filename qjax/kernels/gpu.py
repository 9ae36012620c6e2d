"""y = x W with packed weights on NVIDIA GPUs: Pallas kernels for its Triton backend.

    vector       M up to a few: float32 sums in registers, one pass over the words, no other program before or after it
    dot          larger M: a tile is decoded once and multiplied on tensor cores (float32 x: on the float32 units, no TF32)
    transposed   y W^T: one sum for every code of a unit

Needs compute capability 8.0 (Ampere) or newer and JAX 0.10 or newer, which this one source serves. Mosaic GPU, the successor of
the Triton backend in JAX, starts at Hopper. From 0.11 on JAX warns of that whenever a kernel is lowered, which Python
hides outside of tests.

How the time is spent. At M = 1 a multiprocessor must decode about 27 4-bit weights a cycle to keep up with 3 TB/s, and has 128
lanes for it: so a code is masked where it stands in its word, with an exponent put on top of it,

    bits (word & mask << o) | 2^23's bits   are the float32   2^23 + code 2^o,

and one subtraction of 2^23 + zero 2^o gives (code - zero) 2^o exactly, one multiply-add with x 2^-o the product; scales
are multiplied once a unit. A codebook's value is looked up in memory (64 bytes that stay in the first cache), which is fewer
instructions than a tree of selects. Sums are split over programs along the inputs only where the outputs alone do not fill the
device; the parts are added in a fixed order, so results do not change between runs.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from qjax.errors import QjaxError
from qjax.kernels import layout
from qjax.kernels.layout import KernelWeight

MAGIC = 2.0**23  # whose float32 has a mantissa of 23 zeros, room for a code and what stands below it
MAGIC_BITS = 0x4B000000
OLDEST = "8.0"  # compute capability: Ampere


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One row of the table: sizes of a tile, all powers of two, for the first shape class that holds."""

    device: str  # how the device kind begins; "" is any
    kernel: str
    most_rows: int  # the largest M
    rows: int  # of x in a tile; the vector kernel takes all
    units: int  # in a tile of weights, fewer where a unit has several words
    outputs: int
    programs: int  # inputs are split as long as there are no more of them
    warps: int
    stages: int


# Reasoned and lowered, not yet tuned; a row of a device goes before those of any.
TABLE = (
    Blocks("", "vector", 2, rows=1, units=256, outputs=32, programs=128, warps=16, stages=1),
    Blocks("", "vector", 4, rows=1, units=128, outputs=32, programs=128, warps=16, stages=1),
    Blocks("", "dot", 16, rows=16, units=32, outputs=64, programs=256, warps=4, stages=3),
    Blocks("", "dot", 64, rows=64, units=16, outputs=64, programs=256, warps=4, stages=3),
    Blocks("NVIDIA H", "dot", 2**31, rows=128, units=16, outputs=128, programs=128, warps=8, stages=2),
    Blocks("", "dot", 2**31, rows=64, units=16, outputs=128, programs=128, warps=8, stages=2),
    Blocks("", "dot_int8", 16, rows=16, units=32, outputs=64, programs=256, warps=4, stages=3),
    Blocks("", "dot_int8", 2**31, rows=128, units=32, outputs=128, programs=128, warps=8, stages=2),
    # Without tensor cores every product is an instruction of its own: tiles as small as the compiler bears.
    Blocks("", "dot_float32", 2**31, rows=16, units=16, outputs=64, programs=256, warps=4, stages=2),
    Blocks("", "transposed", 2**31, rows=64, units=16, outputs=32, programs=1, warps=8, stages=2),
    Blocks("", "transposed_float32", 2**31, rows=16, units=16, outputs=32, programs=1, warps=4, stages=2),
)
TILE_INPUTS = 2**14  # elements of x that a pipeline stage of the dot kernel holds in shared memory, of 99 KiB on small devices
VECTOR_ROWS = {jnp.dtype(jnp.float32): 4, jnp.dtype(jnp.bfloat16): 2}  # from where tensor cores are faster


def pick_blocks(kernel: str, rows: int) -> Blocks:
    """The first row of the table that serves the kernel, M = rows and the device at hand."""
    device = jax.devices()[0].device_kind
    return next(b for b in TABLE if b.kernel == kernel and rows <= b.most_rows and device.startswith(b.device))


def refusal(x_dtype: DTypeLike, weight: KernelWeight) -> str | None:
    """Why these kernels cannot serve a type of x and a weight, or None; int8 x is `multiply_int8`'s."""
    x_dtype = jnp.dtype(x_dtype)
    if x_dtype == jnp.int8 and (reason := layout.refusal_int8(weight)):
        return reason
    if x_dtype not in (*VECTOR_ROWS, jnp.int8):
        return f"x is {x_dtype}; float32 and bfloat16 are served"
    if weight.words.ndim != 3:
        return f"the weight is a stack of shape {weight.shape}; one (in, out) matrix is served, a stack under vmap or scan"
    capability = getattr(jax.devices()[0], "compute_capability", OLDEST)  # a GPU's; CPUs, which interpret, have none
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < float(OLDEST):  # AMD's are names
        return f"an NVIDIA GPU of compute capability {OLDEST} or newer is served, this one has {capability}"
    return None


def multiply(
    x: Float[Array, "rows in"], weight: KernelWeight, *, interpret: bool = False, blocks: Blocks | None = None
) -> Float[Array, "rows out"]:
    """x (M, in) float32 or bfloat16 times the weight, float32 sums, in x's type; blocks: other sizes than the table's."""
    _check(x, weight, 0)
    kernel = "vector" if len(x) <= VECTOR_ROWS[x.dtype] else _of_type("dot", x)
    blocks = blocks or pick_blocks(kernel, len(x))
    if blocks.kernel == "vector":
        parts = _vector(x, weight, blocks, interpret)
    else:
        parts = _dot(layout.split_inputs(x, weight.format.bits), weight, blocks, interpret, jnp.float32)
    return jnp.sum(parts, axis=0).astype(x.dtype) if len(parts) > 1 else parts[0].astype(x.dtype)


def multiply_int8(
    x: Int8[Array, "rows in"],
    x_scale: Float[Array, "rows 1"],
    weight: KernelWeight,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> Float[Array, "rows out"]:
    """x (M, in) int8 times x_scale (M, 1) float32, times a symmetric int8-channel weight: int32 sums, float32 results."""
    _check(x, weight, 0)
    blocks = blocks or pick_blocks("dot_int8", len(x))
    parts = _dot(layout.split_inputs(x, weight.format.bits), weight, blocks, interpret, jnp.int32)
    return jnp.sum(parts, axis=0).astype(jnp.float32) * x_scale * weight.scales[0].astype(jnp.float32)


def multiply_transposed(
    y: Float[Array, "rows out"], weight: KernelWeight, *, interpret: bool = False, blocks: Blocks | None = None
) -> Float[Array, "rows in"]:
    """y (M, out) float32 or bfloat16 times the weight's transpose, float32 sums, in y's type."""
    _check(y, weight, 1)
    blocks = blocks or pick_blocks(_of_type("transposed", y), len(y))
    blocks = dataclasses.replace(blocks, stages=1 if weight.format.codebook else blocks.stages)
    count, _ = layout.unit(weight.format.bits)
    # A program holds sums for all codes of a unit: fewer rows the more codes there are.
    rows = min(max(blocks.rows * 8 // count, 16), blocks.rows, max(_power_of_two(len(y)), 16))
    units = weight.words.shape[1]
    parts = pl.pallas_call(
        functools.partial(_transposed_kernel, tile=Tile(weight, blocks), rows=rows),
        out_shape=layout.result((count, len(y), units), y.dtype, (y, weight)),
        grid=(pl.cdiv(len(y), rows), pl.cdiv(units, blocks.units)),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="packed_multiply_transposed",
    )(y, _operands(weight))
    return layout.join_inputs(parts, weight.in_features)


def _check(x: jax.Array, weight: KernelWeight, axis: int) -> None:
    if reason := refusal(x.dtype, weight):
        raise QjaxError(f"pallas_gpu: {reason}")
    if x.shape[1] != weight.shape[axis]:
        raise QjaxError(f"pallas_gpu: inputs of shape {x.shape} do not fit axis {axis} of a weight of shape {weight.shape}")


def _of_type(kernel: str, x: jax.Array) -> str:
    return f"{kernel}_float32" if x.dtype == jnp.float32 else kernel


def _operands(weight: KernelWeight) -> dict[str, jax.Array]:
    """What a kernel reads of a weight; words as (width * units, out)."""
    operands = {"words": weight.words.reshape(-1, weight.words.shape[-1]), "scales": weight.scales}
    if weight.zeros is not None:
        operands["zeros"] = weight.zeros
    if book := weight.format.codebook:  # as long as there are codes, so that every look-up is inside
        values = (*book.values, *[book.values[-1]] * (2**weight.format.bits - len(book.values)))
        operands["values"] = jnp.array(values, jnp.float32)
    return operands


class Tile:
    """How a kernel reads a (units, outputs) tile of a weight and decodes one code of it after the other."""

    def __init__(self, weight: KernelWeight, blocks: Blocks, row_tiles: int = 1) -> None:
        self.format = weight.format
        self.count, self.width = layout.unit(weight.format.bits)
        _, self.all_units, self.all_outputs = weight.words.shape
        self.inputs = weight.in_features
        self.units, self.outputs = blocks.units, blocks.outputs
        self.units_per_group = weight.group // self.count if len(weight.scales) > 1 else 0
        self.chunks = pl.cdiv(self.all_units, self.units)
        # As many splits as there is room for, then evened out: no split is left without a chunk.
        tiles = row_tiles * pl.cdiv(self.all_outputs, self.outputs)
        wanted = min(max(blocks.programs // tiles, 1), self.chunks)
        self.chunks_per_split = pl.cdiv(self.chunks, wanted)
        self.splits = pl.cdiv(self.chunks, self.chunks_per_split)

    def load(self, refs, unit, column) -> tuple[list, jax.Array, jax.Array | float]:
        """(the words of every plane, float32 scales, zeros) at units (units,) and columns (outputs,); zeros outside."""
        # All loads of a tile get one layout: that of the words, 16 bytes a thread, though 16 zeros would fit as well.
        column = triton.max_contiguous(column, 4)
        shape = (self.units, self.outputs)
        inside_units = (unit < self.all_units)[:, None]
        inside = inside_units & (column < self.all_outputs)[None, :]
        columns = jnp.broadcast_to(column[None, :], shape)
        words = []
        for plane in range(self.width):
            row = jnp.broadcast_to((plane * self.all_units + unit)[:, None], shape)
            words.append(triton.load(refs["words"].at[row, columns], mask=inside, other=0))
        if self.units_per_group:
            group, where = jnp.broadcast_to((unit // self.units_per_group)[:, None], shape), inside
        else:  # one group: a row for all units
            columns = column[None, :]
            group, where = jnp.zeros_like(columns), columns < self.all_outputs
        scale = triton.load(refs["scales"].at[group, columns], mask=where, other=0).astype(jnp.float32)
        if "zeros" not in refs:
            return words, scale, 2.0 ** (self.format.bits - 1)
        return words, scale, triton.load(refs["zeros"].at[group, columns], mask=where, other=0).astype(jnp.float32)

    def values(self, refs, words, zero, index: int) -> tuple[jax.Array, float]:
        """(v, p): code `index` of every unit has the value v * p before its scale, p a power of two."""
        bits = self.format.bits
        if self.format.codebook:
            return triton.load(refs["values"].at[layout.code(words, bits, index)]), 1.0
        plane, offset = divmod(index * bits, 32)
        if offset + bits > 32:
            placed, offset = layout.code(words, bits, index), 0
        elif offset < 16:
            placed = words[plane] & (2**bits - 1 << offset)
        else:  # the upper half comes down once for all its codes
            half = jax.lax.shift_right_logical(words[plane], jnp.full_like(words[plane], 16))
            offset -= 16
            placed = half & (2**bits - 1 << offset)
        exponent = jax.lax.bitcast_convert_type(placed | MAGIC_BITS, jnp.float32)
        return exponent - (MAGIC + zero * 2.0**offset), 2.0**-offset


def _fit(weight: KernelWeight, blocks: Blocks, fewest_units: int = 16) -> Blocks:
    """The blocks for a format and size: fewer units where a unit is several words, never many more than there are, and fewer
    rows where it is many codes.
    """
    count, width = layout.unit(weight.format.bits)
    units = min(blocks.units // _power_of_two(width), _power_of_two(weight.words.shape[1]))
    units = max(units, fewest_units)
    rows = min(blocks.rows, max(TILE_INPUTS // (units * count), 16))
    # A look-up is a load, and the compiler would send all loads of a pipelined loop through shared memory.
    return dataclasses.replace(blocks, units=units, rows=rows, stages=1 if weight.format.codebook else blocks.stages)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _vector(x, weight: KernelWeight, blocks: Blocks, interpret: bool) -> Float[Array, "splits rows out"]:
    blocks = _fit(weight, blocks)
    tile = Tile(weight, blocks)
    dtype = x.dtype if tile.splits == 1 else jnp.float32
    return pl.pallas_call(
        functools.partial(_vector_kernel, tile=tile),
        out_shape=layout.result((tile.splits, len(x), tile.all_outputs), dtype, (x, weight)),
        grid=(pl.cdiv(tile.all_outputs, tile.outputs), tile.splits),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="packed_multiply_vector",
    )(x, _operands(weight))


def _vector_kernel(x, refs, out, *, tile: Tile) -> None:
    """out[split] (M, outputs) = the products of the units of this split; x (M, in) as it comes."""
    column = pl.program_id(0) * tile.outputs + jnp.arange(tile.outputs)
    split = pl.program_id(1)
    rows = x.shape[0]

    def add_chunk(chunk, sums):
        unit = (split * tile.chunks_per_split + chunk) * tile.units + jnp.arange(tile.units)
        words, scale, zero = tile.load(refs, unit, column)
        products = [jnp.zeros((tile.units, tile.outputs), jnp.float32)] * rows
        for index in range(tile.count):
            value, power = tile.values(refs, words, zero, index)
            source = unit * tile.count + index
            for row in range(rows):
                feature = triton.load(x.at[row, source], mask=source < tile.inputs, other=0).astype(jnp.float32)
                products[row] += (feature * power)[:, None] * value
        return tuple(total + product * scale for total, product in zip(sums, products, strict=True))

    sums = (jnp.zeros((tile.units, tile.outputs), jnp.float32),) * rows
    sums = jax.lax.fori_loop(0, tile.chunks_per_split, add_chunk, sums)
    for row in range(rows):
        total = jnp.sum(sums[row], axis=0).astype(out.dtype)
        triton.store(out.at[split, row, column], total, mask=column < tile.all_outputs)


def _dot(x, weight: KernelWeight, blocks: Blocks, interpret: bool, sum_dtype) -> Float[Array, "splits rows out"]:
    """x as `split_inputs` gives it; int8 and int32 sums for W8A8, which leave the scales to the caller."""
    blocks = _fit(weight, blocks, fewest_units=32 if sum_dtype == jnp.int32 else 16)  # what tensor cores contract
    rows = x.shape[1]
    tile = Tile(weight, blocks, pl.cdiv(rows, blocks.rows))
    dtype = x.dtype if tile.splits == 1 and sum_dtype == jnp.float32 else sum_dtype
    return pl.pallas_call(
        functools.partial(_dot_kernel, tile=tile, rows=blocks.rows, sum_dtype=sum_dtype),
        out_shape=layout.result((tile.splits, rows, tile.all_outputs), dtype, (x, weight)),
        # Programs that share weights run next to each other.
        grid=(pl.cdiv(rows, blocks.rows), pl.cdiv(tile.all_outputs, tile.outputs), tile.splits),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="packed_multiply_dot",
    )(x, _operands(weight))


def _dot_kernel(x, refs, out, *, tile: Tile, rows: int, sum_dtype) -> None:
    """out[split] (rows, outputs) = sum over units and codes of x[code] (rows, units) @ decode(code) (units, outputs)."""
    row = pl.program_id(0) * rows + jnp.arange(rows)
    column = pl.program_id(1) * tile.outputs + jnp.arange(tile.outputs)
    split = pl.program_id(2)

    def add_chunk(chunk, total):
        unit = (split * tile.chunks_per_split + chunk) * tile.units + jnp.arange(tile.units)
        words, scale, zero = tile.load(refs, unit, column)
        place = (jnp.broadcast_to(row[:, None], (rows, tile.units)), jnp.broadcast_to(unit[None, :], (rows, tile.units)))
        inside = (row < x.shape[1])[:, None] & (unit < tile.all_units)[None, :]
        for index in range(tile.count):
            features = triton.load(x.at[index, *place], mask=inside, other=0)
            if sum_dtype == jnp.int32:
                value = (layout.code(words, tile.format.bits, index) - 2 ** (tile.format.bits - 1)).astype(jnp.int8)
            else:
                value, power = tile.values(refs, words, zero, index)
                value = (value * (scale * power)).astype(features.dtype)
            total += _matmul(features, value, sum_dtype)
        return total

    total = jax.lax.fori_loop(0, tile.chunks_per_split, add_chunk, jnp.zeros((rows, tile.outputs), sum_dtype))
    _store_tile(out, split, row, column, total)


def _transposed_kernel(y, refs, out, *, tile: Tile, rows: int) -> None:
    """out[code] (rows, units) = y (rows, outputs) @ decode(code).T (outputs, units), for every code."""
    row = pl.program_id(0) * rows + jnp.arange(rows)
    unit = pl.program_id(1) * tile.units + jnp.arange(tile.units)

    def add_chunk(chunk, totals):
        column = chunk * tile.outputs + jnp.arange(tile.outputs)
        words, scale, zero = tile.load(refs, unit, column)
        shape = (rows, tile.outputs)
        inside = (row < y.shape[0])[:, None] & (column < tile.all_outputs)[None, :]
        place = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape)
        features = triton.load(y.at[place], mask=inside, other=0)
        added = []
        for index in range(tile.count):
            value, power = tile.values(refs, words, zero, index)
            value = (value * (scale * power)).astype(features.dtype)
            added.append(totals[index] + _matmul(features, value.T, jnp.float32))
        return tuple(added)

    totals = (jnp.zeros((rows, tile.units), jnp.float32),) * tile.count
    totals = jax.lax.fori_loop(0, pl.cdiv(tile.all_outputs, tile.outputs), add_chunk, totals)
    for index in range(tile.count):
        _store_tile(out, index, row, unit, totals[index])


def _matmul(a, b, dtype):
    """a @ b; float32 at full precision, never TF32."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


def _store_tile(out, plane, row, column, values) -> None:
    """out[plane, row, column] = values, where that is inside."""
    inside = (row < out.shape[1])[:, None] & (column < out.shape[2])[None, :]
    place = jnp.broadcast_to(row[:, None], values.shape), jnp.broadcast_to(column[None, :], values.shape)
    triton.store(out.at[plane, *place], values.astype(out.dtype), mask=inside)
