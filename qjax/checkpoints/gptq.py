"""GPTQ's files, as AutoGPTQ, GPTQModel, optimum and AutoRound write them.

    qweight  int32 (in b / 32, out)          codes, a little-endian bit stream along the inputs
    qzeros   int32 (groups, out b / 32)      zero points along the outputs; less one in version 1, as they are in version 2
    scales   float16 (groups, out)
    g_idx    int32 (in)                      the group of every input; may be missing where groups are runs of inputs

    weight = (code - zero) * scale

Groups that are no runs of inputs (desc_act) become runs of a permuted input (`maps.Permute`). Where the configuration says that
grids are symmetric all zero points are 2^(b-1), and their value tells which version a file is, whatever it says. Version 1
is undone as GPTQModel does it: for 2, 4 and 8 bits by adding to whole words, where a zero point of 0 borrowed from the next.
"""

import dataclasses
import math
import warnings
from typing import NamedTuple

import numpy as np

from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import (
    SCALE_TYPES,
    Arrays,
    Codec,
    Module,
    Stored,
    bytes_of,
    fits,
    from_bits,
    layer_of,
    leaf_of,
    matches,
    order_of_groups,
    pack,
    read_early,
    scaled,
    unpack,
)
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats import Format, parse_format
from qjax.models.config_entries import get
from qjax.untrusted import quoted

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every field of a word
REFUSED = (  # settings that change what a layer computes
    *("is_marlin_format", "rotation", "adapter", "static_activations", "activation"),
)


class Settings(NamedTuple):
    """Of a file, or of one of its modules. group: -1 for all inputs."""

    bits: int
    group: int
    symmetric: bool
    version: int
    ordered: bool
    bound: str = "edge"


def codec(config: dict, *, bound: str = "edge", version: int | None = None) -> Codec:
    """The codec of a quantization_config. bound: of symmetric grids, whose scales are signed where it is "full". version: where
    the configuration has no word for it.

    Raises QjaxError that names the entry that is malformed or cannot be done.
    """
    for name in REFUSED:
        if config.get(name):
            raise QjaxError(f"{name!r} is {quoted(config[name])}, which qjax cannot do; quantize again without it")
    if (words := config.get("pack_dtype", "int32")) not in ("int32", None):
        raise QjaxError(f"'pack_dtype' is {quoted(words)}; supported: int32")
    kind = get(config, "checkpoint_format", str, None) or get(config, "format", str, None) or "gptq"
    if kind not in VERSIONS:
        raise QjaxError(f"'checkpoint_format' is {quoted(kind)}; supported: {', '.join(VERSIONS)}")
    base = _settings(config, Settings(0, -1, True, version or VERSIONS[kind], get(config, "desc_act", bool, False), bound))
    rules = _rules(get(config, "dynamic", dict, {}), base)

    def stored(module: Module) -> Stored | None:
        if "qweight" not in module.headers:
            return None
        mine = next((found for pattern, found in rules if matches(pattern, module.name)), base)
        return stored_module(module, mine)

    return stored


def _settings(config: dict, base: Settings) -> Settings:
    bits = get(config, "bits", int, base.bits)
    group = get(config, "group_size", int, base.group)
    if bits not in BITS:
        raise QjaxError(f"'bits' is {bits}; supported: {', '.join(map(str, BITS))}")
    if group < 1 and group != -1:
        raise QjaxError(f"'group_size' is {group}; expected -1 for whole columns, or at least 1")
    symmetric, ordered = get(config, "sym", bool, base.symmetric), get(config, "desc_act", bool, base.ordered)
    return base._replace(bits=bits, group=group, symmetric=symmetric, ordered=ordered)


def _rules(dynamic: dict, base: Settings) -> list[tuple[str, Settings]]:
    """Settings of the modules whose names a pattern matches, the first one's; patterns after "-:" leave modules as they are,
    which the file's tensors say too.
    """
    found = []
    for pattern, values in dynamic.items():
        if not isinstance(values, dict):
            raise QjaxError(f"'dynamic' has {quoted(values)} for {quoted(pattern)}; expected settings, or none")
        if not pattern.startswith("-:"):
            found.append((pattern.removeprefix("+:"), _settings(values, base)))
    return found


def stored_module(module: Module, settings: Settings) -> Stored:
    """How a module with these settings is stored."""
    rows, columns = module.shape
    bits, size = settings.bits, rows if settings.group == -1 else settings.group
    words = math.ceil(columns * bits / 32)
    groups = math.ceil(rows / size)
    expected = {
        "qweight": ((math.ceil(rows * bits / 32), columns), ("I32",)),
        "qzeros": ((groups, words), ("I32",)),
        "scales": ((groups, columns), tuple(SCALE_TYPES)),
    }
    if settings.ordered or "g_idx" in module.headers:
        expected["g_idx"] = ((rows,), ("I32",))
    known = "g_idx" in expected and fits(module, "scales", expected)  # else the size of groups is wrong, which is told later
    g_idx = read_early(module, "g_idx", expected) if known else None
    order = None if g_idx is None else _order(module, g_idx, size)
    zeros = read_early(module, "qzeros", expected) if settings.symmetric else None
    symmetric, version = _symmetry(zeros, columns, settings)
    fmt = _format(module, settings, symmetric)

    def make(arrays: Arrays):
        zeros = None if symmetric else zero_points(arrays["qzeros"], bits, columns, version)
        words = np.ascontiguousarray(arrays["qweight"].T)
        codes = from_bits(bytes_of(words), bits, rows)
        if order is not None:
            codes = np.ascontiguousarray(pack(unpack(bytes_of(words), bits, rows)[:, order], bits).T)
        return leaf_of(codes, arrays["scales"], zeros, fmt, rows, order)

    return Stored(expected, layer_of(blank(fmt, rows, columns), order), make)


def _order(module: Module, g_idx: np.ndarray, size: int) -> np.ndarray | None:
    try:
        return order_of_groups(g_idx, size)
    except QjaxError as error:
        raise QjaxError(f"{module.name}: {error}") from None


def _symmetry(zeros: np.ndarray | None, columns: int, settings: Settings) -> tuple[bool, int]:
    """Whether all zero points are the middle, and the version that they are stored in."""
    if zeros is None or not zeros.size:
        return False, settings.version
    middle, as_stored = 2 ** (settings.bits - 1), unpack(bytes_of(zeros), settings.bits, columns)
    for version in (settings.version, 3 - settings.version):
        if (as_stored == middle - (2 - version)).all():
            if version != settings.version:
                said, found = ({number: name for name, number in VERSIONS.items()}[v] for v in (settings.version, version))
                warnings.warn(
                    f"the checkpoint is labelled {said}, but its zero points are those of {found}: read as {found}",
                    QjaxWarning,
                    stacklevel=2,
                )
            return True, version
    return False, settings.version


def zero_points(qzeros: np.ndarray, bits: int, columns: int, version: int) -> np.ndarray:
    """Zero points (groups, out), one a byte, of packed ones."""
    if version == 1 and bits in ONES:
        qzeros = (np.ascontiguousarray(qzeros).view(np.uint32) + np.uint32(ONES[bits])).view(np.int32)
    zeros = unpack(bytes_of(qzeros), bits, columns)
    return zeros if version == 2 or bits in ONES else zeros + np.uint8(1) & np.uint8(2**bits - 1)


def _format(module: Module, settings: Settings, symmetric: bool) -> Format:
    size = "channel" if settings.group == -1 else f"g{settings.group}"
    fmt = parse_format(f"int{settings.bits}-{size}" + ("-sym" if symmetric else ""))
    return dataclasses.replace(scaled(fmt, module.headers.get("scales")), bound=settings.bound if symmetric else "")
