"""HQQ here and in the authors' library: the same codes and zero points.

Theirs is `Quantizer.quantize` with axis=1 in float32 on a CPU: groups along the inputs, the inverse of the scale, all kept in
float32. Its default solver ignores kappa; the newer one has it, and ends otherwise where it stops early.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.qtensor import unpack_codes, unpack_parameters
from qjax.rounding.hqq import hqq

pytestmark = [
    pytest.mark.peer,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
torch = pytest.importorskip("torch")
optimize = pytest.importorskip("hqq.core.optimize")


def quantize_there(weight: np.ndarray, bits: int, group: int, solver=None):
    """Codes (in, out), scales and zeros (groups, out)."""
    from hqq.core.quantize import Quantizer

    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    with pytest.MonkeyPatch.context() as patch:
        if solver is not None:
            patch.setattr(Quantizer, "optimize_weights", staticmethod(solver))
        codes, meta = Quantizer.quantize(rows, nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu")
    outputs = weight.shape[1]
    return codes.numpy().reshape(outputs, -1).T, *(meta[name].numpy().reshape(outputs, -1).T for name in ("scale", "zero"))


def assert_same(q, there):
    codes, scales, zeros = there
    scale, zero = unpack_parameters(q)
    np.testing.assert_allclose(scale, scales, rtol=1e-6)
    close = np.isclose(zero, zeros, rtol=1e-3 if q.format.zeros == "z16" else 1e-5, atol=1e-5)
    assert close.mean() > 0.99, "but for groups with a weight at a tie in some step"
    apart = np.abs(np.asarray(unpack_codes(q), int) - codes)  # by the rounding of zeros to float16, which 8 bits are as fine as
    assert apart.max() <= 1
    assert np.mean(apart == 0) > (0.999 if q.format.zeros == "z32" else 0.9 if q.format.bits == 8 else 0.995)


def random_weight(seed: int) -> np.ndarray:
    """In the unit of our beta, in which the largest is from 1/16 to 1/8."""
    weight = np.random.default_rng(seed).standard_t(4, (256, 128)).astype(np.float32)
    return weight * np.float32(2.0 ** (-3 - np.frexp(np.abs(weight).max())[1]))


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 64), (3, 64), (2, 32)])
@pytest.mark.parametrize("zeros", ["z32", "z16"])
def test_default_solver(bits, group, zeros):
    weight = random_weight(bits)
    q, _ = hqq(jnp.asarray(weight), f"int{bits}-g{group}-fp32-{zeros}", kappa=1.0)
    assert_same(q, quantize_there(weight, bits, group))


def test_kappa_and_the_other_options():
    weight = random_weight(0)
    options = {"lp_norm": 0.5, "beta": 2000.0, "kappa": 1.05, "iters": 9, "early_stop": False}

    def solver(tensor, scale, zero, min_max, axis, device):
        settings = {**options, "tol": 0.0, "scale_gridsearch": False}
        return optimize.optimize_weights_proximal_v2(tensor, scale, zero, min_max, axis, device, opt_params=settings)

    q, _ = hqq(jnp.asarray(weight), "int3-g64-fp32-z32", **options)
    there = quantize_there(weight, 3, 64, solver)
    assert_same(q, there)
    assert np.abs(np.asarray(q.zeros) - quantize_there(weight, 3, 64)[2]).max() > 1e-2, "the options change something"
