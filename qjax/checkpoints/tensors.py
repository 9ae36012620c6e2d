"""Safetensors files, tensor by tensor: headers first, so that everything is checked before anything large is read.

The library maps a file into memory; a file is opened anew for each tensor so that the pages of the ones already copied are
given back, and loading needs the model once plus one tensor. Types outside NumPy (bfloat16) come from ml_dtypes, exactly.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
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
from qjax.untrusted import json_object, open_regular

DTYPES = {
    **{"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8, "I32": np.int32},
    **{"I8": np.int8, "I64": np.int64},
    **{"F8_E4M3": np.uint8, "F8_E8M0": np.uint8},  # their bits
}
BYTES = ("F8_E4M3", "F8_E8M0")  # types that the library has no NumPy array for
FLOATS = ("F32", "F16", "BF16")
HEADER_BYTES = 2**25  # of a file's header; 100 bytes a tensor


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
    """The tensor, a copy in its own type; 8-bit floats as their bits. Raises QjaxError when the file changed meanwhile."""
    if header.dtype in BYTES:
        return _read_bytes(header)
    with _opened(header.file) as content:
        return content.get_tensor(header.name)


def _read_bytes(header: Header) -> np.ndarray:
    """The bytes of a tensor whose elements are bytes, from where the file's header says that they are."""
    with open_regular(header.file) as content:
        size = int.from_bytes(content.read(8) or b"", "little")
        if size <= HEADER_BYTES:
            entry = json_object(content.read(size), str(header.file), HEADER_BYTES).get(header.name)
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            count = math.prod(header.shape)
            if isinstance(offsets, list) and len(offsets) == 2 and offsets[1] - offsets[0] == count:
                content.seek(8 + size + offsets[0])
                if len(found := content.read(count)) == count:
                    return np.frombuffer(found, np.uint8).reshape(header.shape).copy()
    raise QjaxError(f"{header.file} changed or broke while it was read; copy or download it again")


def read_finite(header: Header, advice: str, below: int | None = None) -> np.ndarray:
    """`read_tensor`. Raises QjaxError, which ends with the advice, for values that are not finite or, with `below`, no distinct
    numbers of [0, below) in a row.
    """
    array = read_tensor(header)
    if not _is_sound(array, below):
        raise QjaxError(f"{header.file}: NaN, infinite or impossible values in {header.name}; {advice}")
    return array


def _is_sound(array: np.ndarray, below: int | None) -> bool:
    if below is None or not array.size:
        return bool(np.isfinite(array).all())
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array[None, None]
    distinct = all(np.unique(row).size == row.size for row in rows)
    return bool(array.min() >= 0 and array.max() < below and distinct)


def read_arrays(
    headers: Mapping[str, Header],
    *,
    advice: str,
    lazy: bool = False,
    below: Mapping[str, int] = MappingProxyType({}),
    before: Callable[[Path], None] = lambda file: None,
) -> dict[str, jax.Array | Lazy]:
    """The tensors as jax arrays by the headers' keys; lazy: when they are needed, each after before(its file). below: of
    distinct indices, what they stay below.

    Raises QjaxError, which ends with the advice, for NaN, infinite and impossible values: of all tensors at once, or of a lazy
    one as it is read.
    """
    if lazy:

        def read(key: str) -> jax.Array:
            before(headers[key].file)
            return jnp.asarray(read_finite(headers[key], advice, below.get(key)))

        readers = {key: functools.partial(read, key) for key in headers}
        return {key: Lazy(each.shape, dtype_of(each), readers[key], each.file) for key, each in headers.items()}
    arrays, broken = {}, []
    for key, header in headers.items():
        array = read_tensor(header)
        broken += [] if _is_sound(array, below.get(key)) else [key]
        arrays[key] = jnp.asarray(array)
    if broken:
        raise QjaxError(f"{header.file.parent}: NaN, infinite or impossible values in {listing(broken)}; {advice}")
    return arrays


def dtype_of(header: Header) -> np.dtype:
    """NumPy's name of a tensor's type."""
    return np.dtype(DTYPES[header.dtype])


@contextmanager
def _opened(file: Path):
    with open_regular(file) as content:
        size = int.from_bytes(content.read(8) or b"", "little")
    if size > HEADER_BYTES:
        raise QjaxError(f"{file} is truncated or corrupt (a header of {size} bytes); copy or download it again")
    try:
        with safe_open(file, framework="numpy") as content:
            yield content
    except SafetensorError as error:
        raise QjaxError(f"{file} is truncated or corrupt ({error}); copy or download it again") from error
    except OSError as error:
        raise QjaxError(f"cannot read {file}: {reason(error)}") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically. Raises QjaxError when it cannot be written, and for values that are not finite."""
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    floats = [np.dtype(DTYPES[name]) for name in FLOATS]
    if broken := [name for name, array in arrays.items() if array.dtype in floats and not np.isfinite(array).all()]:
        raise QjaxError(f"NaN or infinite values in {listing(broken)}, which are not written; start from an intact model")

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, metadata={"format": "pt"})  # what the transformers library asks for
        except SafetensorError as error:  # the library's name for a failed write, too
            raise OSError(str(error)) from error

    write_atomically(path, write)
