"""How zero points are stored: the codecs that a format names, each with its bytes and its arithmetic.

    codes       integers of the format's own bits, packed along the output axis
    z16, z32    real numbers in float16 or float32, as HQQ has them
    m16         no zero points but minima, the values of code 0, in float16: GGUF's Q4_1, Q5_1
    k4m, k6m    minima, none above 0, of 4 or 6 bits times a float16 of 256 weights: GGUF's Q2_K, Q4_K, Q5_K

Nothing outside this file tests for one of them. JAX is imported where something is computed, as in `scales.py`.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from qjax.file_scales import SCALES, InSuperBlocks
from qjax.scales import ITEM_BYTES, laid, of_shape, packed_rows

if TYPE_CHECKING:
    from jax import Array


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Zero points that are codes: whole numbers 0..largest of the format's bits, packed along the output axis."""

    whole: ClassVar[bool] = True
    minima: ClassVar[bool] = False  # a value is code * scale + what is stored, instead of (code - zero) * scale

    def nbytes(self, shape: tuple[int, int], bits: int, flat: bool) -> int:
        """Exact bytes of the zero points of (groups, columns) groups."""
        rows, columns = (1, math.prod(shape)) if flat else shape
        return rows * packed_rows(columns, bits)

    def nearest(self, zero: "Array", largest: int) -> "Array":
        """float32 zero points as they are after being stored."""
        import jax.numpy as jnp

        return jnp.clip(jnp.round(zero), 0, largest)

    def store(self, zero: "Array", bits: int, flat: bool) -> "Array":
        """Zero points (groups, columns) in the form that a QTensor holds."""
        import jax.numpy as jnp

        from qjax import packing

        zero = zero.astype(jnp.uint8)
        zero = zero.T.reshape(1, -1) if flat else zero
        return packing.pack(zero.T, bits).T

    def load(self, stored: "Array", bits: int, shape: tuple[int, int], flat: bool) -> "Array":
        """float32 zero points of `shape` (groups, columns) from what `store` gave."""
        import jax.numpy as jnp

        from qjax import packing

        columns = shape[0] * shape[1] if flat else shape[1]
        zero = packing.unpack(stored.T, bits, columns).T.astype(jnp.float32)
        return zero.reshape(shape[::-1]).T if flat else zero


@dataclasses.dataclass(frozen=True)
class RealZeros(Zeros):
    """Zero points that are real numbers in a floating-point type, as HQQ has them."""

    dtype: str
    whole: ClassVar[bool] = False

    def nbytes(self, shape, bits, flat):
        """A number a group."""
        return math.prod(shape) * ITEM_BYTES[self.dtype]

    def nearest(self, zero, largest):
        """Rounded to the type."""
        import jax.numpy as jnp

        return zero.astype(self.dtype).astype(jnp.float32)

    def store(self, zero, bits, flat):
        """In the type."""
        return laid(zero.astype(self.dtype), flat)

    def load(self, stored, bits, shape, flat):
        """In float32."""
        import jax.numpy as jnp

        return of_shape(stored.astype(jnp.float32), shape)


@dataclasses.dataclass(frozen=True)
class Minima(RealZeros):
    """The value of code 0 in a floating-point type, in a zero point's place."""

    minima: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class MinimaInSuperBlocks(Minima):
    """Minima that are -1 times scales of that codec."""

    codec: InSuperBlocks = SCALES["k6"]

    def nbytes(self, shape, bits, flat):
        """As the codec's."""
        return self.codec.nbytes(math.prod(shape))

    def store(self, zero, bits, flat):
        """SuperBlocks."""
        return self.codec.store(-zero, None, flat)

    def load(self, stored, bits, shape, flat):
        """In float32."""
        return -self.codec.load(stored, shape)


ZEROS: dict[str, Zeros] = {
    "codes": Zeros(),
    "z16": RealZeros("float16"),
    "z32": RealZeros("float32"),
    "m16": Minima("float16"),
    "k4m": MinimaInSuperBlocks("float16", SCALES["k4"]),
    "k6m": MinimaInSuperBlocks("float16", SCALES["k6"]),
}
