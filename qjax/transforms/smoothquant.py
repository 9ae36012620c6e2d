"""SmoothQuant: inputs of large range are divided by a scale that their weights make up for, so that both are easy to round.

    s_j = max |x_j|^alpha / max |W_j|^(1 - alpha),   y = (x / s) (diag(s) W)

over all tokens of calibration, and over all outputs of the layers that share the input. Xiao et al. 2022 (arXiv 2211.10438),
with the bound 1e-5 of their code for both. Their code smooths what a norm feeds; here every layer is, as in Intel Neural
Compressor: the division goes into the norm or the linear layer before where that is exact (`models/folding.py`), and
is the layer's own where it is not.

search=true takes the alpha of 0, 0.1, ..., 1 whose scale gives the output of the module that the layers are in (attention, MLP)
the least squared error, with weights to nearest and inputs as the recipe has them: Intel Neural Compressor's auto-alpha, which
looks at the layers' own outputs or a block's.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import QjaxError
from qjax.formats import Format
from qjax.maps import LARGEST, Divide, InputMap
from qjax.rounding.parts.unit import exponent_of
from qjax.scales import times_power_of_two

LEAST = 1e-5  # of both maxima
STEPS = 10


def smoothquant(
    weights: Sequence[Float[Array, "in out"]],
    fmt: Format | str,
    *,
    abs_max: Float[Array, " in"],
    alpha: float = 0.5,
    search: bool = False,
    trial: Callable[[InputMap], Array] | None = None,
) -> Divide:
    """The map, with a scale (in,) float32, of the input that weights (in, out_k) share.

    abs_max (in,): largest |x|. trial: for search, the error with a map. Inputs that calibration never moved keep a scale of 1.
    Raises QjaxError for an alpha outside 0..1, a search without a trial, and shapes that do not fit.
    """
    del fmt
    if not 0 <= alpha <= 1:
        raise QjaxError(f"smoothquant: alpha={alpha}; expected 0 (all is left to the inputs) to 1 (to the weights)")
    if any(abs_max.shape != weight.shape[:1] for weight in weights):
        shapes = ", ".join(str(weight.shape) for weight in weights)
        raise QjaxError(f"smoothquant: abs_max has shape {abs_max.shape}, weights (in, out) = {shapes} go with (in,)")
    if not search:
        return smoothing(weights, abs_max, alpha)
    if trial is None:
        raise QjaxError("smoothquant: search=true needs trial=, the error of the output with a map")
    candidates = [smoothing(weights, abs_max, step / STEPS) for step in range(STEPS + 1)]
    errors = jnp.stack([trial(each) for each in candidates])
    best = jnp.stack([each.scale for each in candidates])[jnp.argmin(errors)]
    return Divide(jnp.where(jnp.all(jnp.isfinite(errors)), best, jnp.nan))


def smoothing(weights: Sequence[Float[Array, "in out"]], abs_max: Float[Array, " in"], alpha: float) -> Divide:
    """The map for one alpha, weights in an ordinary unit; scales that float16 does not hold, with their inverse, are cut."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(weight), axis=1) for weight in weights]), axis=0)
    largest = times_power_of_two(largest.astype(jnp.float32), -exponent_of(*weights))
    scale = jnp.maximum(abs_max, LEAST) ** alpha / jnp.maximum(largest, LEAST) ** (1 - alpha)
    return Divide(jnp.where(abs_max == 0, 1.0, jnp.clip(scale, 1 / LARGEST, LARGEST)).astype(jnp.float32))
