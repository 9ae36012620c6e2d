"""Adapters in the folders of Hugging Face's PEFT library, both ways.

    adapter_config.json         rank, alpha, modules; `rank_pattern` and `alpha_pattern` for those that differ
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight (rank, in), .lora_B.weight (out, rank)

The layer adds s B A x, s = alpha / rank, or alpha / sqrt(rank) with `use_rslora`. `fan_in_fan_out` says how the base's weights
are laid (GPT-2's) and changes nothing in an adapter. A module of the files that is several kernels of ours (`qkv_proj`) gives
each its outputs' rows of B, and A as it is; written are the kernels' adapters side by side, of ranks added up where their A
differ.

What an adapter may hold beyond that (DoRA, modules saved whole, adapters of embeddings, trained biases, starts that change the
base) is refused by name.
"""

import collections
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.naming import WRAPPERS
from qjax.checkpoints.quantized import module_names
from qjax.checkpoints.tensors import FLOATS, Header, read_finite, read_headers, write_tensors
from qjax.errors import QjaxError
from qjax.files import expand, listing, write_atomically
from qjax.folders import new_folder, standing
from qjax.linear import LowRank
from qjax.models.config import DecoderConfig
from qjax.models.families import FAMILIES
from qjax.models.family import StoredTensor, stored_tensors
from qjax.models.parameters import parameter_shapes
from qjax.untrusted import is_folder, quoted, read_json, refuse_links_out, status

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REPLACED = ("adapter_*.json", "adapter_*.safetensors")
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight")
COPY = ".base_layer.weight"  # ends the name of the base's own head, which PEFT writes beside an adapter of it
PLAIN = re.compile(r"\^?[A-Za-z_]\w*(\.\w+)*\$?")
STARTS = ("gaussian", "eva", "orthogonal", "loftq")  # that leave the base as it is, or come with one
UNREAD = {  # entries of adapter_config.json -> what they ask for
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "lora_bias": "biases of adapters",
    "modules_to_save": "modules saved whole",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters of bare parameters",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron's layers",
}


def load_adapter(folder: str | Path, config: DecoderConfig) -> dict[str, LowRank]:
    """The adapters in a folder of PEFT's by the path of their kernel, in float32, for a model of this configuration.

    Raises QjaxError for what is missing, corrupt, not finite or not supported, and lists all modules that the model lacks or
    that are of other sizes.
    """
    folder = standing(expand(folder))
    if not is_folder(folder) or not status(folder / CONFIG):
        raise QjaxError(f"{folder} has no {CONFIG}; give the folder that PEFT, or qjax train qlora, wrote")
    refuse_links_out(folder)
    settings = read_json(folder / CONFIG)
    _refuse_unread(folder / CONFIG, settings)
    if not status(folder / WEIGHTS):
        raise QjaxError(f"{folder} has no {WEIGHTS}; adapters in pickles (.bin) are not read, PEFT's save_pretrained writes it")
    headers = read_headers([folder / WEIGHTS])
    pairs = _pairs(folder, {name: header for name, header in headers.items() if not name.endswith(COPY)})
    _require_targets(folder, settings, pairs)
    known, prefix = _modules(config), FAMILIES[config.family].prefix
    problems, found = [], {}
    for name in (name for name in headers if name.endswith(COPY)):
        layer = known.get(_unwrapped(name.removesuffix(COPY)))
        if layer is None or layer.shape != headers[name].shape:
            problems.append(f"{name} is {headers[name].shape}, which no layer of it is")
    for given, (a, b) in pairs.items():
        tensor = known.get(given) or known.get(prefix + given)
        if tensor is None:
            problems.append(f"{given} is no linear layer of it")
            continue
        outputs, inputs, rank = sum(shape[1] for _, shape in tensor.parts), tensor.parts[0][1][0], a.shape[0] if a.shape else 0
        if a.shape != (rank, inputs) or b.shape != (outputs, rank) or rank < 1:
            problems.append(f"{given} is {inputs} -> {outputs}, the adapter {a.shape} and {b.shape}")
            continue
        scaling = _scaling(folder / CONFIG, settings, given, rank)
        found |= _read(tensor, *(read_finite(header, "train the adapter again") for header in (a, b)), scaling)
    if problems:
        raise QjaxError(f"{folder} is no adapter for this base: {listing(problems)}; give the base that it was trained on")
    return found


def base_name(folder: str | Path) -> str:
    """The last part of what an adapter says its base is, a hub's name or a folder; "" where it says nothing."""
    named = read_json(standing(expand(folder)) / CONFIG).get("base_model_name_or_path")
    return Path(named).name if isinstance(named, str) else ""


def _refuse_unread(file: Path, settings: Mapping[str, object]) -> None:
    if settings.get("peft_type") != "LORA":
        raise QjaxError(f"{file}: peft_type is {quoted(settings.get('peft_type'))}, only LORA is read; merge it with PEFT")
    wanted = [f"{name} ({what})" for name, what in UNREAD.items() if settings.get(name)]
    if (bias := settings.get("bias", "none")) not in ("none", None):
        wanted.append(f"bias {quoted(bias)} (trained biases)")
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in STARTS and start is not None:
        wanted.append(f"init_lora_weights {quoted(start)} (a base that the start changed)")
    if wanted:
        raise QjaxError(f"{file} asks for {listing(wanted)}, which is not read; merge the adapter with PEFT")


def _pairs(folder: Path, headers: Mapping[str, Header]) -> dict[str, tuple[Header, Header]]:
    """lora_A and lora_B of each module, by its name in the base's files."""
    sides: dict[str, dict[str, Header]] = collections.defaultdict(dict)
    strange = []
    for name, header in headers.items():
        match = TENSOR.fullmatch(name)
        if match is None or header.dtype not in FLOATS:
            strange.append(f"{name} ({header.dtype})")
            continue
        sides[_unwrapped(match["module"])][match["side"]] = header
    if strange:
        raise QjaxError(f"{folder / WEIGHTS}: {listing(strange)} is no part of a LoRA of linear layers; merge it with PEFT")
    if halves := [f"{module} has lora_{next(iter(each))} alone" for module, each in sides.items() if len(each) != 2]:
        raise QjaxError(f"{folder / WEIGHTS}: {listing(halves)}; get the whole file")
    if not sides:
        raise QjaxError(f"{folder / WEIGHTS} holds no adapter; get the whole file")
    return {module: (each["A"], each["B"]) for module, each in sides.items()}


def _unwrapped(module: str) -> str:
    """A module's name in the base's files."""
    while wrapper := next((each for each in WRAPPERS if module.startswith(each)), None):
        module = module.removeprefix(wrapper)
    return module


def _require_targets(folder: Path, settings: Mapping[str, object], pairs: Mapping[str, object]) -> None:
    """Raises QjaxError where modules that the configuration names have no adapter in the file."""
    named = settings.get("target_modules")
    for name in named if isinstance(named, list) else ():
        if not isinstance(name, str) or not any(each == name or each.endswith(f".{name}") for each in pairs):
            raise QjaxError(
                f"{folder}: {CONFIG} names the module {quoted(name)}, {WEIGHTS} has no adapter for it; get the whole file"
            )


def _scaling(file: Path, settings: Mapping[str, object], module: str, rank: int) -> float:
    """s of a module; raises QjaxError for numbers that are none, and where the file's rank is another."""
    asked = _of_module(file, settings, "rank_pattern", module, settings.get("r", 8))
    alpha = _of_module(file, settings, "alpha_pattern", module, settings.get("lora_alpha", 8))
    if asked != rank or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise QjaxError(
            f"{file}: {module} has the rank {quoted(asked)} and alpha {quoted(alpha)}, in the file it is of rank {rank}; "
            "expected that rank and a number"
        )
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_module(file: Path, settings: Mapping[str, object], key: str, module: str, default: object) -> object:
    """The entry of a pattern that fits the module's name, else the default. Patterns are names of modules or their ends, as
    regular expressions of strangers are not run.
    """
    patterns = settings.get(key) or {}
    wrong = [each for each in patterns if not PLAIN.fullmatch(each)] if isinstance(patterns, dict) else [patterns]
    if wrong:
        raise QjaxError(f"{file}: {key} has {listing(map(quoted, wrong))}; expected names of modules or their ends")
    for pattern, value in patterns.items():
        name = pattern.strip("^$")
        if module == name or (not pattern.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def _modules(config: DecoderConfig) -> dict[str, StoredTensor]:
    """The linear layers of the model's files by name."""
    stored = stored_tensors(FAMILIES[config.family], parameter_shapes(config), config.heads)
    fits = lambda tensor: all(path.endswith("/kernel") and len(shape) == 2 for path, shape in tensor.parts)  # noqa: E731
    return {name: tensor for name, tensor in module_names(stored).items() if fits(tensor)}


def _rows(tensor: StoredTensor, rank: int) -> StoredTensor:
    """The module's B (out, rank), as a stored tensor of (rank, out) parts."""
    return tensor._replace(parts=tuple((path, (rank, shape[1])) for path, shape in tensor.parts), transposed=True)


def _read(tensor: StoredTensor, a: np.ndarray, b: np.ndarray, scaling: float) -> dict[str, LowRank]:
    a, b = a.astype(np.float32), b.astype(np.float32)
    pieces = _rows(tensor, a.shape[0]).split(b)
    return {path: LowRank(jnp.asarray(a.T), jnp.asarray(piece), scaling) for path, piece in pieces.items()}


# --- writing -------------------------------------------------------------------------------------------------------------


def save_adapter(
    folder: str | Path,
    config: DecoderConfig,
    adapters: Mapping[str, LowRank],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that PEFT and `load_adapter` read, which appears when it is whole; float32. base: name of the base model.

    Raises QjaxError for adapters of kernels that the model's files have no module for, and what `new_folder` raises.
    """
    known = _modules(config)
    places = {path: name for name, tensor in known.items() for path, _ in tensor.parts}
    if homeless := [path for path in adapters if path not in places]:
        raise QjaxError(f"PEFT has no module for {listing(homeless)}; leave them out")
    if not adapters:
        raise QjaxError("there is no adapter to write; give some")
    tensors, ranks, alphas = {}, {}, {}
    for name in dict.fromkeys(places[path] for path in adapters):
        a, b, scaling = _joined(known[name], {path: each for path, each in adapters.items() if places[path] == name})
        tensors |= {f"{WRAPPERS[0]}{name}.lora_A.weight": a, f"{WRAPPERS[0]}{name}.lora_B.weight": b}
        ranks[name], alphas[name] = len(a), scaling * len(a)
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": FAMILIES[config.family].kernels_in_out,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": _targets(list(ranks), list(known)),
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: _number(each) for name, each in alphas.items() if each != alpha},
    }
    with new_folder(folder, overwrite=overwrite, replaces=REPLACED) as new:
        write_tensors(new / WEIGHTS, tensors)
        write_atomically(new / CONFIG, json.dumps(settings, indent=1) + "\n")


def _joined(tensor: StoredTensor, adapters: Mapping[str, LowRank]) -> tuple[np.ndarray, np.ndarray, float]:
    """(A, B, s) of a module from its kernels' adapters: with one A where all are the same, else side by side."""
    arrays = {path: (np.asarray(each.a, np.float32), np.asarray(each.b, np.float32)) for path, each in adapters.items()}
    first, scaling = next(iter(arrays.values()))[0], next(iter(adapters.values())).scaling
    shared = all(np.array_equal(a, first) for a, _ in arrays.values())
    rank = first.shape[1] if shared else sum(a.shape[1] for a, _ in arrays.values())
    rows = {path: np.zeros((rank, shape[1]), np.float32) for path, shape in tensor.parts}
    start = 0
    for path, (a, b) in arrays.items():
        rows[path][start : start + a.shape[1]] = b * (adapters[path].scaling / scaling)
        start += 0 if shared else a.shape[1]
    whole = first if shared else np.concatenate([a for a, _ in arrays.values()], axis=1)
    return whole.T, _rows(tensor, rank).join(rows), scaling


def _targets(modules: list[str], known: list[str]) -> list[str]:
    """The ends of names by which PEFT finds these modules and no others of the model, or else the whole names."""
    ends = {name.rpartition(".")[2] for name in modules}
    whole = {end for end in ends if all(name in modules for name in known if name.rpartition(".")[2] == end)}
    return sorted(whole) + [name for name in modules if name.rpartition(".")[2] not in whole]


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
