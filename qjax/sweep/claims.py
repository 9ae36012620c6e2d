"""Who is at which cell of a folder of results: workers that share a sweep claim cells, so that every cell is measured once.

A worker's claims are one file, FOLDER/.claims/NAME.json: its process and the keys of the cells that it is at. The file is made,
changed and removed under the store's lock (`store.locked`), so a cell has one claimant. A thread sets the file's time of change
ten times in `stale_seconds`: that is the worker's heartbeat.

A claim is void as soon as its process is gone, where it was one of this machine; of any other worker, when its heartbeat has
not moved for `stale_seconds`. The clock of the one who looks tells how long that is, and heartbeats are compared with their
earlier values alone, so no two machines need clocks that agree. Whoever finds a void claim removes its file. Its worker, frozen
and awake again, finds that out under the lock before it writes: it has no cells any more.

FOLDER/.claims/broken.jsonl tells of cells that turned out to have no figures, so that none of those at work tries them again.

The last worker removes the folder; what a killed one leaves, the next removes.
"""

import contextlib
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
from qjax.files import unwritable
from qjax.place import is_gone, this_place
from qjax.sweep.store import Reader, locked, write_rows
from qjax.untrusted import JSON_BYTES, json_object, open_regular

CLAIMS, BROKEN = ".claims", "broken.jsonl"
STALE_SECONDS = 60.0
LONGEST_SECONDS = 1e6  # which a thread can wait
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
        return is_gone(self.process) if self.place == this_place() else not self.place


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


class Claims:
    """A worker's own claims in a folder, and its eye on those of others. All but `release` under the folder's lock."""

    def __init__(self, folder: Path, *, stale_seconds: float = STALE_SECONDS):
        if not 0 < stale_seconds <= LONGEST_SECONDS:
            raise QjaxError(f"stale_seconds {stale_seconds}: expected more than 0, to {LONGEST_SECONDS:g}")
        self._folder, self._stale = folder, stale_seconds
        self._path = folder / CLAIMS / f"{secrets.token_hex(8)}.json"
        self._broken = folder / CLAIMS / BROKEN
        self._cells: dict[str, str] = {}
        self._seen: dict[Path, tuple[int, float]] = {}  # of others: the last beat, and when it was first seen by our clock
        self._thread, self._stop = threading.Thread(target=self._beat, daemon=True), threading.Event()

    def join(self) -> None:
        """Is seen from now on. The first of those at work forgets what was broken before."""
        if not self._living():
            self._broken.unlink(missing_ok=True)
        self.hold({})

    def others(self) -> dict[str, Holder]:
        """The cells that others are at, by key; void claims are removed."""
        return {key: holder for holder in self._living() for key in holder.cells}

    def _living(self) -> list[Holder]:
        """The others at work."""
        found = []
        for holder in holders(self._folder):
            if holder.path == self._path:
                continue
            if self._is_void(holder):
                holder.path.unlink(missing_ok=True)
            else:
                found.append(holder)
        return found

    def tell_broken(self, key: str, why: str) -> None:
        """Lets nobody else try a cell that has no figures."""
        self._broken.parent.mkdir(exist_ok=True)
        write_rows(self._broken, [{"key": key, "why": why}])

    def broken(self) -> dict[str, str]:
        """Why cells have no figures, by key, as far as one of those at work found out."""
        return {str(each.get("key")): str(each.get("why")) for _, each in Reader(self._broken).objects()}

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
            raise unwritable(self._path, error) from error
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
            if not self._living():
                self._broken.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # what a file server keeps there
                    self._path.parent.rmdir()

    def _beat(self) -> None:
        while not self._stop.wait(self._stale / BEATS):
            with contextlib.suppress(OSError):  # taken for dead: what `cells` finds out
                os.utime(self._path)
