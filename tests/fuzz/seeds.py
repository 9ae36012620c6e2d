"""Small valid inputs, made once a process and without compiling anything."""

import base64
import functools
import json
import struct
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax.activations import parse_activation
from qjax.checkpoints import packed
from qjax.checkpoints.huggingface import save_huggingface
from qjax.linear import Linear, LowRank, Outliers
from qjax.maps import Permute, Scale
from qjax.models.parameters import flatten, unflatten
from tests import foreign, foreign_makers
from tests.conftest import FAMILY_CHANGES, byte_tokenizer, tiny_config
from tests.random_weights import weights_model
from tests.report_rows import early_row, measured_row

PRECOMPILED = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + b"ab\0").decode()  # a trie that knows no text
GROUP = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16, "actorder": "group"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
GROUPS = {"a": {"targets": ["re:.*mlp.*", "Linear"], "weights": GROUP, "input_activations": None}}
TILES = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}, "targets": ["Linear"], "input_activations": FLOAT8}
NVFP4 = {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "targets": ["Linear"]}
FOREIGN = {  # kind -> (settings, maker of `tests.foreign`)
    "gptq": (
        {"quant_method": "gptq", "bits": 3, "group_size": 16, "sym": True, "desc_act": True, "dynamic": {"-:.*gate": {}}},
        functools.partial(foreign.gptq, bits=3, symmetric=True, ordered=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, foreign_makers.awq),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        functools.partial(foreign_makers.bitsandbytes, nested=True),
    ),
    "compressed": (
        {"quant_method": "compressed-tensors", "config_groups": GROUPS, "ignore": ["lm_head"], "kv_cache_scheme": None},
        functools.partial(foreign_makers.integers, symmetric=False, ordered=True),
    ),
    "fp8": ({"quant_method": "compressed-tensors", "config_groups": {"a": TILES}}, foreign_makers.fp8),
    "nvfp4": ({"quant_method": "compressed-tensors", "config_groups": {"a": NVFP4}}, foreign_makers.fp4),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "extra_config": {"lm_head": {"bits": 16}}},
        foreign.gptq,
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        functools.partial(foreign_makers.fp4, whole="weight_scale_2", packed="weight"),
    ),
}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "packed_v1"


@functools.cache
def checkpoint(family: str) -> dict[str, bytes]:
    """Files of a small Hugging Face folder of a family, by name."""
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(folder, weights_model(tiny_config(**FAMILY_CHANGES[family] | {"vocabulary_size": 64})))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def packed_folder(layered: bool) -> dict[str, bytes]:
    """Files of a small packed folder; layered: with a layer of all parts, else of the first version."""
    if not layered:
        return {path.name: path.read_bytes() for path in FIXTURE.iterdir()}
    model = packed.load_packed(FIXTURE)
    leaves = flatten(model.params)
    path = "block_0/attention/o/kernel"  # q is a Linear already
    inputs, outputs = leaves[path].shape
    parts = {
        "inputs": (Scale(jnp.full(inputs, 0.5, jnp.float16)), Permute(jnp.asarray(np.arange(inputs)[::-1], jnp.int32))),
        "activation": parse_activation("int8-tensor"),
        "activation_scale": jnp.float32(0.1),
        "outliers": Outliers(jnp.asarray([3], jnp.int32), jnp.ones((1, outputs), jnp.float16)),
        "adapter": LowRank(jnp.ones((inputs, 2)), jnp.ones((2, outputs)), scaling=0.5),
    }
    model = model._replace(params=unflatten(leaves | {path: Linear(leaves[path], **parts)}))
    with tempfile.TemporaryDirectory() as folder:
        packed.save(folder, model)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def foreign_folder(kind: str) -> dict[str, bytes]:
    """Files of a small folder as another library quantized it."""
    settings, make = FOREIGN[kind]
    with tempfile.TemporaryDirectory() as folder:
        foreign.write(Path(folder) / "a", settings, make(), foreign.llama(vocabulary_size=64))
        return {path.name: path.read_bytes() for path in (Path(folder) / "a").iterdir()}


def models() -> list[dict[str, bytes]]:
    """All small folders."""
    return [*map(checkpoint, FAMILY_CHANGES), packed_folder(False), packed_folder(True), *map(foreign_folder, FOREIGN)]


@functools.cache
def tokenizers() -> list[dict]:
    """Contents of tokenizer.json of several kinds."""
    bpe = json.loads(byte_tokenizer(bos=True).to_json())
    small = {"model": bpe["model"] | {"vocab": dict(list(bpe["model"]["vocab"].items())[:80]), "unk_token": "!"}}
    special = {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    roberta = {"type": "RobertaProcessing", "sep": ["!", 0], "cls": ["!", 0], "trim_offsets": True, "add_prefix_space": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"Regex": "\\s+|[a-z]+"}, "behavior": "Isolated", "invert": False}
    bare = {"added_tokens": [], "post_processor": None}
    return [
        bpe,
        bpe | {"post_processor": {"type": "TemplateProcessing", "single": [a], "pair": [a, b], "special_tokens": special}},
        bpe | small | {"added_tokens": [], "post_processor": roberta},
        bpe
        | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace, {"type": "NFC"}]}},
        bpe
        | {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "!": 2}, "unk_token": "!"}, "pre_tokenizer": split}
        | bare,
        bpe | {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁", -2.0]], "unk_id": 0}} | bare,
        bpe | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": PRECOMPILED}},
        bpe | {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        bpe
        | {
            "decoder": {
                "type": "Sequence",
                "decoders": [replace, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
            }
        },
    ]


@functools.cache
def rows() -> list[dict[str, object]]:
    """Rows of a sweep, of this version and of earlier ones."""
    recipes = ("none", "rtn:int4-g128", "gptq:int3-g128", "nf4", "awq+gptq(damp=0.05):int4-g64@sequential")
    return [make(recipe, 0.01 * i) for make in (measured_row, early_row) for i, recipe in enumerate(recipes)]
