"""Bytes that somebody else made: the one way in which qjax reads files that are not part of it.

Only regular files are opened (a device has no end, a FIFO may never begin), in a model's folder none through a link out of it
(`refuse_links_out`), nothing is read beyond a limit, before or after decompression, and JSON is parsed with limits on depth,
digits and size, without repeated keys and without numbers that are not finite. Whatever is wrong is a QjaxError that names the
file and what to do.
"""

import bz2
import collections
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qjax.errors import QjaxError
from qjax.files import listing, reason

TEXT_BYTES = 2**28  # of a file of texts or questions, decompressed
ARCHIVE_BYTES, MEMBERS = 2**25, 10**4  # of a zip archive, whose table of contents alone takes some ten times its bytes
JSON_BYTES = 2**24  # of a JSON document or line: at most some forty times as much in memory
LINES = 2**20  # of a file that is parsed line by line
DEPTH = 64  # of nested lists and objects
DIGITS = 40  # of an integer; where one is used its range is checked
QUOTED = 120  # characters of a foreign value in a message
UNPACKERS = {".gz": lambda file: gzip.GzipFile(fileobj=file), ".bz2": bz2.BZ2File}


# --- files ---------------------------------------------------------------------------------------------------------------


def status(path: str | Path) -> os.stat_result | None:
    """What stands at a path; None for nothing. Raises QjaxError for a path that cannot be one, or not be looked at, and for a
    link to nothing: who set it meant a file.
    """
    try:
        return os.stat(path)  # noqa: PTH116 - Path.stat has no words for a NUL
    except (FileNotFoundError, NotADirectoryError) as error:
        with contextlib.suppress(OSError, ValueError):  # no link
            raise QjaxError(f"{path} is a link to {os.readlink(path)}, where nothing is; mend or remove it") from error  # noqa: PTH115
        return None
    except (OSError, ValueError) as error:
        raise QjaxError(f"cannot read {path}: {_reason(error)}") from error


def is_folder(path: str | Path) -> bool:
    """Whether a folder stands at a path. Raises what `status` does."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def refuse_links_out(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Raises QjaxError that lists the files of a model's folder, or those of them that are asked about, which are links to
    files elsewhere: who made the folder would choose what is read here, and written on.

    Links within the folder are its own, and of a snapshot in the hub's cache those to the blobs of its repository. Raises
    QjaxError also for a folder that cannot be read.
    """
    try:
        files = sorted(folder.iterdir() if files is None else files)
    except OSError as error:
        raise QjaxError(f"cannot read {folder}: {_reason(error)}") from error
    homes = [home := folder.resolve()]
    for each in home.parents:
        if each.name == "snapshots" and each.parent.name.startswith("models--"):
            homes.append(each.parent / "blobs")
    out = []
    for path in files:
        if not os.path.islink(path) or not os.path.isfile(path):  # noqa: PTH113, PTH114 - Path's raise; nothing else is ever read
            continue
        if not any(map(path.resolve().is_relative_to, homes)):
            out.append(f"{path} is a link to {path.resolve()}")
    if out:
        raise QjaxError(
            f"{listing(out)}; links out of a model's folder are not followed: copy the file into it, or give the folder that "
            "the file is in"
        )


@contextlib.contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """The file at a path, open for reading. Raises QjaxError where it is missing, unreadable or no regular file."""
    flags = os.O_RDONLY  # elsewhere the flags are missing, and devices and FIFOs with them
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        status(path)
        raise QjaxError(f"cannot read {path}: {_reason(error)}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            what = "Is a directory" if stat.S_ISDIR(mode) else "not a regular file (a device, pipe or socket)"
            raise QjaxError(f"cannot read {path}: {what}; give a file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise QjaxError(f"cannot read {path}: {_reason(error)}") from error
    finally:
        os.close(descriptor)


def read_bytes(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """A file's content. Raises QjaxError where there is none, or more than `limit` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_large(path, limit)
        return _limited(file, path, limit)


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file's content. Raises QjaxError as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_unpacked(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """`read_bytes` of a file that its name may say is compressed (.gz, .bz2): then half the limit is of what comes out, which
    the file's own size does not show.
    """
    unpacker = UNPACKERS.get(Path(path).suffix)
    if unpacker is None:
        return read_bytes(path, limit)
    with open_regular(path) as file:
        try:
            return _limited(unpacker(file), path, limit // 2)
        except QjaxError:
            raise
        except Exception as error:  # OSError, EOFError, zlib.error, ValueError: the file is not what its name says
            raise QjaxError(f"{path} cannot be read as its name says ({error}); copy or download it again") from error


def read_archive(path: str | Path, wanted: Callable[[str], bool], limit: int = TEXT_BYTES) -> dict[str, bytes]:
    """Content of a zip archive's members whose name is wanted; the limit is of all together.

    Raises QjaxError for what is no archive, is encrypted, corrupt or compressed in a rare way (whose decoders take memory as
    the file asks), and for larger ones.
    """
    contents, left = {}, limit
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > ARCHIVE_BYTES:
            raise QjaxError(f"{path} has more than {ARCHIVE_BYTES >> 20} MiB; unpack it and give the folder")
        try:
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.is_dir() or not wanted(entry.filename):
                        continue
                    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise ValueError(f"{entry.filename} is compressed oddly")
                    if len(contents) == MEMBERS:
                        raise ValueError(f"more than {MEMBERS} files")
                    with archive.open(entry) as member:
                        contents[entry.filename] = _limited(member, path, left)
                    left -= len(contents[entry.filename])
        except QjaxError:
            raise
        except Exception as error:  # what zipfile raises for broken files is of many kinds, encrypted ones RuntimeError
            raise QjaxError(f"{path} is no readable zip archive: {error}; copy or download it again") from error
    return contents


def lines(path: str | Path, limit: int = JSON_BYTES, *, first: int = 1, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Number and bytes, its end included, of every line, one after the other in memory; from byte `start`, where line number
    `first` begins.

    Raises QjaxError where the file is unreadable and for a line of more than `limit` bytes.
    """
    with open_regular(path) as file:
        file.seek(start)
        for number in itertools.count(first):
            line = file.readline(limit + 1)
            if not line:
                return
            if len(line) > limit:
                raise QjaxError(f"{path}: line {number} has more than {limit >> 20} MiB; mend or remove that line")
            yield number, line


def _limited(file: BinaryIO, path: str | Path, limit: int) -> bytes:
    content = file.read(limit + 1)
    if content is None:  # of what is read without waiting
        raise QjaxError(f"{path} is a file of the kernel that has nothing to read yet; give a file of your own")
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def _too_large(path: str | Path, limit: int) -> QjaxError:
    size = f"{limit >> 20} MiB" if limit >= 2**20 else f"{limit} bytes"
    return QjaxError(f"{path} holds more than {size}; give a smaller file, or a part of it")


def _reason(error: OSError | ValueError) -> str:
    return reason(error) if isinstance(error, OSError) else f"no path at all ({error})"


# --- text and JSON -------------------------------------------------------------------------------------------------------


def decode(content: bytes, where: str) -> str:
    """The UTF-8 text; a byte order mark is left out. Raises QjaxError that begins with `where`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QjaxError(f"{where} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def split_lines(text: str, where: str) -> Iterator[str]:
    """text.split("\\n"), one after the other in memory; str.splitlines would break at U+2028 inside a string.

    Raises QjaxError that begins with `where` for more than `LINES`.
    """
    if (count := text.count("\n")) > LINES:
        raise QjaxError(f"{where} has {count} lines, expected at most {LINES}; give a part of it")
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises QjaxError when it is missing, unreadable, no JSON, no object or beyond the limits."""
    return json_object(read_bytes(path, JSON_BYTES), str(path))


def json_object(content: bytes | str, where: str, limit: int = JSON_BYTES) -> dict:
    """The JSON object in at most `limit` bytes, see the module's docstring. Raises QjaxError that begins with `where`."""
    try:
        value = _parsed(content, limit)
        if not isinstance(value, dict):
            raise ValueError(f"it is a {type(value).__name__}")
    except ValueError as error:
        raise QjaxError(f"{where} is not a JSON object ({error})") from error
    return value


def parse_json(content: bytes | str, where: str) -> object:
    """The JSON value in the content, see the module's docstring. Raises QjaxError that begins with `where`."""
    try:
        return _parsed(content, JSON_BYTES)
    except ValueError as error:
        raise QjaxError(f"{where} is not valid JSON ({error})") from error


def _parsed(content: bytes | str, limit: int) -> object:
    """Raises ValueError for what is no JSON or beyond the limits."""
    if len(content) > limit:
        raise ValueError(f"more than {limit >> 20} MiB")
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    if text.count("[") + text.count("{") > DEPTH and _is_deeper(value, DEPTH):
        raise ValueError(f"nested more than {DEPTH} deep")
    return value


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    while depth and level:
        inside = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inside for each in values if isinstance(each, dict | list)]
        depth -= 1
    return bool(level)


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:QUOTED]} is no finite number")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, count = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(name)} is there {count} times")
    return found


def quoted(value: object) -> str:
    """A foreign value for a message: as Python writes it, the middle of a long one left out."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 40]}...{text[-37:]}"
