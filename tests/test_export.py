"""checkpoints/{export,targets,shards}.py: what is written for another library is read back with the same codes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.checkpoints.export import export
from qjax.checkpoints.gguf.blocks import KINDS
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.leaves import blank
from qjax.checkpoints.load import load
from qjax.checkpoints.modules import from_bits, leaf_of, pack
from qjax.cli.app import main
from qjax.driver.decoder import quantize
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats import parse_format
from qjax.linear import Linear, dequantize, is_quantized, without_activations
from qjax.maps import Scale
from qjax.models.parameters import flatten, unflatten
from qjax.scales import QuantizedScales, laid
from tests import foreign, foreign_makers
from tests.conftest import FALCON, FAMILY_CHANGES, GPT_NEOX, MIXTRAL, byte_tokenizer, tiny_config
from tests.fuzz import seeds
from tests.random_weights import small_model


def random_leaf(shape, fmt, generator, order=None):
    """A layer of random codes; where its scales are neither plain floats nor nested, of nothing but shapes."""
    if fmt.scales not in ("fp16", "bf16", "fp32", "dq") or not fmt.has_whole_zeros:
        return blank(fmt, *shape)
    groups = fmt.parameter_shape(*shape)
    codes = generator.integers(0, fmt.largest_code + 1, shape[::-1]).astype(np.uint8)
    zeros = generator.integers(0, 2**fmt.bits, groups).astype(np.uint8) if fmt.is_affine else None
    return leaf_of(
        from_bits(pack(codes, fmt.bits), fmt.bits, shape[0]), random_scales(groups, fmt, generator), zeros, fmt, shape[0], order
    )


def random_scales(groups, fmt, generator):
    count = int(np.prod(groups))
    if fmt.scales == "dq":
        blocks = generator.uniform(0.001, 0.002, -(-count // 256)).astype(np.float32)
        return QuantizedScales(generator.integers(0, 256, count, np.uint8), blocks, np.float32(0.015))
    dtype = {"fp16": np.float16, "fp32": np.float32}.get(fmt.scales, jnp.bfloat16)
    return laid(generator.uniform(0.01, 0.02, groups).astype(dtype), fmt.is_flat)


def quantized(config, recipe: dict, *, order=None):
    """A small model whose layers have the formats that `recipe` tells by their names."""
    model, generator = small_model(config, byte_tokenizer()), np.random.default_rng(0)
    leaves = flatten(model.params)
    for path, leaf in leaves.items():
        fmt = next((fmt for word, fmt in recipe.items() if word in path), None) if path.endswith("kernel") else None
        if fmt:
            leaves[path] = random_leaf(leaf.shape, parse_format(fmt), generator, order and order(leaf.shape[0]))
    return model._replace(params=unflatten(leaves), recipe="a test")


def assert_equal(a, b) -> None:
    """The same codes, zero points and orders, and the same scales, in whatever shape and type."""
    a, b = flatten(a.params), flatten(b.params)
    for path, leaf in a.items():
        assert type(leaf) is type(b[path]), path
        if isinstance(leaf, Linear):
            np.testing.assert_array_equal(leaf.inputs[0].index, b[path].inputs[0].index, path)
            leaf, b[path] = leaf.weight, b[path].weight  # noqa: PLW2901
        for field in ("codes", "zeros"):
            if getattr(leaf, field, None) is not None:
                np.testing.assert_array_equal(getattr(leaf, field), getattr(b[path], field), path)
        if hasattr(leaf, "scales"):
            assert_same_scales(leaf.scales, b[path].scales, path)
        if not hasattr(leaf, "codes"):
            np.testing.assert_array_equal(leaf, b[path], path)


def assert_same_scales(a, b, said="") -> None:
    if isinstance(a, QuantizedScales):
        jax.tree.map(np.testing.assert_array_equal, a, b)
        return
    a, b = (laid(np.asarray(each, np.float32), flat=a.ndim != b.ndim) for each in (a, b))
    np.testing.assert_array_equal(a, b, said)


CASES = {
    "gptq": ("gptq_v2", {"": "int4-g32"}),
    "gptq v1, zero points of 0 among them": ("gptq", {"mlp": "int4-g16"}),
    "gptq 3 bits sym": ("gptq", {"block": "int3-channel-sym"}),
    "gptq of several bits": ("gptq_v2", {"mlp/down": "int8-g16", "mlp": "int2-g32", "attention": "int4-g32"}),
    "ct": ("compressed-tensors", {"block": "int4-g32-sym-bf16"}),
    "ct asym of several bits": ("compressed-tensors", {"mlp": "int3-g16", "attention/o": "int5-channel"}),
    "awq": ("awq", {"block": "int4-g32"}),
    "nf4": ("bitsandbytes", {"mlp/down": "nf4-b32", "mlp": "nf4-g64"}),
    "fp4": ("bitsandbytes", {"": "fp4_bnb-b64-dq"}),
}


@pytest.mark.parametrize("case", CASES)
def test_reading_back_gives_the_same_codes(case, tmp_path):
    to, recipe = CASES[case]
    model = quantized(foreign.llama(vocabulary_size=288), recipe)
    export(tmp_path / "a", model, to)
    back = load(tmp_path / "a")
    assert_equal(model, back)
    assert back.tokenizer is not None and back.recipe.startswith(f"{to.split('_')[0]} checkpoint: ")


def test_inputs_in_another_order(tmp_path):
    model = quantized(foreign.llama(), {"block": "int4-g16"}, order=np.random.default_rng(0).permutation)
    with pytest.raises(QjaxError, match=r"compressed-tensors cannot hold .*groups of inputs in another order"):
        export(tmp_path / "a", model, "compressed-tensors")
    export(tmp_path / "a", model, "gptq_v2")
    leaves, back = flatten(model.params), flatten(load(tmp_path / "a").params)
    for path, leaf in leaves.items():  # the order within a group is not the file's
        if isinstance(leaf, Linear):
            np.testing.assert_array_equal(dequantize(leaf), dequantize(back[path]), path)
            np.testing.assert_array_equal(leaf.weight.scales, back[path].weight.scales, path)


def test_layers_stored_side_by_side(tmp_path):
    model = quantized(tiny_config(**GPT_NEOX | {"layers": 1, "mlp_size": 64}), {"block": "int4-g16"})
    for to, head in (("gptq_v2", "lm_head"), ("compressed-tensors", "embed_out")):  # as modules are called, and as files do
        export(tmp_path / to, model, to)
        assert f"{head}.weight" in load_file(tmp_path / to / "model.safetensors")
        assert_equal(model, load(tmp_path / to))
    path = tmp_path / "gptq_v2/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"embed_out.weight": tensors["lm_head.weight"]}, path)
    with pytest.raises(QjaxError, match=r"unexpected lm_head\.weight"):  # not one of two heads without a word
        load(tmp_path / "gptq_v2")
    phi3 = quantized(tiny_config(family="phi3", layers=1, mlp_size=64), {"block": "int4-g16"})
    with pytest.warns(QjaxWarning, match="awq of phi3: GPTQModel 7 looks for its gate_up_proj by other names"):
        export(tmp_path / "awq", phi3, "awq")
    assert_equal(phi3, load(tmp_path / "awq"))
    blocks = quantized(tiny_config(**GPT_NEOX | {"layers": 1}), {"block": "nf4-b32"})
    export(tmp_path / "b", blocks, "bitsandbytes")
    assert_equal(blocks, load(tmp_path / "b"))
    nested = quantized(tiny_config(**GPT_NEOX | {"layers": 1}), {"block": "nf4-g32-dq"})
    with pytest.raises(QjaxError, match=r"query_key_value: parts .* have scales that columns share .* fit: rtn:nf4-g32,"):
        export(tmp_path / "c", nested, "bitsandbytes")
    settings = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["embed_out", "lm_head"]  # as transformers calls it


@pytest.mark.parametrize(
    ("changes", "targets", "reason"),
    [
        (FAMILY_CHANGES["gpt2"], ("awq", "compressed-tensors"), "of gpt2: transformers keeps them as Conv1D"),
        (GPT_NEOX, ("awq",), "of gpt_neox: what reads them divides what activations give by scales"),
        (FALCON, ("bitsandbytes", "compressed-tensors"), "of falcon: transformers multiplies with their weights itself"),
        (MIXTRAL, ("bitsandbytes",), "of mixtral: transformers keeps experts as one tensor"),
    ],
)
def test_what_no_library_would_run_is_refused(changes, targets, reason, tmp_path):
    model, _ = quantize(small_model(tiny_config(**changes | {"layers": 1})), "int4-g32")
    for to in targets:
        with pytest.raises(QjaxError, match=f"{to} cannot hold layers {reason}"):
            export(tmp_path / "c", model, to)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("recipe", "to", "part"),
    [
        (
            {"mlp/down": "int4-g48"},
            "gptq",
            "groups of 48 of 64 inputs; a power of two .* the nearest recipes that fit: rtn:int4-g32",
        ),
        ({"mlp/down": "nf4-g64"}, "gptq", "nf4-g64 is not of integers of 2, 3, 4, 8 bits .* fit: rtn:int4-g64, gptq:int4-g64"),
        ({"mlp/down": "int4-g32-z16"}, "gptq", "no place for"),
        ({"mlp/down": "int5-g32"}, "gptq", "is not of integers .* rtn:int4-g32"),
        ({"mlp/down": "int4-g32-fp32"}, "gptq_v2", "scales are float16; .* rtn:int4-g32"),
        ({"mlp/down": "int4-g32-dq"}, "compressed-tensors", "no place for"),
        ({}, "gptq", "no layer is quantized"),
        ({"mlp/down": "int4-g32-fp32"}, "awq", "scales are float16; .* fit: rtn:int4-g32, gptq:int4-g32"),
        ({"mlp/down": "int4-g32", "mlp/up": "int4-g16"}, "awq", "cannot hold groups of 16 and 32 in one model"),
        ({"head": "int4-g32"}, "awq", r"a quantized head \(lm_head\); leave the head as it is"),
        ({"mlp/down": "int8-g32"}, "awq", "is not of integers of 4 bits .* fit: rtn:int4-g32"),
        ({"mlp/down": "int4-g48"}, "bitsandbytes", "none of nf4, fp4_bnb or int8; the nearest recipes that fit: rtn:nf4-g32"),
        ({"mlp/down": "nf4-g48"}, "bitsandbytes", "nf4-g48 of 64 inputs; blocks of 32, .* fit: rtn:nf4-g32"),
        ({"mlp/down": "int8-g32"}, "bitsandbytes", "int8 is symmetric, .* fit: rtn:int8-channel-sym-max"),
        ({"mlp/down": "int8-channel-sym", "mlp/up": "nf4-g64"}, "bitsandbytes", "layers of several kinds in one model"),
        ({"mlp/down": "int4-g32"}, "ggml", "expected gptq, gptq_v2, compressed-tensors, awq, bitsandbytes, gguf"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(recipe, to, part, tmp_path):
    model = quantized(foreign.llama(vocabulary_size=288), recipe)
    with pytest.raises(QjaxError, match=part):
        export(tmp_path / "a", model, to)
    assert not (tmp_path / "a").exists()


def test_what_a_layer_does_besides_is_refused(tmp_path):
    model = quantized(foreign.llama(), {"mlp/down": "int4-g32"})
    leaves = flatten(model.params)
    path = "block_0/mlp/down/kernel"
    for parts, named in (
        ({"inputs": (Scale(jnp.ones(64, jnp.float16)),)}, "Scale"),
        ({"activation": "int8-token"}, "activation"),
    ):
        changed = model._replace(params=unflatten(leaves | {path: Linear(leaves[path], **parts)}))
        with pytest.raises(QjaxError, match=f"the layer does more to its input: {named}"):
            export(tmp_path / "a", changed, "gptq")


def test_awq_beside_shared_values(tmp_path):
    """Whose scale for `o` no layer before takes: the rule that the refusal names leaves it out."""
    model, tokens = small_model(foreign.llama(kv_heads=2)), np.arange(64, dtype=np.int32).reshape(2, 32)
    found, _ = quantize(model, "awq:int4-g32@parallel", calibration=tokens)
    with pytest.raises(QjaxError, match=r"o_proj: .* Scale; .* with the rule") as refusal:
        export(tmp_path / "a", found, "awq")
    rule = re.search(r"rule '(attention/o=.*)'", str(refusal.value))[1]
    found, _ = quantize(model, "awq:int4-g32@parallel", calibration=tokens, rules=[rule])
    export(tmp_path / "a", found, "awq")
    assert_equal(found, load(tmp_path / "a"))


def run(arguments, code=0):
    """A command, to its end."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == code


def test_the_commands(tmp_path, capsys):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    expected = foreign.write(tmp_path / "a", settings, foreign.gptq(group=32))
    (tmp_path / "a/special_tokens_map.json").write_text("{}")
    run(["export", str(tmp_path / "a"), "--to", "gptq_v2", "--out", str(tmp_path / "b")])
    foreign.assert_stands_for(load(tmp_path / "b"), expected)
    run(["dequantize", str(tmp_path / "b"), "--dtype", "fp32", "--out", str(tmp_path / "c"), "--shard-size", "0.00002"])
    plain = load(tmp_path / "c")
    foreign.assert_stands_for(plain, expected)
    assert plain.recipe == "none" and "quantization_config" not in json.loads((tmp_path / "c/config.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert json.loads((tmp_path / "c/model.safetensors.index.json").read_text())["metadata"]["total_size"] > 20_000
    assert (tmp_path / "b/special_tokens_map.json").exists()
    run(["dequantize", str(tmp_path / "a"), "--dtype", "int8", "--out", str(tmp_path / "d")], code=2)
    assert "expected fp32, bf16, fp16" in capsys.readouterr().err


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True}


@pytest.mark.filterwarnings("ignore:the checkpoint's weights are read")
@pytest.mark.parametrize(
    ("settings", "maker", "to"),
    [
        (AWQ, foreign_makers.awq(), "gptq_v2"),
        (GPTQ, foreign.gptq(bits=8, group=32, symmetric=True), "gguf"),
        (GPTQ, foreign.gptq(bits=8, group=-1, symmetric=True), "bitsandbytes"),
    ],
)
def test_from_one_librarys_files_to_anothers(settings, maker, to, tmp_path):
    group = {"group_size": -1} if to == "bitsandbytes" else {}
    expected = foreign.write(tmp_path / "a", settings | group, maker)
    out = tmp_path / ("b.gguf" if to == "gguf" else "b")
    run(["convert", str(tmp_path / "a"), "--to", to, "--out", str(out)])
    assert_equal(load(tmp_path / "a"), load(out))
    if to == "gptq_v2":
        foreign.assert_stands_for(load(out), expected)


def test_what_would_have_to_be_rounded_anew_is_refused(tmp_path, capsys):
    export(tmp_path / "a", quantized(foreign.llama(vocabulary_size=288), {"mlp": "nf4-g64"}), "bitsandbytes")
    run(["convert", str(tmp_path / "a"), "--to", "gptq", "--out", str(tmp_path / "b")], code=2)
    said = capsys.readouterr().err
    assert f"to round it anew: qjax dequantize {tmp_path / 'a'} --out PLAIN, then qjax quantize PLAIN" in said
    assert "gptq cannot hold model.layers.0.mlp.gate_proj: nf4-b64 is not of integers" in said


@pytest.mark.parametrize("scales", ["bf16", "fp32"])
def test_scales_that_float16_holds_become_float16(scales, tmp_path):
    model = quantized(foreign.llama(vocabulary_size=288), {"mlp": f"int4-g32-sym-{scales}"})
    leaves = flatten(model.params)
    if scales == "fp32":  # where they are not random, and one is beyond float16
        with pytest.raises(QjaxError, match="scales are float16"):
            export(tmp_path / "a", model, "awq")
        for path, leaf in leaves.items():
            if hasattr(leaf, "codes"):
                leaves[path] = dataclasses.replace(leaf, scales=jnp.asarray(leaf.scales, jnp.float16).astype(jnp.float32))
        model = model._replace(params=unflatten(leaves))
    export(tmp_path / "a", model, "awq")
    assert_equal(model, load(tmp_path / "a"))


def test_a_sweep_from_one_librarys_files_to_anothers(tmp_path, capsys):
    """A folder of bitsandbytes' measured as it is, differences from a GGUF file that stands for other weights; each evaluated
    alone too.
    """
    config = foreign.llama(vocabulary_size=288, context=32)
    export(tmp_path / "nf4", quantized(config, {"mlp": "nf4-g64"}), "bitsandbytes")
    export(tmp_path / "q8.gguf", quantized(config, {"mlp": "int8-g32-sym-max"}), "gguf")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    words = ["--recipes", "none", "--baseline", str(tmp_path / "q8.gguf"), "--data", f"text:{tmp_path / 'text.txt'}"]
    run(["sweep", str(tmp_path / "nf4"), *words, "--convention", "windows-32", "--out", str(tmp_path / "out")])
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert {row["model"]: row["model_recipe"] for row in rows} == {
        "q8": "gguf file: int8-g32-sym-max",
        "nf4": "bitsandbytes checkpoint: nf4-b64",
    }
    assert all(row["baseline"] == "q8" for row in rows) and rows[0]["nll"] != rows[1]["nll"]
    for row in rows:
        place = tmp_path / {"q8": "q8.gguf", "nf4": "nf4"}[row["model"]]
        capsys.readouterr()
        run(["eval", str(place), "--data", f"text:{tmp_path / 'text.txt'}", "--convention", "windows-32"])
        assert f"perplexity {row['perplexity']:.4f}" in capsys.readouterr().out


def test_a_gguf_file_is_dequantized(tmp_path):
    """Matrices of every type of blocks, to the values that they stand for; the tokenizer goes with them."""
    (tmp_path / "a.gguf").write_bytes(seeds.gguf_file(False)["tiny.gguf"])
    run(["dequantize", str(tmp_path / "a.gguf"), "--dtype", "fp32", "--out", str(tmp_path / "b")])
    there, here = load(tmp_path / "a.gguf"), load(tmp_path / "b")
    assert here.recipe == "none" and {str(leaf.dtype) for leaf in flatten(here.params).values()} == {"float32"}
    formats = {leaf.format for leaf in flatten(there.params).values() if is_quantized(leaf)}
    assert {kind.format for kind in KINDS.values()} == set(map(str, formats))
    for path, leaf in flatten(there.params).items():
        leaf = dequantize(leaf) if is_quantized(leaf) else leaf  # noqa: PLW2901
        np.testing.assert_array_equal(flatten(here.params)[path], leaf, path)
    assert here.tokenizer.encode("The end.").tolist() == there.tokenizer.encode("The end.").tolist()


def test_dequantized_weights_are_in_the_type_asked_for(tmp_path):
    model = quantized(foreign.llama(), {"mlp": "int4-g32"})
    save_huggingface(tmp_path / "a", model, dtype="bfloat16")
    tensors = load_file(tmp_path / "a/model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(jnp.bfloat16)}
    here = dequantize(flatten(model.params)["block_0/mlp/up/kernel"], jnp.bfloat16)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], np.asarray(here).T)


def test_a_command_leaves_out_what_layers_do_to_their_inputs(tmp_path, capsys):
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    expected = foreign.write(tmp_path / "a", settings, foreign_makers.fp8(kind="block", name="weight_scale_inv"))
    run(["dequantize", str(tmp_path / "a"), "--dtype", "fp32", "--out", str(tmp_path / "b")])
    assert "left out: layers round their inputs (fp8_e4m3-g128)" in capsys.readouterr().err
    tensors = load_file(tmp_path / "b/model.safetensors")
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)
    assert flatten(without_activations(load(tmp_path / "a").params))["block_0/mlp/up/kernel"].activation is None


FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
BESIDES = {  # name -> (settings, the file they are in, maker, more tensors, what is left out)
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"targets": ["Linear"], "weights": INT4, "input_activations": INT4 | {"symmetric": False}}},
            "kv_cache_scheme": FP8_CACHE,
        },
        "quantization_config",
        foreign_makers.integers(),
        {"model.layers.0.self_attn.k_scale": np.float32([1]), "model.layers.0.self_attn.v_scale": np.float32([1])},
        "kv_cache_scheme, input_activations, k_scale, v_scale",
    ),
    "a cache alone": (
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FP8_CACHE},
        "quantization_config",
        lambda module, weight: None,
        {"model.layers.0.self_attn.k_scale": np.float32([1]), "model.layers.0.self_attn.v_scale": np.float32([1])},
        "kv_cache_scheme, k_scale, v_scale",
    ),
    "modelopt": (
        {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        "hf_quant_config.json",
        lambda module, weight: foreign_makers.fp4(
            whole="weight_scale_2",
            packed="weight",
            more={"input_scale": np.float32(2e-3)} | ({"k_scale": np.float32(1)} if module.endswith("k_proj") else {}),
        )(module, weight),
        {},
        "kv_cache_quant_algo, input_scale, k_scale",
    ),
}


@pytest.mark.filterwarnings("default::qjax.errors.QjaxWarning")
@pytest.mark.parametrize("name", BESIDES)
def test_weights_are_written_without_what_a_folder_says_of_inputs_and_caches(name, tmp_path, capsys):
    settings, where, make, more, said = BESIDES[name]
    expected = foreign.write(tmp_path / "a", settings, make, name=where)
    if more:
        foreign.change(tmp_path / "a", lambda tensors: tensors.update(more))
    with pytest.raises(QjaxError, match=r"which qjax cannot do; .*; `qjax dequantize` writes the weights without it"):
        load(tmp_path / "a")
    run(["dequantize", str(tmp_path / "a"), "--dtype", "fp32", "--out", str(tmp_path / "b")])
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 1 and told[0].endswith(f"left out is what it says of inputs, outputs or the cache: {said}")
    tensors = load_file(tmp_path / "b/model.safetensors")
    assert not any(tensor.endswith("_scale") for tensor in tensors)
    for tensor, value in expected.items():
        np.testing.assert_array_equal(tensors[tensor], value)
    assert load(tmp_path / "b").recipe == "none"


def test_info_of_what_another_library_quantized(tmp_path, capsys):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    foreign.write(tmp_path / "a", settings, foreign.gptq(group=32, symmetric=True))
    run(["info", str(tmp_path / "a")])
    assert "as it is stored, gptq checkpoint: int4-g32-sym: 4.500 bits per quantized weight" in capsys.readouterr().out


def test_values_that_a_type_does_not_hold_are_refused(tmp_path):
    """Nothing is written; bfloat16 holds them."""
    model = small_model(tiny_config())
    leaves = flatten(model.params)
    leaves["block_0/mlp/up/kernel"] = leaves["block_0/mlp/up/kernel"].astype(jnp.float32).at[0, 0].set(1e6)
    large = model._replace(params=unflatten(leaves))
    with pytest.raises(QjaxError, match=r"block_0/mlp/up/kernel has values that float16 does not hold; write it in bfloat16"):
        save_huggingface(tmp_path / "a", large, dtype="float16")
    assert not any(tmp_path.iterdir())
    save_huggingface(tmp_path / "a", large, dtype="bfloat16")


def test_a_table_in_codes_is_written_as_numbers_with_a_warning(tmp_path):
    recipe, rule = "rtn:int4-g32", "embed*=rtn:int8-g32-sym-max"
    model, _ = quantize(small_model(foreign.llama(vocabulary_size=288)), recipe, rules=[rule])
    with pytest.warns(
        QjaxWarning, match="gptq has no place for codes of embed/tokens/embedding, which are written as numbers in float32"
    ):
        export(tmp_path / "a", model, "gptq")
    table = flatten(load(tmp_path / "a").params)["embed/tokens/embedding"]
    np.testing.assert_array_equal(table, dequantize(flatten(model.params)["embed/tokens/embedding"]))
