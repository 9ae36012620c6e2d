"""The container of GGUF, version 3, as bytes: the inverse of `container.py`, a tensor in memory at a time."""

import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qjax.checkpoints.gguf.container import ARRAY, MAGIC, NUMBERS, STRING

VERSION, ALIGNMENT = 3, 32
CODES = {np.dtype(name): number for number, name in NUMBERS.items()}


class Entry(NamedTuple):
    """A tensor to be written. shape: slowest axis first. kind: the number of its type. make: its bytes, `nbytes` of them."""

    name: str
    shape: tuple[int, ...]
    kind: int
    nbytes: int
    make: Callable[[], np.ndarray]


def write_container(path: Path, values: Mapping[str, object], entries: Iterable[Entry]) -> None:
    """Writes a file. values: numbers and text of Python, lists of text, arrays of numbers. Raises OSError."""
    entries, place, infos = list(entries), 0, []
    for each in entries:
        sizes = struct.pack(f"<{len(each.shape)}Q", *each.shape[::-1])
        infos.append(_text(each.name) + struct.pack("<I", len(each.shape)) + sizes + struct.pack("<IQ", each.kind, place))
        place += each.nbytes + -each.nbytes % ALIGNMENT
    keys = [_text(name) + _value(value) for name, value in values.items()]
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(keys)))
        for part in (*keys, *infos):
            file.write(part)
        file.write(bytes(-file.tell() % ALIGNMENT))
        for each in entries:
            content = np.ascontiguousarray(each.make()).view(np.uint8).reshape(-1)
            file.write(content.data)
            file.write(bytes(-content.size % ALIGNMENT))


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(content)) + content


def _value(value: object) -> bytes:
    match value:
        case str():
            return struct.pack("<I", STRING) + _text(value)
        case list():
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
        case np.ndarray():
            return struct.pack("<IIQ", ARRAY, CODES[value.dtype], value.size) + value.tobytes()
    numbers = {bool: "?", int: "<u4", float: "<f4"}
    dtype = np.dtype(numbers[type(value)])
    return struct.pack("<I", CODES[dtype]) + np.array(value, dtype).tobytes()
