"""Rows on disk: one JSON object a line, appended and flushed row by row.

A run that is killed at any moment leaves at most one unfinished last line, which reading skips and the next append cuts off; a
line that lacks its newline alone is whole. Any other that does not parse is an error that names it: results are evidence and
are never dropped silently.

Whoever writes holds the folder's lock, FOLDER/.lock, an empty file that stays there.
"""

import contextlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from qjax import files, untrusted
from qjax.errors import QjaxError, QjaxWarning
from qjax.files import unwritable
from qjax.sweep.columns import misfits
from qjax.sweep.rows import complete

ROWS = "rows.jsonl"
LAYERS = "layers.jsonl"  # a row a kernel, under the key of its cell
LOCK = ".lock"
LOCK_SECONDS = 60.0  # after which a worker that waits for the lock says so
OTHER_COLUMNS = {"key": str, "kind": str}  # of rows that are no cells of a sweep


class Reader:
    """Reads a file of lines that grows: each time what was added since."""

    def __init__(self, path: Path):
        self._path, self._end, self._lines = path, 0, 0  # of the lines that were read whole

    def objects(self) -> Iterator[tuple[int, dict[str, object]]]:
        """Number and object of every further finished line; one that lacks its newline comes again."""
        found = untrusted.status(self._path)
        size = found.st_size if found else 0
        if size < self._end:  # another file, or somebody mended it
            self._end = self._lines = 0
        if found is None or (size == self._end and stat.S_ISREG(found.st_mode)):  # others have no size
            return
        for number, line in untrusted.lines(self._path, first=self._lines + 1, start=self._end):
            try:
                row = untrusted.json_object(line, f"{self._path}: line {number}")
            except QjaxError as error:
                if not line.endswith(b"\n"):  # unfinished
                    return
                raise QjaxError(f"{error}; mend or remove that line") from error
            if line.endswith(b"\n"):
                self._end, self._lines = self._end + len(line), number
            yield number, row

    def rows(self) -> Iterator[dict[str, object]]:
        """Every further row of a sweep; those of earlier versions with the columns made since."""
        for number, row in self.objects():
            cell = "kind" not in row
            wrong = misfits(row) if cell else [name for name, of in OTHER_COLUMNS.items() if not isinstance(row.get(name), of)]
            if wrong:
                raise QjaxError(
                    f"{self._path}: line {number} is no row of a sweep: {', '.join(wrong)} missing or of another type"
                )
            yield complete(row) if cell else row


def read_rows(path: Path) -> list[dict[str, object]]:
    """All finished rows of a file, none where there is no file."""
    return list(Reader(path).rows())


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """`append_rows` of one."""
    append_rows(path, [row])


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """`write_rows` under the folder's lock, which is made where it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    with locked(path.parent):
        write_rows(path, rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Appends rows and waits until they are on disk, for one who holds the lock; what follows the last whole row is cut off.

    Raises QjaxError when the file cannot be written.
    """
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    try:
        with path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    content = file.read()
                    start = content.rfind(b"\n") + 1
                    try:
                        untrusted.json_object(content[start:], str(path))
                        lines = b"\n" + lines  # whole, but for its newline
                    except QjaxError:
                        file.truncate(start)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: of all processes on all machines that see the folder, one at a time; not to be nested.

    A process that dies gives it back; one that is frozen in the milliseconds when it holds it holds up the others, who say so
    after a minute. Raises QjaxError where the file system has no locks.
    """

    def say() -> None:
        text = f"{folder / LOCK} is held by another process, which may be frozen; end it, or wait"
        warnings.warn(QjaxWarning(text), stacklevel=2)

    with files.locked(folder / LOCK, on_wait=say, patience=LOCK_SECONDS):
        yield
