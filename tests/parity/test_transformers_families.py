"""Every family against the transformers library, in float32, from the same folder of random weights: equal logits, also of what
we write, and equal tokens of greedy generation with cached keys and values (`decoders.py`).

Families that `test_transformers.py` has from before stand there.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qjax.checkpoints.huggingface import load_huggingface, save_huggingface  # noqa: E402
from qjax.errors import QjaxError  # noqa: E402
from qjax.evaluate.generate import generate  # noqa: E402
from qjax.models.model import apply  # noqa: E402
from tests.parity.decoders import (  # noqa: E402
    SHAPE,
    TOKENS,
    TOLERANCE,
    assert_same_decoder,
    assert_same_tokens,
    difference,
    logits,
    reload,
)

pytestmark = [
    pytest.mark.peer,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]

LONGER = np.random.default_rng(1).integers(0, 97, (2, 72))
SHAPE = SHAPE | {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
UNKNOWN = {  # of SHAPE, to a family
    "Bloom": ("intermediate_size", "num_key_value_heads", "max_position_embeddings"),
    "Falcon": ("intermediate_size", "num_key_value_heads"),
    "GPTNeo": ("num_key_value_heads", "num_hidden_layers", "num_attention_heads"),
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
}
NEO = {"num_layers": 3, "num_heads": 6, "window_size": 7, "attention_types": [[["global", "local"], 1], [["local"], 1]]}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": False},
}
FALCON_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
FAMILIES = {  # name -> (configuration class, its arguments beside SHAPE)
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma3-rope": ("Gemma3Text", GEMMA | {"sliding_window_pattern": 2, "rope_parameters": GEMMA3_ROPE}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "attention_bias": True},
    ),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": ("SmolLM3", {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 7}),
    "granite": ("Granite", GRANITE),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-qk-norm": ("StableLm", {"qk_layernorm": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "sliding_window": 7}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
    "qwen3_moe-shares": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3_moe-window": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss-plain": (
        "GptOss",
        GPT_OSS | {"rope_parameters": PLAIN, "attention_bias": False},
    ),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 44, "rope_parameters": LONG}),
    "phi3-partial": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "cohere": ("Cohere", {}),
    "cohere-qk-norm": ("Cohere", {"use_qk_norm": True, "logit_scale": 0.3, "attention_bias": True}),
    "gpt_neo": ("GPTNeo", NEO),
    "falcon": ("Falcon", {}),
    "falcon-sequential": ("Falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon-new": ("Falcon", FALCON_NEW),
    "falcon-new-one-norm": ("Falcon", FALCON_NEW | {"num_ln_in_parallel_attn": 1}),
    "falcon-alibi": ("Falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "bloom": ("Bloom", {"n_layer": 3, "n_head": 6}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-all": (
        "Llama",
        {"rope_parameters": YARN | {"beta_fast": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
}


def way(name):
    """How transformers attends: its eager way adds Falcon's ALiBi twice, its other ones leave out soft caps."""
    return "sdpa" if "alibi" in name else "eager"


def build(name, **changes):
    """A random model of the transformers library, biases, norms and sinks random too; those of experts' first layers are
    beyond the limits of gpt-oss' activation.
    """
    family, options = FAMILIES[name]
    known = {key: value for key, value in SHAPE.items() if key not in UNKNOWN.get(family, ())}
    config = getattr(transformers, f"{family}Config")(**known | options | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=way(name)).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key or key.endswith(("bias", "sinks")):
                size = 6.0 if key.endswith("gate_up_proj_bias") else 1.0 if key.endswith("sinks") else 0.3
                parameter.add_(size * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_tokens(name, tmp_path):
    assert_same_decoder(name, build(name), tmp_path, way(name))


@pytest.mark.parametrize(("name", "context"), [("phi3-longrope", 44), ("llama-dynamic", 64)])
def test_rotations_that_depend_on_the_length_of_a_text(name, context, tmp_path):
    """Equal up to the length from which they do; longer texts, which are rotated otherwise, are refused, and what we write
    rotates them as before.
    """
    peer = build(name)
    peer.save_pretrained(tmp_path / "theirs")
    model = load_huggingface(tmp_path / "theirs")
    assert model.config.context == context
    within = LONGER[:, :context]
    reference, beyond = logits(peer, within), logits(peer, LONGER)
    assert difference(apply(model, jnp.asarray(within)), reference) < TOLERANCE
    assert difference(beyond[:, :context], reference) > 0.01
    assert_same_tokens(model, peer, (LONGER[0, : context - 15], LONGER[1, :9]))  # the last new token is not read
    with pytest.raises(QjaxError, match=f"time at most {context}, the context of"):
        apply(model, jnp.asarray(LONGER[:, : context + 1]))
    with pytest.raises(QjaxError, match=f"do not fit theirs's context of {context}"):
        generate(model, [LONGER[0, : context - 14].astype(np.int32)], 16)
    save_huggingface(tmp_path / "ours", model)
    assert difference(logits(reload(tmp_path / "ours"), LONGER), beyond) < TOLERANCE / 10


def test_gemma_3_as_older_files_have_it(tmp_path):
    peer = build("gemma3-rope")
    peer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    del config["layer_types"]
    config |= {
        "rope_theta": scaling["full_attention"].pop("rope_theta"),
        "rope_local_base_freq": scaling["sliding_attention"]["rope_theta"],
        "rope_scaling": scaling["full_attention"],
        "sliding_window_pattern": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(apply(load_huggingface(tmp_path), jnp.asarray(TOKENS)), logits(peer)) < TOLERANCE
