"""Fingerprints, and a row's key: a hash of everything that can change its figures. Equal keys mean equal figures.

Model weights, recipe, rules, text, convention, seed, library versions, machine kind, compute type, source code less what only
presents results: what the measurements say is asked (`columns.py`), and the windows with their documents.
"""

import hashlib
import json


def digest(*parts: object) -> str:
    """16 hexadecimal digits of a SHA-256 over JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
