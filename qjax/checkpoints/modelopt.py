"""NVFP4 as NVIDIA's ModelOpt stores it.

    weight          uint8 (out, in / 2)      E2M1 pairs
    weight_scale    E4M3 (out, in / 16)      times weight_scale_2, one float32 of the weight
    input_scale     one float32              where inputs are NVFP4 too: the largest of calibration / (448 * 6)

What it says of the cache of keys and values cannot be done, and is refused.
"""

import math

import jax
import numpy as np

from qjax.activations import parse_activation
from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import WITHOUT, Arrays, Codec, Module, Stored, layer_of, leaf_of, positive
from qjax.checkpoints.small_floats import e4m3, fp4_codes
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.models.config_entries import get
from qjax.scales import ScaledFloats
from qjax.untrusted import quoted

ALGORITHMS = {"NVFP4": True, "W4A16_NVFP4": False}  # whether inputs may be rounded
GROUP = 16


def codec(config: dict) -> Codec:
    """The codec of a quantization_config, or of hf_quant_config.json. Raises QjaxError for what cannot be done."""
    said = get(config, "quantization", dict, config)
    algorithm = get(said, "quant_algo", str)
    if algorithm not in ALGORITHMS:
        raise QjaxError(f"'quant_algo' is {quoted(algorithm)}; supported: {', '.join(ALGORITHMS)}")
    for name in ("kv_cache_quant_algo", "kv_cache_scheme"):
        if said.get(name):
            raise QjaxError(f"{name!r} is {quoted(said[name])}, which qjax cannot do; supported: none{WITHOUT}")
    if (group := get(said, "group_size", int, GROUP)) != GROUP:
        raise QjaxError(f"'group_size' is {group}; supported: {GROUP}")
    may_round = ALGORITHMS[algorithm]
    return lambda module: nvfp4_module(module, may_round) if "weight_scale_2" in module.headers else None


def nvfp4_module(module: Module, may_round: bool) -> Stored:
    """How a module is stored. may_round: its inputs are rounded where there is an input_scale."""
    (rows, columns), fmt = module.shape, parse_format("nvfp4")
    rounds = may_round and "input_scale" in module.headers
    activation = parse_activation("nvfp4") if rounds else None
    numbers = ("weight_scale_2", "input_scale") if rounds else ("weight_scale_2",)
    shapes = {name: module.headers[name].shape for name in numbers}
    expected = {
        "weight": ((columns, math.ceil(rows / 2)), ("U8",)),
        "weight_scale": ((columns, math.ceil(rows / GROUP)), ("F8_E4M3",)),
        **{name: (shape if math.prod(shape) == 1 else (), ("F32",)) for name, shape in shapes.items()},
    }

    def make(arrays: Arrays):
        scales = ScaledFloats(e4m3(arrays["weight_scale"]), np.float32(arrays["weight_scale_2"]).reshape(()))
        given = positive("input_scale", arrays["input_scale"].reshape(())) if rounds else None
        return leaf_of(fp4_codes(arrays["weight"], rows), scales, None, fmt, rows, None, activation, given)

    scale = jax.ShapeDtypeStruct((), np.float32) if rounds else None
    return Stored(expected, layer_of(blank(fmt, rows, columns), None, activation, scale), make)
