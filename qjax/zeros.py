"""How zero points are stored: the codecs that a format names, each with its bytes and its arithmetic.

    codes       integers of the format's own bits, packed along the output axis
    z16, z32    real numbers in float16 or float32, as HQQ has them
    m16         no zero points but minima, the values of code 0, in float16: GGUF's Q4_1, Q5_1
    k4m, k6m    minima, none above 0, of 4 or 6 bits times a float16 of 256 weights: GGUF's Q2_K, Q4_K, Q5_K (read only)

Nothing outside this file tests for one of them. JAX is imported where something is computed, as in `scales.py`.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from qjax.file_scales import SCALES, InSuperBlocks
from qjax.scales import ITEM_BYTES, Floats, laid, of_shape, packed_rows

if TYPE_CHECKING:
    import numpy as np
    from jax import Array


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Zero points that are codes: whole numbers 0..largest of the format's bits, packed along the output axis.

    whole: they are codes. minima: a value is code * scale + what is stored, instead of (code - zero) * scale. together: what is
    stored of one depends on others; such are read from files, and nothing is rounded to them.
    """

    whole: ClassVar[bool] = True
    minima: ClassVar[bool] = False
    together: ClassVar[bool] = False

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

    def times(self, stored: "Array", exponent: "int | Array") -> "Array":
        """What is stored for a weight times 2^exponent, whose scales take that factor: the same zero points."""
        del exponent
        return stored

    def cut_off(self, stored: "Array") -> "np.ndarray | None":
        """Which stored numbers, bool and on the host, are their type's largest. None for those that nothing is cut off of."""
        del stored


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
class Minima(Zeros):
    """The value of code 0, in a zero point's place, as a codec of scales stores numbers."""

    codec: Floats | InSuperBlocks
    whole: ClassVar[bool] = False
    minima: ClassVar[bool] = True

    def nbytes(self, shape, bits, flat):
        """As the codec's."""
        return self.codec.nbytes(math.prod(shape))

    def nearest(self, zero, largest):
        """As the codec's."""
        return self.codec.nearest(zero, None)

    def store(self, zero, bits, flat):
        """As the codec does."""
        return self.codec.store(zero, None, flat)

    def load(self, stored, bits, shape, flat):
        """In float32."""
        return self.codec.load(stored, shape)

    def times(self, stored, exponent):
        """Minima take the factor, as far as their type holds them."""
        return self.codec.times(stored, exponent)

    def cut_off(self, stored):
        """Of the codec's floating-point type."""
        import numpy as np

        return np.abs(np.asarray(stored)) >= np.finfo(self.codec.dtype).max


@dataclasses.dataclass(frozen=True)
class MinimaInSuperBlocks(Minima):
    """Minima that are -1 times what the codec stores."""

    codec: InSuperBlocks
    together: ClassVar[bool] = True

    def store(self, zero, bits, flat):
        """SuperBlocks."""
        return super().store(-zero, bits, flat)

    def load(self, stored, bits, shape, flat):
        """In float32."""
        return -super().load(stored, bits, shape, flat)


ZEROS: dict[str, Zeros] = {
    "codes": Zeros(),
    "z16": RealZeros("float16"),
    "z32": RealZeros("float32"),
    "m16": Minima(SCALES["fp16"]),
    "k4m": MinimaInSuperBlocks(SCALES["k4"]),
    "k6m": MinimaInSuperBlocks(SCALES["k6"]),
}
