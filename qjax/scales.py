"""How scales are stored: the codecs that a format names, each with its bytes and its arithmetic.

    fp32, fp16, bf16                floats of a type
    e8m0, e8m0_ceil, e8m0_even      powers of two in a byte, of the Microscaling formats
    e4m3                            8-bit floats times one float32 of the whole weight: NVFP4
    dq                              8-bit codes, in turn with scales and a mean: QLoRA's double quantization

Nothing outside this file and `file_scales.py`, which has those of other libraries' files, tests for one of them: it asks the
codec. A codec stores float32 scales (groups, columns) and loads them; `flat` formats keep them as one axis, output channel
after output channel. To add one, write it here and name it in SCALES.

JAX is imported where something is computed: sizes, names and tables do without it.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from qjax.codebooks import dynamic_map

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

DOUBLE_QUANT_BLOCK = 256
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}  # without NumPy, which `qjax formats` needs not
LARGEST_E4M3 = 448.0


class QuantizedScales(NamedTuple):
    """Doubly quantized scales of QLoRA: dynamic_map[codes] * scales + offset, in blocks of 256 scales.

    Scales are flattened output channel after output channel. codes: (scales,) uint8; scales: (blocks,) float32, the
    largest |scale - offset| of each block; offset: () float32, the mean scale.
    """

    codes: "Array"
    scales: "Array"
    offset: "Array"


class ScaledFloats(NamedTuple):
    """Scales of two levels, codes * scale. codes: (groups, columns) or flat, uint8, the bits of E4M3; scale: () float32."""

    codes: "Array"
    scale: "Array"


@dataclasses.dataclass(frozen=True)
class Floats:
    """Scales in a floating-point type; one beyond its largest number becomes that number. What other codecs start from.

    dtype: a NumPy name. movable: one scale can change while the others stay. together: what is stored of one depends on all
    of them. signed: scales may be negative. label, note: what a table adds to the grid's name, and how it explains that.
    """

    dtype: str
    movable: ClassVar[bool] = True
    together: ClassVar[bool] = False
    signed: ClassVar[bool] = True
    label: ClassVar[str] = ""
    note: ClassVar[str] = ""

    def nbytes(self, count: int) -> int:
        """Exact bytes of `count` scales."""
        return count * ITEM_BYTES[self.dtype]

    def nbytes_of(self, shape: tuple[int, int]) -> int:
        """Exact bytes of the scales of (groups, columns) groups."""
        return self.nbytes(math.prod(shape))

    def of_layout(self, flat: bool) -> "Floats":
        """The codec of flat formats, or of the others, where their arithmetic differs."""
        del flat
        return self

    def codes_exactly(self, flat: bool) -> bool:
        """Whether codes are chosen for the scale as it is found instead of as it is stored."""
        del flat
        return False

    def find(self, exact: "Array", largest: "Array", bound: float, mantissa: int) -> "Array":
        """Scales of groups whose largest weight the value `bound` of the grid, of so many mantissa bits, is to stand for.

        exact: largest / bound.
        """
        del largest, bound, mantissa
        return exact

    def common(self, largest: "Array", bound: float) -> "Array | None":
        """What all scales of a weight are stored relative to, from the largest weights of its groups; None for nothing."""
        del largest, bound

    def common_of(self, stored: "Array | ScaledFloats") -> "Array | None":
        """What stored scales are relative to."""
        del stored

    def store(self, scale: "Array", common: "Array | None", flat: bool) -> "Array | QuantizedScales | ScaledFloats":
        """Scales in the form that a QTensor holds; common: see `common`."""
        return laid(self._narrow(scale, common), flat)

    def load(self, stored: "Array | QuantizedScales | ScaledFloats", shape: tuple[int, int]) -> "Array":
        """float32 scales of `shape` (groups, columns) from what `store` gave."""
        return of_shape(self._widen(stored, None), shape)

    def times(self, stored: "Array | QuantizedScales | ScaledFloats", exponent: "int | Array") -> "Array":
        """Stored scales times 2^exponent, as far as the type holds them: exactly, where it has the range."""
        return self._narrow(times_power_of_two(self._widen(stored, None), exponent), None)

    def columns(
        self, stored: "Array | QuantizedScales | ScaledFloats", shape: tuple[int, int], index: "np.ndarray", flat: bool
    ) -> "Array | QuantizedScales | ScaledFloats | None":
        """Stored scales of some columns, of `shape` (groups, columns); None where what is stored spans several of them."""
        return laid(of_shape(stored, shape)[:, index], flat)

    def strained(self, stored: "Array", bits: int) -> "tuple[np.ndarray, np.ndarray] | None":
        """(lost, coarse), bool and on the host: which stored scales are 0 or the type's largest number, and which are so small
        that the type's rounding moves the outermost of codes of so many bits by half a step. None for types of full range.
        """
        if self.dtype != "float16":
            return None
        import numpy as np

        size, limits = np.abs(np.asarray(stored, np.float64)), np.finfo(np.float16)
        spacing = float(limits.smallest_subnormal)
        return (size == 0) | (size >= float(limits.max)), size < spacing * 2**bits

    def nearest(self, scale: "Array", common: "Array | None") -> "Array":
        """float32 scales as they are after being stored, each alone: of movable codecs."""
        return self._widen(self._narrow(scale, common), common)

    def _narrow(self, scale, common):
        import jax.numpy as jnp

        largest = jnp.finfo(self.dtype).max
        return jnp.clip(scale, -largest, largest).astype(self.dtype)

    def _widen(self, stored, common):
        import jax.numpy as jnp

        return stored.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PowersOfTwo(Floats):
    """Powers of two, 2^(byte - 127). With a = the largest |w| of a group and b the grid's largest value, by three rules:

    floor   2^(floor(log2 a) - floor(log2 b)): the OCP MX specification 1.0 (2023), torchao's FLOOR; cuts off up to half of a
    ceil    2^ceil(log2(a / b)): cuBLAS', torchao's RCEIL; cuts nothing off
    even    as floor, of a rounded to the grid's mantissa first: torchao's EVEN; compressed-tensors' for FP4 (for FP8 it
            rounds to the mantissa of FP4 too)

    A scale that is moved later goes to the nearest power of two, which is where a loss quadratic in it is least. Byte 0, a
    subnormal float32, reads as 0, and 255, which stands for NaN, is never written.
    """

    dtype: str = "uint8"
    rule: str = "floor"
    signed: ClassVar[bool] = False
    label: ClassVar[str] = "E8M0"
    note: ClassVar[str] = "E8M0: the scales are powers of two."

    def find(self, exact, largest, bound, mantissa):
        """The power of two by the rule."""
        match self.rule:
            case "ceil":
                exponent = (_bits(exact) + (1 << 23) - 1) >> 23
            case "even":
                exponent = ((_bits(largest) + (1 << (22 - mantissa))) >> 23) - math.floor(math.log2(bound))
            case _:
                exponent = (_bits(largest) >> 23) - math.floor(math.log2(bound))
        return self._widen(_byte(exponent), None)

    def times(self, stored, exponent):
        """The exponent is added to the bytes, but to 0, which stands for a scale of 0."""
        import jax.numpy as jnp

        return jnp.where(stored == 0, stored, _byte(stored.astype(jnp.int32) + exponent))

    def _narrow(self, scale, common):
        return _byte((_bits(scale) + (1 << 22)) >> 23)

    def _widen(self, stored, common):
        import jax
        import jax.numpy as jnp

        return jax.lax.bitcast_convert_type(stored.astype(jnp.int32) << 23, jnp.float32)


@dataclasses.dataclass(frozen=True)
class TwoLevels(Floats):
    """E4M3 floats, rounded to even, times one float32 of the weight that brings the largest scale to 448, their largest.

    NVFP4's scales (NVIDIA 2025, arXiv 2509.25149), with bytes as compressed-tensors and torchao write them but where all
    weights of a group are 0, or 2^-15 of the largest or less: these libraries put other small scales there.
    """

    dtype: str = "uint8"
    together: ClassVar[bool] = True
    label: ClassVar[str] = "E4M3"
    note: ClassVar[str] = "E4M3: the scales are 8-bit floats times one float32 of the weight."

    def nbytes(self, count):
        """A byte each, and the scale of them all."""
        return count + 4

    def common(self, largest, bound):
        """The float32 of the weight."""
        import jax.numpy as jnp

        return jnp.max(jnp.abs(largest)) / (LARGEST_E4M3 * bound)

    def common_of(self, stored):
        """The float32 of the weight."""
        return stored.scale

    def store(self, scale, common, flat):
        """ScaledFloats."""
        return ScaledFloats(laid(self._narrow(scale, common), flat), common)

    def times(self, stored, exponent):
        """The float32 of the weight takes the factor."""
        return stored._replace(scale=times_power_of_two(stored.scale, exponent))

    def columns(self, stored, shape, index, flat):
        """The float32 of the weight stays."""
        return stored._replace(codes=super().columns(stored.codes, shape, index, flat))

    def load(self, stored, shape):
        """The product of both levels."""
        return of_shape(self._widen(stored.codes, stored.scale), shape)

    def _narrow(self, scale, common):
        import jax
        import jax.numpy as jnp

        relative = jnp.clip(scale / nonzero(common), -LARGEST_E4M3, LARGEST_E4M3)
        return jax.lax.bitcast_convert_type(relative.astype(jnp.float8_e4m3fn), jnp.uint8)

    def _widen(self, stored, common):
        import jax
        import jax.numpy as jnp

        return jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn).astype(jnp.float32) * common


@dataclasses.dataclass(frozen=True)
class Nested(Floats):
    """Codes of `dynamic_map` for the difference from the mean, relative to its largest in blocks of 256 scales (QLoRA).

    For flat blocks as bitsandbytes does it, which codes weights with the exact maximum and quantizes that afterwards, with a
    table of 2^16 equal steps instead of the nearest code, and decodes with a product and a sum that are rounded one by one
    (`separate`). The mean is a sum of many numbers: of weights rounded together under vmap it can differ in the last bit from
    that of one alone, as XLA adds up in another order.
    """

    dtype: str = "uint8"
    separate: bool = False
    movable: ClassVar[bool] = False
    together: ClassVar[bool] = True
    label: ClassVar[str] = "DQ"
    note: ClassVar[str] = "DQ: the scales are quantized in turn."

    def nbytes(self, count):
        """A byte each, a float32 for each block and one for the mean."""
        return count + 4 * math.ceil(count / DOUBLE_QUANT_BLOCK) + 4

    def of_layout(self, flat):
        """As bitsandbytes does."""
        return dataclasses.replace(self, separate=flat)

    def codes_exactly(self, flat):
        """As bitsandbytes does."""
        return flat

    def store(self, scale, common, flat):
        """QuantizedScales, flattened in any format."""
        import jax.numpy as jnp

        scale = scale.T.reshape(-1)
        offset = jnp.mean(scale)
        offset += jnp.mean(scale - offset)  # what rounding of the sum took
        blocks = jnp.pad(scale - offset, (0, -scale.size % DOUBLE_QUANT_BLOCK)).reshape(-1, DOUBLE_QUANT_BLOCK)
        largest = jnp.max(jnp.abs(blocks), axis=1)
        scaled = blocks * (1 / nonzero(largest))[:, None]
        if flat:  # bitsandbytes' table
            step = jnp.floor((scaled + 1) * 0.5 * 65535 + 0.5)
            scaled = 2 * step / 65535 - 1
        table = jnp.array(dynamic_map())
        codes = jnp.searchsorted((table[:-1] + table[1:]) / 2, scaled, side="left").astype(jnp.uint8)
        return QuantizedScales(codes.reshape(-1)[: scale.size], largest, offset)

    def times(self, stored, exponent):
        """The float32 numbers take the factor."""
        scales, offset = (times_power_of_two(x, exponent) for x in (stored.scales, stored.offset))
        return QuantizedScales(stored.codes, scales, offset)

    def columns(self, stored, shape, index, flat):
        """Of a run of columns whose scales are whole blocks; else None."""
        import numpy as np

        first, last = int(index[0]) * shape[0], (int(index[-1]) + 1) * shape[0]
        ends = last % DOUBLE_QUANT_BLOCK == 0 or last == math.prod(shape)
        if first % DOUBLE_QUANT_BLOCK or not ends or not np.array_equal(index, np.arange(index[0], index[-1] + 1)):
            return None
        blocks = slice(first // DOUBLE_QUANT_BLOCK, -(-last // DOUBLE_QUANT_BLOCK))
        return QuantizedScales(stored.codes[first:last], stored.scales[blocks], stored.offset)

    def load(self, stored, shape):
        """The value of each code in its block."""
        import jax.numpy as jnp

        values = jnp.array(dynamic_map())[stored.codes]
        scales = jnp.repeat(stored.scales, DOUBLE_QUANT_BLOCK)[: values.size]
        products = values * scales
        if self.separate:  # a select between them keeps XLA from making one instruction of product and sum
            products = jnp.where(jnp.isnan(products), 0, products)
        return of_shape((products + stored.offset).astype(jnp.float32), shape)


def times_power_of_two(x: "Array", exponent: "int | Array") -> "Array":
    """float32 x * 2^exponent, |exponent| up to 250: exact where the result is a normal number. x itself for a Python 0."""
    import jax
    import jax.numpy as jnp

    if isinstance(exponent, int) and exponent == 0:
        return x
    first = exponent // 2  # 2^exponent itself may be no normal float32
    powers = (jnp.asarray(part, jnp.int32) + 127 << 23 for part in (first, exponent - first))
    for power in powers:
        x = x * jax.lax.bitcast_convert_type(power, jnp.float32)
    return x


def packed_rows(count: int, bits: int) -> int:
    """Bytes that hold `count` codes of `bits` bits, in whole packing units (`packing.unit`)."""
    unit = 8 // math.gcd(8, bits)
    return math.ceil(count / unit) * unit * bits // 8


def laid(stored: "Array", flat: bool) -> "Array":
    """Numbers of groups (groups, columns) as they are stored."""
    return stored.T.reshape(-1) if flat else stored


def of_shape(scales: "Array", shape: tuple[int, int]) -> "Array":
    """The inverse of `laid`."""
    return scales if scales.ndim == 2 else scales.reshape(shape[::-1]).T


def _bits(x):
    import jax
    import jax.numpy as jnp

    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _byte(exponent):
    import jax.numpy as jnp

    return jnp.clip(exponent, 0, 254).astype(jnp.uint8)


def nonzero(scale: "Array") -> "Array":
    """The scales with 1 in place of 0, to divide by."""
    import jax.numpy as jnp

    return jnp.where(scale == 0, 1.0, scale)


SCALES: dict[str, Floats] = {
    "fp32": Floats("float32"),
    "fp16": Floats("float16"),
    "bf16": Floats("bfloat16"),
    "e8m0": PowersOfTwo(),
    "e8m0_ceil": PowersOfTwo(rule="ceil"),
    "e8m0_even": PowersOfTwo(rule="even"),
    "e4m3": TwoLevels(),
    "dq": Nested(),
}
