"""Small valid inputs, made once a process and without compiling anything."""

import base64
import functools
import itertools
import json
import math
import struct
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax.activations import parse_activation
from qjax.checkpoints import packed
from qjax.checkpoints.gguf.container import read_bytes_of, read_contents
from qjax.checkpoints.gguf.export import export_gguf
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.peft import save_adapter
from qjax.linear import Linear, LowRank, Outliers
from qjax.maps import Permute, Scale
from qjax.models.model import Model
from qjax.models.parameters import flatten, parameter_shapes, unflatten
from qjax.train.log import ROWS, step_log
from qjax.train.loop import Told, TrainConfig, TrainState, checkpoints, claim, init_state, make_optimizer, save
from qjax.train.merge import write_base
from tests import foreign, foreign_makers
from tests.conftest import FAMILY_CHANGES, FURTHER_CHANGES, MIXTRAL, byte_tokenizer, tiny_config
from tests.gguf_files import ARCHITECTURES, FURTHER, file_bytes, model_tensors, model_values, random_rows
from tests.random_weights import weights_model
from tests.report_rows import early_row, measured_row

CHECKPOINTS = {  # name -> what makes `tiny_config` a model whose Hugging Face folder is read
    **FAMILY_CHANGES,
    **FURTHER_CHANGES,
    **{name: FURTHER[name] for name in ("phi3", "phi3, longrope", "falcon, two norms")},
    "mixtral": MIXTRAL,
    "qwen3_moe": MIXTRAL | {"family": "qwen3_moe", "qk_norm": "head"},
}
ADAPTED = {  # family -> the configuration that a small adapter is for
    family: tiny_config(**FAMILY_CHANGES[family] | {"vocabulary_size": 64}) for family in ("llama", "gpt2", "gpt_neox")
}
RUN = {"base": "0123456789abcdef", "adapters": {"rank": 2, "target": ["q"]}, "tokens": "fedcba9876543210"}  # what a training is
PRECOMPILED = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + b"ab\0").decode()  # a trie that knows no text
GROUP = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16, "actorder": "group"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
GROUPS = {"a": {"targets": ["re:.*mlp.*", "Linear"], "weights": GROUP, "input_activations": None}}
PADDED = {"a": {"targets": ["Linear"], "weights": {**GROUP, "num_bits": 3, "symmetric": True, "actorder": None}}}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
INT8 = {"weights": {"num_bits": 8, "strategy": "channel"}, "targets": ["Linear"], "input_activations": TOKENS}
CHANNELS = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "targets": ["Linear"],
    "input_activations": FLOAT8,
}
FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
NVFP4 = {"weights": FLOAT4, "targets": ["Linear"], "input_activations": FLOAT4 | {"dynamic": "local"}}
FOREIGN = {  # kind -> (settings, maker of `tests.foreign`)
    "gptq": (
        {"quant_method": "gptq", "bits": 3, "group_size": 16, "sym": True, "desc_act": True, "dynamic": {"-:.*gate": {}}},
        functools.partial(foreign.gptq, bits=3, symmetric=True, ordered=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, foreign_makers.awq),
    "awq gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        functools.partial(foreign_makers.awq, group=32, version="gemv"),
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        functools.partial(foreign_makers.bitsandbytes, nested=True),
    ),
    "bitsandbytes' fp4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        functools.partial(foreign_makers.bitsandbytes, kind="fp4", block=128),
    ),
    "bitsandbytes' int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
        foreign_makers.int8,
    ),
    "compressed": (
        {"quant_method": "compressed-tensors", "config_groups": GROUPS, "ignore": ["lm_head"], "kv_cache_scheme": None},
        functools.partial(foreign_makers.integers, symmetric=False, ordered=True),
    ),
    "compressed of old": (
        {"quant_method": "compressed-tensors", "config_groups": PADDED, "format": "pack-quantized"},
        functools.partial(foreign_makers.integers, bits=3, padded=True),
    ),
    "compressed int8": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": INT8}, "format": "int-quantized"},
        functools.partial(foreign_makers.integers, bits=8, group=-1, packed=False, dtype=np.float32),
    ),
    "fp8": ({"quant_method": "compressed-tensors", "config_groups": {"a": CHANNELS}}, foreign_makers.fp8),
    "fp8 tiles": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        functools.partial(foreign_makers.fp8, kind="block", name="weight_scale_inv"),
    ),
    "nvfp4": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": NVFP4}},
        functools.partial(foreign_makers.fp4, more={"input_global_scale": np.float32([500])}),
    ),
    "auto-round's mx": (
        {
            **{"quant_method": "auto-round", "data_type": "mx_fp", "bits": 4, "group_size": 32},
            **{"act_bits": 4, "act_group_size": 32, "act_dynamic": True},
            "extra_config": {"k_proj.*": {"act_bits": 16, "act_group_size": [1]}},
        },
        functools.partial(foreign_makers.fp4, kind="mxfp4"),
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "extra_config": {"lm_head": {"bits": 16}}},
        foreign.gptq,
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        functools.partial(foreign_makers.fp4, whole="weight_scale_2", packed="weight", more={"input_scale": np.float32(2e-3)}),
    ),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, foreign_makers.experts),
}
CONFIGS = {  # of kinds that the small Llama does not fit
    "mxfp4": foreign.gpt_oss(vocabulary_size=64),
    "fp8 tiles": foreign.llama(vocabulary_size=64, hidden_size=160, mlp_size=136, head_dim=40),
}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "packed_v1"


@functools.cache
def checkpoint(name: str) -> dict[str, bytes]:
    """Files of a small Hugging Face folder of those in CHECKPOINTS."""
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(folder, weights_model(tiny_config(**CHECKPOINTS[name] | {"vocabulary_size": 64})))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def adapted(family: str) -> Model:
    """The model that a small adapter is of."""
    return weights_model(ADAPTED[family])


@functools.cache
def adapter(family: str) -> dict[str, bytes]:
    """Files of a small adapter of PEFT's layout, with patterns, for that model."""
    config, found = ADAPTED[family], {}
    for path, (rank, scaling) in {
        "block_0/mlp/up": (2, 1.0),
        "block_1/mlp/up": (3, 1.0),
        "block_0/attention/q": (2, 4.0),
    }.items():
        inputs, outputs = parameter_shapes(config)[f"{path}/kernel"]
        found[f"{path}/kernel"] = LowRank(jnp.ones((inputs, rank)), jnp.ones((rank, outputs)), scaling=scaling)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder, config, found)
        write_base(Path(folder), adapted(family), "loftq")
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def state() -> TrainState:
    """The state of a small training before its first step."""
    trained = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}
    return init_state(trained, make_optimizer(TrainConfig(steps=4)))


@functools.cache
def training() -> dict[str, bytes]:
    """Files of a small training that was stopped after two steps, by their path in its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        claim(folder, RUN)
        log = step_log(folder / ROWS)
        with checkpoints(folder / "steps") as manager:
            for step in (1, 2):
                log(Told(step, 2.5, 0.1, 1e-4, 100.0, 9.0))
                save(manager, state()._replace(step=jnp.int32(step)))
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
        foreign.write(Path(folder) / "a", settings, make(), CONFIGS.get(kind, foreign.llama(vocabulary_size=64)))
        return {path.name: path.read_bytes() for path in (Path(folder) / "a").iterdir()}


def models() -> list[dict[str, bytes]]:
    """All small folders."""
    ours = [packed_folder(False), packed_folder(True), gguf_file(False), gguf_file(True), gguf_files()]
    return [*map(checkpoint, CHECKPOINTS), *ours, *map(foreign_folder, FOREIGN)]


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


GGUF_SIZES = {"vocabulary_size": 300, "hidden_size": 256, "kv_heads": 1, "heads": 2, "head_dim": 32, "mlp_size": 32}
GGUF_KINDS = {  # size of a matrix' rows -> types
    256: ("Q4_K", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "F16", "BF16", "Q4_0", "Q5_1", "IQ4_NL", "MXFP4", "Q4_1"),
    64: ("Q4_0", "IQ4_NL"),
    32: ("Q5_0", "Q8_0"),
}


@functools.cache
def gguf_parts(sentencepiece: bool) -> tuple[dict, dict]:
    """Values and tensors of a small GGUF file, whose matrices are of all types, with a tokenizer of either kind."""
    model = weights_model(tiny_config(**GGUF_SIZES))
    values, tensors = model_values(model), model_tensors(model)
    kinds = {size: itertools.cycle(each[::-1] if sentencepiece else each) for size, each in GGUF_KINDS.items()}
    for name, (_, shape, content) in tensors.items():
        if len(shape) < 2:
            continue
        kind = next(kinds[shape[-1]])
        if kind in ("F16", "BF16"):
            narrow = np.frombuffer(content, np.float32).astype(np.float16 if kind == "F16" else jnp.bfloat16)
            tensors[name] = (kind, shape, narrow.tobytes())
        else:
            tensors[name] = (kind, shape, random_rows(kind, *shape).tobytes())
    letters = list(json.loads(byte_tokenizer().to_json())["model"]["vocab"])
    tokens = ["<unk>", "<s>", "</s>", *letters, "aa", "ab"]
    types = np.array([2, 3, 3, *[1] * (len(tokens) - 3)], np.int32)
    own = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": types, "merges": ["a a", "a b"]}
    if sentencepiece:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "aa", "  "]
        scores = -np.arange(len(tokens), dtype=np.float32)
        own = {
            "model": "llama",
            "tokens": tokens,
            "scores": scores,
            "token_type": np.array([1] * (len(tokens) - 1) + [4], np.int32),
        }
    own |= {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True, "unknown_token_id": 0}
    return values | {f"tokenizer.ggml.{key}": value for key, value in own.items()}, tensors


@functools.cache
def gguf_written(case: str) -> tuple[dict, dict]:
    """Values and tensors of the file that a small model of an architecture is written as."""
    model = weights_model(tiny_config(**ARCHITECTURES[case] | {"vocabulary_size": 300}), byte_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        export_gguf(path, model)
        values, infos = read_contents(path)
        floats = {name: read_bytes_of(info, 4 * math.prod(info.shape)).tobytes() for name, info in infos.items()}
        return values, {name: ("F32", info.shape, floats[name]) for name, info in infos.items()}


def gguf_file(sentencepiece: bool) -> dict[str, bytes]:
    """The file of these parts, in a folder."""
    return {"tiny.gguf": file_bytes(*gguf_parts(sentencepiece))}


def gguf_halves() -> list[tuple[dict, dict]]:
    """Values and tensors of the two files that such a model is split into."""
    values, tensors = gguf_parts(False)
    split = {"split.count": 2, "split.tensors.count": len(tensors)}
    names = list(tensors)
    halves = [{name: tensors[name] for name in each} for each in (names[:9], names[9:])]
    return [(values | split | {"split.no": 0}, halves[0]), (split | {"split.no": 1}, halves[1])]


def gguf_files() -> dict[str, bytes]:
    """These files, in a folder."""
    return {f"tiny-0000{number}-of-00002.gguf": file_bytes(*half) for number, half in enumerate(gguf_halves(), 1)}


@functools.cache
def rows() -> list[dict[str, object]]:
    """Rows of a sweep, of this version and of earlier ones."""
    recipes = ("none", "rtn:int4-g128", "gptq:int3-g128", "nf4", "awq+gptq(damp=0.05):int4-g64@sequential")
    found = [make(recipe, 0.01 * i) for make in (measured_row, early_row) for i, recipe in enumerate(recipes)]
    return [*found, *tuned_rows(), measured_row("rtn:int4-g128 kv:int4-g32", 0.01, cache="int4-g32")]


def tuned_rows() -> list[dict[str, object]]:
    """The row of a model as it is and of a recipe, with a divergence and a task."""
    of_model = {
        "accuracy:piqa": 0.75,
        "questions:piqa": 4,
        "gold:piqa": [0, 1, 1, 0],
        "answers:piqa": [0, 1, 1, 1],
        "kl": 0.0,
        "kl_stderr": 0.0,
        "documents": 8,
    }
    of_recipe = of_model | {"kl": 0.02, "kl_stderr": 0.004, "routed": 0.5}
    of_recipe |= {"accuracy_delta:piqa": -0.01, "accuracy_delta_low:piqa": -0.02, "accuracy_delta_high:piqa": 0.0}
    return [measured_row("none", **of_model), measured_row("rtn:int4-g128", 0.01, **of_recipe)]
