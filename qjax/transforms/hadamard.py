"""Rotations of layer inputs by random Hadamard matrices, which spread outliers over all inputs: x W = (x M) (M^T W).

    hadamard               QuaRot: the residual stream is rotated, once, in the weights (`models/rotation.py`), and what no
                           weight can take, the inputs of attention/o and mlp/down, as the model runs
    hadamard(online=true)  every layer's input as the model runs; for families whose stream cannot be rotated
    hadamard(block=32)     the same in blocks of so many inputs, for formats that share scales within them: mxfp4 has 32, nvfp4
                           16; a rotation of all inputs is known to hurt these

Signs are drawn by `seed`. Where inputs stay as they are (no format behind a slash), the rotation goes into the decoded weight.

QuaRot: Ashkboos et al. 2024 (arXiv 2404.00456); signs: QuIP#, Tseng et al. 2024 (2402.04396); blocks: Egiazarian et al. 2025
(2509.23202).
"""

from collections.abc import Sequence

from jaxtyping import Array, Float

from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.hadamard import require_order
from qjax.maps import Hadamard, random_hadamard


def hadamard(
    weights: Sequence[Float[Array, "in out"]],
    fmt: Format,
    *,
    stream: bool,
    block: int = 0,
    online: bool = False,
    seed: int = 0,
) -> Hadamard | None:
    """The rotation of the input that weights (in, out_k) share; None for layers that read the residual stream, where that is
    rotated.

    block: inputs that are rotated together, 0: all. online: as the model runs, in every layer. Raises QjaxError for a size of
    which no Hadamard matrix is known, and a block that does not divide the inputs.
    """
    size = len(weights[0])
    if not 0 <= block <= size or seed < 0 or (block and size % block):
        raise QjaxError(
            f"hadamard: a block of {block} of a layer with {size} inputs, seed {seed}; expected a block that divides them, as "
            "16 or 32, or 0 for all, and a seed of at least 0"
        )
    require_order(block or size, "hadamard: a block" if block else "hadamard: a layer's input")
    return None if stream and not block and not online else random_hadamard(size, block, seed)
