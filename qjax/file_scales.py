"""Codecs of scales as other libraries' files hold them, beside those of `scales.py`, whose table this file completes.

e4m3_div             8-bit floats divided by one float32 of the weight: NVFP4 as compressed-tensors stores it
fp32x128, bf16x128   a float for the group of 128 neighbouring columns: tiles of 128 x 128 of FP8 models
k4, k6, k6s, k8s     codes of 4, 6 or 8 bits (s: of either sign) times a float16 of 256 weights: GGUF's K-quants
"""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from qjax.scales import LARGEST_E4M3, SCALES, Floats, TwoLevels, nonzero, of_shape, packed_rows, times_power_of_two

if TYPE_CHECKING:
    from jax import Array


class SuperBlocks(NamedTuple):
    """Numbers of two levels, code * scale, the scale shared by a super-block of several groups that follow each other.

    Flattened output channel after output channel. codes: (bytes,) uint8, packed (`packing.py`); scales: (super-blocks,)
    float16.
    """

    codes: "Array"
    scales: "Array"


@dataclasses.dataclass(frozen=True)
class TwoLevelsDivided(TwoLevels):
    """`TwoLevels` with the inverse of the float32, which E4M3 floats are divided by: compressed-tensors' weight_global_scale,
    448 * 6 / max|w|. What both stand for differs in the last bit.
    """

    def common(self, largest, bound):
        """The float32 of the weight."""
        import jax.numpy as jnp

        return jnp.minimum(LARGEST_E4M3 * bound / nonzero(jnp.max(jnp.abs(largest))), jnp.finfo(jnp.float32).max)

    def times(self, stored, exponent):
        """The float32 of the weight takes the factor's inverse."""
        return stored._replace(scale=times_power_of_two(stored.scale, -exponent))

    def _narrow(self, scale, common):
        import numpy as np

        return super()._narrow(scale * common, np.float32(1))

    def _widen(self, stored, common):
        import numpy as np

        scale = super()._widen(stored, np.float32(1))
        return scale / (common + 0 * scale)  # by one number XLA would divide as it multiplies by the inverse


@dataclasses.dataclass(frozen=True)
class Tiles(Floats):
    """One float, the largest of them, for the scales of a group in `width` neighbouring columns; the last tile may be narrower.

    With groups as long, a tile is a square of the weight: DeepSeek-V3's FP8 (DeepSeek-AI 2024, arXiv 2412.19437) and the block
    strategy of compressed-tensors.
    """

    width: int = 128
    movable: ClassVar[bool] = False
    together: ClassVar[bool] = True
    label: ClassVar[str] = "tiles"
    note: ClassVar[str] = "Tiles: neighbouring columns share a scale."

    def nbytes_of(self, shape):
        """A float for each tile."""
        return self.nbytes(shape[0] * math.ceil(shape[1] / self.width))

    def store(self, scale, common, flat):
        """(groups, tiles), also of flat formats."""
        import jax.numpy as jnp

        tiles = jnp.pad(scale, ((0, 0), (0, -scale.shape[1] % self.width))).reshape(len(scale), -1, self.width)
        low, high = jnp.min(tiles, axis=-1), jnp.max(tiles, axis=-1)
        return self._narrow(jnp.where(-low > high, low, high), common)

    def load(self, stored, shape):
        """Every column's own."""
        import jax.numpy as jnp

        return jnp.repeat(self._widen(stored, None), self.width, axis=1)[:, : shape[1]]

    def columns(self, stored, shape, index, flat):
        """Of a run of columns of whole tiles; else None."""
        import numpy as np

        first, last = int(index[0]), int(index[-1]) + 1
        ends = last % self.width == 0 or last == shape[1]
        if first % self.width or not ends or not np.array_equal(index, np.arange(first, last)):
            return None
        return stored[:, first // self.width : -(-last // self.width)]


@dataclasses.dataclass(frozen=True)
class InSuperBlocks(Floats):
    """Whole multiples of a float16 that `groups` groups share, as in the K-quants of GGUF files: 256 weights in their groups.

    code_bits: of a stored multiple, which is that code less `offset`. What is rounded here takes the scale that its largest
    number asks for; llama.cpp searches it.
    """

    dtype: str = "float16"
    code_bits: int = 6
    groups: int = 8
    offset: int = 0
    movable: ClassVar[bool] = False
    together: ClassVar[bool] = True
    label: ClassVar[str] = "K"
    note: ClassVar[str] = "K: the scales are integers times one float16 of 256 weights."

    @property
    def signed(self) -> bool:
        """Whether multiples may be negative."""
        return self.offset > 0

    def nbytes(self, count):
        """Codes, and a float16 for each super-block."""
        return packed_rows(count, self.code_bits) + 2 * math.ceil(count / self.groups)

    def store(self, scale, common, flat):
        """SuperBlocks, flattened in any format."""
        import jax.numpy as jnp

        from qjax import packing

        scale = scale.T.reshape(-1)
        blocks = jnp.pad(scale, (0, -scale.size % self.groups)).reshape(-1, self.groups)
        highest = 2**self.code_bits - 1 - self.offset
        shared = super()._narrow(jnp.max(jnp.abs(blocks), axis=1) / highest, None)
        codes = jnp.round(blocks / nonzero(shared.astype(jnp.float32))[:, None])
        codes = (jnp.clip(codes, -self.offset, highest) + self.offset).astype(jnp.uint8).reshape(-1)[: scale.size]
        return SuperBlocks(packing.pack(codes[:, None], self.code_bits)[:, 0], shared)

    def columns(self, stored, shape, index, flat):
        """None: super-blocks may go over the ends of columns."""
        del stored, shape, index, flat

    def times(self, stored, exponent):
        """The float16 numbers take the factor."""
        import jax.numpy as jnp

        return stored._replace(scales=super()._narrow(times_power_of_two(stored.scales.astype(jnp.float32), exponent), None))

    def strained(self, stored, bits):
        """Of each super-block's float16, said of all its groups; a code of 0 may be the nearest."""
        import numpy as np

        return tuple(np.repeat(part, self.groups) for part in super().strained(stored.scales, bits))

    def load(self, stored, shape):
        """Each code's multiple."""
        import jax.numpy as jnp

        from qjax import packing

        codes = packing.unpack(stored.codes[:, None], self.code_bits, math.prod(shape))[:, 0].astype(jnp.float32)
        scales = jnp.repeat(stored.scales.astype(jnp.float32), self.groups)[: codes.size]
        return of_shape((codes - self.offset) * scales, shape)


SCALES |= {
    "e4m3_div": TwoLevelsDivided(),
    "fp32x128": Tiles("float32"),
    "bf16x128": Tiles("bfloat16"),
    "k4": InSuperBlocks(code_bits=4, groups=16),
    "k6": InSuperBlocks(code_bits=6, groups=8),
    "k6s": InSuperBlocks(code_bits=6, groups=16, offset=32),
    "k8s": InSuperBlocks(code_bits=8, groups=16, offset=128),
}
