"""checkpoints/packed.py and files.py: quantized models on disk, bit-equal, and every bad folder."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax import files
from qjax.activations import parse_activation
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import config_from_dict, config_to_dict, load_packed, save
from qjax.driver.decoder import quantize_to
from qjax.errors import QjaxError
from qjax.files import write_atomically
from qjax.formats import parse_format
from qjax.lazy import materialised
from qjax.linear import Linear, LowRank, Outliers, dequantize, is_quantized, prepare
from qjax.maps import MAPS, Divide, Permute, Scale, register_map
from qjax.models.model import apply
from qjax.models.parameters import flatten, unflatten
from qjax.models.scalings import LinearScaling, Llama3Scaling
from qjax.qtensor import QTensor
from qjax.rounding.nearest import rtn
from qjax.untrusted import read_json
from tests.conftest import FAMILY_CHANGES, byte_tokenizer, tiny_config
from tests.random_weights import weights_model

FORMATS = [
    *("int4-g16", "int3-channel", "int2-g12", "int8-tensor-sym", "int1-g16-sym", "int5-g16-bf16", "int4-b16", "int4-b24"),
    *("nf4-g16", "nf4-b16-dq", "nf4-g16-dq", "int4-g16-dq", "fp4_e2m1-g16", "fp8_e4m3-channel", "bf16", "fp16", "fp32"),
    *("mxfp4", "mxfp8_e5m2_ceil", "nvfp4", "fp4-b24-e4m3", "int2-g12-sym-full", "int3-g16-z16", "int4-b24-z32", "int4-g16-m16"),
]
NESTED = (".scales.codes", ".scales.scales", ".scales.offset")


def quantized_model(*formats, dtype=jnp.bfloat16, tokenizer=None, config=None):
    """A model whose kernels take turns with the formats."""
    model = weights_model(config or tiny_config(), tokenizer, dtype=dtype)
    leaves = flatten(model.params)
    kernels = [path for path in leaves if path.startswith("block_") and path.endswith("kernel")]
    for i, path in enumerate(kernels):
        fmt = parse_format(formats[i % len(formats)])
        leaves[path], _ = rtn(leaves[path].astype(jnp.float32), fmt)
    return model._replace(params=unflatten(leaves), recipe=f"rtn:{formats[0]}", name="tiny")


def assert_equal_models(a, b):
    assert (a.config, a.name, a.recipe) == (b.config, b.name, b.recipe)
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)  # formats and in_features too
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model in two formats; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    save(folder, quantized_model("int4-g16", "nf4-g16-dq", tokenizer=byte_tokenizer()))
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit(folder, change):
    """Rewrites qjax.json after change(description)."""
    description = json.loads((folder / "qjax.json").read_text())
    change(description)
    (folder / "qjax.json").write_text(json.dumps(description))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def expect_refusal(folder, *parts):
    with pytest.raises(QjaxError) as error:
        load_packed(folder)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


# Round trips


def test_a_folder_of_the_first_version_loads():
    """Written by the qjax whose formats had no codecs yet, with the values and logits that it read from it."""
    fixtures = Path(__file__).parent / "fixtures"
    expected = read_json(fixtures / "packed_v1_values.json")
    model = load(fixtures / "packed_v1")
    leaves = flatten(model.params)
    rows = {path: np.asarray(dequantize(leaf))[0] for path, leaf in leaves.items() if is_quantized(leaf)}
    assert {str(leaves[path].format) for path in rows} == {
        *("int4-g32", "nf4-g16-dq", "nf4-b16-dq", "int3-channel", "int4-g16-sym-max-bf16", "int2-b24")
    }
    assert rows.keys() == expected["rows"].keys()
    for path, row in rows.items():
        np.testing.assert_allclose(row, expected["rows"][path], rtol=1e-6)
    np.testing.assert_allclose(apply(model, jnp.arange(8)[None])[0, -1], expected["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_saving_and_loading_is_bit_equal(fmt, tmp_path):
    model = quantized_model(fmt)
    save(tmp_path / "a", model)
    assert_equal_models(load_packed(tmp_path / "a"), model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_plain_leaves_keep_their_type(dtype, tmp_path):
    model = weights_model(tiny_config(tied=True), dtype=dtype)
    save(tmp_path, model)
    assert_equal_models(load_packed(tmp_path), model)


def linear_leaf(generator, dtype=jnp.float32):
    """A (32, 32) layer with some of all parts, drawn at random."""

    def normal(*shape, dtype=dtype):
        return jnp.asarray(generator.standard_normal(shape), dtype)

    fmt = str(generator.choice(["int4-g16", "nf4-g16-dq", "bf16", ""]))
    weight = rtn(normal(32, 32, dtype=jnp.float32), fmt)[0] if fmt else normal(32, 32)
    index = jnp.asarray(generator.permutation(32), jnp.int32)
    maps = [Scale(normal(32, dtype=jnp.float16)), Permute(index), Divide(normal(32))]
    activation = parse_activation(str(generator.choice(["int8-token", "int4-g8", "fp8_e4m3-tensor"])))
    rows = int(generator.integers(1, 4))
    parts = {
        "inputs": tuple(maps[: generator.integers(1, 4)]),
        "activation": activation,
        "activation_scale": normal() if activation.is_static else None,
        "outliers": Outliers(jnp.asarray(generator.permutation(32)[:rows], jnp.int32), normal(rows, 32, dtype=jnp.bfloat16)),
        "adapter": LowRank(normal(32, rows), normal(rows, 32), scaling=float(generator.random())),
    }
    kept = {name for name in parts if generator.random() < 0.6} | {"activation_scale"}
    kept -= set() if "activation" in kept else {"activation_scale"}
    return Linear(weight, **{name: value for name, value in parts.items() if name in kept})


def linear_model(seed):
    """A model with such layers in the place of some kernels."""
    generator, model = np.random.default_rng(seed), quantized_model("int4-g16")
    leaves = flatten(model.params)
    for layer in range(model.config.layers):
        for name in "qo":
            leaves[f"block_{layer}/attention/{name}/kernel"] = linear_leaf(generator)
    return model._replace(params=unflatten(leaves))


@pytest.mark.parametrize("seed", range(6))
def test_every_part_of_a_layer_is_kept(seed, tmp_path):
    model = linear_model(seed)
    save(tmp_path, model)
    assert_equal_models(load_packed(tmp_path), model)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(array.nbytes for array in stored.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


O_KERNEL = "block_0/attention/o/kernel"


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """A folder with a layer of all parts; tests copy it before they break it."""
    model, folder = quantized_model("int4-g16"), tmp_path_factory.mktemp("layered") / "model"
    save(folder, with_layer(model))
    return folder


def with_layer(model, **parts):
    kernel = flatten(model.params)[O_KERNEL]
    parts = {
        "inputs": (Scale(jnp.full(32, 0.5, jnp.float16)), Permute(jnp.arange(32, dtype=jnp.int32)[::-1])),
        "activation": parse_activation("int8-tensor"),
        "activation_scale": jnp.float32(0.1),
        "outliers": Outliers(jnp.asarray([3], jnp.int32), jnp.ones((1, 32), jnp.float16)),
        "adapter": LowRank(jnp.ones((32, 2)), jnp.ones((2, 32)), scaling=0.5),
    } | parts
    return model._replace(params=unflatten(flatten(model.params) | {O_KERNEL: Linear(kernel, **parts)}))


def test_the_record_of_a_layer_is_plain(layered):
    assert read_json(layered / "qjax.json")["quantized"][O_KERNEL] == {
        "format": "int4-g16",
        "in_features": 32,
        "linear": {
            "inputs": [
                {"map": "Scale", "arrays": {"scale": "float16[32]"}},
                {"map": "Permute", "arrays": {"index": "int32[32]"}},
            ],
            "activation": "int8-tensor",
            "activation_scale": "float32[]",
            "outliers": {"arrays": {"index": "int32[1]", "weight": "float16[1, 32]"}},
            "adapter": {"arrays": {"a": "float32[32, 2]", "b": "float32[2, 32]"}, "static": {"scaling": 0.5}},
        },
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(inputs=[{"map": "Twist", "arrays": {}}]), "unknown map 'Twist'; known are Divide, Scale, Permute"),
        (lambda r: r.update(inputs=["Scale"]), "'map' must be str, got nothing"),
        (lambda r: r.update(inputs=3), "'inputs' must be list, got 3"),
        (lambda r: r["inputs"][0].update(arrays={"size": "float16[32]"}), "Scale: .*unexpected keyword argument 'size'"),
        (
            lambda r: r["inputs"][0]["arrays"].update(scale="float16[31]"),
            "the parts of 'linear' do not fit a kernel (32, 32): ",
        ),
        (
            lambda r: r["inputs"][0]["arrays"].update(scale="float12[32]"),
            "an array is 'float12[32]', expected a type and a shape",
        ),
        (lambda r: r["inputs"][0]["arrays"].update(scale=32), "an array is 32, expected"),
        (lambda r: r.update(activation="int8"), "activation format 'int8': expected"),
        (lambda r: r.pop("activation_scale"), "int8-tensor is static, but there is none"),
        (lambda r: r["outliers"]["arrays"].update(weight="float16[1, 31]"), "do not fit"),
        (lambda r: r["adapter"].update(static={"scaling": 1.0, "rank": 2}), "unexpected keyword argument 'rank'"),
        (lambda r: r.update(colour="red"), "unknown entries colour of 'linear'"),
    ],
)
def test_malformed_layers(layered, tmp_path, change, message):
    """All said by the description alone: nothing is read."""
    folder = Path(shutil.copytree(layered, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    edit(folder, lambda d: change(d["quantized"][O_KERNEL]["linear"]))
    with pytest.raises(QjaxError, match=f"qjax.json: {O_KERNEL}: .*{message if '.*' in message else re.escape(message)}"):
        load_packed(folder)


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        (".inputs[0].scale", np.ones(32, np.float32), "is F32 (32,), expected F16 (32,)"),
        (".inputs[1].index", np.full(32, 32, np.int32), "impossible values in "),
        (".inputs[1].index", np.r_[0, 0, 2:32].astype(np.int32), "impossible values in "),
        (".outliers.index", np.full(1, -1, np.int32), "impossible values in "),
        (".adapter.a", np.full((32, 2), np.inf, np.float32), "infinite or impossible values in "),
    ],
)
def test_malformed_parts(layered, tmp_path, key, array, message):
    folder = Path(shutil.copytree(layered, tmp_path / "model"))
    edit_weights(folder, lambda t: t.update({O_KERNEL + key: array}))
    expect_refusal(folder, message, O_KERNEL + key)


def test_other_indices_are_the_maps_own(tmp_path):
    """Only a Permute's and the outliers' name inputs."""

    @register_map
    class Shifted(Scale):
        indexes: jax.Array
        index: jax.Array

    own = jnp.asarray([99, 99], jnp.int32)
    try:
        model = with_layer(quantized_model("int4-g16"), inputs=(Shifted(jnp.ones(32, jnp.float16), own, own),))
        save(tmp_path, model)
        assert_equal_models(load_packed(tmp_path), model)
    finally:
        MAPS.pop("Shifted")


def test_layers_that_no_folder_can_hold_are_named(tmp_path):
    class Unknown(Scale):
        pass

    model = quantized_model("int4-g16")
    unknown = with_layer(model, inputs=(Unknown(jnp.ones(32)),))
    with pytest.raises(QjaxError, match=f"{O_KERNEL}: its input map Unknown is not known to folders"):
        save(tmp_path, unknown)
    leaves = flatten(with_layer(model).params)
    laid_out = unflatten(leaves | {O_KERNEL: prepare(leaves[O_KERNEL])})
    with pytest.raises(QjaxError, match=f"{O_KERNEL}: a KernelWeight .* has no place in a file"):
        save(tmp_path, model._replace(params=laid_out))
    with pytest.raises(QjaxError, match="an array is int8, folders hold float32"):
        save(tmp_path, with_layer(model, activation_scale=jnp.int8(1)))
    assert list(tmp_path.iterdir()) == []


def test_folders_of_version_1(tmp_path):
    """They knew one thing beside the codes: a scale of the input."""
    model = with_layer(quantized_model("int4-g16"), activation=None, activation_scale=None, outliers=None, adapter=None)
    leaf = flatten(model.params)[O_KERNEL]
    model = model._replace(params=unflatten(flatten(model.params) | {O_KERNEL: Linear(leaf.weight, leaf.inputs[:1])}))
    save(tmp_path, model)
    record = {"format": "int4-g16", "in_features": 32, "input_scale": True}
    edit(tmp_path, lambda d: d.update(version=1) or [d.pop(name) for name in ("digest", "digests")])
    edit(tmp_path, lambda d: d["quantized"].update({O_KERNEL: record}))
    edit_weights(tmp_path, lambda t: t.update({f"{O_KERNEL}.input_scale": t.pop(f"{O_KERNEL}.inputs[0].scale")}))
    assert_equal_models(load_packed(tmp_path), model)


def test_a_mixture_with_tokenizer(source):
    model = quantized_model("int4-g16", "nf4-g16-dq", tokenizer=byte_tokenizer())
    back = load(source)
    assert_equal_models(back, model)
    assert back.tokenizer.to_json() == model.tokenizer.to_json()
    tokens = jnp.arange(10)[None]
    np.testing.assert_array_equal(apply(back, tokens), apply(model, tokens))


def test_the_file_holds_the_packed_bytes_and_no_more(source):
    model = quantized_model("int4-g16", "nf4-g16-dq")
    stored = load_file(source / "model.safetensors")
    assert sum(array.nbytes for array in stored.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    for name, fields in {"q": (".codes", ".scales", ".zeros"), "v": (".codes", *NESTED)}.items():
        path = f"block_0/attention/{name}/kernel"
        assert {key for key in stored if key.startswith(path)} == {path + field for field in fields}


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16), sliding_window=3, bos_id=1),
        tiny_config(rope_scaling=LinearScaling(2.0), tied=True, norm="layer"),
        *(tiny_config(**changes) for changes in FAMILY_CHANGES.values()),
    ],
)
def test_configurations_survive_json(config):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


# Bad folders


def test_missing_description(folder):
    (folder / "qjax.json").unlink()
    expect_refusal(folder, "qjax.json: No such file")


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_broken_description(folder, content):
    (folder / "qjax.json").write_text(content)
    expect_refusal(folder, "qjax.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=5), "version 5 is not supported, expected 1 to 4"),
        (lambda d: d.pop("version"), "version None"),
        (lambda d: d.pop("config"), "'config' must be dict, got nothing"),
        (lambda d: d.pop("name"), "'name' must be str"),
        (lambda d: d.update(recipe=3), "'recipe' must be str, got 3"),
        (lambda d: d.update(quantized=[]), "'quantized' must be dict"),
        (lambda d: d["config"].pop("heads"), "missing entry 'heads'"),
        (lambda d: d["config"].update(colour="red"), "unknown entry 'colour'"),
        (lambda d: d["config"].update(layers="2"), "'layers' is '2'"),
        (lambda d: d["config"].update(layers=0), "layers is 0, expected 1 to 1024"),
        (lambda d: d["config"].update(activation="mish"), "activation is 'mish'"),
        (lambda d: d["config"].update(norm="batch"), "norm is 'batch'"),
        (lambda d: d["config"].update(rope_scaling={"kind": "ntk"}), "'rope_scaling' is {'kind': 'ntk'}"),
        (lambda d: d["config"].update(rope_scaling={"kind": "linear"}), "LinearScaling: missing entry 'factor'"),
        (lambda d: d["quantized"]["block_0/mlp/up/kernel"].update(format="int9-g16"), "kernel: format 'int9-g16'"),
        (lambda d: d["quantized"]["block_0/mlp/up/kernel"].pop("format"), "block_0/mlp/up/kernel: 'format' must be str"),
        (lambda d: d["quantized"]["block_0/mlp/up/kernel"].update(in_features=31), "in_features is 31, expected 32"),
        (lambda d: d["quantized"].update({"block_0/mlp/up/kernel": None}), "block_0/mlp/up/kernel: 'format' must be str"),
        (lambda d: d["quantized"].update({"block_7/mlp/up/kernel": {}}), "'block_7/mlp/up/kernel', which is no matrix"),
        (lambda d: d["quantized"].update({"head/norm/scale": {}}), "'head/norm/scale', which is no matrix"),
    ],
)
def test_malformed_description(folder, change, message):
    edit(folder, change)
    expect_refusal(folder, "qjax.json: ", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("block_0/attention/q/kernel.codes"), "missing block_0/attention/q/kernel.codes"),
        (lambda t: t.pop("block_0/attention/v/kernel.scales.offset"), "missing block_0/attention/v/kernel.scales.offset"),
        (lambda t: t.pop("head/norm/scale"), "missing head/norm/scale"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "unexpected extra"),
        (
            lambda t: t.update({"block_0/attention/q/kernel.codes": np.zeros((15, 32), np.uint8)}),
            "block_0/attention/q/kernel.codes is U8 (15, 32), expected U8 (16, 32)",
        ),
        (
            lambda t: t.update({"block_0/attention/q/kernel.scales": np.zeros((2, 32), np.float32)}),
            "block_0/attention/q/kernel.scales is F32 (2, 32), expected F16 (2, 32)",
        ),
        (lambda t: t.update({"head/norm/scale": np.zeros(32, np.uint8)}), "head/norm/scale is U8 (32,), expected F32 or F16"),
    ],
)
def test_malformed_weights(folder, change, message):
    edit_weights(folder, change)
    expect_refusal(folder, "the weights do not fit qjax.json", message)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, value):
    """In scales of codes and in plain leaves."""
    names = ("block_0/attention/q/kernel.scales", "head/norm/scale")

    def change(tensors):
        for name in names:
            tensors[name] = np.array(tensors[name])
            tensors[name].flat[3] = value

    edit_weights(folder, change)
    expect_refusal(folder, "NaN, infinite or impossible values in", *names)


@pytest.mark.parametrize("kept", [0, 5, 60, 3000, -1])
def test_truncated_weights(folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    expect_refusal(folder, "model.safetensors is truncated or corrupt")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    expect_refusal(folder, "model.safetensors: No such file")


def test_tokenizer_larger_than_the_embedding(folder):
    inner = byte_tokenizer().inner
    inner.add_tokens(["one", "two"])
    inner.save(str(folder / "tokenizer.json"))
    expect_refusal(folder, "tokenizer.json has 258 tokens", "only 257")


# Writing


def test_a_folder_in_use_is_not_overwritten_unasked(folder):
    with pytest.raises(QjaxError, match="is not empty"):
        save(folder, quantized_model("int8-channel"))
    assert_equal_models(load_packed(folder), quantized_model("int4-g16", "nf4-g16-dq"))
    save(folder, quantized_model("int8-channel"), overwrite=True)
    assert_equal_models(load_packed(folder), quantized_model("int8-channel"))
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "qjax.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: [
            record.update(format="fp4-g16-dq") for record in d["quantized"].values() if record["format"] == "nf4-g16-dq"
        ],
        lambda d: d["config"].update(family="mistral"),
        lambda d: d["config"].update(eos_id=3),
        lambda d: d.update(recipe="gptq:int4-g16"),
        lambda d: d.update(name="other"),
        lambda d: d["digests"].pop("model.safetensors"),
        lambda d: d.pop("digest"),
    ],
)
def test_a_description_that_was_changed(folder, change):
    """What fits the weights as well as what was written, and is something else."""
    before = (folder / "qjax.json").read_text()
    edit(folder, change)
    assert json.loads(before) != json.loads((folder / "qjax.json").read_text())
    expect_refusal(folder, "qjax.json is not as qjax wrote it; get the folder anew")
    (folder / "qjax.json").write_text(before)
    load_packed(folder)


def test_weights_that_were_changed(folder):
    """A code of another model of the same shape; of a lazy model when its file is first read."""

    def change(tensors):
        name = next(name for name in tensors if name.endswith(".codes"))
        tensors[name].flat[0] ^= 1

    edit_weights(folder, change)
    expect_refusal(folder, "model.safetensors is not as qjax.json tells it")
    lazy = load_packed(folder, lazy=True)
    with pytest.raises(QjaxError, match=r"model\.safetensors is not as qjax\.json tells it"):
        materialised(lazy.params)


def test_values_that_are_not_finite_are_not_written(tmp_path):
    """And a good folder is not given for them."""
    model = quantized_model("int4-g16")
    save(tmp_path / "model", model)
    leaves = flatten(model.params)
    leaves["head/norm/scale"] = leaves["head/norm/scale"].at[3].set(np.nan)
    for write in (save, save_huggingface):
        with pytest.raises(QjaxError, match=r"NaN or infinite values in .*norm.*, which are not written"):
            write(tmp_path / "model", model._replace(params=unflatten(leaves)), overwrite=True)
        assert_equal_models(load_packed(tmp_path / "model"), model)


def test_rows_of_layers_are_not_read(tmp_path):
    """Whatever stands in their place, though the description has their digest."""
    quantize_to(tmp_path / "model", weights_model(tiny_config()), "rtn:int4-g16")
    assert "layers.jsonl" in read_json(tmp_path / "model" / "qjax.json")["digests"]
    (tmp_path / "model" / "layers.jsonl").unlink()
    os.mkfifo(tmp_path / "model" / "layers.jsonl")
    assert load_packed(tmp_path / "model").recipe == "rtn:int4-g16"


def test_a_description_that_claims_to_be_older(folder):
    """What a version without digests would not check is checked where they are there."""
    edit(folder, lambda d: d.update(version=2))
    expect_refusal(folder, "qjax.json is not as qjax wrote it")


def test_a_folder_of_version_2_has_no_digests(folder):
    edit(folder, lambda d: d.update(version=2) or [d.pop(name) for name in ("digest", "digests")])
    assert_equal_models(load_packed(folder), quantized_model("int4-g16", "nf4-g16-dq"))


def test_what_has_no_place_in_a_file_is_refused(tmp_path):
    model = quantized_model("int4-g16")
    leaves = flatten(model.params) | {"head/norm/scale": "text", "head/more": jnp.ones(3)}
    with pytest.raises(QjaxError, match="unexpected head/more; head/norm/scale is a str"):
        save(tmp_path, model._replace(params=unflatten(leaves)))


def test_full_disk(tmp_path):
    """A limit on file sizes fails a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(QjaxError, match=r"cannot write .*model\.safetensors: .*choose a writable folder") as error:
            save(tmp_path / "out", quantized_model("int8-channel"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_files_that_cannot_be_written(tmp_path, monkeypatch, number):
    (tmp_path / "a.txt").write_text("old")

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(QjaxError, match=rf"cannot write .*a\.txt: {os.strerror(number)}"):
        write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_read_only_folder(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(QjaxError, match=r"cannot write .*out: Read-only file system"):
        save(tmp_path / "out", weights_model(tiny_config()))


def test_writing_bytes_text_and_by_function(tmp_path):
    write_atomically(tmp_path / "a", b"\x00\xff")
    write_atomically(tmp_path / "b", "é")
    write_atomically(str(tmp_path / "c"), lambda path: path.write_text("by function"))
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == b"\xc3\xa9"
    assert (tmp_path / "c").read_text() == "by function"
    with pytest.raises(QjaxError, match="No such file or directory"):
        write_atomically(tmp_path / "missing" / "a", b"")


def test_files_are_on_disk_before_they_take_their_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: events.append(name) or call(*args))
    write_atomically(tmp_path / "a", b"content")
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_listing():
    assert files.listing("abc") == "a; b; c"
    assert files.listing("abcdefgh") == "a; b; c; d; e; and 3 more"


def test_fields_of_a_qtensor_are_what_is_stored():
    """A field added to QTensor needs a new version of the files."""
    assert [field.name for field in dataclasses.fields(QTensor)] == ["codes", "scales", "zeros", "format", "in_features"]
    assert is_quantized(quantized_model("int4-g16").params["block_0"]["mlp"]["up"]["kernel"])
