"""Entries of config.json about rotary positions, read and written.

Both generations of names are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. The older one, which every version
of the transformers library understands, is written.
"""

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.scalings import LinearScaling, Llama3Scaling, Scaling
from qjax.untrusted import quoted


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
    scaling = config.get("rope_scaling") if older == "rope_theta" else None
    own = {"rope_theta": config.get(older), "rope_scaling": scaling, "rope_parameters": parameters.get(kind)}
    return rope(own, theta=theta)


def partial_rope(config: dict, *, share: float, older: tuple[str, ...] = (), theta: float = 10000.0) -> dict[str, object]:
    """rope_theta, rope_scaling and rotary_fraction of DecoderConfig, from either generation of names.

    share, theta: where config.json does not say them. older: the family's own names of theta and the fraction.
    """
    newer, former = (entries.get(config, name, dict, None) or {} for name in ("rope_parameters", "rope_scaling"))
    if newer and any(newer.get(key, value) != value for key, value in former.items()):
        raise QjaxError("'rope_parameters' and 'rope_scaling' disagree; keep the one that the model was trained with")
    parameters = newer or former
    if nested := [key for key, value in parameters.items() if isinstance(value, dict)]:
        raise QjaxError(f"rotary settings of their own for {nested} are not supported; supported: the same in all layers")
    return {
        "rope_theta": entries.agreed((parameters, config), ("rope_theta", *older[:1]), theta),
        "rope_scaling": _read_scaling(parameters),
        "rotary_fraction": entries.agreed((parameters, config), ("partial_rotary_factor", *older[1:]), share),
    }


def _read_scaling(parameters: dict) -> Scaling | None:
    match kind := parameters.get("rope_type", parameters.get("type", "default")):
        case "default":
            return None
        case "linear":
            return LinearScaling(float(entries.get(parameters, "factor", float)))
        case "llama3":
            return Llama3Scaling(
                factor=float(entries.get(parameters, "factor", float)),
                low_frequency_factor=float(entries.get(parameters, "low_freq_factor", float)),
                high_frequency_factor=float(entries.get(parameters, "high_freq_factor", float)),
                original_context=entries.get(parameters, "original_max_position_embeddings", int),
            )
        case _:
            raise QjaxError(f"rotary scaling {quoted(kind)} is not supported; supported: default, linear, llama3")


def write_rope(config: DecoderConfig | LayerKind) -> dict:
    """The inverse of `rope`, of a model or of layers of one kind."""
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
