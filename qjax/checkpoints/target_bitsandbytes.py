"""bitsandbytes' files, as transformers writes them: the inverse of `bitsandbytes.py`.

NF4 and FP4 in blocks of the flattened weight (groups that divide the inputs are such blocks), with float32 scales or nested
ones, and symmetric int8 by output channels, SCB = 127 scale. A 16-bit scale of int8 is read again as it was, and so is one
that came from such a file; of other float32 scales about one in a hundred moves by its last bit, as no SCB stands for it.
"""

import json

import numpy as np

from qjax.checkpoints.bitsandbytes import GRIDS, INVERSE_127, STATE
from qjax.checkpoints.target import Codes, Formats, RefusedError, Target
from qjax.codebooks import codebooks, dynamic_map
from qjax.formats import Format, parse_format
from qjax.scales import DOUBLE_QUANT_BLOCK, QuantizedScales, laid

THEIRS = {ours: theirs for theirs, ours in GRIDS.items()}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAGNITUDES = (0, 1, 6, 7, 4, 5, 2, 3)  # of FP4 by their codes, as places among sorted ones
MAPS = {"nf4": tuple(range(16)), "fp4_bnb": (*(7 + i for i in MAGNITUDES), *(7 - i for i in MAGNITUDES))}  # their code -> ours
FLOATS = ("fp32", "fp16", "bf16")


def _refusal(fmt: Format, shape: tuple[int, int], ordered: bool) -> str | None:
    if ordered:
        return "groups of inputs in another order (desc_act), which the files have no word for"
    if fmt.grid == "int8":
        fits = fmt.bound in ("max", "edge") and fmt.granularity == "channel" and fmt.scales in FLOATS
        return None if fits else f"{fmt}: int8 is symmetric, with one float scale for a channel"
    if fmt.grid not in THEIRS:
        return f"{fmt} is none of {', '.join(THEIRS)} or int8"
    if fmt.scales not in (*FLOATS, "dq"):
        return f"{fmt} stores scales that the files have no place for"
    if fmt.group not in BLOCKS or not (fmt.is_flat or (fmt.granularity == "group" and shape[0] % fmt.group == 0)):
        return f"{fmt} of {shape[0]} inputs; blocks of {', '.join(map(str, BLOCKS))} weights are expected"
    return None


def _nearest(fmt: Format, shape: tuple[int, int]) -> Format:
    if fmt.bits > 5:
        return parse_format("int8-channel-sym-max")
    size = min(BLOCKS, key=lambda block: abs(block - (fmt.group or 64)))
    grid = fmt.grid if fmt.grid in THEIRS else "nf4"
    return parse_format(f"{grid}-{'b' if shape[0] % size else 'g'}{size}{'-dq' if fmt.scales == 'dq' else ''}")


def _store(layer: Codes) -> dict[str, np.ndarray]:
    return _int8(layer) if layer.format.grid == "int8" else _four_bits(layer)


def _four_bits(layer: Codes) -> dict[str, np.ndarray]:
    kind, values = THEIRS[layer.format.grid], np.float32(codebooks()[layer.format.grid].values)
    places = np.array(MAPS[layer.format.grid])
    codes = np.array([int(np.argmax(places == code)) for code in range(len(values))], np.uint8)[layer.codes.T.reshape(-1)]
    codes = np.pad(codes, (0, codes.size % 2))
    state = {
        "quant_type": kind,
        "blocksize": layer.format.group,
        "dtype": layer.dtype,
        "shape": layer.codes.shape[::-1],
    }
    tensors = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": values[places]}
    if isinstance(layer.scales, QuantizedScales):
        tensors["weight.absmax"] = layer.scales.codes
        tensors["weight.nested_absmax"] = layer.scales.scales
        tensors["weight.nested_quant_map"] = dynamic_map()
        offset = float(layer.scales.offset)
        state |= {"nested_blocksize": DOUBLE_QUANT_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["weight.absmax"] = laid(layer.scales, flat=True).astype(np.float32)
    return tensors | {f"{STATE}{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8)}


def _int8(layer: Codes) -> dict[str, np.ndarray]:
    return {
        "weight": (layer.codes.T ^ np.uint8(128)).view(np.int8),
        "SCB": _scb(layer.scales[0].astype(np.float32)),
        "weight_format": np.zeros((), np.uint8),
    }


def _scb(scales: np.ndarray) -> np.ndarray:
    """float32 numbers whose products with 1/127, as they are read, are these scales or next to them."""
    first = scales * np.float32(127)
    near = [np.nextafter(first, np.float32(-np.inf)), first, np.nextafter(first, np.float32(np.inf))]
    errors = [np.abs((each * INVERSE_127).astype(np.float64) - scales) for each in near]
    return np.choose(np.argmin(errors, axis=0), near)


def _settings(formats: Formats, left: list[str], dtype: str) -> dict:
    kinds = sorted({(fmt.grid, fmt.scales == "dq") for fmt, _ in formats.values()})
    if len(kinds) > 1:
        said = ", ".join(f"{grid}{' with nested scales' * nested}" for grid, nested in kinds)
        raise RefusedError(f"bitsandbytes cannot hold layers of several kinds in one model ({said}); quantize all layers alike")
    ((grid, nested),) = kinds
    four = grid != "int8"
    return {
        "quant_method": "bitsandbytes",
        **{f"{prefix}load_in_4bit": four for prefix in ("", "_")},
        **{f"{prefix}load_in_8bit": not four for prefix in ("", "_")},
        "bnb_4bit_quant_type": THEIRS.get(grid, "fp4"),
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": left,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


BITSANDBYTES = Target(_refusal, _nearest, _store, _settings)
