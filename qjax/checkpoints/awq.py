"""AWQ's files, as AutoAWQ, GPTQModel and AutoRound write them: affine integers of 4 bits, eight to an int32 word.

    version gemm    qweight (in, out / 8), qzeros (groups, out / 8)  along the outputs, in the order 0 2 4 6 1 3 5 7
                    scales (groups, out)
            gemv    qweight (out, in / 8), qzeros (out, words)       along the inputs and the groups, in order
                    scales (out, 8 words), whole words of groups, the last ones of nothing

    weight = (code - zero) * scale, scales in float16

The files of exllama, exllamav2 and ipex are gemm's, which these kernels lay out anew; gemv_fast and llm-awq have others.
"""

import math

import numpy as np

from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import SCALE_TYPES, Arrays, Codec, Module, Stored, bytes_of, leaf_of, pack, scaled, unpack
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.models.config_entries import get
from qjax.untrusted import quoted

BITS, PER_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of columns in a word
GEMM = ("gemm", "exllama", "exllamav2", "ipex", "torch")


def codec(config: dict) -> Codec:
    """The codec of a quantization_config. Raises QjaxError that names the entry that is malformed or cannot be done."""
    bits = get(config, "w_bit", int, None) or get(config, "bits", int)
    group = get(config, "q_group_size", int, None) or get(config, "group_size", int, 128)
    found = [get(config, name, str, None) for name in ("version", "checkpoint_format", "format")]
    version = next((name for name in found if name), "gemm").lower()
    if bits != BITS:
        raise QjaxError(f"'bits' is {bits}; supported: {BITS}")
    if version not in (*GEMM, "gemv") or config.get("backend") == "llm-awq":
        raise QjaxError(f"'version' is {quoted(version)}; supported: {', '.join(GEMM)}, gemv")
    if not get(config, "zero_point", bool, True):
        raise QjaxError("'zero_point' is false; supported: true, codes with zero points")
    if group < 1 and group != -1:
        raise QjaxError(f"'group_size' is {group}; expected -1 for whole columns, or at least 1")
    stored = gemv_module if version == "gemv" else gemm_module
    return lambda module: stored(module, group) if "qweight" in module.headers else None


def gemm_module(module: Module, group: int) -> Stored:
    """How a module is stored along the outputs."""
    rows, columns = module.shape
    groups, fmt = _groups(module, group)
    words = math.ceil(columns / PER_WORD)
    expected = {
        "qweight": ((rows, words), ("I32",)),
        "qzeros": ((groups, words), ("I32",)),
        "scales": ((groups, columns), tuple(SCALE_TYPES)),
    }

    def make(arrays: Arrays):
        codes, zeros = (
            _in_order(unpack(bytes_of(arrays[name]), BITS, words * PER_WORD), columns) for name in list(expected)[:2]
        )
        codes = np.ascontiguousarray(pack(codes.T, BITS).T)
        return leaf_of(codes, arrays["scales"], zeros, fmt, rows)

    return Stored(expected, blank(fmt, rows, columns), make)


def gemv_module(module: Module, group: int) -> Stored:
    """How a module is stored along the inputs."""
    rows, columns = module.shape
    groups, fmt = _groups(module, group)
    multiple = max(1, 128 // (rows if group == -1 else group))
    words = math.ceil(math.ceil(groups / PER_WORD) / multiple) * multiple
    expected = {
        "qweight": ((columns, math.ceil(rows / PER_WORD)), ("I32",)),
        "qzeros": ((columns, words), ("I32",)),
        "scales": ((columns, words * PER_WORD), tuple(SCALE_TYPES)),
    }

    def make(arrays: Arrays):
        codes = pack(unpack(bytes_of(arrays["qweight"]), BITS, rows), BITS)
        zeros = unpack(bytes_of(arrays["qzeros"]), BITS, groups)
        scales = np.ascontiguousarray(arrays["scales"][:, :groups].T)
        return leaf_of(np.ascontiguousarray(codes.T), scales, np.ascontiguousarray(zeros.T), fmt, rows)

    return Stored(expected, blank(fmt, rows, columns), make)


def _groups(module: Module, group: int):
    size = "channel" if group == -1 else f"g{group}"
    fmt = scaled(parse_format(f"int{BITS}-{size}"), module.headers.get("scales"))
    return fmt.parameter_shape(*module.shape)[0], fmt


def _in_order(fields: np.ndarray, columns: int) -> np.ndarray:
    """Columns, of which every word holds eight out of order."""
    return fields.reshape(len(fields), -1, PER_WORD)[..., PLACES].reshape(len(fields), -1)[:, :columns]
