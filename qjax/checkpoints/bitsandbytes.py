"""bitsandbytes' files, as transformers writes them.

    4 bits   weight              uint8 (n / 2, 1)    codes of the flattened (out, in) weight, two a byte, the first one high;
                                                     in another type where bnb_4bit_quant_storage says so: the same bytes
             weight.absmax       float32 (blocks)    scales of blocks of the flattened weight; uint8 codes where nested
             weight.quant_map    float32 (16)        what codes stand for: NF4, or FP4 with its two zeros
             weight.nested_*                         absmax and map of these codes (`scales.Nested`)
             weight.quant_state.bitsandbytes__nf4    JSON: quant_type, blocksize, shape, nested_blocksize, nested_offset
    8 bits   weight              int8 (out, in)
             SCB                 float32 (out)       weight = code * SCB / 127

What LLM.int8 does to inputs as a model runs (llm_int8_threshold) is no part of a layer here, and a warning says so. Its
library multiplies by SCB and then by 1/127; here the scale is their product, so a weight may differ in the last bit.
"""

import warnings

import numpy as np

from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import Arrays, Codec, Module, Stored, from_bits, leaf_of, pack
from qjax.checkpoints.tensors import DTYPES, read_tensor
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats import Format, parse_format
from qjax.models.config_entries import get
from qjax.scales import DOUBLE_QUANT_BLOCK, QuantizedScales, dynamic_map
from qjax.untrusted import json_object, quoted

GRIDS = {"nf4": "nf4", "fp4": "fp4_bnb"}  # theirs -> ours
STATE, STATE_BYTES = "weight.quant_state.bitsandbytes__", 2**14
STORAGE = ("U8", "BF16", "F16", "F32")
INVERSE_127 = np.float32(7.874015718698502e-3)


def codec(config: dict) -> Codec:
    """The codec of a quantization_config. Raises QjaxError for an entry that is malformed."""
    if get(config, "load_in_8bit", bool, False):
        warnings.warn(
            "the checkpoint's weights are read; that bitsandbytes rounds the inputs of these layers to int8 too, but for those "
            f"beyond {config.get('llm_int8_threshold', 6.0)}, is left out",
            QjaxWarning,
            stacklevel=2,
        )

    def stored(module: Module) -> Stored | None:
        if state := next((suffix for suffix in module.headers if suffix.startswith(STATE)), None):
            return four_bits(module, state)
        return eight_bits(module) if "SCB" in module.headers else None

    return stored


def four_bits(module: Module, state: str) -> Stored:
    """How a module of 4 bits is stored; `state` is what follows its name in that of its JSON."""
    rows, columns = module.shape
    said = _state(module, state)
    fmt, nested = said["format"], said["nested"]
    blocks, size = fmt.groups(rows, columns), (rows * columns + 1) // 2
    storage = module.headers["weight"].dtype if "weight" in module.headers else "U8"
    width = np.dtype(DTYPES[storage]).itemsize if storage in STORAGE else 1
    expected = {
        "weight": ((-(-size // width), 1), STORAGE),
        "weight.absmax": ((blocks,), ("U8",) if nested else ("F32",)),
        "weight.quant_map": ((16,), ("F32",)),
    }
    if nested:
        expected["weight.nested_absmax"] = ((-(-blocks // DOUBLE_QUANT_BLOCK),), ("F32",))
        expected["weight.nested_quant_map"] = ((256,), ("F32",))

    def make(arrays: Arrays):
        pairs = np.ascontiguousarray(arrays["weight"]).view(np.uint8).reshape(-1)
        codes = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)[: rows * columns].reshape(columns, rows)
        codes = _places(arrays["weight.quant_map"], fmt)[codes]
        scales = arrays["weight.absmax"]
        if nested:
            if not np.array_equal(arrays["weight.nested_quant_map"], dynamic_map()):
                raise QjaxError("nested_quant_map is not bitsandbytes' map of 256 values, the one supported")
            scales = QuantizedScales(scales, arrays["weight.nested_absmax"], np.float32(said["offset"]))
        return leaf_of(from_bits(pack(codes, fmt.bits), fmt.bits, rows), scales, None, fmt, rows)

    return Stored(expected, blank(fmt, rows, columns), make, optional=(state,), raw=("weight",))


def _state(module: Module, suffix: str) -> dict[str, object]:
    """What the JSON says: format, nested, offset. Raises QjaxError for what is malformed or does not fit."""
    header, where = module.headers[suffix], f"{module.name}.{suffix}"
    if header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > STATE_BYTES:
        raise QjaxError(f"{where} is {header.dtype} {header.shape}, expected at most {STATE_BYTES} bytes of JSON")
    said = json_object(read_tensor(header).tobytes(), where, STATE_BYTES)
    try:
        kind, block, shape = get(said, "quant_type", str), get(said, "blocksize", int), get(said, "shape", list)
        nested = get(said, "nested_blocksize", int, None)
        offset = get(said, "nested_offset", float, 0.0)
    except QjaxError as error:
        raise QjaxError(f"{where}: {error}") from None
    if kind not in GRIDS or not suffix.endswith(kind):
        raise QjaxError(f"{where}: 'quant_type' is {quoted(kind)}; supported: {', '.join(GRIDS)}")
    if not 1 <= block <= 2**20 or nested not in (None, DOUBLE_QUANT_BLOCK):
        raise QjaxError(
            f"{where}: 'blocksize' is {block}, 'nested_blocksize' {nested}; supported: 1 to 2^20, {DOUBLE_QUANT_BLOCK}"
        )
    if shape != [*module.shape[::-1]]:
        raise QjaxError(f"{where}: 'shape' is {quoted(shape)}, expected {[*module.shape[::-1]]}")
    if abs(offset) > np.finfo(np.float32).max:
        raise QjaxError(f"{where}: 'nested_offset' is {offset}, beyond float32")
    fmt = parse_format(f"{GRIDS[kind]}-b{block}{'' if nested is None else '-dq'}")
    return {"format": fmt, "nested": nested is not None, "offset": offset}


def _places(quant_map: np.ndarray, fmt: Format) -> np.ndarray:
    """Our codes of theirs."""
    ours = np.float32(fmt.codebook.values)
    places = np.clip(np.searchsorted(ours, quant_map), 0, len(ours) - 1)
    if not np.array_equal(ours[places], quant_map):
        raise QjaxError(f"quant_map is not the table of {fmt.grid}, the one supported")
    return places.astype(np.uint8)


def eight_bits(module: Module) -> Stored:
    """How a module of 8 bits is stored."""
    rows, columns = module.shape
    fmt = parse_format("int8-channel-sym-max-fp32")
    expected = {"weight": ((columns, rows), ("I8",)), "SCB": ((columns,), ("F32",))}
    if "weight_format" in module.headers:
        expected["weight_format"] = (module.headers["weight_format"].shape, ("U8",))

    def make(arrays: Arrays):
        if np.any(arrays.get("weight_format", 0)):
            raise QjaxError("weight_format is not 0 (rows); save the checkpoint again with a newer bitsandbytes")
        codes = arrays["weight"].view(np.uint8) ^ np.uint8(128)
        return leaf_of(np.ascontiguousarray(codes.T), arrays["SCB"][None] * INVERSE_127, None, fmt, rows)

    return Stored(expected, blank(fmt, rows, columns), make)
