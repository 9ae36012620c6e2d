"""checkpoints/peft.py: PEFT's layout, written and read back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.checkpoints import peft
from qjax.checkpoints.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from qjax.errors import QjaxError
from qjax.linear import LowRank
from qjax.models.parameters import parameter_shapes
from tests.conftest import GPT2, tiny_config

LLAMA = tiny_config(vocabulary_size=64)
PHI3 = tiny_config(family="phi3", vocabulary_size=64)
A, B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"


def adapters_for(config, ranks=lambda path: 4, scaling=lambda path: 2.0, only=""):
    """Random adapters of the blocks' kernels whose path has `only` in it."""
    generator, found = np.random.default_rng(0), {}
    for path, shape in parameter_shapes(config).items():
        if path.endswith("kernel") and "block" in path and only in path:
            a, b = (
                generator.normal(size=size).astype(np.float32) for size in ((shape[0], ranks(path)), (ranks(path), shape[1]))
            )
            found[path] = LowRank(jnp.asarray(a), jnp.asarray(b), scaling(path))
    return found


def products(adapters):
    return {path: each.scaling * np.asarray(each.a) @ np.asarray(each.b) for path, each in adapters.items()}


def assert_same(found, expected) -> None:
    for path, product in products(expected).items():
        np.testing.assert_allclose(products(found)[path], product, rtol=1e-5, atol=1e-5, err_msg=path)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    given = adapters_for(LLAMA)
    save_adapter(tmp_path / "a", LLAMA, given, base="mine")
    found = load_adapter(tmp_path / "a", LLAMA)
    assert found.keys() == given.keys()
    jax.tree.map(np.testing.assert_array_equal, found, {path: given[path] for path in found})
    settings = json.loads((tmp_path / "a" / CONFIG).read_text())
    expected = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "mine", "fan_in_fan_out": False, "rank_pattern": {}}
    assert {key: settings[key] for key in expected} == expected
    assert settings["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    arrays = load_file(tmp_path / "a" / WEIGHTS)
    np.testing.assert_array_equal(
        arrays[B.format("model.layers.1.mlp.down_proj")], np.asarray(given["block_1/mlp/down/kernel"].b).T
    )
    with pytest.raises(QjaxError, match="not empty"):
        save_adapter(tmp_path / "a", LLAMA, given)


def test_ranks_and_alphas_that_differ(tmp_path):
    given = adapters_for(
        LLAMA, lambda path: 2 if "block_1/mlp/up" in path else 4, lambda path: 0.5 if "attention/q" in path else 2.0
    )
    save_adapter(tmp_path / "a", LLAMA, given)
    settings = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert settings["rank_pattern"] == {"model.layers.1.mlp.up_proj": 2}
    assert settings["alpha_pattern"] == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.mlp.up_proj": 4,
    }
    assert_same(load_adapter(tmp_path / "a", LLAMA), given)


def test_kernels_that_are_one_module_in_the_files(tmp_path):
    """Side by side with ranks added up; one A for all is written once."""
    given = adapters_for(PHI3, lambda path: 3 if "/q/" in path else 4)
    given.pop("block_0/attention/k/kernel")
    one = given["block_1/mlp/gate/kernel"]
    given["block_1/mlp/up/kernel"] = LowRank(one.a, given["block_1/mlp/up/kernel"].b, one.scaling)
    save_adapter(tmp_path / "a", PHI3, given)
    arrays = load_file(tmp_path / "a" / WEIGHTS)
    assert arrays[A.format("model.layers.0.self_attn.qkv_proj")].shape == (7, 32)
    assert arrays[A.format("model.layers.1.self_attn.qkv_proj")].shape == (11, 32)
    assert arrays[B.format("model.layers.1.mlp.gate_up_proj")].shape == (96, 4)
    found = load_adapter(tmp_path / "a", PHI3)
    assert_same(found, given)
    assert not np.asarray(found["block_0/attention/k/kernel"].b).any()
    again = tmp_path / "again"
    save_adapter(again, PHI3, found)  # as read, with one A for each module
    assert load_file(again / WEIGHTS).keys() == arrays.keys()
    for name, array in load_file(again / WEIGHTS).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_some_modules_of_a_name(tmp_path):
    config = tiny_config(**GPT2, vocabulary_size=64)
    given = adapters_for(config, only="mlp/down")  # c_proj, as attention's output is
    save_adapter(tmp_path / "a", config, given)
    settings = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert settings["fan_in_fan_out"] is True
    assert settings["target_modules"] == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert_same(load_adapter(tmp_path / "a", config), given)


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path / "a", LLAMA, adapters_for(LLAMA, only="mlp/up"))
    return tmp_path / "a"


def changed(folder, **settings):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_peft_may_write_otherwise(folder):
    """rsLoRA, patterns by the ends of names, the adapter's name in tensors, half precision, no prefix of the family."""
    changed(folder, use_rslora=True, r=3, rank_pattern={"up_proj": 4}, alpha_pattern={"^layers.0.mlp.up_proj": 16})
    arrays = {
        name.replace(".weight", ".default.weight").replace("model.model.", "model."): array.astype(np.float16)
        for name, array in load_file(folder / WEIGHTS).items()
    }
    save_file(arrays, folder / WEIGHTS)
    found = load_adapter(folder, LLAMA)
    assert [each.scaling for each in found.values()] == [16 / 2, 8 / 2]
    assert all(each.a.dtype == jnp.float32 for each in found.values())


def test_a_copy_of_the_bases_head_is_left_aside(tmp_path):
    """PEFT writes one beside an adapter of the head; one of other sizes is of another base."""
    shape = parameter_shapes(LLAMA)["head/output/kernel"]
    given = {"head/output/kernel": LowRank(jnp.ones((shape[0], 2)), jnp.ones((2, shape[1])))}
    save_adapter(tmp_path / "a", LLAMA, given)
    arrays, name = load_file(tmp_path / "a" / WEIGHTS), "base_model.model.lm_head.base_layer.weight"
    for size, fits in ((shape[1], True), (shape[1] + 8, False)):
        save_file(arrays | {name: np.zeros((size, shape[0]), np.float32)}, tmp_path / "a" / WEIGHTS)
        if fits:
            assert_same(load_adapter(tmp_path / "a", LLAMA), given)
    with pytest.raises(QjaxError, match=r"base_layer.weight is \(72, 32\), which no layer of it is"):
        load_adapter(tmp_path / "a", LLAMA)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA is read"),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, r"use_dora \(DoRA\); modules_to_save \(modules saved whole\)"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "'pissa' .a base that the start changed"),
        ({"r": 5}, "has the rank 5 and alpha 8, in the file it is of rank 4"),
        ({"lora_alpha": "8"}, "alpha '8'"),
        ({"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern has '\(a\+\)\+\$'; expected names"),
        ({"target_modules": ["up_proj", "q_proj"]}, "names the module 'q_proj', adapter_model.safetensors has no adapter"),
    ],
)
def test_settings_that_are_refused(folder, settings, message):
    changed(folder, **settings)
    with pytest.raises(QjaxError, match=message):
        load_adapter(folder, LLAMA)


def test_files_that_are_refused(folder, tmp_path):
    with pytest.raises(
        QjaxError, match=r"no adapter for this base: model.layers.0.mlp.up_proj is 32 -> 56, the adapter \(4, 32\)"
    ):
        load_adapter(folder, tiny_config(vocabulary_size=64, mlp_size=56))
    with pytest.raises(QjaxError, match=r"model.layers.0.mlp.up_proj is no linear layer of it; model.layers.1"):
        load_adapter(folder, tiny_config(**GPT2, vocabulary_size=64))
    arrays = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj"
    for change, message in (
        ({A.format(name): None}, "up_proj has lora_B alone"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 64), np.float32)}, r"lora_embedding_A \(F32\)"),
        ({B.format(name): np.full((48, 4), np.nan, np.float32)}, "NaN"),
        (dict.fromkeys(arrays), "holds no adapter"),
    ):
        save_file({key: array for key, array in (arrays | change).items() if array is not None}, folder / WEIGHTS)
        with pytest.raises(QjaxError, match=message):
            load_adapter(folder, LLAMA)
    (folder / WEIGHTS).unlink()
    with pytest.raises(QjaxError, match="adapters in pickles"):
        load_adapter(folder, LLAMA)
    with pytest.raises(QjaxError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path, LLAMA)
    with pytest.raises(QjaxError, match="no module for block_9/x/kernel"):
        save_adapter(tmp_path / "b", LLAMA, {"block_9/x/kernel": LowRank(jnp.zeros((3, 2)), jnp.zeros((2, 4)))})
    assert peft.REPLACED
