"""`mxfp4`, `mxfp8_*` and `nvfp4` here and in torchao and compressed-tensors: the same bytes and the same values.

The peers quantize an (out, in) weight along its rows, which are our columns. Codes are compared as the bits of the small
floats, low nibble first as all three pack them; their -0, a second code for zero that ours have not, counts as 0. Scales of
groups of zeros are left out for NVFP4, where each library writes another placeholder. compressed-tensors rounds the largest
weight to the mantissa of FP4 for MXFP8 too, which is none of the three rules: its MXFP8 is compared where that makes no
difference.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.qtensor import dequantize, unpack_codes
from qjax.rounding.nearest import rtn

pytestmark = [
    pytest.mark.peer,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
torch = pytest.importorskip("torch")

RULES = {"": "FLOOR", "_ceil": "RCEIL", "_even": "EVEN"}
ELEMENTS = {"mxfp4": "float4_e2m1fn_x2", "mxfp8_e4m3": "float8_e4m3fn", "mxfp8_e5m2": "float8_e5m2"}


def weight_of(kind: str) -> np.ndarray:
    """An (in, out) weight whose groups differ by orders of magnitude."""
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (256, 96)) * 0.02
    if kind == "spread":
        weight *= np.exp2(rng.integers(-20, 12, (8, 96))).repeat(32, axis=0)
    if kind == "powers":  # largest weights that are powers of two, and one step of float32 beside them
        weight[::16] = np.exp2(rng.integers(-6, -2, (16, 96))) * (1 + 2.0**-23 * rng.integers(-1, 2, (16, 96)))
    if kind == "zeros":
        weight[64:128, 3] = 0
    return weight.astype(np.float32)


def bits_here(q) -> np.ndarray:
    """Codes (in, out) as the bits of the small floats: sign and magnitude."""
    signed = np.asarray(unpack_codes(q), int) - len(q.format.codebook.values) // 2
    return np.abs(signed) + (signed < 0) * 2 ** (q.format.bits - 1)


def bits_there(data, bits: int) -> np.ndarray:
    """The same of a peer's (out, in) or packed (out, in / 2) bytes."""
    octets = data.view(torch.uint8).numpy()
    found = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1) if bits == 4 else octets
    return np.where(found == 2 ** (bits - 1), 0, found).T


@pytest.mark.parametrize("kind", ["normal", "spread", "powers", "zeros"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_microscaling_of_torchao(name, rule, kind):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    weight = weight_of(kind)
    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    element = getattr(torch, ELEMENTS[name])
    scales, data = mx.to_mx(rows, element, 32, mx.ScaleCalculationMode[RULES[rule]])
    q, _ = rtn(jnp.asarray(weight), f"{name}{rule}")
    scales_there = scales.view(torch.uint8).numpy().T
    exact = np.asarray(q.scales) == scales_there
    if rule == "_ceil":  # torch's log2 in float32 loses what is a step above a power of two
        assert exact.mean() > 0.98 and np.all(np.asarray(q.scales, int)[~exact] == scales_there[~exact] + 1)
    else:
        assert exact.all()
    compared = exact.repeat(32, axis=0)
    np.testing.assert_array_equal(bits_here(q)[compared], bits_there(data, q.format.bits)[compared])
    values = mx.to_dtype(data, scales, element, 32, torch.float32).numpy().T
    np.testing.assert_array_equal(np.asarray(dequantize(q))[compared], values[compared])


@pytest.mark.parametrize("kind", ["normal", "spread", "zeros"])
def test_nvfp4_of_torchao(kind):
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = weight_of("normal" if kind == "spread" else kind)
    if kind == "spread":  # within what torchao's smallest scale, a normal number, can hold
        weight *= np.exp2(np.random.default_rng(1).integers(-8, 1, (16, 96))).astype(np.float32).repeat(16, axis=0)
    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    level = nv.per_tensor_amax_to_scale(rows.abs().max())
    tensor = nv.NVFP4Tensor.to_nvfp4(rows, per_tensor_scale=level)
    q, _ = rtn(jnp.asarray(weight), "nvfp4")
    assert np.float32(q.scales.scale) == level.numpy()
    used = np.abs(weight).reshape(16, 16, 96).max(axis=1) > 0
    np.testing.assert_array_equal(np.asarray(q.scales.codes)[used], tensor.scale.view(torch.uint8).numpy().T[used])
    np.testing.assert_array_equal(bits_here(q), bits_there(tensor.qdata, 4))
    np.testing.assert_allclose(dequantize(q), tensor.dequantize(torch.float32).numpy().T, rtol=2e-7)


@pytest.mark.parametrize("kind", ["normal", "spread", "zeros"])
@pytest.mark.parametrize(
    ("name", "preset"), [("mxfp4_even", "MXFP4A16"), ("mxfp8_e4m3_even", "MXFP8A16"), ("nvfp4", "NVFP4A16")]
)
def test_compressed_tensors(name, preset, kind):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    compressor = {
        "MXFP4A16": MXFP4PackedCompressor,
        "MXFP8A16": MXFP8QuantizationCompressor,
        "NVFP4A16": NVFP4PackedCompressor,
    }[preset]
    scheme, nested = preset_name_to_scheme(preset, ["Linear"]), preset == "NVFP4A16"
    weight = weight_of(kind)
    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    groups = rows.reshape(96, -1, scheme.weights.group_size)
    level = {"weight_global_scale": generate_gparam(rows.min(), rows.max())} if nested else {}
    scale, _ = calculate_qparams(
        groups.amin(-1), groups.amax(-1), scheme.weights, **({"global_scale": level["weight_global_scale"]} if nested else {})
    )
    there = compressor.compress({"weight": rows, "weight_scale": scale, **level}, scheme)
    q, _ = rtn(jnp.asarray(weight), name)
    packed = there["weight_packed" if q.format.bits == 4 else "weight"]
    codes, scales = bits_there(packed, q.format.bits), there["weight_scale"].view(torch.uint8).numpy().T
    found = np.asarray(q.scales.codes if nested else q.scales)
    if nested:
        np.testing.assert_allclose(1 / q.scales.scale, level["weight_global_scale"].numpy()[0], rtol=2e-7)
    compared = np.abs(weight).reshape(*found.shape[:1], -1, 96).max(axis=1) > 0
    if name.startswith("mxfp8"):
        compared &= np.asarray(found == scales)
        assert compared.mean() > 0.7
    np.testing.assert_array_equal(found[compared], scales[compared])
    compared = compared.repeat(scheme.weights.group_size, axis=0)
    np.testing.assert_array_equal(bits_here(q)[compared], codes[compared])
