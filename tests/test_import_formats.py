"""checkpoints/{awq,bitsandbytes,compressed_tensors,autoround,fp8,modelopt}.py: what folders stand for, and what is refused."""

import numpy as np
import pytest

from qjax.checkpoints.huggingface import load_huggingface, weight_files
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.checkpoints.tensors import read_headers, read_tensor
from qjax.errors import QjaxError, QjaxWarning
from qjax.linear import Linear, apply_linear, is_quantized
from qjax.models.fingerprint import model_fingerprint
from qjax.models.parameters import flatten
from tests import foreign
from tests import foreign_makers as makers
from tests.conftest import GPT_NEOX, tiny_config

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WIDE = {"hidden_size": 160, "mlp_size": 136, "heads": 4, "kv_heads": 4, "head_dim": 40}  # sizes that tiles of 128 do not divide


def group(targets=("Linear",), inputs=None, **weights) -> dict:
    """One of compressed-tensors' config groups."""
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    return {"targets": list(targets), "weights": base | weights, "input_activations": inputs, "output_activations": None}


def ct(*groups, **entries) -> dict:
    named = {f"group_{i}": each for i, each in enumerate(groups)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": named,
        "ignore": ["lm_head"],
    } | entries


TOKEN, TENSOR = (
    {"num_bits": 8, "symmetric": True, "strategy": s, "dynamic": d} for s, d in (("token", True), ("tensor", False))
)
FLOAT8 = {"num_bits": 8, "type": "float", "group_size": None}
NVFP4 = {"type": "float", "strategy": "tensor_group"}
W4A4 = {"num_bits": 4, **NVFP4, "group_size": 16, "dynamic": "local"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def autoround(kind: str, bits: int, size: object, **more) -> dict:
    """AutoRound's settings of floats."""
    said = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "sym": True}
    return said | {"data_type": kind, "bits": bits, "group_size": size} | more


CASES = {  # name -> (settings, maker, format of a kernel, activation format)
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, makers.awq(), "int4-g16", None),
    "awq of old": ({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, makers.awq(group=32), "int4-g32", None),
    "awq ipex": (
        {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "ipex"},
        makers.awq(group=-1),
        "int4-channel",
        None,
    ),
    "awq exllama": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "exllama"}, makers.awq(), "int4-g16", None),
    "awq gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        makers.awq(group=32, version="gemv"),
        "int4-g32",
        None,
    ),
    "nf4": (BNB, makers.bitsandbytes(), "nf4-b64", None),
    "nf4 in blocks of 32": (BNB, makers.bitsandbytes(block=32), "nf4-b32", None),
    "nf4 nested": (BNB, makers.bitsandbytes(nested=True), "nf4-b64-dq", None),
    "nf4 in blocks of 4096": (BNB, makers.bitsandbytes(block=4096), "nf4-b4096", None),
    "nf4 stored as bfloat16": (BNB, makers.bitsandbytes(storage=makers.ml_dtypes.bfloat16), "nf4-b64", None),
    "fp4": (BNB, makers.bitsandbytes(kind="fp4", block=128), "fp4_bnb-b128", None),
    "w4a16": (ct(group()), makers.integers(), "int4-g16-sym-bf16", None),
    "w4a16 asym": (ct(group(symmetric=False)), makers.integers(symmetric=False), "int4-g16-bf16", None),
    "w8a16 channels": (
        ct(group(num_bits=8, strategy="channel", group_size=None)),
        makers.integers(bits=8, group=-1, dtype=np.float16),
        "int8-channel-sym",
        None,
    ),
    "3 bits": (ct(group(num_bits=3, symmetric=False)), makers.integers(bits=3, symmetric=False), "int3-g16-bf16", None),
    "3 bits of old": (
        ct(group(num_bits=3, symmetric=False)),
        makers.integers(bits=3, symmetric=False, padded=True),
        "int3-g16-bf16",
        None,
    ),
    "5 bits of old": (ct(group(num_bits=5)), makers.integers(bits=5, padded=True), "int5-g16-sym-bf16", None),
    "actorder": (ct(group(actorder="group")), makers.integers(ordered=True), "int4-g16-sym-bf16", None),
    "w8a8": (
        ct(group(inputs=TOKEN, num_bits=8, strategy="channel", group_size=None), format="int-quantized"),
        makers.integers(bits=8, group=-1, packed=False, dtype=np.float32),
        "int8-channel-sym-fp32",
        "int8-token-sym",
    ),
    "w8 asym": (
        ct(group(num_bits=8, symmetric=False), format="naive-quantized"),
        makers.integers(bits=8, symmetric=False, packed=False),
        "int8-g16-bf16",
        None,
    ),
    "int8 of whole tensors": (
        ct(group(num_bits=8, strategy="tensor", group_size=None), format="int-quantized"),
        makers.integers(bits=8, group=0, packed=False, dtype=np.float32),
        "int8-tensor-sym-fp32",
        None,
    ),
    "fp8": (
        ct(group(inputs=TOKEN | FLOAT8, **FLOAT8, strategy="channel"), format="float-quantized"),
        makers.fp8(),
        "fp8_e4m3-channel",
        "fp8_e4m3-token",
    ),
    "fp8 static": (
        ct(group(inputs=TENSOR | FLOAT8, **FLOAT8, strategy="tensor"), format="float-quantized"),
        makers.fp8(kind="tensor", static=True),
        "fp8_e4m3-tensor",
        "fp8_e4m3-tensor",
    ),
    "nvfp4": (
        ct(group(**NVFP4), format="nvfp4-pack-quantized"),
        makers.fp4(),
        "fp4_e2m1-g16-e4m3_div",
        None,
    ),
    "nvfp4, and inputs": (
        ct(group(inputs=W4A4, **NVFP4), format="nvfp4-pack-quantized"),
        makers.fp4(more={"input_global_scale": np.float32([500.3])}),
        "fp4_e2m1-g16-e4m3_div",
        "nvfp4",
    ),
    "mxfp4": (
        ct(group(type="float", group_size=32), format="mxfp4-pack-quantized"),
        makers.fp4(kind="mxfp4"),
        "mxfp4_even",
        None,
    ),
    "auto-round": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 2, "group_size": 16, "sym": True},
        foreign.gptq(bits=2, symmetric=True),
        "int2-g16-sym-full",
        None,
    ),
    "auto-round's awq": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 16, "sym": False},
        makers.awq(),
        "int4-g16",
        None,
    ),
    "auto-round's mxfp4": (
        autoround("mx_fp", 4, 32, act_bits=4, act_data_type="mx_fp", act_group_size=32, act_dynamic=True),
        makers.fp4(kind="mxfp4"),
        "mxfp4_even",
        "mxfp4",
    ),
    "auto-round's nvfp4": (
        autoround("nv_fp", 4, 16, act_bits=4, act_data_type="nv_fp4_with_static_gs", act_group_size=16, act_dynamic=True),
        makers.fp4(more={"input_global_scale": np.float32([500.3])}),
        "fp4_e2m1-g16-e4m3_div",
        "nvfp4",
    ),
    "auto-round's fp8": (
        autoround("fp", 8, -1, act_bits=8, act_group_size=0, act_dynamic=False),
        makers.fp8(kind="row", static=True),
        "fp8_e4m3-channel",
        "fp8_e4m3-tensor",
    ),
    "auto-round's fp8 of weights": (autoround("fp", 8, 0), makers.fp8(kind="tensor"), "fp8_e4m3-tensor", None),
    "modelopt": (
        MODELOPT,
        makers.fp4(whole="weight_scale_2", packed="weight"),
        "nvfp4",
        None,
    ),
    "modelopt, and inputs": (
        MODELOPT,
        makers.fp4(whole="weight_scale_2", packed="weight", more={"input_scale": np.float32(0.0021)}),
        "nvfp4",
        "nvfp4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_file_stands_for(case, tmp_path):
    settings, make, fmt, activation = CASES[case]
    name = "quantization_config" if "quant_method" in settings else "quant_config.json"
    expected = foreign.write(tmp_path / "a", settings, make, name=name)
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    leaf = flatten(model.params)["block_0/mlp/down/kernel"]
    assert str(leaf.format) == fmt
    assert str(leaf.activation if isinstance(leaf, Linear) else None) == str(activation)
    assert model_fingerprint(load(tmp_path / "a", lazy=True)) == model_fingerprint(model)
    if activation or fmt.startswith(("fp", "nv", "mx")):
        save(tmp_path / "b", model)
        assert model_fingerprint(load(tmp_path / "b")) == model_fingerprint(model)


@pytest.mark.parametrize(
    ("settings", "make", "activation"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"name": "weight_scale_inv"}, "fp8_e4m3-g128"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"name": "weight_scale_inv", "dtype": makers.ml_dtypes.bfloat16},
            "fp8_e4m3-g128",
        ),
        (
            autoround("fp", 8, [128, 128], act_bits=8, act_group_size=128, act_dynamic=True),
            {"name": "weight_scale_inv"},
            "fp8_e4m3-g128",
        ),
        (
            ct(
                group(
                    inputs={**FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True},
                    **FLOAT8,
                    strategy="block",
                    block_structure=[128, 128],
                )
            ),
            {},
            "fp8_e4m3-g128",
        ),
    ],
)
def test_fp8_in_tiles_with_ragged_edges(settings, make, activation, tmp_path):
    expected = foreign.write(tmp_path / "a", settings, makers.fp8(kind="block", **make), foreign.llama(**WIDE))
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    leaf = flatten(model.params)["block_0/mlp/up/kernel"]
    assert str(leaf.activation) == activation and leaf.weight.scales.shape == (2, 2)
    scale_bytes = 2 if "dtype" in make else 4
    assert leaf.format.nbytes(160, 136) == leaf.weight.nbytes == 160 * 136 + 4 * scale_bytes
    assert model_fingerprint(load(tmp_path / "a", lazy=True)) == model_fingerprint(model)


def test_inputs_of_tiles_with_ragged_edges(tmp_path):
    """Runs of 128 inputs of a token, the last one shorter, and a tile of each pair of runs: products in float64."""
    settings, columns, rows = {"quant_method": "fp8", "weight_block_size": [128, 128]}, 136, 160
    foreign.write(tmp_path / "a", settings, makers.fp8(kind="block", name="weight_scale_inv"), foreign.llama(**WIDE))
    headers, name = read_headers(weight_files(tmp_path / "a")), "model.layers.0.mlp.up_proj"
    stored = read_tensor(headers[f"{name}.weight"]).view(makers.ml_dtypes.float8_e4m3fn).astype(np.float64)
    tiles = read_tensor(headers[f"{name}.weight_scale_inv"]).astype(np.float64)
    weight = stored * [[tiles[i // 128, j // 128] for j in range(rows)] for i in range(columns)]
    x = np.random.default_rng(1).standard_t(3, (9, rows)).astype(np.float32)
    rounded = np.zeros(x.shape)
    for token, run in np.ndindex(9, 2):
        part = np.s_[token, 128 * run : 128 * (run + 1)]
        scale = np.float64(np.abs(x[part]).max() / np.float32(448))
        rounded[part] = (x[part] / scale).astype(makers.ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    y = rounded @ weight.T
    here = apply_linear(x, flatten(load(tmp_path / "a").params)["block_0/mlp/up/kernel"], precision="highest")
    np.testing.assert_allclose(here, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    assert np.abs(x @ weight.T - y).max() > 1e-3 * np.abs(y).max()  # inputs that are left alone would be seen


@pytest.mark.parametrize(
    ("settings", "make", "name", "number"),
    [
        (
            ct(group(inputs=W4A4, **NVFP4)),
            makers.fp4(more={"input_global_scale": np.float32([500.3])}),
            "quantization_config",
            500.3,
        ),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}},
            makers.fp4(whole="weight_scale_2", packed="weight", more={"input_scale": np.float32(1 / 500.3)}),
            "hf_quant_config.json",
            500.3,
        ),
    ],
)
def test_nvfp4_inputs_are_rounded_as_the_file_says(settings, make, name, number, tmp_path):
    """Groups of 16: an E4M3 scale of `number` * largest / 6, divided by that number, and E2M1; beyond calibration too."""
    expected = foreign.write(tmp_path / "a", settings, make, name=name)["model.layers.0.mlp.up_proj.weight"]
    x = (np.random.default_rng(1).standard_t(3, (9, 64)) * 1.5).astype(np.float32)
    assert np.abs(x).max() > 448 * 6 / number
    groups = x.reshape(9, -1, 16).astype(np.float64)
    scales = np.minimum(np.abs(groups).max(-1, keepdims=True) / 6 * number, 448)
    scales = scales.astype(makers.ml_dtypes.float8_e4m3fn).astype(np.float64) / number
    codes = np.clip(groups / scales, -6, 6).astype(makers.ml_dtypes.float4_e2m1fn).astype(np.float64)
    y = (codes * scales).reshape(x.shape) @ expected.T.astype(np.float64)
    here = apply_linear(x, flatten(load(tmp_path / "a").params)["block_0/mlp/up/kernel"], precision="highest")
    np.testing.assert_allclose(here, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_int8_warns_of_inputs_that_are_left_alone(tmp_path):
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    expected = foreign.write(tmp_path / "a", settings, makers.int8())
    with pytest.warns(QjaxWarning, match=r"rounds the inputs of these layers to int8 too, but for those beyond 6\.0"):
        model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    assert model.recipe == "bitsandbytes checkpoint: int8-channel-sym-max-fp32"


def test_groups_of_several_kinds(tmp_path):
    groups = [
        group(["re:.*self_attn.*"], **FLOAT8, strategy="channel"),
        group(),
        group(["model.layers.0.mlp.up_proj"], num_bits=8, group_size=32),
    ]
    kinds = {"attn": makers.fp8(), "up_proj": makers.integers(bits=8, group=32), "down": lambda *_: None, "": makers.integers()}
    choose = lambda module, weight: next(make for word, make in kinds.items() if word in module)(module, weight)  # noqa: E731
    expected = foreign.write(tmp_path / "a", ct(*groups, format="mixed-precision"), choose)
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    leaves = flatten(model.params).items()
    formats = {path: str(leaf.format) if is_quantized(leaf) else "None" for path, leaf in leaves}
    assert formats["block_0/attention/q/kernel"] == "fp8_e4m3-channel"
    assert formats["block_0/mlp/up/kernel"] == "int8-g32-sym-bf16"
    assert formats["block_0/mlp/gate/kernel"] == "int4-g16-sym-bf16"
    assert formats["block_0/mlp/down/kernel"] == "None"
    assert "fp8_e4m3-channel" in model.recipe and "int4-g16-sym-bf16" in model.recipe


@pytest.mark.parametrize(
    ("packing", "version", "bits"),
    [
        *((":auto_gptq", 1, 4), (":gptq", 1, 4), (None, 1, 4), (":auto_gptq:exllamav2", 1, 3)),
        *(("", 2, 4), (":gptqmodel", 2, 4), (":exllamav2", 2, 3)),
    ],
)
def test_zero_points_of_autoround(packing, version, bits, tmp_path):
    settings = {"quant_method": "auto-round", "bits": bits, "group_size": 16, "sym": False}
    settings |= {} if packing is None else {"packing_format": f"auto_round{packing}"}
    expected = foreign.write(tmp_path / "a", settings, foreign.gptq(bits=bits, version=version))
    foreign.assert_stands_for(load(tmp_path / "a"), expected)


def test_extra_config_of_autoround(tmp_path):
    """A whole name before a pattern that stands first; a part of a name; nothing from entries that are null."""
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False}
    extra = {
        ".*_proj": {"bits": 2, "group_size": 32},
        "model.layers.0.mlp.up_proj": {"bits": 8, "sym": None, "act_bits": 16},
        "lm_head": {"bits": 16},
    }
    kinds = {"up_proj": foreign.gptq(bits=8), "": foreign.gptq(bits=2, group=32)}
    choose = lambda module, weight: next(make for word, make in kinds.items() if word in module)(module, weight)  # noqa: E731
    expected = foreign.write(tmp_path / "a", settings | {"extra_config": extra}, choose)
    foreign.assert_stands_for(load(tmp_path / "a"), expected)
    kinds[""] = foreign.gptq()
    expected = foreign.write(tmp_path / "b", settings | {"extra_config": {"up_proj": {"bits": 8}}}, choose)
    foreign.assert_stands_for(load(tmp_path / "b"), expected)


def test_extra_config_of_autoround_for_floats(tmp_path):
    inputs = {"act_bits": 4, "act_data_type": "mx_fp", "act_group_size": 32, "act_dynamic": True}
    extra = {"mlp.*": {"data_type": "nv_fp", "group_size": 16, "act_bits": 16}, "lm_head": {"bits": None, "act_bits": 16}}
    kinds = {"mlp": makers.fp4(), "": makers.fp4(kind="mxfp4")}
    choose = lambda module, weight: next(make for word, make in kinds.items() if word in module)(module, weight)  # noqa: E731
    expected = foreign.write(tmp_path / "a", autoround("mx_fp", 4, 32, extra_config=extra, **inputs), choose)
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    leaves = flatten(model.params)
    assert str(leaves["block_0/attention/q/kernel"].activation) == "mxfp4"
    assert str(leaves["block_0/mlp/up/kernel"].format) == "fp4_e2m1-g16-e4m3_div"


@pytest.mark.parametrize(
    ("settings", "make", "fmt"),
    [
        (BNB, makers.bitsandbytes(block=8, nested=True), "nf4-b8"),
        (ct(group()), makers.integers(), "int4-g16-sym-bf16"),
        (ct(group(**FLOAT8, strategy="tensor")), makers.fp8(kind="tensor"), "fp8_e4m3-tensor"),
        (ct(group(type="float", strategy="tensor_group")), makers.fp4(), "fp4_e2m1-g16-e4m3_div"),
    ],
)
def test_layers_stored_side_by_side_are_cut_undecoded(settings, make, fmt, tmp_path):
    config = tiny_config(**GPT_NEOX | {"layers": 1, "mlp_size": 64})
    expected = foreign.write(tmp_path / "a", settings, make, config)
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    assert str(flatten(model.params)["block_0/attention/k/kernel"].format) == fmt


def test_blocks_that_cross_columns_cannot_be_cut(tmp_path):
    config = tiny_config(**GPT_NEOX | {"layers": 1, "mlp_size": 64})
    foreign.write(tmp_path / "a", BNB, makers.bitsandbytes(), config)
    with pytest.raises(QjaxError, match="query_key_value: blocks of 64 go over the ends of columns of 32 weights"):
        load_huggingface(tmp_path / "a")


REFUSED = {
    "kv cache": (ct(group(), kv_cache_scheme={"num_bits": 8}), "'kv_cache_scheme' is {'num_bits': 8}, which qjax cannot do"),
    "rotations": (ct(group(), transform_config={"config_groups": {"u": {}}}), "'transform_config'"),
    "sparsity": (ct(group(), sparsity_config={"format": "sparse-24-bitmask"}), "'sparsity_config' has the format"),
    "marlin": (ct(group(), format="marlin-24"), "'format' is 'marlin-24'; supported: pack-quantized"),
    "status": (ct(group(), quantization_status="calibration"), "'quantization_status' is 'calibration'"),
    "nvfp4 inputs": (ct(group(inputs=W4A4 | {"dynamic": True}, **NVFP4)), "group_0: 'input_activations' are"),
    "asym inputs": (ct(group(inputs=TOKEN | {"symmetric": False})), "'input_activations' are"),
    "no bits": (ct(group(num_bits=9)), "int of 2 to 8 bits"),
    "no group": (ct(group(targets=["re:.*mlp.*"])), "no group of 'config_groups' is for model.layers.0.self_attn.q_proj"),
    "tiles": (
        ct(group(**FLOAT8, strategy="block", block_structure=[64, 64])),
        "FP8 in tiles of [64, 64]; supported: [128, 128]",
    ),
    "gemv_fast": ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "'version' is 'gemv_fast'"),
    "awq of 3 bits": ({"quant_method": "awq", "bits": 3}, "'bits' is 3; supported: 4"),
    "awq without zeros": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "'zero_point' is false"),
    "auto-round's mx of 6 bits": (
        autoround("mx_fp", 6, 32),
        "'data_type' is 'mx_fp' of 6 bits in groups of 32; supported",
    ),
    "auto-round's mx of integers": (autoround("mx_int", 4, 32), "'data_type' is 'mx_int' of 4 bits in groups of 32"),
    "auto-round's groups": (autoround("mx_fp", 4, {}), "'group_size' must be int"),
    "auto-round's data type": (autoround("mx_fp8e5m2", 8, 32), "'data_type' is 'mx_fp8e5m2' of 8 bits in groups of 32"),
    "auto-round's rotation": (autoround("mx_fp", 4, 32, spinquant_config={"r1": 1}), "'spinquant_config' rotates inputs"),
    "auto-round's scales": (autoround("mx_fp", 8, 32), "weight_scale is BF16, of mx_fp expected bytes"),
    "auto-round's inputs of a layer": (
        {"quant_method": "auto-round", "bits": 4, "extra_config": {"up_proj": {"act_bits": 8}}},
        "'act_bits' is 8; supported with integers: 16",
    ),
    "auto-round's mlx": (
        {"quant_method": "auto-round", "packing_format": "auto_round:mlx", "bits": 4, "group_size": 16, "sym": False},
        "'packing_format' is 'mlx' of integers; supported: auto_gptq, gptq, gptqmodel",
    ),
    "auto-round's e5m2": (autoround("fp", 8, -1, fmt="e5m2"), "'fmt' is 'e5m2'; supported: e4m3"),
    "auto-round's fp8 groups": (autoround("fp", 8, -1, act_bits=8, act_group_size=64), "inputs of {'act_bits': 8,"),
    "auto-round's library": ({"quant_method": "auto-round", "packing_format": "mlx", "bits": 4}, "'packing_format' is 'mlx'"),
    "auto-round's packing": (
        {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "bits": 4},
        "'packing_format' is 'llm_compressor' of integers",
    ),
    "auto-round's inputs": ({"quant_method": "auto-round", "act_bits": 8, "bits": 4}, "'act_bits' is 8"),
    "modelopt's fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "'quant_algo' is 'FP8'; supported: NVFP4"),
    "modelopt's cache": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"},
        "'kv_cache_quant_algo' is 'FP8'",
    ),
    "fp8 scheme": ({"quant_method": "fp8", "activation_scheme": "odd"}, "'activation_scheme' is 'odd'"),
}


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct") / "a"
    foreign.write(folder, ct(group()), makers.integers())
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(case, packed_folder):
    settings, part = REFUSED[case]
    foreign.edit(packed_folder, quantization_config=settings)
    with pytest.raises(QjaxError) as error:
        load_huggingface(packed_folder)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "make", "name", "value", "part"),
    [
        (BNB, makers.bitsandbytes(), "weight.quant_map", np.linspace(-1, 1, 16, dtype=np.float32), "not the table of nf4"),
        (
            BNB,
            makers.bitsandbytes(nested=True),
            "weight.nested_quant_map",
            np.zeros(256, np.float32),
            "nested_quant_map is not",
        ),
        (BNB, makers.bitsandbytes(), "weight.absmax", np.zeros(3, np.float32), "weight.absmax has shape (3,), expected (64,)"),
        (BNB, makers.bitsandbytes(), "weight.quant_state.bitsandbytes__nf4", np.zeros(3, np.uint8), "is not a JSON object"),
        (
            ct(group(**NVFP4)),
            makers.fp4(),
            "weight_global_scale",
            np.zeros(1, np.float32),
            "weight_global_scale is 0.0, expected a number above 0",
        ),
        (
            ct(group(inputs=W4A4, **NVFP4)),
            makers.fp4(more={"input_global_scale": np.float32([500.3])}),
            "input_global_scale",
            np.zeros(1, np.float32),
            "input_global_scale is 0.0, expected a number above 0",
        ),
        (
            MODELOPT | {"quant_algo": "W4A16_NVFP4"},
            makers.fp4(whole="weight_scale_2", packed="weight"),
            "input_scale",
            np.float32(1),
            "unexpected model.layers.0.mlp.up_proj.input_scale",
        ),
        (ct(group()), makers.integers(), "weight_shape", np.array([64, 32]), "weight_shape is [64, 32], expected [64, 64]"),
        (
            ct(group(), format="int-quantized"),
            makers.integers(packed=False),
            "weight",
            np.full((64, 64), -9, np.int8),
            "weight holds 4096 numbers beyond -8 .. 7, as -9: not 4 bits",
        ),
        (
            ct(group(symmetric=False), format="int-quantized"),
            makers.integers(packed=False, symmetric=False),
            "weight_zero_point",
            np.full((64, 4), 8, np.int8),
            "weight_zero_point holds 256 numbers beyond -8 .. 7, as 8",
        ),
        (
            ct(group(**FLOAT8, strategy="channel")),
            makers.fp8(),
            "weight",
            makers.F8(np.full((64, 64), 255, np.uint8)),
            "NaN among",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(settings, make, name, value, part, tmp_path):
    def broken(module, weight):
        tensors, values = make(module, weight)
        return tensors | ({name: value} if module.endswith("up_proj") else {}), values

    foreign.write(tmp_path / "a", settings, broken)
    with pytest.raises(QjaxError, match="up_proj") as error:
        load_huggingface(tmp_path / "a")
    assert part in str(error.value)
