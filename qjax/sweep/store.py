"""Rows on disk: one JSON object a line, appended and flushed row by row.

A run that is killed at any moment leaves at most one unfinished last line, which reading skips and the next append cuts off.
Any other line that does not parse is an error that names it: results are evidence and are never dropped silently.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from qjax.errors import QjaxError

ROWS = "rows.jsonl"


def read_rows(path: Path) -> list[dict[str, object]]:
    """All finished rows of a file, none where there is no file."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is unfinished
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise QjaxError(f"{path}: line {number} is not a JSON object; mend or remove that line")
        rows.append(row)
    return rows


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Appends one row and waits until it is on disk; an unfinished last line is cut off first."""
    line = json.dumps(row, allow_nan=True).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        finished = file.read().rfind(b"\n") + 1 if end else 0
        if finished < end:
            file.truncate(finished)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
