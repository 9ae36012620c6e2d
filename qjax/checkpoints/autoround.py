"""AutoRound's own folders: the packings of GPTQ, AWQ and compressed-tensors under another configuration.

    data_type     packing_format
    int           auto_round:auto_gptq, :gptq; or no packing_format             GPTQ's, version 1
                  auto_round, auto_round:gptqmodel, :exllamav2                  GPTQ's, version 2
                  auto_round:auto_awq, :awq                                     AWQ's gemm
    mx_fp, nv_fp  auto_round:llm_compressor                                     compressed-tensors' MXFP4, MXFP8, NVFP4
    fp            auto_round:fp8_static, auto_round:fp8 or none                 its FP8; in tiles as DeepSeek-V3 has them
    extra_config  name, part or pattern of names of modules -> entries of their own; a whole name comes first

Its symmetric grids of integers are -2^(b-1) .. 2^(b-1) - 1 times a scale of either sign. Inputs are rounded as act_bits and
what goes with it say, but not where weights are integers.
"""

import re

from qjax.activations import Activation, parse_activation
from qjax.checkpoints import awq, gptq
from qjax.checkpoints.compressed_tensors import Weights, module_of
from qjax.checkpoints.fp8 import fp8_module
from qjax.checkpoints.modules import Codec, Module, Stored, matches
from qjax.errors import QjaxError
from qjax.models.config_entries import get
from qjax.untrusted import quoted

VERSIONS = {"auto_gptq": 1, "gptq": 1, "": 2, "gptqmodel": 2, "exllamav2": 2}  # of GPTQ's packing, as its exporter writes it
AWQ = ("auto_awq", "awq")
LEFT = 16  # bits of modules and inputs that are left as they are
ENTRIES = (
    *("bits", "group_size", "sym", "data_type"),
    *("act_bits", "act_group_size", "act_data_type", "act_dynamic"),
)
MX, NV, FP = ("mx_fp", "mx_fp4", "mx_fp8"), ("nv_fp", "nv_fp4", "nv_fp4_with_static_gs"), ("fp", "fp8", "fp8_e4m3")
MX_UP = tuple(f"{kind}_rceil" for kind in MX)
STRATEGIES = {  # data types, bits, group_size -> how compressed-tensors calls it
    (*MX, *MX_UP): {(4, 32): "group", (8, 32): "group"},
    NV: {(4, 16): "tensor_group"},
    FP: {(8, -1): "channel", (8, 0): "tensor"},
}
INPUTS = {  # data types, act_bits, act_group_size, act_dynamic -> our format
    MX: {(4, 32, True): "mxfp4", (8, 32, True): "mxfp8"},
    MX_UP: {(4, 32, True): "mxfp4_ceil", (8, 32, True): "mxfp8_ceil"},
    NV: {(4, 16, True): "nvfp4"},
    FP: {(8, 0, False): "fp8_e4m3-tensor", (8, -1, True): "fp8_e4m3-token", (8, 128, True): "fp8_e4m3-g128"},
}
KINDS = "int; mx_fp of 4 or 8 bits in groups of 32; nv_fp of 4 in groups of 16; fp of 8 by channel, tensor or tiles"


def codec(config: dict) -> Codec:
    """The codec of a quantization_config. Raises QjaxError that names the entry that is malformed or cannot be done."""
    packing = get(config, "packing_format", str, "auto_round:gptq")
    own, _, library = packing.partition(":")
    if own != "auto_round":
        raise QjaxError(f"'packing_format' is {quoted(packing)}; supported: auto_round and what follows it after a colon")
    for name in ("rotation_config", "spinquant_config"):
        if config.get(name):
            raise QjaxError(f"{name!r} rotates inputs, which qjax cannot do here; quantize again without it")
    if get(config, "fmt", str, "e4m3") != "e4m3":
        raise QjaxError(f"'fmt' is {quoted(config['fmt'])}; supported: e4m3")
    said = {name: config[name] for name in ENTRIES if config.get(name) is not None}
    base, extra = _of(said, library), {}
    for name, values in get(config, "extra_config", dict, {}).items():
        if not isinstance(values, dict):
            raise QjaxError(f"'extra_config' has {quoted(values)} for {quoted(name)}; expected settings")
        merged = said | {key: value for key, value in values.items() if key in ENTRIES and value is not None}
        if get(merged, "bits", int) < LEFT:
            extra[name] = _of(merged, library)

    def stored(module: Module) -> Stored | None:
        fitting = (found for name, found in extra.items() if _means(name, module.name))
        return (extra.get(module.name) or next(fitting, base))(module)

    return stored


def _means(name: str, module: str) -> bool:
    """Whether an entry of extra_config is of the module: a pattern of its name, or a part of it between dots."""
    if re.search(r"[*+\\^$|?(\[]", name):
        return matches(name, module, anywhere=True)
    return f".{name}." in f".{module}."


def _of(said: dict, library: str) -> Codec:
    """The codec of modules of these entries."""
    if get(said, "data_type", str, "int") != "int":
        return _floats(said)
    packing, *_ = library.split(":")  # kernels may stand behind it
    if packing not in (*VERSIONS, *AWQ):
        known = ", ".join(filter(None, (*VERSIONS, *AWQ)))
        raise QjaxError(f"'packing_format' is {quoted(library)} of integers; supported: {known}, and auto_round alone")
    if get(said, "act_bits", int, LEFT) < LEFT:
        raise QjaxError(f"'act_bits' is {said['act_bits']}; supported with integers: {LEFT}, inputs as they are")
    entries = {name: said[name] for name in ("bits", "group_size", "sym") if name in said}
    return awq.codec(entries) if packing in AWQ else gptq.codec(entries, bound="full", version=VERSIONS[packing])


def _floats(said: dict) -> Codec:
    kind, bits, activation = said["data_type"], get(said, "bits", int), _activation(said)
    if kind in FP and bits == 8 and isinstance(block := said.get("group_size"), list):
        return lambda module: fp8_module(module, block, activation) if "weight_scale_inv" in module.headers else None
    size = get(said, "group_size", int)
    strategy = next((found.get((bits, size)) for kinds, found in STRATEGIES.items() if kind in kinds), None)
    if strategy is None:
        raise QjaxError(f"'data_type' is {quoted(kind)} of {bits} bits in groups of {size}; supported: {KINDS}")
    weights = Weights("float", bits, True, strategy, max(size, 0), None, False)

    def stored(module: Module) -> Stored | None:
        scale = module.headers.get("weight_scale")
        if scale is not None and strategy == "group" and scale.dtype not in ("U8", "F8_E8M0"):
            raise QjaxError(f"{module.name}: weight_scale is {scale.dtype}, of {kind} expected bytes")
        return None if scale is None else module_of(module, weights, activation)

    return stored


def _activation(said: dict) -> Activation | None:
    """The format of inputs. Raises QjaxError for one that qjax has not."""
    if (bits := get(said, "act_bits", int, LEFT)) >= LEFT:
        return None
    kind, dynamic = get(said, "act_data_type", str, said["data_type"]), get(said, "act_dynamic", bool, True)
    asked = bits, get(said, "act_group_size", int), dynamic
    name = next((found.get(asked) for kinds, found in INPUTS.items() if kind in kinds), None)
    if name is None:
        of = {key: value for key, value in said.items() if key.startswith("act_")}
        raise QjaxError(f"inputs of {quoted(of)}, which qjax cannot do; supported: MXFP4, MXFP8, NVFP4, FP8")
    return parse_activation(name)
