"""Folders that other libraries quantized: whose codec reads them, and the modules of a model as it makes leaves of them.

A codec (`modules.py`) is made from the entry quantization_config of config.json, or from the file that stood in its place
earlier. A module that is stored beside others (query, key and value of GPT-NeoX) is cut into columns, its codes undecoded.
What a folder says of inputs and of the cache of keys and values can be left out: its weights are the same without.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from qjax.checkpoints import autoround, awq, bitsandbytes, compressed_tensors, fp8, gptq, modelopt, mxfp4
from qjax.checkpoints.modules import Codec, Module, Stored
from qjax.checkpoints.naming import owner_of
from qjax.checkpoints.tensors import FLOATS, Header, read_tensor
from qjax.errors import QjaxError, QjaxWarning
from qjax.lazy import Lazy
from qjax.linear import Linear, columns
from qjax.models.family import StoredTensor
from qjax.qtensor import QTensor
from qjax.untrusted import quoted, read_json, status

CONFIG = "config.json"
LEGACY = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}  # and whose
METHODS: dict[str, Callable[[dict], Codec]] = {
    "gptq": gptq.codec,
    "awq": awq.codec,
    "bitsandbytes": bitsandbytes.codec,
    "compressed-tensors": compressed_tensors.codec,
    "auto-round": autoround.codec,
    "fp8": fp8.codec,
    "modelopt": modelopt.codec,
    "mxfp4": mxfp4.codec,
}
STACKS = ("mxfp4",)  # whose codecs know experts that are stored as one tensor
BESIDES = ("input_activations", "output_activations", "kv_cache_scheme", "kv_cache_quant_algo")  # settings, not of weights
BESIDE = re.compile(r"\.(?P<name>(input|output|[qkv])_(scale|global_scale|zero_point))")  # ends of names of their tensors


class Quantizer(NamedTuple):
    """A library's way to store weights, as a folder's configuration has it. where: which file says so; left_out: what it says
    besides `settings`.
    """

    method: str
    codec: Codec
    where: Path
    settings: dict
    left_out: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A module of the folder that holds codes: the tensor in whose place it stands, and how it is stored."""

    tensor: StoredTensor
    module: Module
    stored: Stored

    def name_of(self, suffix: str) -> str:
        """What the file calls one of the module's tensors."""
        return f"{self.module.name}{'.' if len(self.module.shape) == 2 else '_'}{suffix}"


def find_quantizer(folder: Path, config: dict, *, weights_alone: bool = False) -> Quantizer | None:
    """Whose codes a folder holds; None for a model's own weights. weights_alone: settings of all else are left out. Raises
    QjaxError for a library or setting not known.
    """
    where, settings = folder / CONFIG, config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not settings:
        legacy = next((name for name in LEGACY if status(folder / name)), None)
        if legacy is None:
            return None
        where, settings = folder / legacy, read_json(folder / legacy)
        method = settings.get("quant_method", LEGACY[legacy])
    if not isinstance(settings, dict) or not isinstance(method, str) or method.lower() not in METHODS:
        raise QjaxError(
            f"{where}: the weights are quantized by {quoted(method)}, which qjax does not read; supported: {', '.join(METHODS)}"
        )
    settings, left_out = _of_weights(settings) if weights_alone else (settings, [])
    try:
        return Quantizer(method.lower(), METHODS[method.lower()](settings), where, settings, tuple(left_out))
    except QjaxError as error:
        raise QjaxError(f"{where}: {error}") from error


def _of_weights(settings: Mapping[str, object], levels: int = 3) -> tuple[dict[str, object], list[str]]:
    """What settings say of weights, and the names of what else they say; levels: of entries within entries."""
    left_out = [name for name in BESIDES if settings.get(name)]
    kept = {name: value for name, value in settings.items() if name not in BESIDES}
    for name, value in kept.items():
        if isinstance(value, dict) and levels > 1:
            kept[name], more = _of_weights(value, levels - 1)
            left_out += more
    return kept, left_out


def tensors_of_weights(quantizer: Quantizer, headers: Mapping[str, Header]) -> dict[str, Header]:
    """The tensors of weights; a warning names what else the folder, and its quantizer's settings, hold."""
    others = {name: found["name"] for name in headers if (found := BESIDE.fullmatch(name, name.rfind(".")))}
    if left_out := dict.fromkeys([*quantizer.left_out, *others.values()]):
        warnings.warn(
            f"{quantizer.where}: only weights are read; left out is what it says of inputs, outputs or the cache: "
            f"{', '.join(left_out)}",
            QjaxWarning,
            stacklevel=2,
        )
    return {name: header for name, header in headers.items() if name not in others}


def module_names(tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    """The linear layers, and stacks of them, among a family's tensors, by their names in the file."""
    return {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in tensors
        if all(path.endswith("/kernel") for path, _ in tensor.parts)
    }


def modules_with_codes(quantizer: Quantizer, tensors: Sequence[StoredTensor], headers: Mapping[str, Header]) -> list[Quantized]:
    """The modules that hold codes. Raises QjaxError for settings that do not fit what is there."""
    modules = module_names(tensors)
    plain = {tensor.name for tensor in tensors if tensor.name.removesuffix(".weight") not in modules}
    held: dict[str, dict[str, Header]] = {name: {} for name in modules}
    for name, header in headers.items():
        owner = owner_of(name, held)
        if owner is not None and name not in plain:
            held[owner][name[len(owner) + 1 :]] = header
    found = []
    for name, tensor in modules.items():
        leading = tensor.parts[0][1][:-1]
        module = Module(name, (*leading, sum(shape[-1] for _, shape in tensor.parts)), held[name])
        known = len(leading) == 1 or quantizer.method in STACKS
        try:
            stored = quantizer.codec(module) if module.headers and known else None
        except QjaxError as error:
            raise QjaxError(f"{quantizer.where}: {error}") from error
        if stored is not None and _adds_nothing(module):
            stored = stored._replace(optional=(*stored.optional, "bias"))
        found += [] if stored is None else [Quantized(tensor, module, stored)]
    return found


def _adds_nothing(module: Module) -> bool:
    """Whether a module without a bias has one of zeros, as AutoGPTQ's early files do."""
    header = module.headers.get("bias")
    fits = header is not None and header.shape == module.shape[1:] and header.dtype in FLOATS
    return fits and not np.any(read_tensor(header))


def read_module(quantized: Quantized) -> dict[str, Linear | QTensor]:
    """A module's leaves by path. Raises QjaxError for values that are not finite, or impossible."""
    module, stored = quantized.module, quantized.stored
    arrays = {suffix: read_tensor(module.headers[suffix]) for suffix in stored.expected}
    file = next(iter(module.headers.values())).file
    for suffix, array in arrays.items():
        if suffix not in stored.raw and not np.isfinite(array).all():
            raise QjaxError(f"{file}: NaN or infinite values in {quantized.name_of(suffix)}; get an intact checkpoint")
    try:
        return _cut(quantized.tensor, stored.make(arrays))
    except QjaxError as error:
        raise QjaxError(f"{file}: {module.name}: {error}") from error


def lazy_module(quantized: Quantized, read: Callable[[Quantized], Mapping[str, object]]) -> dict[str, Linear | QTensor]:
    """A module's leaves by path, with arrays that `read`, a `read_module`, makes when they are needed."""
    template = jax.eval_shape(functools.partial(_cut, quantized.tensor), quantized.stored.leaf)
    file = next(iter(quantized.module.headers.values())).file

    def array(path: str, number: int) -> jax.Array:
        return jax.tree.leaves(read(quantized)[path])[number]

    found = {}
    for path, leaf in template.items():
        parts, tree = jax.tree.flatten(leaf)
        lazy = [Lazy(x.shape, np.dtype(x.dtype), functools.partial(array, path, n), file) for n, x in enumerate(parts)]
        found[path] = jax.tree.unflatten(tree, lazy)
    return found


def _cut(tensor: StoredTensor, leaf: Linear | QTensor) -> dict[str, Linear | QTensor]:
    """The parts of a module's leaf by path."""
    if len(tensor.parts) == 1:
        return {tensor.parts[0][0]: leaf}
    numbers = tensor._replace(parts=tuple((path, (1, shape[-1])) for path, shape in tensor.parts), transposed=False)
    places = numbers.split(np.arange(leaf.shape[-1])[None])
    return {path: columns(leaf, np.ravel(index)) for path, index in places.items()}
