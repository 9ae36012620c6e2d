"""compressed-tensors' files, as llm-compressor writes them: a scheme for each group of modules (`config_groups`).

    integers   weight_packed      int32 (out, in b / 32)   codes + 2^(b-1), a bit stream along the inputs; before June 2026, for
                                                           3, 5, 6 and 7 bits, 32 // b codes to a word: told by the shape
               or weight          int8 (out, in)           the same, a byte each
               weight_scale       (out, groups), (out) or one     weight = (code - zero point) * scale
               weight_zero_point                           packed along the outputs, or int8; none where symmetric
               weight_g_idx       (in)                     the group of every input, where groups are no runs (actorder "group")
    FP8        weight, weight_scale                        by tensor, channel, group, or tiles of 128 x 128
    NVFP4      weight_packed      uint8 (out, in / 2), weight_scale E4M3, divided by weight_global_scale
               input_global_scale one, where inputs are NVFP4 too: 448 * 6 / the largest input of calibration
    MXFP4      weight_packed      uint8 (out, in / 2), weight_scale E8M0 bytes; MXFP8 with weight

A module's scheme is that of the target that is its name, else of the first pattern, else of its class, Linear. What it says of
input_activations becomes the layer's activation format; whatever else a layer cannot do is refused by name.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from qjax.activations import Activation, parse_activation
from qjax.checkpoints.leaves import blank
from qjax.checkpoints.modules import (
    SCALE_TYPES,
    WITHOUT,
    Arrays,
    Codec,
    Expected,
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
    positive,
    read_early,
    scaled,
    unpack,
)
from qjax.checkpoints.small_floats import e4m3, e8m0, fp4_codes, fp8_codes, tiled
from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.models.config_entries import get
from qjax.scales import ScaledFloats
from qjax.untrusted import quoted

FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mxfp8"),
)
STATUSES = ("compressed", "frozen")  # older files say the latter of codes, too
CACHE = "kv_cache_scheme"
REFUSED = (CACHE, "transform_config")
CLASS = "Linear"


class Weights(NamedTuple):
    """A scheme's weights. size: of a group, 0 for channels and tensors. ordered: whether there is a g_idx."""

    kind: str
    bits: int
    symmetric: bool
    strategy: str
    size: int
    block: list | None
    ordered: bool


class Scheme(NamedTuple):
    """What a config group says of its modules."""

    targets: tuple[str, ...]
    weights: Weights
    activation: Activation | None


def codec(config: dict) -> Codec:
    """The codec of a quantization_config. Raises QjaxError that names the entry that is malformed or cannot be done."""
    for name in REFUSED:
        if config.get(name):
            weights = WITHOUT if name == CACHE else ""
            raise QjaxError(f"{name!r} is {quoted(config[name])}, which qjax cannot do; supported: none{weights}")
    sparsity = get(config, "sparsity_config", dict, None) or {}
    if sparsity.get("format", "dense") != "dense":
        raise QjaxError(f"'sparsity_config' has the format {quoted(sparsity['format'])}; supported: dense")
    if (status := get(config, "quantization_status", str, "compressed")) not in STATUSES:
        raise QjaxError(f"'quantization_status' is {quoted(status)}; supported: {', '.join(STATUSES)}")
    groups = get(config, "config_groups", dict, {})
    for values in (config, *groups.values()):
        if isinstance(values, dict) and (kind := get(values, "format", str, None) or "dense") not in FORMATS:
            raise QjaxError(f"'format' is {quoted(kind)}; supported: {', '.join(FORMATS)}")
    schemes = [_scheme(name, values) for name, values in groups.items()]
    targets = {target: scheme for scheme in schemes for target in scheme.targets}

    def stored(module: Module) -> Stored | None:
        if "weight_scale" not in module.headers:
            return None
        exact = (target for target in targets if target == module.name)
        patterns = (t for t in sorted(targets) if t.startswith("re:") and matches(t.removeprefix("re:"), module.name))
        found = next(exact, None) or next(patterns, None) or next((t for t in targets if t == CLASS), None)
        if found is None:
            raise QjaxError(f"no group of 'config_groups' is for {module.name}, which has a weight_scale")
        return module_of(module, targets[found].weights, targets[found].activation)

    return stored


def _scheme(name: str, values: object) -> Scheme:
    if not isinstance(values, dict):
        raise QjaxError(f"'config_groups' has {quoted(values)} for {quoted(name)}; expected a scheme")
    if values.get("output_activations"):
        raise QjaxError(f"{name}: 'output_activations' are {quoted(values['output_activations'])}; supported: none{WITHOUT}")
    try:
        weights, inputs = get(values, "weights", dict), get(values, "input_activations", dict, None)
        return Scheme(tuple(map(str, get(values, "targets", list))), _weights(weights), _activation(inputs))
    except QjaxError as error:
        raise QjaxError(f"{name}: {error}") from None


def _weights(values: dict) -> Weights:
    size, block = get(values, "group_size", int, None), get(values, "block_structure", list, None)
    fallback = "block" if block else "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = get(values, "strategy", str, fallback)
    found = Weights(
        get(values, "type", str, "int"),
        get(values, "num_bits", int, 8),
        get(values, "symmetric", bool, True),
        strategy,
        size if size and strategy in ("group", "tensor_group") else 0,
        block,
        values.get("actorder") == "group",
    )
    known = (found.kind == "int" and 2 <= found.bits <= 8) or (found.kind == "float" and found.bits in (4, 8))
    if not known or values.get("dynamic") or (found.kind == "float" and not found.symmetric):
        raise QjaxError(f"weights of {quoted(values)}; supported: int of 2 to 8 bits, symmetric float of 4 or 8, not dynamic")
    if strategy not in ("tensor", "channel", "group", "tensor_group", "block") or found.size < 0:
        raise QjaxError(f"'strategy' is {quoted(strategy)}; supported: tensor, channel, group, tensor_group, block")
    if strategy in ("group", "tensor_group") and not found.size:
        raise QjaxError(f"'group_size' is {quoted(size)} with the strategy {strategy}; expected at least 1")
    if (strategy == "block" and (found.kind, found.bits) != ("float", 8)) or (strategy == "tensor" and not found.symmetric):
        raise QjaxError(f"weights of {quoted(values)}; supported: blocks of FP8, whole tensors where symmetric")
    return found


def _activation(values: dict | None) -> Activation | None:
    """The format of inputs. Raises QjaxError for one that qjax has not."""
    if not values:
        return None
    kind, bits, size = get(values, "type", str, "int"), get(values, "num_bits", int, 8), get(values, "group_size", int, None)
    strategy, dynamic = get(values, "strategy", str, "tensor"), values.get("dynamic", False) is True
    name = {("token", True): "token", ("tensor", False): "tensor", ("group", True): f"g{size}"}.get((strategy, dynamic))
    grid = f"int{bits}" if kind == "int" else {8: "fp8_e4m3", 4: "fp4_e2m1"}.get(bits)
    symmetric, nvfp4 = get(values, "symmetric", bool, True), ("float", 4, "tensor_group", 16, "local")
    if symmetric and (kind, bits, strategy, size, values.get("dynamic")) == nvfp4:
        return parse_activation("nvfp4")
    if name and grid and symmetric:
        if (kind, bits, strategy, size) == ("float", 4, "group", 32):
            return parse_activation("mxfp4_even")
        if kind == "int" or (bits == 8 and size != 32):
            return parse_activation(f"{grid}-{name}" + ("-sym" if kind == "int" and dynamic else ""))
    raise QjaxError(
        f"'input_activations' are {quoted(values)}, which qjax cannot do; supported: symmetric int or FP8, dynamic by "
        f"token or group or static by tensor, MXFP4, and NVFP4 with local scales{WITHOUT}"
    )


# --- modules -------------------------------------------------------------------------------------------------------------


def module_of(module: Module, weights: Weights, activation: Activation | None) -> Stored:
    """How a module of these weights is stored that rounds its inputs so."""
    if weights.kind == "int":
        return _integers(module, weights, activation)
    return (_fp4 if weights.bits == 4 else _fp8)(module, weights, activation)


def _scales(module: Module, weights: Weights, fmt: Format) -> tuple[tuple[int, ...], int]:
    """Shape of weight_scale, and how many groups there are."""
    rows, columns = module.shape
    groups = fmt.parameter_shape(rows, columns)[0]
    found = module.headers["weight_scale"].shape
    if weights.strategy == "tensor":
        return found if math.prod(found) == 1 else (1,), groups
    return found if weights.strategy == "channel" and found == (columns,) else (columns, groups), groups


def _name(weights: Weights) -> str:
    return weights.strategy if weights.strategy in ("tensor", "channel") else f"g{weights.size}"


def _finished(
    module: Module, activation: Activation | None, expected: dict, fmt: Format, parts, order: np.ndarray | None = None
) -> Stored:
    """The module of which `parts` makes (packed codes, scales, zeros) from arrays; with what its activation format needs."""
    rows, columns = module.shape
    static = activation is not None and activation.is_static
    divides = static and activation.format.scale_codec.together  # NVFP4's number is the reciprocal of ours
    name = "input_global_scale" if divides else "input_scale"
    if static:
        given = module.headers.get(name)
        expected[name] = (given.shape if given and math.prod(given.shape) == 1 else (1,), tuple(SCALE_TYPES))
    scale = jax.ShapeDtypeStruct((), np.float32) if static else None

    def make(arrays: Arrays):
        given = arrays[name].astype(np.float32).reshape(()) if static else None
        given = 1 / positive(name, given) if divides else given
        return leaf_of(*parts(arrays), fmt, rows, order, activation, given)

    leaf = layer_of(blank(fmt, rows, columns), order, activation, scale)
    return Stored(expected, leaf, make, optional=("input_zero_point",) if static else ())


def _integers(module: Module, weights: Weights, activation: Activation | None) -> Stored:
    rows, columns = module.shape
    bits = weights.bits
    named = parse_format(f"int{bits}-{_name(weights)}" + ("-sym" if weights.symmetric else ""))
    fmt = scaled(named, module.headers["weight_scale"])
    shape, groups = _scales(module, weights, fmt)
    expected: dict = {"weight_scale": (shape, tuple(SCALE_TYPES))}
    packed = "weight_packed" in module.headers
    dense = True
    if packed:
        words = {True: math.ceil(rows * bits / 32), False: math.ceil(rows / (32 // bits))}
        dense = module.headers["weight_packed"].shape != (columns, words[False]) or words[True] == words[False]
        expected["weight_packed"] = ((columns, words[dense]), ("I32",))
        expected["weight_shape"] = ((2,), ("I64", "I32"))
    else:
        expected["weight"] = ((columns, rows), ("I8",))
    if not weights.symmetric:
        along = math.ceil(columns * bits / 32) if dense else math.ceil(columns / (32 // bits))
        expected["weight_zero_point"] = ((along, groups), ("I32",)) if packed else ((columns, groups), ("I8",))
    order = _order(module, expected, rows, weights)

    def parts(arrays: Arrays):
        if packed:
            if arrays["weight_shape"].tolist() != [columns, rows]:
                raise QjaxError(f"weight_shape is {arrays['weight_shape'].tolist()}, expected {[columns, rows]}")
            codes = _unpacked(arrays["weight_packed"], bits, rows, dense)
        else:
            codes = _checked("weight", arrays["weight"], bits)
        codes = codes if order is None else codes[:, order]
        zeros = None
        if not weights.symmetric:
            stored = arrays["weight_zero_point"]
            zeros = _unpacked(stored.T, bits, columns, dense) if packed else _checked("weight_zero_point", stored.T, bits)
        scales = arrays["weight_scale"]
        scales = scales.reshape(1, 1) if weights.strategy == "tensor" else _by_group(scales)
        return from_bits(pack(codes, bits), bits, rows), scales, zeros

    return _finished(module, activation, expected, fmt, parts, order)


def _checked(name: str, values: np.ndarray, bits: int) -> np.ndarray:
    """Codes of int8 numbers. Raises QjaxError for one that so many bits do not hold."""
    codes = values.view(np.uint8) + np.uint8(2 ** (bits - 1))
    if (wrong := values[codes >= 2**bits]).size:
        ends = f"{-(2 ** (bits - 1))} .. {2 ** (bits - 1) - 1}, as {wrong[0]}"
        raise QjaxError(f"{name} holds {wrong.size} numbers beyond {ends}: not {bits} bits, as 'num_bits' says")
    return codes


def _by_group(scales: np.ndarray) -> np.ndarray:
    """(groups, out) scales of (out, groups) ones, or of one each."""
    return np.ascontiguousarray(scales.reshape(len(scales), -1).T)


def _unpacked(words: np.ndarray, bits: int, count: int, dense: bool) -> np.ndarray:
    """Codes along the last axis, of words that are a bit stream, or hold whole codes."""
    if dense:
        return unpack(bytes_of(words), bits, count)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    return fields.reshape(*words.shape[:-1], -1)[..., :count].astype(np.uint8)


def _order(module: Module, expected: dict, rows: int, weights: Weights) -> np.ndarray | None:
    if not weights.size or not (weights.ordered or "weight_g_idx" in module.headers):
        return None
    expected["weight_g_idx"] = ((rows,), ("I32",))
    known: Expected = expected
    g_idx = read_early(module, "weight_g_idx", known) if fits(module, "weight_scale", known) else None
    try:
        return None if g_idx is None or (g_idx == -1).all() else order_of_groups(g_idx, weights.size)
    except QjaxError as error:
        raise QjaxError(f"{module.name}: {error}") from None


def _fp8(module: Module, weights: Weights, activation: Activation | None) -> Stored:
    rows, columns = module.shape
    header = module.headers["weight_scale"]
    types: tuple[str, ...] = tuple(SCALE_TYPES)
    if weights.strategy == "block":
        fmt = tiled(weights.block, header)
        shape = tuple(math.ceil(size / 128) for size in (columns, rows))
    elif weights.size == 32 and header.dtype in ("U8", "F8_E8M0"):
        fmt, types = parse_format("mxfp8_e4m3"), ("U8", "F8_E8M0")
        shape = (columns, math.ceil(rows / 32))
    else:
        fmt = scaled(parse_format(f"fp8_e4m3-{_name(weights)}"), header)
        shape = _scales(module, weights, fmt)[0]
    expected = {"weight": ((columns, rows), ("F8_E4M3",)), "weight_scale": (shape, types)}

    def parts(arrays: Arrays):
        scales = arrays["weight_scale"]
        scales = scales.reshape(1, 1) if weights.strategy == "tensor" else _by_group(scales)
        return fp8_codes(arrays["weight"]), e8m0(scales.T) if types[0] == "U8" else scales, None

    return _finished(module, activation, expected, fmt, parts)


def _fp4(module: Module, weights: Weights, activation: Activation | None) -> Stored:
    (rows, columns), size = module.shape, weights.size
    if size not in (16, 32):
        raise QjaxError(f"FP4 in groups of {size}; supported: 16 (NVFP4) and 32 (MXFP4)")
    nested = size == 16
    fmt = parse_format("fp4_e2m1-g16-e4m3_div" if nested else "mxfp4_even")
    types = ("F8_E4M3",) if nested else ("U8", "F8_E8M0")
    expected: dict = {
        "weight_packed": ((columns, math.ceil(rows / 2)), ("U8",)),
        "weight_scale": ((columns, math.ceil(rows / size)), types),
    }
    if nested:
        expected["weight_global_scale"] = ((1,), tuple(SCALE_TYPES))

    def parts(arrays: Arrays):
        codes, stored = fp4_codes(arrays["weight_packed"], rows), arrays["weight_scale"]
        if not nested:
            return codes, e8m0(stored), None
        divisor = positive("weight_global_scale", arrays["weight_global_scale"].astype(np.float32).reshape(()))
        return codes, ScaledFloats(e4m3(stored), divisor), None

    return _finished(module, activation, expected, fmt, parts)
