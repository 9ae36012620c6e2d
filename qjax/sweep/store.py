"""Rows on disk: one JSON object a line, appended and flushed row by row.

A run that is killed at any moment leaves at most one unfinished last line, which reading skips and the next append cuts off.
Any other line that does not parse is an error that names it: results are evidence and are never dropped silently.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from qjax import untrusted
from qjax.errors import QjaxError
from qjax.files import reason
from qjax.sweep.columns import misfits
from qjax.sweep.rows import complete

ROWS = "rows.jsonl"
LAYERS = "layers.jsonl"  # a row a kernel, under the key of its cell
OTHER_COLUMNS = {"key": str, "kind": str}  # of rows that are no cells of a sweep


def read_rows(path: Path) -> list[dict[str, object]]:
    """All finished rows of a file, none where there is no file; those of earlier versions with the columns made since."""
    rows = []
    for number, row in _objects(path):
        cell = "kind" not in row
        wrong = misfits(row) if cell else [name for name, kind in OTHER_COLUMNS.items() if not isinstance(row.get(name), kind)]
        if wrong:
            raise QjaxError(f"{path}: line {number} is no row of a sweep: {', '.join(wrong)} missing or of another type")
        rows.append(complete(row) if cell else row)
    return rows


def _objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The number and the object of every finished line."""
    if not untrusted.status(path):
        return
    for number, line in untrusted.lines(path):
        if not line.endswith(b"\n"):  # unfinished
            return
        try:
            row = untrusted.json_object(line, f"{path}: line {number}")
        except QjaxError as error:
            raise QjaxError(f"{error}; mend or remove that line") from error
        yield number, row


def layers_held(path: Path) -> set[tuple[str, str]]:
    """(key, path) of the kernels in a layers file: a run that is killed before it writes a cell's row has left the cell's."""
    return {(str(row.get("key")), str(row.get("path"))) for _, row in _objects(path)}


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """`append_rows` of one."""
    append_rows(path, [row])


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Appends rows and waits until they are on disk; an unfinished last line is cut off first.

    One writer at a time: processes that share a file wait for each other where the system has file locks. Raises QjaxError when
    the file cannot be written.
    """
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file, _locked(file):
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise QjaxError(f"cannot write {path}: {reason(error)}; free space or choose another folder, and run again") from error


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
    yield
