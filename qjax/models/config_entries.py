"""Entries of a Hugging Face config.json, checked one by one: what several families share in reading and writing it.

Rotary settings have a file of their own (`rope_entries.py`). Every function raises QjaxError that names the entry.
"""

from qjax.errors import QjaxError
from qjax.models.ranges import RANGES
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
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "swiglu_oai": "silu"}

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
    """The token ids of an entry that holds one or several; None for a first one that is no token (null, or below 0). A first
    one beyond all tokens is kept, for DecoderConfig to refuse. Raises QjaxError for what is no number.
    """
    value = config.get(key)
    ids = value if isinstance(value, list) else [value]
    if not all(i is None or type(i) is int for i in ids):
        raise QjaxError(f"{key!r} must be the number of a token or a list of them, got {quoted(value)}")
    first, *others = ids or [None]
    known = [i for i in others if _is_token(i) and i <= RANGES["eos_id"][1]]
    return [first if _is_token(first) else None, *known]


def _is_token(value: object) -> bool:
    return type(value) is int and value >= 0


def agreed(sources: tuple[dict, ...], names: tuple[str, ...], default: float) -> float:
    """The one number that all of these names, wherever they stand, have."""
    values = [get(source, name, float, None) for source in sources for name in names]
    values = sorted({float(value) for value in values if value is not None}) or [default]
    if len(values) > 1:
        raise QjaxError(f"{' and '.join(map(repr, names))} disagree: {', '.join(map(str, values))}")
    return values[0]


def window(config: dict, default: int | None) -> int | None:
    """The sliding window: how many tokens, itself included, a token sees."""
    size = get(config, "sliding_window", int, default)
    if size is not None and size < 1:
        raise QjaxError(f"'sliding_window' must be at least 1, got {size}")
    return size
