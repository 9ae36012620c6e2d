"""gpt-oss against the transformers library: folders in bfloat16, experts in MXFP4 blocks, and OpenAI's rotary settings."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from qjax.checkpoints.huggingface import load_huggingface, save_huggingface  # noqa: E402
from qjax.evaluate.generate import generate  # noqa: E402
from qjax.linear import dequantize, is_quantized  # noqa: E402
from qjax.models.families import FAMILIES, read_config  # noqa: E402
from qjax.models.family import stored_tensors  # noqa: E402
from qjax.models.model import apply  # noqa: E402
from qjax.models.parameters import flatten, parameter_shapes  # noqa: E402
from qjax.models.rope import rope_amplitude, rope_frequencies  # noqa: E402
from tests.foreign_makers import experts  # noqa: E402
from tests.parity.decoders import TOKENS, difference, logits  # noqa: E402
from tests.parity.test_transformers_families import FAMILIES as CASES  # noqa: E402
from tests.parity.test_transformers_families import build  # noqa: E402

pytestmark = [
    pytest.mark.peer,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
LOAD = {"attn_implementation": "eager", "dtype": torch.float32}


def loaded(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **LOAD | options).eval()


def test_bfloat16(tmp_path):
    """Computed in float32 by both, and written back to the same tensors."""
    build("gpt_oss").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    reference = logits(loaded(tmp_path / "theirs"))
    model = load_huggingface(tmp_path / "theirs")
    assert {leaf.dtype for leaf in flatten(model.params).values()} == {jnp.dtype("bfloat16")}
    error = difference(apply(model, jnp.asarray(TOKENS)), reference)
    print(f"bfloat16: {error:.2e}")
    assert error < 1e-5
    save_huggingface(tmp_path / "ours", model)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(folder whose experts are in MXFP4, its blocks and scales by the name of the weight)."""
    folder = tmp_path_factory.mktemp("mxfp4")
    build("gpt_oss", hidden_size=64, intermediate_size=96).to(torch.bfloat16).save_pretrained(folder)
    tensors, stored, make = load_file(folder / "model.safetensors"), {}, experts()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        made, _ = make(name, tensors.pop(name).swapaxes(1, 2))
        stored[name] = made
        tensors |= {f"{name}_{suffix}": array for suffix, array in made.items()}
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, stored


def test_experts_in_mxfp4(packed):
    """Decoded bit for bit as transformers does; equal logits and tokens."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, stored = packed
    model = load_huggingface(folder)
    leaves = flatten(model.params)
    tensors = {
        each.name: each
        for each in stored_tensors(FAMILIES["gpt_oss"], parameter_shapes(model.config), model.config.heads)
        if each.name in stored
    }
    assert len(tensors) == len(stored) == 2 * model.config.layers
    for name, tensor in tensors.items():
        assert all(is_quantized(leaves[path]) for path, _ in tensor.parts)
        blocks, scales = (torch.from_numpy(stored[name][key]) for key in ("blocks", "scales"))
        for theirs, ours in ((torch.float32, jnp.float32), (torch.bfloat16, jnp.bfloat16)):
            expected = convert_moe_packed_tensors(blocks, scales, dtype=theirs).float().numpy()
            found = tensor.join({path: np.asarray(dequantize(leaves[path], ours), np.float32) for path, _ in tensor.parts})
            np.testing.assert_array_equal(found, expected)
    peer = loaded(folder, quantization_config=transformers.Mxfp4Config(dequantize=True)).float()  # which reads it as bfloat16
    error = difference(apply(model, jnp.asarray(TOKENS)), logits(peer))
    print(f"mxfp4: {error:.2e}")
    assert error < 1e-4
    (found,) = generate(model, [TOKENS[0, :12].astype(np.int32)], 16).tokens
    ids = torch.from_numpy(TOKENS[:1, :12])
    ends = {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert found.tolist() == peer.generate(ids, max_new_tokens=16, do_sample=False, **ends)[0, 12:].tolist()


@pytest.mark.parametrize("options", [{}, {"max_position_embeddings": 4096}, CASES["gpt_oss"][1]], ids=["20b", "short", "tiny"])
def test_rotary_settings(options):
    """Frequencies and amplitude, also those that a silent config.json stands for."""
    config = transformers.GptOssConfig(**options)
    rotary = transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding(config)
    entries = json.loads(config.to_json_string()) | {"architectures": ["GptOssForCausalLM"]}
    for silent in (False, True):
        if silent and not options:
            del entries["rope_parameters"]
        ours = read_config(entries)
        np.testing.assert_allclose(rope_frequencies(ours), rotary.inv_freq.numpy(), rtol=1e-6)
        assert rope_amplitude(ours) == pytest.approx(rotary.attention_scaling, rel=1e-12)
