"""Safetensors files, tensor by tensor: headers first, so that everything is checked before anything large is read.

The library maps a file into memory; a file is opened anew for each tensor so that the pages of the ones already copied are
given back, and loading needs the model once plus one tensor. Types outside NumPy (bfloat16) come from ml_dtypes, exactly.
"""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qjax.errors import QjaxError
from qjax.files import reason, write_atomically

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
FLOATS = ("F32", "F16", "BF16")


class Header(NamedTuple):
    """What a file says about one of its tensors; dtype is the format's name, for example "BF16"."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Headers of all tensors in the files by name. Raises QjaxError for a file that is missing, truncated or corrupt."""
    headers = {}
    for file in files:
        with _opened(file) as content:
            for name in content.keys():  # noqa: SIM118 - not a dict
                view = content.get_slice(name)
                if name in headers:
                    raise QjaxError(f"{file}: tensor {name} is also in {headers[name].file.name}")
                headers[name] = Header(file, name, tuple(view.get_shape()), view.get_dtype())
    return headers


def read_tensor(header: Header) -> np.ndarray:
    """The tensor, a copy in its own type. Raises QjaxError when the file changed or broke meanwhile."""
    with _opened(header.file) as content:
        return content.get_tensor(header.name)


@contextmanager
def _opened(file: Path):
    try:
        with safe_open(file, framework="numpy") as content:
            yield content
    except SafetensorError as error:
        raise QjaxError(f"{file} is truncated or corrupt ({error}); copy or download it again") from error
    except OSError as error:
        raise QjaxError(f"cannot read {file}: {reason(error)}") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically. Raises QjaxError when it cannot be written."""
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, metadata={"format": "pt"})  # what the transformers library asks for
        except SafetensorError as error:  # the library's name for a failed write, too
            raise OSError(str(error)) from error

    write_atomically(path, write)
