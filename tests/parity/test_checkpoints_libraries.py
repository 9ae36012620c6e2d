"""Whole folders: those that libraries write run here as there, and those that are exported run there as here."""

import dataclasses
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import numpy as np
import pytest

from qjax import quantize
from qjax.checkpoints.export import export
from qjax.checkpoints.load import load
from qjax.errors import QjaxWarning
from qjax.linear import dequantize
from qjax.models.model import apply
from qjax.models.parameters import flatten, unflatten
from qjax.rounding.nearest import rtn
from tests.conftest import FAMILY_CHANGES, MIXTRAL, byte_tokenizer, tiny_config
from tests.gguf_files import MIXTURES, rotated
from tests.parity.peers import IGNORED, save_random_llama
from tests.random_weights import small_model, weights_model

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("float32_bitsandbytes"), *IGNORED]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random Llama whose layers fit every library."""
    folder = tmp_path_factory.mktemp("models") / "source"
    save_random_llama(folder, hidden=128, mlp=128, layers=1, heads=4, vocabulary=288, context=64)
    return folder


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def assert_close(here: np.ndarray, there: np.ndarray, share: float) -> None:
    assert np.abs(np.asarray(here) - there).max() <= share * np.abs(there).max()


@pytest.mark.parametrize("nested", [False, True])
def test_transformers_with_bitsandbytes(nested, source, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32
    )
    there = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)
    there.save_pretrained(tmp_path / "a")
    here = load(tmp_path / "a")
    assert here.recipe == f"bitsandbytes checkpoint: nf4-b64{'-dq' if nested else ''}"
    assert_close(apply(here, TOKENS), logits(there.eval()), 1e-4)


def quantized(source, fmt: str):
    return in_format(load(source), fmt)


def in_format(model, fmt: str):
    leaves = flatten(model.params)
    layers = {path: rtn(leaf, fmt)[0] for path, leaf in leaves.items() if path.startswith("block") and path.endswith("kernel")}
    return model._replace(params=unflatten(leaves | layers), recipe=f"rtn:{fmt}")


@pytest.mark.parametrize("fmt", ["int4-g32-sym", "int3-g64", "int8-channel-sym"])
def test_transformers_runs_what_is_exported_to_compressed_tensors(fmt, source, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantized(source, fmt)
    export(tmp_path / "a", model, "compressed-tensors", beside=source)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert_close(apply(model, TOKENS), logits(there), 1e-3)


@pytest.mark.parametrize(("fmt", "to"), [("int4-g32", "gptq_v2"), ("int8-channel-sym", "gptq")])
def test_gptqmodel_runs_what_is_exported_to_gptq(fmt, to, source, tmp_path, monkeypatch):
    gptqmodel = pytest.importorskip("gptqmodel")
    monkeypatch.chdir(tmp_path)  # it writes logs/
    model = quantized(source, fmt)
    export(tmp_path / "a", model, to, beside=source)
    there = gptqmodel.GPTQModel.load(
        str(tmp_path / "a"), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    assert_close(apply(model, TOKENS), logits(there.model.float().eval()), 1e-3)


@pytest.mark.parametrize("fmt", ["nf4-g64", "nf4-b64-dq", "fp4_bnb-b32"])
def test_transformers_runs_what_is_exported_to_bitsandbytes(fmt, source, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantized(source, fmt)
    export(tmp_path / "a", model, "bitsandbytes", beside=source)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert type(there.model.layers[0].mlp.up_proj).__name__ == "Linear4bit" and type(there.lm_head) is torch.nn.Linear
    assert_close(apply(model, TOKENS), logits(there), 1e-3)


def test_transformers_holds_the_int8_that_is_exported_to_bitsandbytes(source, tmp_path):
    """Its layers round their inputs, too: logits agree as far as that goes, weights to the last bit."""
    functional = pytest.importorskip("bitsandbytes.functional")
    model = quantized(source, "int8-channel-sym-max")
    export(tmp_path / "a", model, "bitsandbytes", beside=source)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    layer = there.model.layers[0].mlp.up_proj
    found = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).numpy().T
    leaf = flatten(model.params)["block_0/mlp/up/kernel"]
    np.testing.assert_allclose(found, dequantize(leaf), rtol=2e-7)
    assert_close(apply(model, TOKENS), logits(there), 1e-2)


def test_gptqmodel_runs_what_is_exported_to_awq(source, tmp_path, monkeypatch):
    gptqmodel = pytest.importorskip("gptqmodel")
    monkeypatch.chdir(tmp_path)  # it writes logs/
    model = quantized(source, "int4-g32")
    export(tmp_path / "a", model, "awq", beside=source)
    there = gptqmodel.GPTQModel.load(
        str(tmp_path / "a"), device="cpu", backend=gptqmodel.BACKEND.TORCH_AWQ, dtype=torch.float16
    )
    assert_close(apply(model, TOKENS), logits(there.model.float().eval()), 1e-3)


def side_by_side(family):
    changes = FAMILY_CHANGES.get(family, {"family": family}) | {"hidden_size": 128, "mlp_size": 128, "head_dim": 32}
    return in_format(small_model(tiny_config(**changes)), "int4-g32")


def test_gptqmodel_runs_gpt_neox(source, tmp_path, monkeypatch):
    """Whose head has another name in files than in transformers, by whose names this library reads."""
    gptqmodel = pytest.importorskip("gptqmodel")
    monkeypatch.chdir(tmp_path)  # it writes logs/
    model = side_by_side("gpt_neox")
    export(tmp_path / "a", model, "gptq_v2", beside=source)
    there = gptqmodel.GPTQModel.load(
        str(tmp_path / "a"), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    assert_close(apply(model, TOKENS), logits(there.model.float().eval()), 1e-3)


def test_transformers_runs_phi3_in_gptq(tmp_path):
    """GPTQModel's own loader knows no gate_up_proj."""
    pytest.importorskip("optimum.gptq")
    model = side_by_side("phi3")
    with pytest.warns(QjaxWarning, match="gptq_v2 of phi3: GPTQModel 7 looks for its gate_up_proj by other names"):
        export(tmp_path / "a", model, "gptq_v2")
    plain = transformers.GPTQConfig(bits=4, backend="gptq_torch")  # others multiply in bfloat16
    there = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype=torch.float32, device_map="cpu", quantization_config=plain
    )
    assert_close(apply(model, TOKENS), logits(there.eval()), 1e-3)


def test_transformers_runs_phi3_in_awq(tmp_path):
    """GPTQModel's own loader knows no gate_up_proj."""
    pytest.importorskip("gptqmodel")
    model = side_by_side("phi3")
    with pytest.warns(QjaxWarning, match="awq of phi3: GPTQModel 7 looks for its gate_up_proj by other names"):
        export(tmp_path / "a", model, "awq")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float16, device_map="cpu")
    assert_close(apply(model, TOKENS), logits(there.eval()), 3e-2)  # its kernel for CPUs multiplies in bfloat16


@pytest.mark.parametrize(("fmt", "to"), [("nf4-g64", "bitsandbytes"), ("int4-g32-sym", "compressed-tensors")])
@pytest.mark.parametrize("family", ["gpt_neox", "phi3"])
def test_layers_stored_side_by_side(family, fmt, to, tmp_path):
    """GPT-NeoX's head has another name in files than in transformers."""
    pytest.importorskip(to.replace("-", "_"))
    changes = FAMILY_CHANGES.get(family, {"family": family}) | {"hidden_size": 64, "mlp_size": 128, "head_dim": 16}
    model = weights_model(tiny_config(**changes))
    export(tmp_path / "a", in_format(model, fmt), to)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert type(there.lm_head) is torch.nn.Linear
    assert_close(apply(in_format(model, fmt), TOKENS), logits(there), 1e-3)


def test_transformers_runs_mixtral_in_compressed_tensors(tmp_path):
    """It multiplies codes in the type of their scales: float16's would round every weight."""
    pytest.importorskip("compressed_tensors")
    random = weights_model(tiny_config(**MIXTRAL, hidden_size=64, mlp_size=128, head_dim=16))
    model, _ = quantize(random, "rtn:int4-g32-sym-fp32")
    export(tmp_path / "a", model, "compressed-tensors")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert_close(apply(model, TOKENS), logits(there), 1e-5)


@pytest.mark.parametrize(("fmt", "to"), [("nf4-b64-dq", "bitsandbytes"), ("int4-g32-sym", "compressed-tensors")])
def test_a_tied_head_stays_as_it_is(fmt, to, source, tmp_path):
    pytest.importorskip(to.replace("-", "_"))
    model = quantized(source, fmt)
    params = {name: part for name, part in model.params.items() if name != "head"}
    params["head"] = {"norm": model.params["head"]["norm"]}
    model = model._replace(params=params, config=dataclasses.replace(model.config, tied=True))
    export(tmp_path / "a", model, to)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert type(there.lm_head) is torch.nn.Linear
    assert_close(apply(model, TOKENS), logits(there), 1e-3)


@pytest.mark.parametrize("recipe", ["rtn:int4-g32-m16", "gptq:int5-g32-m16@parallel"])
def test_the_gguf_librarys_values_of_minima_are_ours(recipe, source, tmp_path):
    """Bit for bit, and its own blocks of the same weights have the same minima and scales."""
    gguf, quants = pytest.importorskip("gguf"), pytest.importorskip("gguf.quants")
    model, _ = quantize(load(source), recipe, **({"calibration": TOKENS} if "gptq" in recipe else {}))
    export(tmp_path / "m.gguf", model, "gguf")
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    leaves, floats = flatten(model.params), flatten(load(source).params)
    for name, path in (("attn_v", "attention/v"), ("ffn_gate", "mlp/gate"), ("ffn_down", "mlp/down")):
        tensor, ours = tensors[f"blk.0.{name}.weight"], leaves[f"block_0/{path}/kernel"]
        assert tensor.tensor_type.name == ("Q4_1" if "int4" in recipe else "Q5_1")
        found = quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found.view(np.uint32), np.asarray(dequantize(ours)).T.copy().view(np.uint32))
        weight = np.ascontiguousarray(np.asarray(floats[f"block_0/{path}/kernel"], np.float32).T)
        theirs = quants.quantize(weight, tensor.tensor_type).reshape(-1, 20 if "int4" in recipe else 24)
        np.testing.assert_array_equal(theirs[:, :4], tensor.data.reshape(theirs.shape)[:, :4])


@pytest.mark.parametrize("fmt", ["int4-g32-sym", "int8-channel-sym-max"])
def test_the_gguf_librarys_reader_and_transformers_read_what_is_exported_to_gguf(fmt, source, tmp_path):
    gguf, quants = pytest.importorskip("gguf"), pytest.importorskip("gguf.quants")
    model = quantized(source, fmt)
    export(tmp_path / "a/m.gguf", model, "gguf", beside=source)
    reader = gguf.GGUFReader(tmp_path / "a/m.gguf")
    tensors, leaves = {each.name: each for each in reader.tensors}, flatten(model.params)
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("llama.attention.head_count").contents() == model.config.heads
    for name, path, move in (("attn_q", "attention/q", True), ("ffn_down", "mlp/down", False)):
        tensor, ours = tensors[f"blk.0.{name}.weight"], np.asarray(dequantize(leaves[f"block_0/{path}/kernel"])).T
        assert tensor.tensor_type.name == ("Q4_0" if "4" in fmt else "Q8_0")
        found = quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, rotated(ours, model.config.head_dim) if move else ours)
    options = {"gguf_file": "m.gguf", "dtype": torch.float32}
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", **options).eval()
    assert_close(apply(model, TOKENS), logits(there), 1e-3)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert tokens[256] == "</s>" and len(tokens) == model.config.vocabulary_size


def test_transformers_reads_a_mixture_that_is_exported_to_gguf(tmp_path):
    """Qwen3-MoE alone: transformers knows no experts of Mixtral's files, and stops at YaRN's settings in gpt-oss'."""
    pytest.importorskip("gguf")
    sizes = {"hidden_size": 64, "mlp_size": 96, "head_dim": 16}
    random = small_model(tiny_config(**MIXTURES["qwen3moe"] | sizes), byte_tokenizer(bos=True))
    model, _ = quantize(random, "rtn:int8-g32-sym-max")
    export(tmp_path / "a/m.gguf", model, "gguf")
    options = {"gguf_file": "m.gguf", "dtype": torch.float32}
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", **options).eval()
    assert_close(apply(model, TOKENS), logits(there), 1e-4)
