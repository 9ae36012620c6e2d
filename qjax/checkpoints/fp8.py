"""FP8 as DeepSeek-V3 stores it, and Qwen, MiniMax and transformers' fine-grained FP8 after it.

    weight            E4M3 (out, in)
    weight_scale_inv  (out / 128, in / 128), rounded up: what a tile is multiplied by, in spite of the name; or one number

Inputs are rounded as well: activation_scheme "dynamic" by runs of 128 inputs of a token, as the weight's tiles; with one scale
of the weight, by tokens. Where it is "static", activation_scale is the one number of all tokens.
"""

import math

import jax
import numpy as np

from qjax.activations import Activation, parse_activation
from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import Arrays, Codec, Module, Stored, layer_of, leaf_of, scaled
from qjax.checkpoints.small_floats import TILE, fp8_codes, tiled
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.models.config_entries import get
from qjax.untrusted import quoted

FLOAT_SCALES = ("F32", "BF16")
SCHEMES = ("dynamic", "static")


def codec(config: dict) -> Codec:
    """The codec of a quantization_config. Raises QjaxError that names the entry that is malformed or cannot be done."""
    block = get(config, "weight_block_size", list, None)
    scheme = get(config, "activation_scheme", str, "dynamic").lower()
    if scheme not in SCHEMES:
        raise QjaxError(f"'activation_scheme' is {quoted(scheme)}; supported: {', '.join(SCHEMES)}")
    if (kind := config.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise QjaxError(f"'fmt' is {quoted(kind)}; supported: e4m3")
    if get(config, "scale_fmt", str, "float") not in ("float", "ue8m0"):
        raise QjaxError(f"'scale_fmt' is {quoted(config['scale_fmt'])}; supported: float, ue8m0")
    if block is not None:
        tiled(block, None)
    name = "tensor" if scheme == "static" else f"g{TILE}" if block else "token"
    activation = parse_activation(f"fp8_e4m3-{name}")
    return lambda module: fp8_module(module, block, activation) if "weight_scale_inv" in module.headers else None


def fp8_module(module: Module, block: list | None, activation: Activation | None) -> Stored:
    """How a module is stored."""
    rows, columns = module.shape
    header = module.headers["weight_scale_inv"]
    if block is None:
        fmt, shape = scaled(parse_format("fp8_e4m3-tensor"), header), header.shape if math.prod(header.shape) == 1 else ()
    else:
        fmt, shape = tiled(block, header), (math.ceil(columns / TILE), math.ceil(rows / TILE))
    expected = {"weight": ((columns, rows), ("F8_E4M3",)), "weight_scale_inv": (shape, FLOAT_SCALES)}
    scale, static = None, activation is not None and activation.is_static
    if static:
        given = module.headers.get("activation_scale")
        expected["activation_scale"] = (given.shape if given and math.prod(given.shape) == 1 else (), FLOAT_SCALES)
        scale = jax.ShapeDtypeStruct((), np.float32)

    def make(arrays: Arrays):
        stored = arrays["weight_scale_inv"]
        scales = stored.reshape(1, 1) if block is None else np.ascontiguousarray(stored.T)
        given = arrays["activation_scale"].astype(np.float32).reshape(()) if static else None
        return leaf_of(fp8_codes(arrays["weight"]), scales, None, fmt, rows, None, activation, given)

    return Stored(expected, layer_of(blank(fmt, rows, columns), None, activation, scale), make)
