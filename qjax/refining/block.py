"""What a block refiner sees: a transformer's block that it can run, differentiate and compare with the float one.

    minimise over the QTensors  sum over batches of || block(inputs; QTensors) - targets ||^2        (or whatever it likes)

inputs are what the block is given after the quantized blocks before it (in the order `parallel`: in the float model); targets
what the float block makes of the float model's states. As in AutoRound (Cheng et al. 2023, arXiv 2309.05516).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from qjax.formats import Format
from qjax.qtensor import QTensor


class BlockSite(NamedTuple):
    """One kernel of a block: the float32 weight (in, out) that was rounded, after maps and corrections, the format it was
    rounded to, and statistics of its input where the recipe asked for any.
    """

    weight: Float[Array, "in out"]
    format: Format
    statistics: Mapping[str, Array]


class Block(NamedTuple):
    """apply(weights, *inputs[i]) is the block's output with these weights, by path: QTensors, or float (in, out) arrays in
    their place; differentiable in both, and free of effects, so that it goes into jit. Paths left out keep what the rounding
    gave.

    token_weights: per batch, how much each token counts (0 leaves it out), or None.
    """

    apply: Callable[..., object]
    sites: Mapping[str, BlockSite]
    inputs: Sequence[tuple]
    targets: Sequence[Array]
    token_weights: Sequence[Array | None]


class BlockInfo(NamedTuple):
    """Mean squared error of the block's output before and after; float32 scalars, None where it was not looked at."""

    loss_before: Array | None = None
    loss_after: Array | None = None


BlockRefiner = Callable[..., tuple[dict[str, QTensor], BlockInfo]]
