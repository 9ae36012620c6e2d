"""AutoRound's own folders: the packings of GPTQ and AWQ under another configuration.

    packing_format  auto_round, auto_round:auto_gptq, :gptqmodel, :exllamav2 ...  GPTQ's, version 1
                    auto_round:auto_awq                                           AWQ's gemm
    extra_config    name or pattern of modules -> bits, group_size, sym of their own

Its symmetric grids are -2^(b-1) .. 2^(b-1) - 1 times a scale of either sign.
"""

import re

from qjax.checkpoints import awq, gptq
from qjax.checkpoints.modules import Codec, Module, Stored, matches
from qjax.errors import QjaxError
from qjax.models.config_entries import get
from qjax.untrusted import quoted

LEFT = 16  # bits of modules that are left as they are


def codec(config: dict) -> Codec:
    """The codec of a quantization_config. Raises QjaxError that names the entry that is malformed or cannot be done."""
    packing = get(config, "packing_format", str, "auto_round:auto_gptq")
    own, _, library = packing.partition(":")
    if own != "auto_round" or any(word in library for word in ("fp8", "llm_compressor", "mx", "nv")):
        raise QjaxError(f"'packing_format' is {quoted(packing)}; supported: auto_round, with auto_gptq, gptqmodel or auto_awq")
    if (kind := get(config, "data_type", str, "int")) != "int":
        raise QjaxError(f"'data_type' is {quoted(kind)}; supported: int")
    if get(config, "act_bits", int, LEFT) < LEFT:
        raise QjaxError(f"'act_bits' is {config['act_bits']}; supported: {LEFT}, inputs as they are")
    if config.get("rotation_config"):
        raise QjaxError("'rotation_config' rotates inputs, which qjax cannot do here; quantize again without it")
    make = awq.codec if "awq" in library else lambda said: gptq.codec(said, bound="full", version=1)
    said = {name: config[name] for name in ("bits", "group_size", "sym") if name in config}
    base, extra = make(said), _extra(config, said, make)

    def stored(module: Module) -> Stored | None:
        own = next((found for name, found in extra if _means(name, module.name)), base)
        return own(module)

    return stored


def _extra(config: dict, said: dict, make) -> list[tuple[str, Codec]]:
    found = []
    for name, values in get(config, "extra_config", dict, {}).items():
        if not isinstance(values, dict):
            raise QjaxError(f"'extra_config' has {quoted(values)} for {quoted(name)}; expected settings")
        if get(values, "bits", int, said.get("bits")) < LEFT:
            found.append(
                (name, make(said | {key: value for key, value in values.items() if key in ("bits", "group_size", "sym")}))
            )
    return found


def _means(name: str, module: str) -> bool:
    """Whether an entry of extra_config is of the module: its name, or a pattern."""
    return name == module or (re.search(r"[*+\\^$|]", name) is not None and matches(name, module))
