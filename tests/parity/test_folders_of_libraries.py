"""Whole folders: quantized and saved by a library, read here with the weights that it computes with."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import pytest

from qjax.checkpoints.load import load
from qjax.linear import dequantize
from qjax.models.parameters import flatten
from tests.parity import peers

pytestmark = [
    pytest.mark.peer,
    *peers.IGNORED,
    pytest.mark.filterwarnings("error::qjax.errors.QjaxWarning"),
]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOWS = np.random.default_rng(0).integers(0, 256, (4, 32))
NAMES = {  # ours -> theirs
    **{f"attention/{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "source"
    peers.save_random_llama(folder, hidden=128, mlp=192, layers=1, heads=4, vocabulary=288, context=64)
    return folder


def assert_same_weights(folder, weight_of, dtype) -> None:
    """weight_of: the (out, in) weight of a module by its name in the block, in the dtype that the library multiplies in."""
    leaves = flatten(load(folder).params)
    for ours, theirs in NAMES.items():
        here = np.asarray(dequantize(leaves[f"block_0/{ours}/kernel"])).T
        np.testing.assert_array_equal(here.astype(dtype), weight_of(theirs), err_msg=theirs)


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric", "ordered"),
    [("gptq", 4, True, True), ("gptq", 3, True, False), ("gptq_v2", 4, False, False), ("gptq_v2", 2, False, True)],
)
def test_gptqmodel(kind, bits, symmetric, ordered, source, tmp_path, monkeypatch):
    gptqmodel = pytest.importorskip("gptqmodel")
    monkeypatch.chdir(tmp_path)  # it writes logs/
    config = gptqmodel.QuantizeConfig(
        bits=bits, group_size=32, sym=symmetric, desc_act=ordered, format=kind, offload_to_disk=False
    )
    model = gptqmodel.GPTQModel.load(str(source), config, device="cpu", dtype=torch.float32)
    windows = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in WINDOWS]
    model.quantize(windows, batch_size=4)
    model.save(str(tmp_path / "a"))
    there = gptqmodel.GPTQModel.load(
        str(tmp_path / "a"), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    block = there.model.model.layers[0]
    assert_same_weights(
        tmp_path / "a", lambda name: block.get_submodule(name).dequantize_weight().detach().numpy().T, np.float16
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_llm_compressor(symmetric, source, tmp_path):
    """Its weights are, after it has rounded them, those that its files stand for."""
    pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    recipe = [GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])]
    model = peers.load_transformers(source)
    peers.oneshot(source, model, WINDOWS, recipe, 4)
    block = model.model.layers[0]
    rounded = {name: peers.fake_quantized(block.get_submodule(name)).T for name in NAMES.values()}
    model.save_pretrained(tmp_path / "a", save_compressed=True)
    assert_same_weights(tmp_path / "a", rounded.__getitem__, np.float32)


@pytest.mark.parametrize(
    ("form", "bits", "symmetric"),
    [
        ("auto_round", 4, True),
        ("auto_round", 2, False),
        ("auto_round", 3, False),
        ("auto_round", 4, False),
        ("auto_round:gptqmodel", 4, True),
        ("auto_round:gptqmodel", 8, False),
    ],
)
def test_autoround(form, bits, symmetric, source, tmp_path):
    """Its layers decode in float16. Which packing it takes depends on bits and symmetry: of GPTQ in either version, of AWQ."""
    auto_round = pytest.importorskip("auto_round")
    model, tokenizer = peers.load_transformers(source), transformers.AutoTokenizer.from_pretrained(source)
    how = {"bits": bits, "group_size": 32, "sym": symmetric, "iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    auto_round.AutoRound(model, tokenizer, **how).quantize_and_save(str(tmp_path), format=form)
    (config,) = tmp_path.rglob("config.json")
    there = transformers.AutoModelForCausalLM.from_pretrained(config.parent, device_map="cpu", dtype=torch.float32)
    block = there.model.layers[0]

    def weight_of(name):
        inputs = torch.eye(192 if "down" in name else 128)
        with torch.no_grad():
            return block.get_submodule(name)(inputs).numpy().T.astype(np.float16)

    assert_same_weights(config.parent, weight_of, np.float16)
