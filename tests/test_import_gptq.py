"""checkpoints/gptq.py and quantized.py: GPTQ's folders are the weights that they stand for, with the codes of the file."""

import json

import numpy as np
import pytest

from qjax.checkpoints.huggingface import load_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.errors import QjaxError, QjaxWarning
from qjax.lazy import is_lazy, materialised
from qjax.linear import Linear, dequantize_tree
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import apply
from qjax.models.parameters import flatten
from qjax.qtensor import QTensor, unpack_codes
from tests import foreign
from tests.conftest import GPT2, GPT_NEOX, tiny_config

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
CASES = {  # name -> (how the folder is made, what its configuration says of it, the format)
    "v1": ({}, {}, "int4-g16"),
    "v2": ({"version": 2}, {"checkpoint_format": "gptq_v2"}, "int4-g16"),
    "2 bits": ({"bits": 2}, {"bits": 2}, "int2-g16"),
    "3 bits": ({"bits": 3}, {"bits": 3}, "int3-g16"),
    "3 bits v2": ({"bits": 3, "version": 2}, {"bits": 3, "checkpoint_format": "gptq_v2"}, "int3-g16"),
    "8 bits": ({"bits": 8}, {"bits": 8}, "int8-g16"),
    "columns": ({"group": -1}, {"group_size": -1}, "int4-channel"),
    "ragged": ({"group": 24}, {"group_size": 24}, "int4-g24"),
    "wider than the layer": ({"group": 128}, {"group_size": 128}, "int4-g128"),
    "float32 scales": ({"dtype": np.float32}, {}, "int4-g16-fp32"),
    "sym": ({"symmetric": True}, {"sym": True}, "int4-g16-sym"),
    "sym with other zeros": ({}, {"sym": True}, "int4-g16"),
    "desc_act": ({"ordered": True}, {"desc_act": True}, "int4-g16"),
    "desc_act, 3 bits sym": ({"ordered": True, "bits": 3, "symmetric": True}, {"bits": 3, "sym": True}, "int3-g16-sym"),
}


def refusal(folder) -> str:
    with pytest.raises(QjaxError) as error:
        load_huggingface(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_file_stands_for(case, tmp_path):
    how, said, fmt = CASES[case]
    expected = foreign.write(tmp_path / "a", SETTINGS | said, foreign.gptq(**how))
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    leaf = flatten(model.params)["block_0/mlp/down/kernel"]
    assert str(leaf.format) == fmt and isinstance(leaf, Linear if "ordered" in how else QTensor)
    assert model.recipe == f"gptq checkpoint: {fmt}"
    lazy = load(tmp_path / "a", lazy=True)
    assert is_lazy(lazy.params) and model_fingerprint(lazy) == model_fingerprint(model)


def test_codes_are_those_of_the_file_and_are_kept(tmp_path):
    codes = {}
    make = foreign.gptq(3, bits=3, ordered=True)

    def noted(module, weight):
        made = make(module, weight)
        codes[module] = made[0]
        return made

    foreign.write(tmp_path / "a", SETTINGS | {"bits": 3, "desc_act": True}, noted, head=True)
    model = load(tmp_path / "a")
    leaf = flatten(model.params)["head/output/kernel"]
    order = np.argsort(codes["lm_head"]["g_idx"], kind="stable")
    np.testing.assert_array_equal(leaf.inputs[0].index, order)
    np.testing.assert_array_equal(
        foreign.words(np.asarray(unpack_codes(leaf.weight))[np.argsort(order)], 3), codes["lm_head"]["qweight"]
    )
    tokens = np.arange(6)[None]
    dense = model._replace(params=dequantize_tree(model.params))
    np.testing.assert_allclose(apply(model, tokens), apply(dense, tokens), rtol=1e-5, atol=1e-5)
    save(tmp_path / "b", model)
    assert model_fingerprint(load(tmp_path / "b")) == model_fingerprint(model)
    assert load(tmp_path / "b").recipe == "gptq checkpoint: int3-g16"


@pytest.mark.parametrize("family", [GPT_NEOX, GPT2 | {"tied": False}])
def test_layers_stored_side_by_side_are_cut_undecoded(family, tmp_path):
    config = tiny_config(**family | {"layers": 1, "mlp_size": 64})
    expected = foreign.write(tmp_path / "a", SETTINGS | {"desc_act": True}, foreign.gptq(ordered=True), config)
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    assert str(flatten(model.params)["block_0/attention/k/kernel"].format) == "int4-g16"
    assert model_fingerprint(load(tmp_path / "a", lazy=True)) == model_fingerprint(model)


def test_dynamic_rules(tmp_path):
    made = {"mlp": foreign.gptq(bits=8, group=-1), "k_proj": lambda *_: None, "": foreign.gptq()}
    rules = {"-:.*k_proj": {}, r"+:.*\.mlp\..*": {"bits": 8, "group_size": -1}, r".*mlp\.down.*": {"bits": 2}}
    choose = lambda module, weight: next(make for word, make in made.items() if word in module)(module, weight)  # noqa: E731
    expected = foreign.write(tmp_path / "a", SETTINGS | {"dynamic": rules}, choose)
    model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)
    leaves = flatten(model.params)
    assert str(leaves["block_0/mlp/down/kernel"].format) == "int8-channel"
    assert not isinstance(leaves["block_0/attention/k/kernel"], QTensor)


def test_a_mislabelled_symmetric_file(tmp_path):
    expected = foreign.write(tmp_path / "a", SETTINGS | {"sym": True}, foreign.gptq(symmetric=True, version=2))
    with pytest.warns(QjaxWarning, match="labelled gptq, but its zero points are those of gptq_v2"):
        model = load(tmp_path / "a")
    foreign.assert_stands_for(model, expected)


def test_a_zero_point_of_nothing_borrows_in_version_1(tmp_path):
    """As GPTQModel writes it, and takes it back: 1 is subtracted from whole words."""
    expected = foreign.write(tmp_path / "a", SETTINGS | {"checkpoint_format": "gptq_v2"}, foreign.gptq(version=2))

    def stored_as_version_1(tensors):
        name = "model.layers.0.mlp.up_proj.qzeros"
        tensors[name].view(np.uint32)[:] &= np.uint32(0xFFFFFF0F)
        np.testing.assert_array_equal(tensors[name].view(np.uint8)[:, ::4] >> 4, 0)
        for each in tensors:
            if each.endswith("qzeros"):
                tensors[each] = (tensors[each].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)

    before = flatten(load(tmp_path / "a").params)["block_0/mlp/gate/kernel"]
    foreign.change(tmp_path / "a", stored_as_version_1)
    foreign.edit(tmp_path / "a", quantization_config=SETTINGS)
    leaves = flatten(load(tmp_path / "a").params)
    np.testing.assert_array_equal(leaves["block_0/mlp/gate/kernel"].zeros, before.zeros)
    zeros = np.asarray(leaves["block_0/mlp/up/kernel"].zeros)
    assert (zeros[:, ::4] >> 4 == 0).all() and (zeros[:, 1::4] & 15 != 0).all()
    assert expected


@pytest.mark.parametrize("method", [{}, {"quant_method": "gptq"}])
def test_folders_from_before_quantization_config(method, tmp_path):
    settings = {"bits": 4, "group_size": 16, "sym": False, "desc_act": False, "model_file_base_name": "gptq_model-4bit-16g"}
    expected = foreign.write(tmp_path / "a", settings | method, foreign.gptq(), name="quantize_config.json")
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/gptq_model-4bit-16g.safetensors")
    foreign.assert_stands_for(load(tmp_path / "a"), expected)


def test_names_without_the_familys_prefix(tmp_path):
    expected = foreign.write(tmp_path / "a", SETTINGS, foreign.gptq())
    foreign.change(
        tmp_path / "a", lambda tensors: tensors.update({n.removeprefix("model."): tensors.pop(n) for n in [*tensors]})
    )
    foreign.assert_stands_for(load(tmp_path / "a"), expected)


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"bits": 5}, "'bits' is 5; supported: 2, 3, 4, 8"),
        ({"bits": None}, "'bits' is 0"),
        ({"bits": "4"}, "'bits' must be int"),
        ({"group_size": 0}, "'group_size' is 0"),
        ({"checkpoint_format": "marlin"}, "'checkpoint_format' is 'marlin'; supported: gptq, gptq_v2"),
        ({"is_marlin_format": True}, "'is_marlin_format' is True"),
        ({"activation": "w4afp8"}, "'activation' is 'w4afp8'"),
        ({"pack_dtype": "int64"}, "'pack_dtype'"),
        ({"dynamic": {"(a+)+b": {}}}, "longer or more intricate"),
        ({"dynamic": {"[": {}}}, "no regular expression"),
        ({"dynamic": {"a": 3}}, "'dynamic' has 3"),
        ({"quant_method": "quip"}, "quantized by 'quip', which qjax does not read; supported: gptq"),
        ({"group_size": 8}, "qzeros has shape (4, 8), expected (8, 8)"),
        ({"bits": 8}, "model.layers.0.mlp.up_proj.qweight has shape (8, 64), expected (16, 64)"),
    ],
)
def test_what_cannot_be_read_is_named(said, part, tmp_path):
    foreign.write(tmp_path / "a", SETTINGS | said, foreign.gptq())
    assert part in refusal(tmp_path / "a")


def test_broken_tensors_are_named(tmp_path):
    foreign.write(tmp_path / "a", SETTINGS | {"desc_act": True}, foreign.gptq())
    name = "model.layers.0.mlp.up_proj."
    foreign.change(tmp_path / "a", lambda tensors: tensors.update({name + "g_idx": tensors[name + "g_idx"] * 0}))
    assert f"{name[:-1]}: g_idx puts 64 to 64 inputs in a group, expected 16 in each of 4" in refusal(tmp_path / "a")
    foreign.change(tmp_path / "a", lambda tensors: tensors.pop(name + "g_idx"))
    assert f"missing {name}g_idx" in refusal(tmp_path / "a")
    foreign.edit(tmp_path / "a", quantization_config=SETTINGS)
    foreign.change(tmp_path / "a", lambda tensors: tensors.update({name + "bias": np.zeros(64, np.float16)}))
    load_huggingface(tmp_path / "a")  # groups are runs of inputs then, and early files have biases of zeros
    foreign.change(tmp_path / "a", lambda tensors: tensors.update({name + "bias": np.ones(64, np.float16)}))
    assert f"unexpected {name}bias" in refusal(tmp_path / "a")
    foreign.change(tmp_path / "a", lambda tensors: tensors.pop(name + "bias"))
    foreign.change(tmp_path / "a", lambda tensors: tensors.update({name + "extra": np.zeros(1, np.int32)}))
    assert f"unexpected {name}extra" in refusal(tmp_path / "a")
    foreign.change(
        tmp_path / "a", lambda tensors: tensors.pop(name + "extra") is tensors[name + "scales"].__setitem__(0, np.nan)
    )
    assert f"NaN or infinite values in {name}scales" in refusal(tmp_path / "a")
    lazy = load(tmp_path / "a", lazy=True)
    with pytest.raises(QjaxError, match="NaN or infinite"):
        materialised(lazy.params)


def test_the_folder_says_nothing_of_a_quantizer(tmp_path):
    foreign.write(tmp_path / "a", SETTINGS, foreign.gptq())
    content = json.loads((tmp_path / "a/config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "a/config.json").write_text(json.dumps(content))
    assert "GPTQ or AWQ" in refusal(tmp_path / "a")


def test_a_group_of_more_inputs_than_numpy_counts(tmp_path):
    foreign.write(tmp_path / "a", SETTINGS | {"group_size": 10**30, "desc_act": True}, foreign.gptq(group=-1))
    with pytest.raises(QjaxError, match=r"config\.json: format 'int4-g10+'"):
        load(tmp_path / "a")
