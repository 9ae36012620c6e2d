"""NVFP4 as NVIDIA's ModelOpt stores it.

    weight          uint8 (out, in / 2)      E2M1 pairs
    weight_scale    E4M3 (out, in / 16)      times weight_scale_2, one float32 of the weight

What it says of inputs (input_scale: W4A4) and of the cache of keys and values cannot be done, and is refused.
"""

import math

import numpy as np

from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import Arrays, Codec, Module, Stored, leaf_of
from qjax.checkpoints.small_floats import e4m3, fp4_codes
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.models.config_entries import get
from qjax.scales import ScaledFloats
from qjax.untrusted import quoted

ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
GROUP = 16


def codec(config: dict) -> Codec:
    """The codec of a quantization_config, or of hf_quant_config.json. Raises QjaxError for what cannot be done."""
    said = get(config, "quantization", dict, config)
    algorithm = get(said, "quant_algo", str)
    if algorithm not in ALGORITHMS:
        raise QjaxError(f"'quant_algo' is {quoted(algorithm)}; supported: {', '.join(ALGORITHMS)}")
    for name in ("kv_cache_quant_algo", "kv_cache_scheme"):
        if said.get(name):
            raise QjaxError(f"{name!r} is {quoted(said[name])}, which qjax cannot do; supported: none")
    if (group := get(said, "group_size", int, GROUP)) != GROUP:
        raise QjaxError(f"'group_size' is {group}; supported: {GROUP}")
    return lambda module: nvfp4_module(module) if "weight_scale_2" in module.headers else None


def nvfp4_module(module: Module) -> Stored:
    """How a module is stored. Raises QjaxError where its inputs are rounded."""
    if "input_scale" in module.headers:
        raise QjaxError(f"{module.name}.input_scale rounds inputs to NVFP4, which qjax cannot do; supported: weights alone")
    (rows, columns), fmt = module.shape, parse_format("nvfp4")
    whole = module.headers["weight_scale_2"].shape
    expected = {
        "weight": ((columns, math.ceil(rows / 2)), ("U8",)),
        "weight_scale": ((columns, math.ceil(rows / GROUP)), ("F8_E4M3",)),
        "weight_scale_2": (whole if math.prod(whole) == 1 else (), ("F32",)),
    }

    def make(arrays: Arrays):
        scales = ScaledFloats(e4m3(arrays["weight_scale"]), np.float32(arrays["weight_scale_2"]).reshape(()))
        return leaf_of(fp4_codes(arrays["weight"], rows), scales, None, fmt, rows)

    return Stored(expected, blank(fmt, rows, columns), make)
