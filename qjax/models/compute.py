"""What a model computes in when it runs, by name.

    float32     everything in float32
    bfloat16    on accelerators everything in bfloat16, with float32 sums. On a CPU what goes into products (linear layers,
                scores and mixing of attention, head) is rounded to bfloat16 and summed in float32; hidden states, norms,
                rotations, softmax and log-sum-exp stay in float32, and so do routers, layers that round their inputs, and
                packed weights

Calibration has a type of its own (`Calibration.compute`), in which refiners of blocks run them too. Statistics and rounding are
float32 in any case: inputs in bfloat16 are what layers multiply, whose products are exact there (`calibrate/statistics.py`).
"""

from typing import TYPE_CHECKING, NamedTuple

from qjax.errors import QjaxError

if TYPE_CHECKING:  # names are known without JAX
    from jax.typing import DTypeLike

NAMES = ("float32", "bfloat16")


class Compute(NamedTuple):
    """dtype: of all between products. products: of what goes into them, where that is another type; sums are in `dtype`."""

    dtype: "DTypeLike"
    products: "DTypeLike | None" = None


def require_compute(name: str | None) -> str | None:
    """The name; raises QjaxError for one that is none. None: the device's own, float32 on a CPU and bfloat16 elsewhere."""
    if name is not None and name not in NAMES:
        raise QjaxError(f"compute {name!r}: allowed are {', '.join(NAMES)}")
    return name


def compute_of(name: str | None) -> Compute:
    """What a name stands for on JAX's default device."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    if require_compute(name) == "float32" or (name is None and on_cpu):
        return Compute(jnp.float32)
    return Compute(jnp.float32, jnp.bfloat16) if on_cpu else Compute(jnp.bfloat16)


def compute_name(name: str | None) -> str:
    """The name, of the device's own too."""
    import numpy as np

    found = compute_of(name)
    return np.dtype(found.products or found.dtype).name
