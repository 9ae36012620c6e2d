"""Adapters of PEFT's run here as there, ours there as here, and what is merged runs in transformers."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs

import json

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.load import load
from qjax.checkpoints.peft import load_adapter, save_adapter
from qjax.linear import LowRank
from qjax.models.adapters import attach
from qjax.models.model import apply
from qjax.models.parameters import flatten
from qjax.train.merge import load_merge, save_merged
from tests.parity.peers import IGNORED, save_random_llama

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("float32_bitsandbytes"), *IGNORED]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "source"
    save_random_llama(folder, hidden=64, mlp=128, layers=2, heads=4, vocabulary=288, context=64)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Conv1D layers, q, k and v in one of them."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=288, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def there(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def assert_close(here, theirs: np.ndarray, share: float) -> None:
    assert np.abs(np.asarray(here) - theirs).max() <= share * np.abs(theirs).max()


def adapt(model, folder, **settings):
    """PEFT's adapters that do something, in a folder; the model with them."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()


LLAMA = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj", "lm_head"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 20},
    },
}


@pytest.mark.parametrize("case", LLAMA)
def test_theirs_runs_here(case, source, tmp_path):
    expected = logits(adapt(there(source), tmp_path / "a", **LLAMA[case]))
    base = load(source)
    found = attach(base, load_adapter(tmp_path / "a", base.config))
    assert_close(apply(found, TOKENS), expected, 1e-4)
    assert np.abs(np.asarray(apply(base, TOKENS)) - expected).max() > 0.05 * np.abs(expected).max()


def test_theirs_of_gpt2_runs_here_and_back(gpt2, tmp_path):
    settings = {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    expected = logits(adapt(there(gpt2), tmp_path / "a", **settings))
    base = load(gpt2)
    adapters = load_adapter(tmp_path / "a", base.config)
    assert_close(apply(attach(base, adapters), TOKENS), expected, 1e-4)
    save_adapter(tmp_path / "b", base.config, adapters)
    assert_close(logits(peft.PeftModel.from_pretrained(there(gpt2), tmp_path / "b")), expected, 1e-5)


@pytest.mark.parametrize("which", ["source", "gpt2"])
def test_ours_runs_there(which, request, tmp_path):
    """Of several ranks and scalings; kernels that are one module there have adapters of their own."""
    folder = request.getfixturevalue(which)
    base, generator, adapters = load(folder), np.random.default_rng(0), {}
    for number, (path, leaf) in enumerate(flatten(base.params).items()):
        if path.startswith("block") and path.endswith("kernel") and "mlp/up" not in path:
            rank = 2 + number % 3
            a, b = generator.normal(size=(leaf.shape[0], rank)) / 8, generator.normal(size=(rank, leaf.shape[1])) / 8
            adapters[path] = LowRank(jnp.float32(a), jnp.float32(b), 0.5 if "block_1" in path else 2.0)
    save_adapter(tmp_path / "a", base.config, adapters, base=str(folder))
    found = peft.PeftModel.from_pretrained(there(folder), tmp_path / "a").eval()
    assert_close(apply(attach(base, adapters), TOKENS), logits(found), 1e-4)


def test_bitsandbytes_and_an_adapter_become_one_plain_folder(source, tmp_path):
    """In bfloat16 as asked for, without quantization_config; in float32 the same as the adapter on the quantized base."""
    pytest.importorskip("bitsandbytes")
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = there(source, quantization_config=nf4)
    quantized.save_pretrained(tmp_path / "base")
    expected = logits(adapt(quantized, tmp_path / "a", r=4, target_modules="all-linear"))
    base = load(tmp_path / "base")
    assert base.recipe == "bitsandbytes checkpoint: nf4-b64"
    for dtype, share in (("float32", 1e-4), ("bfloat16", 3e-2)):
        out = tmp_path / dtype
        merged = save_merged(out, load_merge(base, tmp_path / "a")[1], dtype=dtype)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        plain = there(out)
        assert_close(logits(plain), expected, share)
        assert_close(apply(merged, TOKENS), logits(plain), 1e-4)
