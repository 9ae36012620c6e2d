"""Figures that may be told: finite ones. What is NaN or infinite stops a measurement by name, at the depth where it arises."""

import math
from collections.abc import Mapping

import jax
import numpy as np

from qjax.errors import QjaxError


class NotFiniteError(QjaxError):
    """There is no figure: it came out as NaN or infinity, or of numbers that their type cannot hold."""


def require_finite(values: object, of: str, *, model: str) -> None:
    """Raises NotFiniteError, which names what the values are of, where any of them (an array) is NaN or infinite."""
    values = np.asarray(values)
    broken = values.size - int(np.isfinite(values).sum())
    if broken:
        raise NotFiniteError(
            f"{model}: {broken} of {values.size} {of} are not finite, and no figure comes of that; the weights, or what the "
            "recipe makes of them, are broken or far too large"
        )


def as_json(row: Mapping[str, object]) -> dict[str, object]:
    """A row of JSON values, which have neither nan (a standard error of a single window) nor infinity: null and "inf"."""
    return {name: _jsonable(value) for name, value in row.items()}


def _jsonable(value: object) -> object:
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "inf"
