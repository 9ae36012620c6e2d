"""Inputs rounded here and by bitsandbytes, torchao and compressed-tensors, and SmoothQuant's scales by llm-compressor."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.activations import parse_activation, round_activation, static_scale
from qjax.linear import Linear, apply_linear, dense
from qjax.outliers import split_outliers
from qjax.qtensor import unpack_codes
from qjax.rounding.nearest import rtn
from qjax.transforms.smoothquant import smoothquant

pytestmark = [
    pytest.mark.peer,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
torch = pytest.importorskip("torch")

rng = np.random.default_rng(0)
WEIGHT = rng.standard_normal((64, 24)).astype(np.float16).astype(np.float32)


def inputs(outliers: bool) -> np.ndarray:
    """(tokens, in), numbers that float16 holds, as bitsandbytes takes them."""
    x = rng.standard_t(5, (9, 64)).clip(-5.9, 5.9)
    if outliers:
        x[2, 7], x[5, 7], x[3, 40] = 30, -7, -6
    return x.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("outliers", [True, False])
def test_llm_int8_of_bitsandbytes(outliers):
    functional = pytest.importorskip("bitsandbytes.functional")
    bnb = pytest.importorskip("bitsandbytes")
    x = inputs(outliers)
    codes, stats, columns = functional.int8_vectorwise_quant(torch.from_numpy(x).to(torch.float16), threshold=6.0)
    ours, scale, outlying = split_outliers(jnp.asarray(x), 6.0)
    np.testing.assert_array_equal(ours, codes.numpy())
    np.testing.assert_array_equal(np.flatnonzero(outlying), columns.numpy())
    np.testing.assert_allclose(np.asarray(scale)[:, 0], stats.numpy() / 127, rtol=1e-6)
    weight_codes, weight_stats, _ = functional.int8_vectorwise_quant(torch.from_numpy(WEIGHT.T.copy()).to(torch.float16))
    q, _ = rtn(jnp.asarray(WEIGHT), "int8-channel-sym-max-fp32")
    np.testing.assert_array_equal(np.asarray(unpack_codes(q), int).T - 128, weight_codes.numpy())
    state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights, state.CB, state.SCB = 6.0, False, weight_codes, weight_stats
    state.is_training = False  # else a CPU takes the decoded weight and the input as it comes
    y = bnb.matmul(torch.from_numpy(x), torch.from_numpy(WEIGHT.T.copy()), state=state).numpy()
    leaf = Linear(q, activation="llm_int8")
    for held in (leaf, dense(leaf)):
        np.testing.assert_allclose(apply_linear(jnp.asarray(x), held), y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize(("name", "kind"), [("int8-token-affine", "ASYMMETRIC"), ("int8-token-sym", "SYMMETRIC")])
def test_dynamic_integers_of_torchao(name, kind):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.from_numpy(inputs(True))
    mapping, block = getattr(primitives.MappingType, kind), [1, x.shape[1]]
    how = {"eps": 1e-12, "scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
    scale, zero = primitives.choose_qparams_affine(x, mapping, block, torch.int8, -128, 127, **how)
    codes = primitives.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    values = primitives.dequantize_affine(codes, block, scale, zero, torch.int8, -128, 127).numpy()
    ours = np.asarray(round_activation(jnp.asarray(x.numpy()), parse_activation(name)))
    same = np.isclose(ours, values, rtol=1e-5, atol=1e-6)
    assert same.mean() > 0.98  # but for ties of a quotient and a product: at -127.5, the lowest of a token often is one
    assert np.max(np.abs(ours - values)) < 1.01 * float(scale.max())


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("int8-token-sym", {"strategy": "token"}),
        ("int4-token-sym", {"strategy": "token", "num_bits": 4}),
        ("int8-token-affine", {"strategy": "token", "symmetric": False}),
        ("int8-g16-sym", {"strategy": "group", "group_size": 16}),
        ("fp8_e4m3-token", {"strategy": "token", "type": "float"}),
    ],
)
def test_dynamic_inputs_of_compressed_tensors(name, asked):
    """Whose W8A8 it is: scales equal to a rounding, values equal but for ties."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    args = quantization.QuantizationArgs(**{"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True} | asked)
    x = torch.from_numpy(inputs(True))[None]  # (batch, tokens, in)
    scale, zero = helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    there = quantization.fake_quantize(x, scale, zero, args).numpy()[0]
    ours = np.asarray(round_activation(jnp.asarray(x[0].numpy()), parse_activation(name)))
    assert np.isclose(ours, there, rtol=1e-5, atol=1e-6).mean() > 0.98
    assert np.max(np.abs(ours - there)) < 1.01 * float(scale.max())


@pytest.mark.parametrize(("name", "element"), [("mxfp8", "float8_e4m3fn"), ("mxfp4", "float4_e2m1fn_x2")])
def test_microscaling_of_torchao(name, element):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = inputs(True)
    there = mx.MXTensor.to_mx(torch.from_numpy(x), getattr(torch, element), 32).dequantize(torch.float32).numpy()
    np.testing.assert_array_equal(round_activation(jnp.asarray(x), parse_activation(name)), there)


def test_nvfp4_of_torchao():
    """With one float32 for all tokens: of this tensor's largest value there, of calibration's here."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x, activation = inputs(True), parse_activation("nvfp4")
    common = nv.per_tensor_amax_to_scale(torch.from_numpy(x).abs().max())
    there = nv.NVFP4Tensor.to_nvfp4(torch.from_numpy(x), 16, common).dequantize(torch.float32).numpy()
    scale = static_scale(jnp.max(jnp.abs(jnp.asarray(x)), axis=0), activation)
    assert float(scale) == pytest.approx(float(common), rel=1e-6)
    np.testing.assert_allclose(round_activation(jnp.asarray(x), activation, scale), there, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_of_llm_compressor(alpha):
    """It takes the range and twice the largest weight: of symmetric inputs our scale times 2^(2 alpha - 1)."""
    module = pytest.importorskip("llmcompressor.modifiers.transform.smoothquant.base")
    weights = [WEIGHT, WEIGHT[:, :5] * 3]
    abs_max = np.abs(inputs(True)).max(axis=0)
    layers = [torch.nn.Linear(*weight.shape, bias=False) for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = torch.from_numpy(weight.T.copy())
    modifier = module.SmoothQuantModifier(smoothing_strength=alpha, mappings=[])
    there = modifier._calculate_smoothing_scales(layers, torch.from_numpy(2 * abs_max)).detach().numpy()
    ours = smoothquant([jnp.asarray(weight) for weight in weights], "int8-channel", abs_max=jnp.asarray(abs_max), alpha=alpha)
    np.testing.assert_allclose(np.asarray(ours.scale) * 2 ** (2 * alpha - 1), there, rtol=1e-5)
