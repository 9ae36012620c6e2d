"""gpt-oss' MXFP4: the experts of a layer as one tensor of blocks and one of scales, beside which everything else is bfloat16.

    gate_up_proj_blocks   uint8 (experts, out, in / 32, 16)   E2M1 pairs along the inputs, the first of a pair low
    gate_up_proj_scales   uint8 (experts, out, in / 32)       E8M0: weight = value * 2^(scale - 127)

OCP Microscaling specification 1.0 (2023); gpt-oss: OpenAI 2025 (arXiv 2508.10925). Codes stay as they are, but for -0, which is
0 here (`small_floats.py`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import Arrays, Codec, Module, Stored
from qjax.checkpoints.small_floats import e8m0, fp4_codes
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.models.config_entries import get
from qjax.qtensor import QTensor
from qjax.untrusted import quoted

SETTINGS = ("quant_method", "modules_to_not_convert", "dequantize")
FORMAT, GROUP = "mxfp4_even", 32
SUFFIXES = ("blocks", "scales")


def codec(config: dict) -> Codec:
    """The codec of a quantization_config. Raises QjaxError that names an entry that is malformed or not known."""
    if unknown := [key for key in config if key not in SETTINGS]:
        raise QjaxError(f"MXFP4 with {quoted(unknown)}, which qjax does not know; supported: {', '.join(SETTINGS)}")
    left = get(config, "modules_to_not_convert", list, [])
    if strange := [name for name in left if not isinstance(name, str)]:
        raise QjaxError(f"'modules_to_not_convert' has {quoted(strange)}; expected names of modules")
    get(config, "dequantize", bool, False)  # what whoever loads the folder is to do
    return lambda module: _experts(module) if any(suffix in module.headers for suffix in SUFFIXES) else None


def _experts(module: Module) -> Stored:
    *stack, rows, columns = module.shape
    if len(stack) != 1 or rows % GROUP:
        raise QjaxError(f"{module.name} is {module.shape}; MXFP4 is of (experts, in, out), in a multiple of {GROUP}")
    fmt, (count,) = parse_format(FORMAT), stack
    groups = (count, columns, rows // GROUP)
    stacked = lambda array: jax.ShapeDtypeStruct((count, *array.shape), array.dtype)  # noqa: E731
    leaf = jax.tree.map(stacked, blank(fmt, rows, columns))

    def make(arrays: Arrays) -> QTensor:
        blocks, scales = (arrays[suffix] for suffix in SUFFIXES)
        codes = np.stack([fp4_codes(each.reshape(columns, -1), rows) for each in blocks])
        return QTensor(jnp.asarray(codes), jnp.asarray(np.stack([e8m0(each) for each in scales])), None, fmt, rows)

    expected = {"blocks": ((*groups, GROUP // 2), ("U8",)), "scales": (groups, ("U8",))}
    return Stored(expected, leaf, make)
