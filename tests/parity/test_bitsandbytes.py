"""bitsandbytes' `nf4-b64` and `fp4_bnb-b64` and ours are the same numbers: codes, absmax, doubly quantized absmax.

bitsandbytes flattens an (out, in) weight; a block format flattens an (in, out) weight output channel after output channel,
which is the same order. Known differences, none of which a dequantized weight shows:

- FP4 has two codes for zero there (0 and 8); compared by value.
- The last block, when it is short, is divided by its maximum there, the others multiplied by its reciprocal; a weight within
  one bit of a threshold could differ.
- The offset of dq is the mean of the maxima; another order of additions gives another last bit, so a maximum within that of the
  edge of one of the 2^16 steps may get a neighbouring code (one in ten thousand).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import parse_format
from qjax.qtensor import dequantize, unpack_codes
from qjax.rounding.nearest import rtn
from qjax.scales import dynamic_map

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

GRIDS = {"nf4": "nf4", "fp4_bnb": "fp4"}  # ours -> theirs


def quantize_there(weight: np.ndarray, grid: str, block: int, nested: bool):
    """Codes in the order of the flattened (out, in) weight, their state, the dequantized (in, out) weight."""
    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    packed, state = functional.quantize_4bit(rows, quant_type=GRIDS[grid], blocksize=block, compress_statistics=nested)
    pairs = packed.numpy().reshape(-1)
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[: weight.size]
    return codes, state, functional.dequantize_4bit(packed, state).numpy().T


def values_here(q) -> np.ndarray:
    """Unscaled grid values in their order."""
    return np.float32(q.format.codebook.values)[np.asarray(unpack_codes(q)).T.ravel()]


def values_there(codes: np.ndarray, grid: str) -> np.ndarray:
    return functional.get_4bit_type(GRIDS[grid], device="cpu").numpy()[codes]


def matrices():
    """name -> (in, out) weight."""
    rng = np.random.default_rng(0)
    outliers = rng.standard_t(3, (512, 256)).astype(np.float32) * 0.02
    outliers[rng.random(outliers.shape) < 0.001] *= 50
    zeros = rng.standard_normal((256, 64)).astype(np.float32)
    zeros[:, 3] = 0
    zeros[64:128] = 0
    found = {
        "normal": rng.standard_normal((1024, 512)).astype(np.float32),
        "outliers": outliers,
        "zeros": zeros,
        "constant": np.full((128, 8), 0.3, np.float32),
        "from bfloat16": np.asarray(jnp.asarray(rng.standard_normal((512, 256)), jnp.bfloat16).astype(jnp.float32)),
    }
    for shape in [(96, 40), (100, 7), (65, 3), (1, 1)]:  # blocks cross output channels; the last one is short
        found[f"{shape}"] = rng.standard_normal(shape).astype(np.float32)
    return found


MATRICES = matrices()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MATRICES)
def test_codes_and_absmax(name, grid, block):
    weight = MATRICES[name]
    codes, state, restored = quantize_there(weight, grid, block, nested=False)
    q, _ = rtn(jnp.asarray(weight), f"{grid}-b{block}")
    np.testing.assert_array_equal(values_here(q), values_there(codes, grid))
    if grid == "nf4":
        np.testing.assert_array_equal(np.asarray(unpack_codes(q)).T.ravel(), codes)
    np.testing.assert_array_equal(q.scales, state.absmax.numpy())
    if weight.shape[0] % block == 0:  # elsewhere its native decoder starts a new block with each row, unlike its encoder
        np.testing.assert_array_equal(dequantize(q), restored)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MATRICES)
def test_double_quantization(name, grid):
    weight = MATRICES[name]
    codes, state, restored = quantize_there(weight, grid, 64, nested=True)
    q, _ = rtn(jnp.asarray(weight), f"{grid}-b64-dq")
    np.testing.assert_array_equal(values_here(q), values_there(codes, grid))
    np.testing.assert_array_equal(dynamic_map(), state.state2.code.numpy())
    np.testing.assert_allclose(float(q.scales.offset), float(state.offset), rtol=1e-6)
    if name == "constant" or weight.size <= 64:  # maxima and mean are equal but for rounding: their difference is noise
        return
    np.testing.assert_allclose(q.scales.scales, state.state2.absmax.numpy(), rtol=2e-6)
    difference = np.asarray(q.scales.codes).astype(int) - state.absmax.numpy()
    assert np.abs(difference).max() <= 1
    assert np.sum(difference != 0) <= max(1, 1e-3 * difference.size)
    if weight.shape[0] % 64 == 0:
        same = (difference == 0).repeat(64).reshape(weight.T.shape).T
        unit = float(np.abs(weight).max())
        np.testing.assert_allclose(np.asarray(dequantize(q))[same], restored[same], rtol=1e-5, atol=1e-6 * unit)


def test_many_weights():
    """A million weights, one in ten thousand of them within a few bits of a threshold: still the same code for each."""
    weight = np.random.default_rng(1).standard_normal((1024, 1024)).astype(np.float32)
    cuts = np.float32(parse_format("nf4-b64").codebook.thresholds)
    steps = np.random.default_rng(2).integers(-2, 3, (16, cuts.size))
    near = cuts[None] + steps * np.spacing(cuts)[None]
    weight[:64, :16] = 0
    weight[0, :16] = 1  # the block's maximum, so that the others are what is compared with the thresholds
    weight[1 : 1 + cuts.size, :16] = near.T
    codes, state, _ = quantize_there(weight, "nf4", 64, nested=False)
    q, _ = rtn(jnp.asarray(weight), "nf4-b64")
    np.testing.assert_array_equal(np.asarray(unpack_codes(q)).T.ravel(), codes)
    np.testing.assert_array_equal(q.scales, state.absmax.numpy())


@pytest.mark.parametrize(("grid", "error"), [("nf4", 8.45e-3), ("fp4_bnb", 1.49e-2)])
def test_relative_errors(grid, error):
    """Theirs and ours on normal weights, both within 2 % of the value computed with independent NumPy code."""
    weight = MATRICES["normal"]
    _, _, restored = quantize_there(weight, grid, 64, nested=False)
    _, info = rtn(jnp.asarray(weight), f"{grid}-b64")
    there = np.sum(np.square(restored - weight, dtype=np.float64)) / np.sum(np.square(weight, dtype=np.float64))
    assert float(info.weight_error) == pytest.approx(there, rel=1e-4)
    assert there == pytest.approx(error, rel=0.02)
