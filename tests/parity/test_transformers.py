"""Our decoder against the transformers library, both in float32, from the same checkpoint folder: equal logits, both ways, and
equal tokens of greedy generation (`decoders.py`).
"""

import gzip
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qjax.checkpoints.huggingface import load_huggingface, save_huggingface  # noqa: E402
from qjax.models.model import apply  # noqa: E402
from qjax.models.tokenizer import wrap_tokenizer  # noqa: E402
from tests.parity.decoders import (  # noqa: E402
    SHAPE,
    TOLERANCE,
    assert_same_decoder,
    assert_same_weights,
    difference,
    logits,
    reload,
)
from tests.parity.peers import IGNORED  # noqa: E402
from tests.paths import real_data  # noqa: E402

pytestmark = [pytest.mark.peer, *IGNORED]

UNKNOWN = {
    "GPT2": ("num_key_value_heads", "intermediate_size"),
    "GPTNeoX": ("num_key_value_heads",),
    "OPT": ("num_key_value_heads", "intermediate_size", "initializer_range"),
}  # of SHAPE, to a family
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {  # name -> (configuration class, its arguments beside SHAPE)
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "gpt2": ("GPT2", {}),
    "gpt2-inner": ("GPT2", {"n_inner": 100, "activation_function": "relu"}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoX", {}),  # heads of 8 features, 2 of them rotated
    "gpt_neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "gpt_neox-half": ("GPTNeoX", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}),
    "gpt_neox-whole": ("GPTNeoX", {"rotary_pct": 1.0, "rotary_emb_base": 5e5}),
    "gpt_neox-linear": ("GPTNeoX", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}),
    "gpt_neox-no-attention-bias": ("GPTNeoX", {"attention_bias": False, "hidden_act": "gelu_fast"}),
    "gpt_neox-tied": ("GPTNeoX", {"tie_word_embeddings": True, "use_parallel_residual": False, "hidden_act": "relu"}),
    "gemma": ("Gemma", {"head_dim": 16}),  # wider than hidden size / heads
    "gemma-one-key": ("Gemma", {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma-untied": ("Gemma", {"head_dim": 16, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma-silu": ("Gemma", {"head_dim": 16, "hidden_act": "silu", "rope_parameters": LLAMA3}),
    "opt": ("OPT", {}),
    "opt-untied": ("OPT", {"tie_word_embeddings": False}),
    "opt-no-bias": ("OPT", {"enable_bias": False}),
    "opt-gelu": ("OPT", {"activation_function": "gelu"}),
}


def build(name):
    """A random model of the transformers library, biases and norms random too."""
    family, options = MODELS[name]
    shape = {key: value for key, value in SHAPE.items() if key not in UNKNOWN.get(family, ())}
    if family == "OPT":
        shape |= {"ffn_dim": SHAPE["intermediate_size"], "init_std": SHAPE["initializer_range"]}
    config = getattr(transformers, f"{family}Config")(**{**shape, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key or key.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_random_model(name, tmp_path):
    assert_same_decoder(name, build(name), tmp_path)


def test_bfloat16_weights_survive(tmp_path):
    peer = build("llama").bfloat16()
    peer.save_pretrained(tmp_path / "theirs")
    save_huggingface(tmp_path / "ours", load_huggingface(tmp_path / "theirs"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.bfloat16
    assert_same_weights(back, peer)


@pytest.mark.parametrize(
    ("name", "theta", "share"),
    [("llama-rope-llama3", "rope_theta", None), ("gpt_neox-linear", "rotary_emb_base", "rotary_pct")],
)
def test_older_configuration_names(name, theta, share, tmp_path):
    peer = build(name)
    peer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {theta: scaling.pop("rope_theta"), "rope_scaling": scaling}
    if share is not None:
        config[share] = scaling.pop("partial_rotary_factor")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = np.arange(40)[None]
    assert difference(apply(load_huggingface(tmp_path), tokens), logits(peer, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-hf"])
def test_trained_model(name, tmp_path):
    folder = real_data(f"models/{name}")
    text = real_data("text/tinystories_val.txt").read_text()[:20000]
    model = load_huggingface(folder)
    ids, counts = model.tokenizer.encode_with_bytes(text)
    assert counts.sum() == len(text.encode())
    tokens = ids[: 4 * model.config.context].reshape(4, -1)
    reference = logits(reload(folder), tokens)
    error = difference(apply(model, tokens), reference)
    print(f"{name}: {error:.2e}, largest logit {np.abs(reference).max():.1f}")
    assert error < TOLERANCE
    save_huggingface(tmp_path, model)
    assert_same_weights(reload(tmp_path), reload(folder))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text[:2000])["input_ids"] == model.tokenizer.encode(text[:2000], special_tokens=True).tolist()


def test_gpt2_tokenizer_counts():
    folder = real_data("tokenizers/gpt2")
    inner = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = wrap_tokenizer(inner)
    text = gzip.decompress(real_data("text/calib/c4.utf8.gz").read_bytes()).decode()[:100_000]
    ids, counts = tokenizer.encode_with_bytes(text)
    assert counts.sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
