"""A packed folder written part by part, and gone on with after a kill.

    .NAME.partial/    beside NAME, until all is there
        model-block_3.safetensors   a part's leaves: whole, or not there
        progress.json               what is being made, and of every complete part the digest of its file, what its quantized
                                    leaves are, and a record for its maker; rewritten after the file is on disk

`finish` adds the description (`packed.py`) and gives the folder its name: whoever sees the name sees a whole model.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qjax import __version__
from qjax.checkpoints import packed
from qjax.checkpoints.tensors import read_arrays, read_headers, write_tensors
from qjax.errors import QjaxError
from qjax.files import expand, listing, prepare_output_folder, read_json, reason, sync, write_atomically
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.models.parameters import check_parameters, parameter_shapes

PROGRESS = "progress.json"


class PartWriter:
    """Writes a packed model into `folder`, a part at a time."""

    def __init__(
        self, folder: str | Path, config: DecoderConfig, identity: Mapping[str, object], *, overwrite: bool = False
    ) -> None:
        """Begins, or goes on where an earlier process was stopped.

        identity: JSON values that say all that the leaves depend on: model, recipe, calibration data and so on. Raises
        QjaxError where the folder holds anything, unless `overwrite`, and where what was begun is something else (with
        `overwrite` that is begun anew).
        """
        self._target, self._config, self._overwrite = expand(folder).resolve(), config, overwrite
        self._folder = self._target.with_name(f".{self._target.name}.partial")
        if self._target.exists():
            prepare_output_folder(self._target, overwrite=overwrite)
        identity = json.loads(json.dumps({"qjax": __version__, "version": packed.VERSION, **identity}))
        begun = (
            read_json(self._folder / PROGRESS) if (self._folder / PROGRESS).exists() else {"identity": identity, "parts": {}}
        )
        if begun["identity"] != identity:
            if not overwrite:
                raise QjaxError(
                    f"{self._folder} holds the beginning of something else ({_difference(begun['identity'], identity)}); "
                    "name another folder, or ask to overwrite"
                )
            shutil.rmtree(self._folder)
            begun["parts"] = {}
        prepare_output_folder(self._folder, overwrite=True)
        whole = {name: entry for name, entry in begun["parts"].items() if _digest(self._file(name)) == entry["digest"]}
        self._progress = {"identity": identity, "parts": whole}

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
        entry = {"digest": _digest(self._file(name)), "quantized": packed.describe(leaves), "record": record}
        self._progress["parts"][name] = entry
        write_atomically(self._folder / PROGRESS, json.dumps(self._progress))

    def read(self, name: str) -> dict[str, object]:
        """A complete part's leaves by path; lazy (`lazy.py`)."""
        headers = read_headers([self._file(name)])
        templates = packed.templates_of(self._config, self._progress["parts"][name]["quantized"])
        held = {path: leaf for path, leaf in templates.items() if packed.stored({path: leaf}).keys() <= headers.keys()}
        return packed.filled(held, read_arrays(headers, advice="write the part again", lazy=True))

    def finish(self, model: Model) -> Path:
        """Describes the folder and gives it its name, which is returned. model: its name, recipe and tokenizer; its parameters
        are not looked at. Raises QjaxError where parameters of the configuration are missing.
        """
        parts = self._progress["parts"]
        check_parameters(
            {path: leaf for name in parts for path, leaf in self.read(name).items()}, parameter_shapes(self._config)
        )
        quantized = {path: entry for part in parts.values() for path, entry in part["quantized"].items()}
        files = [self._file(name).name for name in parts]
        packed.write_description(self._folder, model._replace(config=self._config), quantized, files)
        try:
            self._make_room()
            self._folder.replace(self._target)
            sync(self._target.parent)
            (self._target / PROGRESS).unlink()
        except OSError as error:
            raise QjaxError(f"cannot write {self._target}: {reason(error)}; choose a writable folder") from error
        return self._target

    def _make_room(self) -> None:
        """Takes away the folder that has the name: a model's files go, others of it are kept."""
        if not self._target.exists():
            return
        prepare_output_folder(self._target, overwrite=self._overwrite, replaces=(*packed.REPLACED, PROGRESS))
        for other in self._target.iterdir():
            other.replace(self._folder / other.name)
        self._target.rmdir()

    def _file(self, name: str) -> Path:
        if not re.fullmatch(r"[\w-]+", name):
            raise QjaxError(f"part {name!r}: expected letters, digits, _ and -")
        return self._folder / f"model-{name}.safetensors"


def _digest(file: Path) -> str | None:
    """SHA-256 of a file; None where it is missing."""
    if not file.exists():
        return None
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _difference(begun: Mapping[str, object], identity: Mapping[str, object]) -> str:
    names = [name for name in {**begun, **identity} if begun.get(name) != identity.get(name)]
    return listing(f"{name}: {begun.get(name)!r}, now {identity.get(name)!r}" for name in names)
