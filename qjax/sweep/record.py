"""Fingerprints, and a row's key: a hash of everything that can change its figures. Equal keys mean equal figures.

Model weights, recipe, rules, text, convention, seed, library versions, machine kind, compute type, source code less what only
presents results: what the measurements say is asked (`columns.py`).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from qjax.formats import UNQUANTIZED

if TYPE_CHECKING:
    from qjax.driver.report import Report


def digest(*parts: object) -> str:
    """16 hexadecimal digits of a SHA-256 over JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def layer_rows(key: str | None, report: "Report") -> list[dict[str, object]]:
    """One flat row a quantized kernel; key: of the cell, None outside a sweep."""
    records = [record._asdict() for record in report.layers if record.recipe != UNQUANTIZED]
    return [({"key": key} if key else {}) | as_json(record) for record in records]


def as_json(row: Mapping[str, object]) -> dict[str, object]:
    """A row of JSON values, which have neither nan (a standard error of a single window) nor infinity (a model that diverged):
    null and "inf".
    """
    return {name: _jsonable(value) for name, value in row.items()}


def _jsonable(value: object) -> object:
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "inf"
