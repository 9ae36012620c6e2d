"""Fingerprints, and a row's key: a hash of everything that can change its figures. Equal keys mean equal figures.

Model weights, recipe, rules, text, convention, seed, library versions, machine kind, compute type, source code less what only
presents results: what the measurements say is asked (`columns.py`), and the windows with their documents.
"""

import hashlib
import json
from typing import TYPE_CHECKING

from qjax.driver.report import rows_of

if TYPE_CHECKING:
    from qjax.driver.report import Report


def digest(*parts: object) -> str:
    """16 hexadecimal digits of a SHA-256 over JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def layer_rows(key: str | None, report: "Report") -> list[dict[str, object]]:
    """One flat row a quantized kernel; key: of the cell, None outside a sweep."""
    return [({"key": key} if key else {}) | row for row in rows_of(report.layers)]
