"""Entries of config.json about rotary positions, read and written.

Both generations of names are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. The older one, which every version
of the transformers library understands, is written.
"""

import dataclasses

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.scalings import SCALINGS, DynamicScaling, LinearScaling, Llama3Scaling, LongScaling, Scaling, YarnScaling
from qjax.untrusted import quoted

ORIGINAL = "original_max_position_embeddings"


def rope(config: dict, *, theta: float = 10000.0) -> dict[str, object]:
    """rope_theta and rope_scaling of DecoderConfig, for a family that rotates whole heads.

    theta: where config.json is silent.
    """
    found = partial_rope(config, share=1.0, theta=theta)
    if (share := found.pop("rotary_fraction")) != 1:
        raise QjaxError(f"'partial_rotary_factor' is {share}; the family rotates whole heads")
    return found


def rope_of_kind(config: dict, kind: str, older: str, *, theta: float) -> dict[str, object]:
    """The same for layers of one kind, where rope_parameters has settings for each; older: the former name of their theta.

    Former files scale the rotation of full attention alone.
    """
    parameters = entries.get(config, "rope_parameters", dict, None) or {}
    if flat := [key for key, value in parameters.items() if not isinstance(value, dict | None)]:
        raise QjaxError(
            f"'rope_parameters' has {quoted(flat)} beside settings for each kind of layer; the family has only those"
        )
    own = {key: config.get(key) for key in ("max_position_embeddings", "original_max_position_embeddings")}
    own |= {"rope_theta": config.get(older), "rope_parameters": parameters.get(kind)}
    return rope(own | ({"rope_scaling": config.get("rope_scaling")} if older == "rope_theta" else {}), theta=theta)


def partial_rope(
    config: dict,
    *,
    share: float,
    older: tuple[str, ...] = (),
    theta: float = 10000.0,
    long_names: tuple[str, ...] = (),
) -> dict[str, object]:
    """rope_theta, rope_scaling and rotary_fraction of DecoderConfig, from either generation of names.

    share, theta: where config.json does not say them. older: the family's own names of theta and the fraction. long_names:
    what the family's files also call longrope.
    """
    newer, former = (entries.get(config, name, dict, None) or {} for name in ("rope_parameters", "rope_scaling"))
    if newer and any(newer.get(key, value) != value for key, value in former.items()):
        raise QjaxError("'rope_parameters' and 'rope_scaling' disagree; keep the one that the model was trained with")
    parameters = newer or former
    if nested := [key for key, value in parameters.items() if isinstance(value, dict)]:
        raise QjaxError(f"rotary settings of their own for {nested} are not supported; supported: the same in all layers")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = "longrope" if kind in long_names else kind
    if kind != "default" and not (isinstance(kind, str) and kind in READERS):
        raise QjaxError(f"rotary scaling {quoted(kind)} is not supported; supported: default, {', '.join(READERS)}")
    return {
        "rope_theta": entries.agreed((parameters, config), ("rope_theta", *older[:1]), theta),
        "rope_scaling": None if kind == "default" else READERS[kind](parameters, config),
        "rotary_fraction": entries.agreed((parameters, config), ("partial_rotary_factor", *older[1:]), share),
    }


def _number(parameters: dict, key: str, *default: float | None) -> float | None:
    value = entries.get(parameters, key, float, *default)
    return None if value is None else float(value)


def _original(parameters: dict, config: dict) -> int:
    """The context that the model began with; some families have it beside the rotary settings."""
    inside = entries.get(parameters, ORIGINAL, int, entries.get(config, "max_position_embeddings", int))
    return entries.get(config, ORIGINAL, int, inside)


def _read_llama3(parameters: dict, config: dict) -> Scaling:
    return Llama3Scaling(
        factor=_number(parameters, "factor"),
        low_frequency_factor=_number(parameters, "low_freq_factor"),
        high_frequency_factor=_number(parameters, "high_freq_factor"),
        original_context=entries.get(parameters, ORIGINAL, int),
    )


def _read_yarn(parameters: dict, config: dict) -> Scaling:
    return YarnScaling(
        factor=_number(parameters, "factor"),
        original_context=_original(parameters, config),
        fast_turns=_number(parameters, "beta_fast", 32.0),
        slow_turns=_number(parameters, "beta_slow", 1.0),
        amplitude=_number(parameters, "attention_factor", None),
        mscale=_number(parameters, "mscale", None),
        mscale_all_dim=_number(parameters, "mscale_all_dim", None),
        truncate=entries.get(parameters, "truncate", bool, True),
    )


def _read_long(parameters: dict, config: dict) -> Scaling:
    return LongScaling(
        short=tuple(entries.get(parameters, "short_factor", list)),
        long=tuple(entries.get(parameters, "long_factor", list)),
        original_context=_original(parameters, config),
        context=entries.get(config, "max_position_embeddings", int),
        factor=_number(parameters, "factor", None),
        amplitude=_number(parameters, "attention_factor", None),
    )


READERS = {
    "linear": lambda parameters, config: LinearScaling(_number(parameters, "factor")),
    "dynamic": lambda parameters, config: DynamicScaling(_number(parameters, "factor")),
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_long,
}
NAMES = {  # fields of scalings -> entries, where they have other names
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_context": ORIGINAL,
    "fast_turns": "beta_fast",
    "slow_turns": "beta_slow",
    "amplitude": "attention_factor",
    "short": "short_factor",
    "long": "long_factor",
}


def write_rope(config: DecoderConfig | LayerKind) -> dict:
    """The inverse of `rope`, of a model or of layers of one kind."""
    scaling, written = config.rope_scaling, None
    if scaling is not None:
        kind = next(name for name, cls in SCALINGS.items() if type(scaling) is cls)
        fields = {
            field.name: getattr(scaling, field.name)
            for field in dataclasses.fields(scaling)
            if field.name != "context" and (getattr(scaling, field.name) != field.default)
        }
        written = {"rope_type": kind} | {NAMES.get(name, name): _plain(value) for name, value in fields.items()}
    return {"rope_theta": config.rope_theta, "rope_scaling": written}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def context_of(config: dict, scaling: Scaling | None) -> int:
    """The tokens of a text that the model can see: with longrope, those of its original context (`scalings.py`)."""
    context = entries.get(config, "max_position_embeddings", int)
    return min(context, scaling.original_context) if isinstance(scaling, LongScaling) else context


def written_context(config: DecoderConfig) -> int:
    """`max_position_embeddings`."""
    return config.rope_scaling.context if isinstance(config.rope_scaling, LongScaling) else config.context
