"""The container of GGUF, versions 2 and 3: values by key, then what each tensor is, then their bytes, aligned.

    magic "GGUF", version u32, tensors u64, keys u64
    keys      name (length u64, UTF-8), type u32, value; an array is a type u32, a length u64 and its values
    tensors   name, axes u32, sizes u64 (fastest first), type u32, offset u64 into the data
    data      from the next multiple of `general.alignment`

Specification: ggml's docs/gguf.md. Everything is little endian. Every count is held against the bytes that are left before
anything is made of it; tensors are read one by one, when they are asked for. Arrays of arrays, which nobody writes, are
refused.
"""

import mmap
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.files import listing
from qjax.untrusted import open_regular, quoted, refuse_links_out, status

MAGIC = b"GGUF"
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
KEYS, TENSORS, TEXTS, AXES, NAME_BYTES = 2**16, 2**17, 2**22, 4, 128  # at most; texts: in all lists of a file
HEADER_BYTES = 2**28  # all before the data; the largest vocabularies take 2^24
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


class TensorInfo(NamedTuple):
    """What a file says of a tensor. shape: slowest axis first, so (out, in) of a matrix. kind: the number of its type. start:
    of its bytes in the file; end: of the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    end: int


class Contents(NamedTuple):
    """A file's values by key (numbers and text of Python, lists of text, arrays of numbers), and its tensors."""

    values: dict[str, object]
    tensors: dict[str, TensorInfo]


def read_contents(path: Path) -> Contents:
    """All of a file but the tensors' bytes. Raises QjaxError for what is no GGUF file of these versions, or broken."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if size < len(MAGIC):
                raise _BrokenError("it is no GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _contents(path, _Cursor(content, min(size, HEADER_BYTES)), size)
        except _BrokenError as error:
            raise QjaxError(f"{path}: {error}; get an intact GGUF file") from None


def read_files(path: Path) -> Contents:
    """`read_contents` of a file and, where it is one of several that a model was split into, of the others beside it; the
    values are the first's. Raises QjaxError, also where some of them are missing, are links to elsewhere, or do not
    belong together.
    """
    found = read_contents(path)
    count = _integer(found.values.get("split.count"))
    if count is None or count <= 1:
        return found
    match = SPLIT.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise QjaxError(
            f"{path} is one of {count} files of a model, expected a name as NAME-00001-of-{count:05}.gguf; rename it"
        )
    files = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, min(count, 10**5) + 1)]
    if missing := [file.name for file in files if not status(file)]:
        raise QjaxError(f"{path.parent} lacks {listing(missing)} of a model in {count} files; copy or download them")
    given = path.resolve().parent  # of a link to one of several files the others may be links to those beside it
    refuse_links_out(path.parent, [file for file in files if file.resolve().parent != given])
    parts = [read_contents(file) for file in files]
    tensors = {}
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        if (said := _integer(part.values.get("split.no"))) != number:
            raise QjaxError(f"{file} says that it is part {said} of the model, expected {number}; get the right one")
        if again := tensors.keys() & part.tensors.keys():
            raise QjaxError(f"{file} has {listing(sorted(again))}, as another part of the model has; get the right one")
        tensors |= part.tensors
    if (said := _integer(parts[0].values.get("split.tensors.count"))) not in (None, len(tensors)):
        raise QjaxError(f"{path}: the files of the model have {len(tensors)} tensors, expected {said}; get the missing ones")
    return Contents(parts[0].values, tensors)


def read_bytes_of(info: TensorInfo, count: int) -> np.ndarray:
    """The tensor's first `count` bytes. Raises QjaxError where the file has become shorter."""
    with open_regular(info.file) as file:
        if os.fstat(file.fileno()).st_size < info.start + count:
            raise QjaxError(f"{info.file} ends within {info.name}; copy or download it again")
        file.seek(info.start)
        return np.frombuffer(file.read(count), np.uint8)


class _BrokenError(Exception):
    """What is wrong with a file."""


class _Cursor:
    """A file's bytes, one after the other, up to a limit. Raises _BrokenError where they end."""

    def __init__(self, content: mmap.mmap, size: int) -> None:
        self._content, self._size, self.place, self._texts = content, size, 0, 0

    def take(self, count: int) -> bytes:
        start, end = self.place, self.place + count
        if end > self._size:
            raise _BrokenError(f"it ends after byte {start}, or goes on beyond all limits, where {count} more are expected")
        self.place = end
        return self._content[start:end]

    def number(self, code: str):
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self, limit: int = HEADER_BYTES) -> str:
        if (length := int.from_bytes(self.take(8), "little")) > limit:
            raise _BrokenError(f"a text of {length} bytes at byte {self.place}, expected at most {limit}")
        return self.take(length).decode("utf-8", "replace")  # tokens may be parts of characters

    def value(self) -> object:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self._numbers(kind, 1)[0].item()
        kind, count = self.number("I"), self.number("Q")
        if kind != STRING:
            return self._numbers(kind, count)
        if count * 8 > self._size - self.place:
            raise _BrokenError(f"a list of {count} texts at byte {self.place}, which it has no room for")
        self._texts += count
        if self._texts > TEXTS:
            raise _BrokenError(f"it has lists of {self._texts} texts, expected at most {TEXTS}")
        return [self.text() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in NUMBERS:
            raise _BrokenError(f"a value of the unknown type {kind} at byte {self.place}")
        dtype = np.dtype(NUMBERS[kind])
        content = self.take(count * dtype.itemsize)
        return np.frombuffer(content, np.uint8) != 0 if dtype.kind == "b" else np.frombuffer(content, dtype)


def _contents(path: Path, cursor: _Cursor, size: int) -> Contents:
    if cursor.take(4) != MAGIC:
        raise _BrokenError("it is no GGUF file")
    if (version := cursor.number("I")) not in (2, 3):
        what = "of a big-endian machine" if version in (2 << 24, 3 << 24) else f"of version {version}"
        raise _BrokenError(f"it is {what}, expected version 2 or 3, little endian")
    count, keys = cursor.number("Q"), cursor.number("Q")
    if count > TENSORS or keys > KEYS:
        raise _BrokenError(f"it has {count} tensors and {keys} keys, expected at most {TENSORS} and {KEYS}")
    values = {}
    for _ in range(keys):
        name = cursor.text(NAME_BYTES)
        if name in values:
            raise _BrokenError(f"the key {quoted(name)} is there twice")
        values[name] = cursor.value()
    infos = [_info(path, cursor) for _ in range(count)]
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise _BrokenError(f"general.alignment is {quoted(alignment)}, expected a number of bytes")
    if uneven := next((info.name for info in infos if info.start % alignment), None):
        raise _BrokenError(f"{quoted(uneven)} begins at no multiple of {alignment} bytes, the file's alignment")
    data = -(-cursor.place // alignment) * alignment
    tensors = {info.name: info._replace(start=data + info.start, end=size) for info in infos}
    if len(tensors) != len(infos):
        raise _BrokenError("a tensor's name is there twice")
    return Contents(values, tensors)


def _info(path: Path, cursor: _Cursor) -> TensorInfo:
    name, axes = cursor.text(NAME_BYTES), cursor.number("I")
    if not 1 <= axes <= AXES:
        raise _BrokenError(f"{quoted(name)} has {axes} axes, expected 1 to {AXES}")
    sizes: Sequence[int] = [cursor.number("Q") for _ in range(axes)]
    if not all(1 <= size < 2**40 for size in sizes):
        raise _BrokenError(f"{quoted(name)} has the sizes {quoted(sizes)}")
    kind, offset = cursor.number("I"), cursor.number("Q")
    return TensorInfo(path, name, tuple(sizes[::-1]), kind, offset, 0)


def _integer(value: object) -> int | None:
    return value if type(value) is int else None
