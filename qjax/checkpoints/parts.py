"""A packed folder written part by part, and gone on with after a kill.

    .NAME.partial/    beside NAME, until all is there
        model-block_3.safetensors   a part's leaves: whole, or not there
        qjax-progress.json          what is being made, and of every complete part the digest of its file, what its quantized
                                    leaves are, and a record for its maker; rewritten after the file is on disk
        qjax.lock                   locked by the writer that is at work here, until it is closed or its process ends

`finish` adds the description (`packed.py`) and gives the folder its name: whoever sees the name sees a whole model.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qjax import __version__
from qjax.checkpoints import packed
from qjax.checkpoints.tensors import read_arrays, read_headers, write_tensors
from qjax.errors import QjaxError
from qjax.files import expand, listing, locked, unwritable, write_atomically
from qjax.folders import prepare_output_folder, require_place, take_name
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.models.parameters import check_parameters, parameter_shapes
from qjax.untrusted import digest_of, read_json

PROGRESS, LOCK = "qjax-progress.json", "qjax.lock"


class PartWriter:
    """Writes a packed model into `folder`, a part at a time; a context, which keeps other writers out of it."""

    def __init__(
        self, folder: str | Path, config: DecoderConfig, identity: Mapping[str, object], *, overwrite: bool = False
    ) -> None:
        """Begins, or goes on where an earlier process was stopped.

        identity: JSON values that say all that the leaves depend on: model, recipe, calibration data and so on. Raises
        QjaxError where the folder holds anything, unless `overwrite`, where what was begun is something else (with
        `overwrite` that is begun anew), and where another writer is at work on it.
        """
        _tidy(expand(folder))
        self._target, self._config = require_place(folder, overwrite=overwrite), config
        self._folder = self._target.with_name(f".{self._target.name}.partial")
        with contextlib.ExitStack() as held:
            held.enter_context(_alone(prepare_output_folder(self._folder)))
            self._progress = self._begin(identity, overwrite)
            self._held = held.pop_all()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _begin(self, identity: Mapping[str, object], overwrite: bool) -> dict[str, dict]:
        """What was begun, less what is not whole; all else is taken away."""
        identity = json.loads(json.dumps({"qjax": __version__, "version": packed.VERSION, **identity}))
        begun = (
            read_json(self._folder / PROGRESS) if (self._folder / PROGRESS).exists() else {"identity": identity, "parts": {}}
        )
        if not _is_progress(begun):
            begun = {"identity": {PROGRESS: "unreadable"}, "parts": {}}
        if begun["identity"] != identity:
            if not overwrite:
                raise QjaxError(
                    f"{self._folder} holds the beginning of something else ({_difference(begun['identity'], identity)}); "
                    "name another folder, or ask to overwrite"
                )
            begun["parts"] = {}
        whole = {name: entry for name, entry in begun["parts"].items() if _is_whole(self._file(name), entry)}
        known = {PROGRESS, LOCK, *(self._file(name).name for name in whole)}
        for other in self._folder.iterdir():  # half a part, what libraries wrote it through, something else's
            if other.name not in known:
                shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
        return {"identity": identity, "parts": whole}

    @property
    def complete(self) -> dict[str, object]:
        """The record of every part that is on disk whole, by the part's name."""
        return {name: entry["record"] for name, entry in self._progress["parts"].items()}

    def write(self, name: str, leaves: Mapping[str, object], record: object = None) -> None:
        """Puts a part's leaves, by path in the model, on disk. record: JSON values that `complete` gives back.

        Raises QjaxError for leaves that the model does not have, or of other shapes, and for a folder that cannot be written.
        """
        shapes = parameter_shapes(self._config)
        check_parameters(leaves, {path: shapes[path] for path in leaves if path in shapes})
        write_tensors(self._file(name), {key: np.asarray(array) for key, array in packed.stored(leaves).items()})
        entry = {"digest": digest_of(self._file(name)), "quantized": packed.describe(leaves), "record": record}
        self._progress["parts"][name] = entry
        write_atomically(self._folder / PROGRESS, json.dumps(self._progress))

    def read(self, name: str) -> dict[str, object]:
        """A complete part's leaves by path; lazy (`lazy.py`)."""
        headers = read_headers([self._file(name)])
        templates = packed.templates_of(self._config, self._progress["parts"][name]["quantized"])
        held = {path: leaf for path, leaf in templates.items() if packed.stored({path: leaf}).keys() <= headers.keys()}
        return packed.filled(held, read_arrays(headers, advice="write the part again", lazy=True))

    def finish(self, model: Model, layers: str | None = None, beside: Path | None = None) -> Path:
        """Describes the folder and gives it its name, which is returned. model: its name, recipe and tokenizer; its parameters
        are not looked at. layers: the content of layers.jsonl. beside: see `packed.save`. Raises QjaxError where parameters of
        the configuration are missing.
        """
        parts = self._progress["parts"]
        check_parameters(
            {path: leaf for name in parts for path, leaf in self.read(name).items()}, parameter_shapes(self._config)
        )
        quantized = {path: entry for part in parts.values() for path, entry in part["quantized"].items()}
        digests = {self._file(name).name: part["digest"] for name, part in parts.items()}
        packed.write_description(self._folder, model._replace(config=self._config), quantized, digests, layers, beside)
        try:
            take_name(self._folder, self._target, (*packed.REPLACED, PROGRESS, LOCK))
            _tidy(self._target)
        except OSError as error:
            raise unwritable(self._target, error) from error
        return self._target

    def _file(self, name: str) -> Path:
        if not re.fullmatch(r"[\w-]+", name):
            raise QjaxError(f"part {name!r}: expected letters, digits, _ and -")
        return self._folder / f"model-{name}.safetensors"


def _is_progress(begun: Mapping[str, object]) -> bool:
    """Whether it is what `write` keeps."""
    parts = begun.get("parts")
    if not isinstance(begun.get("identity"), dict) or not isinstance(parts, dict):
        return False
    return all(
        isinstance(entry, dict) and isinstance(entry.get("quantized"), dict) and {"digest", "record"} <= entry.keys()
        for entry in parts.values()
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other writers out of a folder. Raises QjaxError where one is at work in it."""

    def refuse() -> None:
        raise QjaxError(f"{folder} is in use by another process; wait until it ends, or name another folder")

    with locked(folder / LOCK, on_wait=refuse):
        if not (folder / LOCK).exists():  # who had it has finished meanwhile
            refuse()
        yield


def _is_whole(file: Path, entry: Mapping[str, object]) -> bool:
    return file.exists() and digest_of(file) == entry["digest"]


def _tidy(folder: Path) -> None:
    """Takes what only a beginning needs out of a finished folder."""
    if (folder / packed.DESCRIPTION).exists():
        (folder / PROGRESS).unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)


def _difference(begun: Mapping[str, object], identity: Mapping[str, object]) -> str:
    names = [name for name in {**begun, **identity} if begun.get(name) != identity.get(name)]
    return listing(f"{name}: {begun.get(name)!r}, now {identity.get(name)!r}" for name in names)
