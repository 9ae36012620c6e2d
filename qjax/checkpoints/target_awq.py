"""AWQ's files of version gemm, as AutoAWQ writes them: the inverse of `awq.py`.

Integers of 4 bits with float16 scales, eight along the outputs to a word. Symmetric codes are written with the zero point 8,
which stands for the same weights. A configuration knows one size of groups, and no quantized head.
"""

import numpy as np

from qjax.checkpoints.awq import BITS, PER_WORD, PLACES
from qjax.checkpoints.target import Codes, Formats, RefusedError, Target, group_of, integers_refusal, nearest_integers, words
from qjax.files import listing
from qjax.formats import Format

ORDER = np.argsort(PLACES)  # of columns, by their place in a word


def _refusal(fmt: Format, shape: tuple[int, int], ordered: bool) -> str | None:
    if ordered:
        return "groups of inputs in another order (desc_act), which the files have no word for"
    if reason := integers_refusal(fmt, shape, (BITS,)):
        return reason
    if fmt.scales != "fp16":
        return f"{fmt}: the files' scales are float16"
    if shape[1] % PER_WORD:
        return f"a layer of {shape[1]} outputs; a multiple of {PER_WORD} is expected"
    return None


def _store(layer: Codes) -> dict[str, np.ndarray]:
    zeros = np.full_like(layer.scales, 2 ** (BITS - 1), np.uint8) if layer.zeros is None else layer.zeros
    return {"qweight": _words(layer.codes), "qzeros": _words(zeros), "scales": layer.scales}


def _words(codes: np.ndarray) -> np.ndarray:
    """(rows, out / 8) int32 of codes (rows, out), in the order of a word."""
    fields = codes.reshape(len(codes), -1, PER_WORD)[..., ORDER]
    return words(fields.reshape(codes.shape), BITS)


def _settings(formats: Formats, left: list[str], _: str) -> dict:
    groups = sorted({group_of(fmt) for fmt, _ in formats.values()})
    if len(groups) > 1:
        raise RefusedError(
            f"awq cannot hold groups of {' and '.join(map(str, groups))} in one model; quantize all layers alike"
        )
    if heads := [name for name in formats if "." not in name]:
        raise RefusedError(f"awq cannot hold a quantized head ({listing(heads)}); leave the head as it is")
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": groups[0],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left or None,
    }


AWQ = Target(_refusal, lambda fmt, shape: nearest_integers(fmt, shape, (BITS,), ("fp16",)), _store, _settings)
