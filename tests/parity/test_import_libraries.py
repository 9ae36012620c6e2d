"""Layers that the libraries themselves pack are read as the weights that they unpack: bit for bit, in float32.

The libraries' own packing stores the tensors of a folder, and their own dequantization says what they stand for. Known
differences: bitsandbytes multiplies int8 codes by SCB and then by 1/127, so that a weight may differ in the last bit; AutoRound
multiplies NVFP4's values by the reciprocal of the number that compressed-tensors, whose layout it is, divides scales by.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import ml_dtypes
import numpy as np
import pytest

from qjax.checkpoints.load import load
from qjax.linear import apply_linear, dequantize
from qjax.models.parameters import flatten
from tests import foreign
from tests.foreign_makers import F8
from tests.parity.peers import IGNORED

pytestmark = [pytest.mark.peer, *IGNORED]
torch = pytest.importorskip("torch")


def numpy_of(tensor) -> np.ndarray | F8:
    """A tensor as `foreign.write` takes it."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:
        return F8(tensor.view(torch.uint8).numpy())
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def float_of(tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def weights(shape, generator) -> np.ndarray:
    return (generator.standard_t(4, shape) * 0.05).astype(np.float32)


# bitsandbytes


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_four_bits(kind, nested, block, tmp_path):
    """Dequantized as one row: the library's kernel for CPUs takes other scales where a block goes on in the next row."""
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = np.random.default_rng(0)

    def make(module, weight):
        rows = torch.from_numpy(weights(weight.shape, generator))
        packed, state = functional.quantize_4bit(rows, quant_type=kind, blocksize=block, compress_statistics=nested)
        tensors = {f"weight.{name}": numpy_of(value) for name, value in state.as_dict(packed=True).items()}
        state.shape = torch.Size((1, weight.size))
        value = functional.dequantize_4bit(packed, state).numpy().reshape(weight.shape)
        return {"weight": packed.numpy(), **tensors}, value

    config = foreign.llama(hidden_size=128, mlp_size=128, head_dim=32)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    expected = foreign.write(tmp_path / "a", settings, make, config)
    foreign.assert_stands_for(load(tmp_path / "a"), expected)


@pytest.mark.filterwarnings("ignore:the checkpoint's weights are read")
def test_bitsandbytes_int8(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = np.random.default_rng(0)

    def make(module, weight):
        codes, scb, _ = functional.int8_vectorwise_quant(torch.from_numpy(weights(weight.shape, generator)).half())
        return {"weight": codes.numpy(), "SCB": scb.numpy()}, functional.int8_vectorwise_dequant(codes, scb).numpy()

    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    expected = foreign.write(tmp_path / "a", settings, make)["model.layers.0.mlp.up_proj.weight"]
    here = np.asarray(dequantize(flatten(load(tmp_path / "a").params)["block_0/mlp/up/kernel"])).T
    assert np.abs(here.view(np.int32) - expected.view(np.int32)).max() <= 1


# GPTQModel


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("bits", "symmetric", "ordered"), [(2, False, False), (3, False, True), (4, True, True), (8, False, False)]
)
def test_gptqmodel(bits, symmetric, ordered, version, tmp_path):
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    generator, group = np.random.default_rng(0), 32

    def make(module, weight):
        columns, rows = weight.shape
        layer = qlinear.TorchLinear(bits, group, symmetric, ordered, rows, columns, register_buffers=True)
        index = np.arange(rows) // group
        index = torch.from_numpy(generator.permutation(index) if ordered else index).int()
        scales = torch.from_numpy(generator.uniform(0.01, 0.02, (columns, rows // group)).astype(np.float32))
        zeros = generator.integers(0, 2**bits, (columns, rows // group))
        zeros[:] = 2 ** (bits - 1) if symmetric else zeros
        linear = torch.nn.Linear(rows, columns, bias=False).requires_grad_(False)
        layer.pack_original(linear, scales.clone(), torch.from_numpy(zeros).int(), index)
        layer.post_init()
        value = layer.dequantize_weight().detach()
        if version == 1:
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group, sym=symmetric))
        tensors = {name: numpy_of(getattr(layer, name)) for name in ("qweight", "qzeros", "scales", "g_idx")}
        return tensors, float_of(value).T

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered}
    settings["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    expected = foreign.write(tmp_path / "a", settings, make)
    leaves = flatten(load(tmp_path / "a").params)
    for name, path in (("mlp.up_proj", "mlp/up"), ("self_attn.o_proj", "attention/o")):
        there = expected[f"model.layers.0.{name}.weight"]
        here = np.asarray(dequantize(leaves[f"block_0/{path}/kernel"])).T
        # its scales are float16, so are its products, of which a float32 product is the exact value
        np.testing.assert_array_equal(here.astype(np.float16), there.astype(np.float16))
        np.testing.assert_allclose(here, there, rtol=1e-3)


# compressed-tensors

SCHEMES = {  # name -> (format, weights)
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 asym": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int3 asym": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int8 channels": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 block": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.observers import Observer

    kind, said = SCHEMES[name]
    if said.get("type") == "float" and said["num_bits"] == 4:
        said = said | ({"scale_dtype": torch.float8_e4m3fn} if said["group_size"] == 16 else {"scale_dtype": torch.uint8})
    arguments = QuantizationArgs(**said)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor, generator = BaseCompressor.get_value_from_registry(kind), np.random.default_rng(0)

    def make(module, weight):
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(False)
        linear.weight.data = torch.from_numpy(weights(weight.shape, generator)).to(getattr(torch, dtype))
        found = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=arguments)(
            linear.weight
        ).get_qparams()
        state = {"weight": linear.weight.data, "weight_scale": found["scale"], "weight_zero_point": found["zero_point"]}
        if found.get("global_scale") is not None:
            state["weight_global_scale"] = found["global_scale"]
        stored = compressor.compress(state, scheme)
        value = compressor.decompress(dict(stored), scheme)["weight"]
        stored.pop("weight_zero_point", None) if arguments.symmetric else None
        return {suffix: numpy_of(tensor) for suffix, tensor in stored.items()}, float_of(value)

    said = arguments.model_dump(mode="json")
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": said}},
    }
    config = foreign.llama(hidden_size=160, mlp_size=192, head_dim=40)
    expected = foreign.write(tmp_path / "a", settings, make, config)
    leaves = flatten(load(tmp_path / "a").params)
    # the library unpacks FP4 in bfloat16, to which its products, computed in float32, are rounded
    narrow = ml_dtypes.bfloat16 if "bfloat16" in dtype or name == "nvfp4" else np.float32
    for theirs, path in (("mlp.up_proj", "mlp/up"), ("self_attn.o_proj", "attention/o"), ("mlp.down_proj", "mlp/down")):
        here = np.asarray(dequantize(leaves[f"block_0/{path}/kernel"])).T
        np.testing.assert_array_equal(here.astype(narrow).astype(np.float32), expected[f"model.layers.0.{theirs}.weight"])


def test_nvfp4_of_weights_and_inputs(tmp_path):
    """Its simulated layer, with inputs beyond those of calibration too."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationStatus, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import set_forward_quantized
    from compressed_tensors.quantization.utils import generate_gparam
    from llmcompressor.observers import Observer

    scheme, kind = preset_name_to_scheme("NVFP4", ["Linear"]), "nvfp4-pack-quantized"
    compressor, generator = BaseCompressor.get_value_from_registry(kind), np.random.default_rng(0)
    x = torch.from_numpy(generator.standard_t(4, (16, 160)).astype(np.float32))
    least, largest = torch.aminmax(x[:, :8])
    layers = {}

    def make(module, weight):
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(False)
        linear.weight.data = torch.from_numpy(weights(weight.shape, generator))
        observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=scheme.weights)
        found = observer(linear.weight).get_qparams()
        state = {"weight_scale": found["scale"], "weight_global_scale": found["global_scale"]}
        state["input_global_scale"] = generate_gparam(least, largest)
        for name, tensor in state.items():
            linear.register_buffer(name, tensor)
        linear.quantization_scheme, linear.quantization_status = scheme, QuantizationStatus.FROZEN
        set_forward_quantized(linear)
        layers[module] = linear
        stored = compressor.compress({"weight": linear.weight.data, "weight_zero_point": found["zero_point"], **state}, scheme)
        stored.pop("weight_zero_point", None)
        return {suffix: numpy_of(tensor) for suffix, tensor in stored.items()}, weight

    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    foreign.write(tmp_path / "a", settings, make, foreign.llama(hidden_size=160, mlp_size=192, head_dim=40))
    leaf = flatten(load(tmp_path / "a").params)["block_0/mlp/up/kernel"]
    assert str(leaf.activation) == "nvfp4" and x.abs().max() > 1.2 * max(-least, largest)
    there = float_of(layers["model.layers.0.mlp.up_proj"](x))
    here = np.asarray(apply_linear(x.numpy(), leaf, precision="highest"))
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5 * np.abs(there).max())
    alone = np.asarray(apply_linear(x.numpy(), leaf.weight, precision="highest"))
    assert np.abs(alone - there).max() > 0.01 * np.abs(there).max()  # the inputs' rounding is not lost in the tolerance


# AutoRound, and transformers' FP8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("packing", "of"), [("auto_round", "torch"), ("auto_round:gptqmodel", "torch"), ("auto_round:auto_gptq", "torch_zp")]
)
@pytest.mark.filterwarnings("error::qjax.errors.QjaxWarning")
def test_autoround(packing, of, symmetric, bits, tmp_path):
    """Of the layers that its exporter packs with for these formats."""
    module_of = pytest.importorskip(f"auto_round_extension.torch.qlinear_{of}").QuantLinear
    generator, group = np.random.default_rng(0), 32

    def make(module, weight):
        columns, rows = weight.shape
        layer = module_of(bits, group, rows, columns, bias=False)
        layer.device = torch.device("cpu")  # its exporter sets it
        linear = torch.nn.Linear(rows, columns, bias=False).requires_grad_(False)
        linear.weight.data = torch.from_numpy(weights(weight.shape, generator))
        scales = generator.uniform(-0.02 if symmetric else 0.01, 0.02, (columns, rows // group)).astype(np.float32)
        zeros = torch.from_numpy(generator.integers(1, 2**bits, scales.shape).astype(np.float32))
        layer.pack(linear, torch.from_numpy(scales), 2 ** (bits - 1) if symmetric else zeros, None, device="cpu")
        stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.post_init()
        value = layer(torch.eye(rows, dtype=torch.float32))
        return {name: numpy_of(stored[name]) for name in ("qweight", "qzeros", "scales")}, float_of(value).T

    settings = {"quant_method": "auto-round", "packing_format": packing, "bits": bits, "group_size": group, "sym": symmetric}
    expected = foreign.write(tmp_path / "a", settings, make)
    there = expected["model.layers.0.mlp.up_proj.weight"]
    leaf = flatten(load(tmp_path / "a").params)["block_0/mlp/up/kernel"]
    assert leaf.format.is_affine != symmetric
    assert not symmetric or (leaf.format.bound == "full" and float(np.asarray(leaf.scales).min()) < 0)
    np.testing.assert_array_equal(np.asarray(dequantize(leaf)).T.astype(np.float16), there.astype(np.float16))


FLOATS = {  # name -> data_type, bits, group_size, act_data_type, the class of its layer
    "mxfp4": ("mx_fp", 4, 32, "mx_fp", "MXFP4QuantLinear"),
    "mxfp4, rounded up": ("mx_fp", 4, 32, "mx_fp_rceil", "MXFP4QuantLinear"),
    "mxfp8": ("mx_fp", 8, 32, "mx_fp", "MXFP8QuantLinear"),
    "nvfp4": ("nv_fp", 4, 16, "nv_fp4_with_static_gs", "NVFP4QuantLinear"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_autoround_of_small_floats(name, tmp_path):
    """Packed by its exporter; weights and a layer's output as its own layer has them."""
    pytest.importorskip("auto_round")
    from auto_round.data_type import get_quant_func
    from auto_round.experimental import qmodules
    from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear
    from auto_round.schemes import QuantizationScheme

    *values, of_inputs, kind = FLOATS[name]
    said = dict(zip(("data_type", "bits", "group_size"), values, strict=True))
    inputs = {"act_bits": said["bits"], "act_group_size": said["group_size"], "act_data_type": of_inputs, "act_dynamic": True}
    scheme, generator, layers = QuantizationScheme.from_dict(said | inputs), np.random.default_rng(0), {}
    x = torch.from_numpy(generator.standard_t(4, (16, 160)).astype(np.float32))

    def make(module, weight):
        columns, rows = weight.shape
        linear = torch.nn.Linear(rows, columns, bias=False).requires_grad_(False)
        linear.weight.data = torch.from_numpy(weights(weight.shape, generator))
        quantize, data_type = get_quant_func(said["data_type"], said["bits"], True)
        more, least = {}, 6 * 448 / x[:, :8].abs().max()
        if kind.startswith("NV"):
            more = {"global_scale": 6 * 448 / linear.weight.abs().max(), "input_global_scale": least.reshape(1)}
        _, scale, _ = quantize(linear.weight, said["bits"], said["group_size"], data_type=data_type)
        packed = QuantLinear(
            said["bits"], said["group_size"], rows, columns, False, data_type=data_type, act_bits=inputs["act_bits"]
        )
        packed.pack(linear, scale.reshape(columns, -1), **more, device="cpu")
        stored = {name: value for name, value in packed.state_dict().items() if value is not None}
        layer = getattr(qmodules, kind)(rows, columns, scheme, dtype=torch.float32)
        layer.load_state_dict(stored)
        layers[module] = layer
        return {suffix: numpy_of(tensor) for suffix, tensor in stored.items()}, float_of(layer.dequant_weight_online())

    settings = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", **said, **inputs}
    config = foreign.llama(hidden_size=160, mlp_size=192, head_dim=40)
    expected = foreign.write(tmp_path / "a", settings, make, config)
    leaf = flatten(load(tmp_path / "a").params)["block_0/mlp/up/kernel"]
    here, there = np.asarray(dequantize(leaf)).T, expected["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_max_ulp(here, there, 2 if name == "nvfp4" else 0)
    there = float_of(layers["model.layers.0.mlp.up_proj"](x))
    here = np.asarray(apply_linear(x.numpy(), leaf, precision="highest"))
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5 * np.abs(there).max())


@pytest.mark.parametrize("static", [False, True])
def test_autoround_fp8(static, tmp_path):
    """Its layer for FP8, in float32; with one static scale of the inputs too. Scales in bfloat16, as it writes them for most
    models, are numbers of float32 as well.
    """
    module_of = pytest.importorskip("auto_round.experimental.qmodules.fp8_static").WeightFP8ActFP8StaticQuantLinear
    from auto_round.export.export_to_autoround.export_to_fp8 import FP8QLinear

    generator, layers = np.random.default_rng(0), {}

    def make(module, weight):
        stored = torch.from_numpy(weights(weight.shape, generator) * 1000).to(torch.float8_e4m3fn)
        scale = torch.from_numpy(generator.uniform(1e-4, 2e-4, len(weight)).astype(np.float32))
        given = torch.tensor([0.01]) if static else None
        packed = FP8QLinear(*weight.shape[::-1], stored, scale, input_scale=given, dtype=torch.bfloat16)
        scales = packed.weight_scale.float(), None if given is None else packed.input_scale.float()
        layer = module_of(*weight.shape[::-1], stored, scales[0], input_scale=scales[1], dtype=torch.float32)
        layers[module] = layer
        tensors = {suffix: numpy_of(tensor) for suffix, tensor in packed.state_dict().items()}
        return tensors, float_of(layer.dequant_weight_online())

    settings = {"quant_method": "auto-round", "data_type": "fp", "bits": 8, "group_size": -1}
    settings |= {"act_bits": 8, "act_group_size": 0, "act_dynamic": False} if static else {}
    expected = foreign.write(tmp_path / "a", settings, make)
    foreign.assert_stands_for(load(tmp_path / "a"), expected)
    leaf = flatten(load(tmp_path / "a").params)["block_0/mlp/up/kernel"]
    x = torch.from_numpy(generator.standard_t(4, (16, leaf.shape[0])).astype(np.float32))
    if static:
        there = float_of(layers["model.layers.0.mlp.up_proj"](x))
        here = np.asarray(apply_linear(x.numpy(), leaf, precision="highest"))
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5 * np.abs(there).max())


def test_fine_grained_fp8(tmp_path):
    conversion = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    generator = np.random.default_rng(0)

    def make(module, weight):
        stored = torch.from_numpy(weights(weight.shape, generator) * 1000).to(torch.float8_e4m3fn)
        scales = torch.from_numpy(generator.uniform(1e-4, 2e-4, [n // 128 for n in weight.shape]).astype(np.float32))
        value = conversion._dequantize_one(stored, scales)
        return {"weight": numpy_of(stored), "weight_scale_inv": scales.numpy()}, value.numpy()

    config = foreign.llama(hidden_size=256, mlp_size=384, head_dim=32, heads=8, kv_heads=4)
    expected = foreign.write(tmp_path / "a", {"quant_method": "fp8", "weight_block_size": [128, 128]}, make, config)
    foreign.assert_stands_for(load(tmp_path / "a"), expected)
