"""Entries of config.json that say how the layers of a model differ, read into LayerKinds and written."""

from collections.abc import Callable, Sequence

from qjax.errors import QjaxError
from qjax.models import config_entries as entries
from qjax.models import rope_entries
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.ranges import RANGES
from qjax.untrusted import quoted

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_count(config: dict, key: str = "num_hidden_layers") -> int:
    """How many layers to make lists for: of an impossible number, which DecoderConfig refuses, as many as may be."""
    return min(max(entries.get(config, key, int), 1), RANGES["layers"][1])


def sliding_layers(config: dict, default: Callable[[int], bool]) -> list[bool]:
    """Which layers have a sliding window; default(number of a layer) where layer_types is silent."""
    layers = layer_count(config)
    kinds = entries.get(config, "layer_types", list, None)
    if kinds is None:
        return [default(number) for number in range(layers)]
    kinds = list(map(str, kinds))
    if unknown := set(kinds) - {SLIDING, FULL}:
        raise QjaxError(f"'layer_types' has {quoted(sorted(unknown))}; supported: {FULL}, {SLIDING}")
    if len(kinds) != layers:
        raise QjaxError(f"'layer_types' names {len(kinds)} layers; the model has {layers}")
    return [kind == SLIDING for kind in kinds]


def layer_types(config: DecoderConfig) -> list[str]:
    """The inverse of `sliding_layers`."""
    return [FULL if kind.sliding_window is None else SLIDING for kind in config.layer_kinds]


def window_of(config: DecoderConfig) -> int | None:
    """The sliding window of those layers that have one."""
    return next((kind.sliding_window for kind in config.layer_kinds if kind.sliding_window is not None), None)


def by_layer(kinds: Sequence[LayerKind]) -> dict[str, object]:
    """The fields of DecoderConfig that say of what kind each layer is."""
    return {**vars(kinds[0]), "kinds": tuple(kinds) if len(set(kinds)) > 1 else ()}


def with_windows(config: dict, window: int | None, default: Callable[[int], bool]) -> dict[str, object]:
    """Those fields for layers that are equal but for a sliding window that some of them have (`sliding_layers`)."""
    sliding = [window is not None and each for each in sliding_layers(config, default)]
    if window is not None and not all(sliding) and window >= entries.get(config, "max_position_embeddings", int):
        sliding = [False] * len(sliding)  # no text is long enough to meet it
    rope = rope_entries.rope(config)
    return by_layer([LayerKind(sliding_window=window if each else None, **rope) for each in sliding])
