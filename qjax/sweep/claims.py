"""Who is at which cell of a folder of results: workers that share a sweep claim cells, so that every cell is measured once.

A worker's claims are one file, FOLDER/.claims/NAME.json: its process and the keys of the cells that it is at. The file is made,
changed and removed under the store's lock (`store.locked`), so a cell has one claimant. A thread sets the file's time of change
ten times in `stale_seconds`: that is the worker's heartbeat.

A claim is void as soon as its process is gone, where it was one of this machine; of any other worker, when its heartbeat has
not moved for `stale_seconds`. The clock of the one who looks tells how long that is, and heartbeats are compared with their
earlier values alone, so no two machines need clocks that agree. Whoever finds a void claim removes its file. Its worker, frozen
and awake again, finds that out under the lock before it writes: it has no cells any more.

The last worker removes the folder; what a killed one leaves, the next removes.
"""

import contextlib
import functools
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qjax.errors import QjaxError
from qjax.files import reason
from qjax.sweep.store import locked
from qjax.untrusted import JSON_BYTES, json_object, open_regular

CLAIMS = ".claims"
STALE_SECONDS = 60.0
BEATS = 10  # heartbeats in the time after which a claim is void


class Holder(NamedTuple):
    """A worker with its claims. place: what its process number counts in; cells: key -> recipe and text."""

    path: Path
    place: str
    host: str
    process: int
    cells: Mapping[str, str]
    beat: int  # the file's time of change, ns

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """Whether it was a process of this machine and is none any more, or died while it wrote its claims."""
        if self.place != this_place():
            return not self.place
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:  # of another user
            return False
        return False


def holders(folder: Path) -> Iterator[Holder]:
    """All workers with claims in a folder, living or not."""
    for path in sorted((folder / CLAIMS).glob("*.json")):
        with contextlib.suppress(QjaxError), open_regular(path) as file:  # removed meanwhile; opening asks a file server anew
            yield Holder(path, *_told(file.read(JSON_BYTES)), os.fstat(file.fileno()).st_mtime_ns)


def _told(content: bytes) -> tuple[str, str, int, dict[str, str]]:
    """Place, host, process and cells of a file of claims; of one that is not whole, nothing."""
    with contextlib.suppress(QjaxError, TypeError, KeyError, AttributeError):
        told = json_object(content, CLAIMS)
        place, host, process, cells = (told[name] for name in ("place", "host", "process", "cells"))
        if 0 < process < 2**31:
            return str(place), str(host), int(process), {str(key): str(label) for key, label in cells.items()}
    return "", "", 0, {}


@functools.cache
def this_place() -> str:
    """This machine since it was started, and the space of process numbers (containers have their own)."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


class Claims:
    """A worker's own claims in a folder, and its eye on those of others. All but `release` under the folder's lock."""

    def __init__(self, folder: Path, *, stale_seconds: float = STALE_SECONDS):
        self._folder, self._stale = folder, stale_seconds
        self._path = folder / CLAIMS / f"{secrets.token_hex(8)}.json"
        self._cells: dict[str, str] = {}
        self._seen: dict[Path, tuple[int, float]] = {}  # of others: the last beat, and when it was first seen by our clock
        self._thread, self._stop = threading.Thread(target=self._beat, daemon=True), threading.Event()

    def others(self) -> dict[str, Holder]:
        """The cells that others are at, by key; void claims are removed."""
        found = {}
        for holder in holders(self._folder):
            if holder.path == self._path:
                continue
            if self._is_void(holder):
                holder.path.unlink(missing_ok=True)
            else:
                found |= dict.fromkeys(holder.cells, holder)
        return found

    def _is_void(self, holder: Holder) -> bool:
        now = time.monotonic()
        beat, since = self._seen.get(holder.path, (None, now))
        self._seen[holder.path] = holder.beat, since if beat == holder.beat else now
        return holder.is_gone or now - self._seen[holder.path][1] > self._stale

    def cells(self) -> Mapping[str, str]:
        """The cells that this worker is at, key -> recipe and text: none any more where others took it for dead."""
        if not self._path.exists():
            self._cells = {}
        return self._cells

    def hold(self, cells: Mapping[str, str]) -> None:
        """Claims these cells, and no others any longer. Raises QjaxError when the claim cannot be written."""
        told = {"place": this_place(), "host": platform.node(), "process": os.getpid(), "cells": dict(cells)}
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_text(json.dumps(told))
        except OSError as error:
            raise QjaxError(f"cannot write {self._path}: {reason(error)}; free space, and run again") from error
        self._cells = dict(cells)
        if not self._thread.is_alive():
            self._thread.start()

    def release(self) -> None:
        """Gives all back and ends; the folder of claims goes with the last of them."""
        self._stop.set()
        if not self._path.parent.exists():
            return
        with locked(self._folder):
            self._path.unlink(missing_ok=True)
            self.others()
            with contextlib.suppress(OSError):  # others are at work
                self._path.parent.rmdir()

    def _beat(self) -> None:
        while not self._stop.wait(self._stale / BEATS):
            with contextlib.suppress(OSError):  # taken for dead: what `cells` finds out
                os.utime(self._path)
