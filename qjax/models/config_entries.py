"""Entries of a Hugging Face config.json, checked one by one: what several families share in reading and writing it.

Both generations of rotary settings are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. The older one, which
every version of the transformers library understands, is written. Every function raises QjaxError that names the entry.
"""

from qjax.errors import QjaxError
from qjax.models.config import RANGES, DecoderConfig, LinearScaling, Llama3Scaling
from qjax.untrusted import quoted

ACTIVATIONS = {  # config.json -> DecoderConfig
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}

_REQUIRED = object()


def get(config: dict, key: str, kind: type, default=_REQUIRED):
    """config[key], checked; null counts as missing. Integers are accepted for float."""
    value = config.get(key) if isinstance(config, dict) else None
    if value is None and default is not _REQUIRED:
        return default
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        got = "nothing" if value is None else quoted(value)
        raise QjaxError(f"{key!r} must be {'a number' if kind is float else kind.__name__}, got {got}")
    return value


def require(config: dict, key: str, default: object, allowed: object) -> None:
    """An entry that changes the arithmetic must have the one value that the decoder implements."""
    if (value := config.get(key, default)) not in (allowed, None):
        raise QjaxError(f"{key!r} is {quoted(value)}; the decoder can only do {allowed!r}")


def activation(config: dict, key: str, default: str) -> str:
    """DecoderConfig's name of an activation function."""
    name = get(config, key, str, default)
    if name not in ACTIVATIONS:
        raise QjaxError(f"{key!r} is {quoted(name)}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_dim(hidden: int, heads: int) -> int:
    """The size of a head where config.json does not say it."""
    if heads < 1 or hidden % heads:
        raise QjaxError(f"a hidden size of {hidden} does not divide into {heads} heads")
    return hidden // heads


def token_ids(config: dict) -> dict[str, object]:
    """bos_id, eos_id and other_eos_ids of DecoderConfig. Where config.json lists several, the first is the one."""
    begins, ends = (ids_of(config, f"{name}_token_id") for name in ("bos", "eos"))
    return {"bos_id": begins[0], "eos_id": ends[0], "other_eos_ids": tuple(dict.fromkeys(i for i in ends[1:] if i != ends[0]))}


def ids_of(config: dict, key: str) -> list[int | None]:
    """The token ids of an entry that holds one or several; None for a first one that is no token. A first one beyond all
    tokens is kept, for DecoderConfig to refuse.
    """
    value = config.get(key)
    first, *others = value if isinstance(value, list) and value else [value]
    known = [i for i in others if _is_token(i) and i <= RANGES["eos_id"][1]]
    return [first if _is_token(first) else None, *known]


def _is_token(value: object) -> bool:
    return type(value) is int and value >= 0


def rope(config: dict) -> dict[str, object]:
    """rope_theta and rope_scaling of DecoderConfig, for a family that rotates whole heads."""
    found = partial_rope(config, share=1.0)
    if (share := found.pop("rotary_fraction")) != 1:
        raise QjaxError(f"'partial_rotary_factor' is {share}; the family rotates whole heads")
    return found


def partial_rope(config: dict, *, share: float, older: tuple[str, ...] = ()) -> dict[str, object]:
    """rope_theta, rope_scaling and rotary_fraction of DecoderConfig, from either generation of names.

    share: the fraction where config.json does not say it. older: the family's own names of theta and the fraction.
    """
    newer, former = (get(config, name, dict, None) or {} for name in ("rope_parameters", "rope_scaling"))
    if newer and any(newer.get(key, value) != value for key, value in former.items()):
        raise QjaxError("'rope_parameters' and 'rope_scaling' disagree; keep the one that the model was trained with")
    parameters = newer or former
    if nested := [key for key, value in parameters.items() if isinstance(value, dict)]:
        raise QjaxError(f"rotary settings of their own for {nested} are not supported; supported: the same in all layers")
    theta = agreed((parameters, config), ("rope_theta", *older[:1]), 10000.0)
    share = agreed((parameters, config), ("partial_rotary_factor", *older[1:]), share)
    match kind := parameters.get("rope_type", parameters.get("type", "default")):
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(float(get(parameters, "factor", float)))
        case "llama3":
            scaling = Llama3Scaling(
                factor=float(get(parameters, "factor", float)),
                low_frequency_factor=float(get(parameters, "low_freq_factor", float)),
                high_frequency_factor=float(get(parameters, "high_freq_factor", float)),
                original_context=get(parameters, "original_max_position_embeddings", int),
            )
        case _:
            raise QjaxError(f"rotary scaling {quoted(kind)} is not supported; supported: default, linear, llama3")
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_fraction": share}


def agreed(sources: tuple[dict, ...], names: tuple[str, ...], default: float) -> float:
    """The one number that all of these names, wherever they stand, have."""
    values = [get(source, name, float, None) for source in sources for name in names]
    values = sorted({float(value) for value in values if value is not None}) or [default]
    if len(values) > 1:
        raise QjaxError(f"{' and '.join(map(repr, names))} disagree: {', '.join(map(str, values))}")
    return values[0]


def write_rope(config: DecoderConfig) -> dict:
    """The inverse of `rope`."""
    match config.rope_scaling:
        case None:
            scaling = None
        case LinearScaling(factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def window(config: dict, default: int | None) -> int | None:
    """The sliding window: how many tokens, itself included, a token sees."""
    size = get(config, "sliding_window", int, default)
    if size is not None and size < 1:
        raise QjaxError(f"'sliding_window' must be at least 1, got {size}")
    return size


def window_of_all_layers(config: dict, window: int | None, *, first: int) -> int | None:
    """The sliding window that all layers share, or None; `first` is the first layer with one where layer_types is silent."""
    if window is None:
        return None
    layers = min(get(config, "num_hidden_layers", int), RANGES["layers"][1])  # DecoderConfig refuses more
    first = min(max(first, 0), layers)
    default = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    kinds = list(map(str, get(config, "layer_types", list, default)))
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise QjaxError(f"'layer_types' has {sorted(unknown)}; supported: full_attention, sliding_attention")
    if "full_attention" not in kinds:
        return window
    if "sliding_attention" not in kinds or window >= get(config, "max_position_embeddings", int):
        return None  # no layer has it, or no text is long enough to meet it
    raise QjaxError(
        f"a sliding window in {kinds.count('sliding_attention')} of {len(kinds)} layers is not supported; "
        "supported: in all layers or in none"
    )
