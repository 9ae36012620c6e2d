"""Safetensors files, tensor by tensor: headers first, so that everything is checked before anything large is read.

The library maps a file into memory; a file is opened anew for each tensor so that the pages of the ones already copied are
given back, and loading needs the model once plus one tensor. Types outside NumPy (bfloat16) come from ml_dtypes, exactly.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qjax.errors import QjaxError
from qjax.files import listing, reason, write_atomically
from qjax.lazy import Lazy

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


def read_finite(header: Header, advice: str) -> np.ndarray:
    """`read_tensor`. Raises QjaxError, which ends with the advice, for values that are not finite."""
    array = read_tensor(header)
    if not np.isfinite(array).all():
        raise QjaxError(f"{header.file}: NaN or infinite values in {header.name}; {advice}")
    return array


def read_arrays(headers: Mapping[str, Header], *, advice: str, lazy: bool = False) -> dict[str, jax.Array | Lazy]:
    """The tensors as jax arrays by the headers' keys; lazy: when they are needed.

    Raises QjaxError, which ends with the advice, for NaN and infinite values: of all tensors at once, or of a lazy one as it is
    read.
    """
    if lazy:
        return {key: Lazy(header.shape, dtype_of(header), _reading(header, advice)) for key, header in headers.items()}
    arrays, broken = {}, []
    for key, header in headers.items():
        array = read_tensor(header)
        broken += [] if np.isfinite(array).all() else [key]
        arrays[key] = jnp.asarray(array)
    if broken:
        raise QjaxError(f"{header.file.parent}: NaN or infinite values in {listing(broken)}; {advice}")
    return arrays


def _reading(header: Header, advice: str) -> Callable[[], jax.Array]:
    return lambda: jnp.asarray(read_finite(header, advice))


def dtype_of(header: Header) -> np.dtype:
    """NumPy's name of a tensor's type."""
    return np.dtype(DTYPES[header.dtype])


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
