"""load(name): a model from wherever it is."""

import importlib.resources
from pathlib import Path

from qjax.checkpoints.gguf.model import gguf_file, load_gguf
from qjax.checkpoints.huggingface import download, load_huggingface
from qjax.checkpoints.packed import DESCRIPTION, load_packed
from qjax.errors import QjaxError
from qjax.files import expand, looks_like_a_path, reason
from qjax.folders import standing
from qjax.models.model import Model
from qjax.untrusted import is_folder, status

BUNDLED = "bundled"


def load(name: str | Path, *, lazy: bool = False, weights_alone: bool = False) -> Model:
    """The model called `name`.

    name: "bundled" (the small model that comes with qjax), a folder that `save` wrote, a Hugging Face checkpoint folder, a GGUF
    file or a folder that holds one, or the name of a model on the Hugging Face hub. lazy: headers are checked, weights are read
    part by part whenever they are needed, and never all held (the bundled model always is). weights_alone: what another
    library's folder says of inputs and caches is left out, with a warning that names it. Raises QjaxError, one line that says
    what to do, when it cannot be loaded.
    """
    if str(name) == BUNDLED:
        with importlib.resources.as_file(importlib.resources.files("qjax.models") / BUNDLED) as folder:
            if not folder.is_dir():
                raise QjaxError("this copy of qjax has no bundled model; install qjax anew or name another model")
            return load_huggingface(folder, trusted=True)._replace(name=BUNDLED)
    try:
        return _load(name, lazy, weights_alone)
    except OSError as error:  # a folder that may not be entered, a name too long for a file
        raise QjaxError(f"cannot read {name}: {reason(error)}") from error


def _load(name: str | Path, lazy: bool, weights_alone: bool) -> Model:
    folder = standing(expand(name))
    if is_folder(folder) and status(folder / DESCRIPTION):
        return load_packed(folder, lazy=lazy)
    if (file := gguf_file(folder)) is not None:
        return load_gguf(file, lazy=lazy)
    if is_folder(folder):
        return load_huggingface(folder, lazy=lazy, weights_alone=weights_alone)
    if status(folder) or looks_like_a_path(name):
        return load_huggingface(folder)  # says what is wrong with it
    return load_huggingface(download(str(name)), lazy=lazy, weights_alone=weights_alone)._replace(name=str(name))
