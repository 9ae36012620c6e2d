"""A decoder's configuration as JSON values, and back: how qjax's own files keep it."""

import dataclasses

from qjax.errors import QjaxError
from qjax.files import listing
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.scalings import SCALINGS
from qjax.untrusted import quoted


def config_to_dict(config: DecoderConfig) -> dict:
    """The configuration as JSON values; `rope_scaling` carries its kind."""
    kinds = [_to_dict(kind) for kind in config.kinds]
    return {**_to_dict(config), "kinds": kinds}


def _to_dict(values: DecoderConfig | LayerKind) -> dict:
    scaling = values.rope_scaling
    names = {cls: name for name, cls in SCALINGS.items()}
    tagged = None if scaling is None else {"kind": names[type(scaling)], **dataclasses.asdict(scaling)}
    return {**dataclasses.asdict(values), "rope_scaling": tagged}


def config_from_dict(values: dict) -> DecoderConfig:
    """The inverse of `config_to_dict`. Raises QjaxError for unknown, missing or malformed entries."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if isinstance(kinds := values.get("kinds"), tuple):
        if strange := [kind for kind in kinds if not isinstance(kind, dict)]:
            raise QjaxError(f"'kinds' has {quoted(strange[0])}; expected the settings of each layer")
        values["kinds"] = tuple(_build(LayerKind, _with_scaling(kind)) for kind in kinds)
    return _build(DecoderConfig, _with_scaling(values))


def _with_scaling(values: dict) -> dict:
    tagged = values.get("rope_scaling")
    if tagged is None:
        return values
    if not isinstance(tagged, dict) or not isinstance(kind := tagged.get("kind"), str) or kind not in SCALINGS:
        raise QjaxError(f"'rope_scaling' is {quoted(tagged)}; its kind must be one of {', '.join(SCALINGS)}")
    scaling = {key: tuple(value) if isinstance(value, list) else value for key, value in tagged.items() if key != "kind"}
    return {**values, "rope_scaling": _build(SCALINGS[kind], scaling)}


def _build(cls: type, values: dict) -> object:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    problems = [f"unknown entry {quoted(name)}" for name in values if name not in fields]
    problems += [f"missing entry {name!r}" for name in required if name not in values]
    for name in values.keys() & fields.keys():
        kind = int | float if fields[name].type is float else fields[name].type
        if not isinstance(values[name], kind):
            problems.append(f"{name!r} is {quoted(values[name])}")
    if problems:
        raise QjaxError(f"{cls.__name__}: {listing(problems)}")
    return cls(**values)
