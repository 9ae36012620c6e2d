"""Whole folders: those that libraries write run here as there, and those that are exported run there as here."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import numpy as np
import pytest

from qjax.checkpoints.export import export
from qjax.checkpoints.load import load
from qjax.models.model import apply
from qjax.models.parameters import flatten, unflatten
from qjax.rounding.nearest import rtn
from tests.parity.peers import IGNORED, save_random_llama

pytestmark = [pytest.mark.peer, *IGNORED]
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
    model = load(source)
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
    assert_close(apply(model, TOKENS), logits(there.model.eval()), 1e-2)  # it computes in float16
