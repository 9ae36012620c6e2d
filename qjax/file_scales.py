"""Codecs of scales as other libraries' files hold them, beside those of `scales.py`, whose table this file completes.

e4m3_div             8-bit floats divided by one float32 of the weight: NVFP4 as compressed-tensors stores it
fp32x128, bf16x128   a float for the group of 128 neighbouring columns: tiles of 128 x 128 of FP8 models
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from qjax.scales import LARGEST_E4M3, SCALES, Floats, TwoLevels, nonzero, times_power_of_two


@dataclasses.dataclass(frozen=True)
class TwoLevelsDivided(TwoLevels):
    """`TwoLevels` with the inverse of the float32, which E4M3 floats are divided by: compressed-tensors' weight_global_scale,
    448 * 6 / max|w|. What both stand for differs in the last bit.
    """

    def common(self, largest, bound):
        """The float32 of the weight."""
        import jax.numpy as jnp

        return LARGEST_E4M3 * bound / nonzero(jnp.max(jnp.abs(largest)))

    def times(self, stored, exponent):
        """The float32 of the weight takes the factor's inverse."""
        return stored._replace(scale=times_power_of_two(stored.scale, -exponent))

    def _narrow(self, scale, common):
        return super()._narrow(scale * common, np.float32(1))

    def _widen(self, stored, common):
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
        first, last = int(index[0]), int(index[-1]) + 1
        ends = last % self.width == 0 or last == shape[1]
        if first % self.width or not ends or not np.array_equal(index, np.arange(first, last)):
            return None
        return stored[:, first // self.width : -(-last // self.width)]


SCALES |= {"e4m3_div": TwoLevelsDivided(), "fp32x128": Tiles("float32"), "bf16x128": Tiles("bfloat16")}
