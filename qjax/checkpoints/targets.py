"""What other libraries' files can hold of a layer, and how: the inverse of `gptq.py` and its neighbours.

    gptq, gptq_v2        affine or symmetric integers of 2, 3, 4 or 8 bits, float16 scales, inputs in any order (g_idx)
    compressed-tensors   pack-quantized: integers of 2 to 8 bits, scales in any type of floats
    awq                  integers of 4 bits, float16 scales (`target_awq.py`)
    bitsandbytes         NF4 and FP4 in blocks, nested or not, and symmetric int8 by rows (`target_bitsandbytes.py`)

Version 1 of GPTQ's files has no word for a zero point of 0 but to borrow from the next one, which GPTQModel undoes and some
kernels do not: gptq_v2 is the one for affine codes.
"""

import re
from collections import Counter

import numpy as np

from qjax import __version__
from qjax.checkpoints.gptq import ONES
from qjax.checkpoints.target import Codes, Formats, Target, group_of, integers_refusal, nearest_integers, words
from qjax.checkpoints.target_awq import AWQ
from qjax.checkpoints.target_bitsandbytes import BITSANDBYTES
from qjax.formats import Format
from qjax.models.family import Family

# --- GPTQ ----------------------------------------------------------------------------------------------------------------

GPTQ_BITS = (2, 3, 4, 8)


def _gptq_refusal(fmt: Format, shape: tuple[int, int], ordered: bool) -> str | None:
    if reason := integers_refusal(fmt, shape, GPTQ_BITS):
        return reason
    if fmt.scales != "fp16":
        return f"{fmt}: the files' scales are float16"
    if shape[0] % 32 or shape[1] % 32:
        return f"a layer of {shape[0]} inputs and {shape[1]} outputs; multiples of 32 are expected"
    return None


def _gptq_store(layer: Codes, version: int) -> dict[str, np.ndarray]:
    fmt, (rows, columns) = layer.format, layer.codes.shape
    size = rows if group_of(fmt) == -1 else min(fmt.group, rows)
    index, codes = np.arange(rows) // size, layer.codes
    if layer.order is not None:
        places = np.argsort(layer.order)
        index, codes = index[places], codes[places]
    zeros = layer.zeros
    if zeros is None:
        zeros = np.full((len(layer.scales), columns), 2 ** (fmt.bits - 1), np.uint8)
    if version == 1 and fmt.bits not in ONES:
        qzeros = words(zeros - np.uint8(1) & np.uint8(2**fmt.bits - 1), fmt.bits)
    else:
        qzeros = words(zeros, fmt.bits)
        less = np.uint32(ONES[fmt.bits] if version == 1 else 0)
        qzeros = (qzeros.view(np.uint32) - less).view(np.int32)
    return {
        "qweight": np.ascontiguousarray(words(codes.T, fmt.bits).T),
        "qzeros": qzeros,
        "scales": layer.scales,
        "g_idx": index.astype(np.int32),
    }


def _gptq_settings(formats: Formats, left: list[str], kind: str) -> dict:
    said = {name: {"bits": f.bits, "group_size": group_of(f), "sym": not f.is_affine} for name, (f, _) in formats.items()}
    (common, _), *_ = Counter(tuple(each.items()) for each in said.values()).most_common(1)
    rules = {f"+:{re.escape(name)}$": each for name, each in said.items() if tuple(each.items()) != common}
    rules |= {f"-:{re.escape(name)}$": {} for name in left if "." in name}
    return {
        "quant_method": "gptq",
        "checkpoint_format": kind,
        **dict(common),
        "desc_act": any(ordered for _, ordered in formats.values()),
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": any("." not in name for name in formats),
        "pack_dtype": "int32",
        **({"dynamic": rules} if rules else {}),
        "meta": {"quantizer": [f"qjax:{__version__}"]},
    }


def _gptq(kind: str, version: int) -> Target:
    return Target(
        _gptq_refusal,
        lambda fmt, shape: nearest_integers(fmt, shape, GPTQ_BITS, ("fp16",)),
        lambda layer: _gptq_store(layer, version),
        lambda formats, left, _: _gptq_settings(formats, left, kind),
    )


# --- compressed-tensors --------------------------------------------------------------------------------------------------

CT_BITS = (2, 3, 4, 5, 6, 7, 8)


def _ct_refusal(fmt: Format, shape: tuple[int, int], ordered: bool) -> str | None:
    if ordered:
        return "groups of inputs in another order (desc_act), which the library no longer reads"
    return integers_refusal(fmt, shape, CT_BITS)


def _ct_store(layer: Codes) -> dict[str, np.ndarray]:
    bits, (rows, columns) = layer.format.bits, layer.codes.shape
    tensors = {
        "weight_packed": words(np.ascontiguousarray(layer.codes.T), bits),
        "weight_scale": np.ascontiguousarray(layer.scales.T),
        "weight_shape": np.array([columns, rows], np.int64),
    }
    if layer.zeros is not None:
        tensors["weight_zero_point"] = np.ascontiguousarray(words(layer.zeros, bits).T)
    return tensors


def _ct_settings(formats: Formats, left: list[str], _: str) -> dict:
    kinds = {}
    for name, (fmt, _) in formats.items():
        kinds.setdefault(_ct_weights(fmt), []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": dict(weights),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (weights, names) in enumerate(kinds.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": left,
        "kv_cache_scheme": None,
    }


def _ct_weights(fmt: Format) -> tuple:
    group = group_of(fmt)
    said = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": not fmt.is_affine,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
    }
    return tuple(said.items())


FLOAT16 = ("gptq", "gptq_v2", "awq")  # targets whose scales are of that type
BY_MODULE = ("gptq", "gptq_v2", "awq")  # whose libraries read tensors by the names of modules as they run
RENAMED = {"mixtral": "experts", "phi3": "gate_up_proj", "glm": "gate_up_proj", "glm4": "gate_up_proj"}  # by GPTQModel's models
TARGETS: dict[str, Target] = {
    "gptq": _gptq("gptq", 1),
    "gptq_v2": _gptq("gptq_v2", 2),
    "compressed-tensors": Target(
        _ct_refusal,
        lambda fmt, shape: nearest_integers(fmt, shape, CT_BITS, ("fp16", "bf16", "fp32")),
        _ct_store,
        _ct_settings,
    ),
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
}


def not_run(to: str, family: Family) -> str | None:
    """Why the library of a target does not run a family's layers, and what can hold them; None where it does."""
    falcon, experts = family.name.startswith("falcon"), any("mlp/up/{e}" in name for name in family.modules)
    if to in ("compressed-tensors", "awq") and family.kernels_in_out:
        return "transformers keeps them as Conv1D and the library leaves them alone; gptq, bitsandbytes and gguf can"
    if to in ("compressed-tensors", "bitsandbytes") and falcon:
        return "transformers multiplies with their weights itself, before the library has decoded them; gptq can"
    if to == "bitsandbytes" and experts:
        return "transformers keeps experts as one tensor, which the library leaves alone; gptq and compressed-tensors can"
    if to == "awq" and (falcon or family.name in ("bloom", "gpt_neox")):
        others = "gptq" if falcon else "gptq, compressed-tensors, bitsandbytes and gguf"
        return f"what reads them divides what activations give by scales that this model has none of; {others} can"
    return None


def renamed(to: str, family: Family) -> str | None:
    """What to know of a family in a target's files where the library that reads most of them does not find its layers."""
    if to not in BY_MODULE or family.name not in RENAMED:
        return None
    return (
        f"{to} of {family.name}: GPTQModel 7 looks for its {RENAMED[family.name]} by other names than the family's files have, "
        "and fails, or computes with weights that it has not read; what reads the files' own names is not concerned"
    )
