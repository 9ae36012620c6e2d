"""Reading and writing files so that a reader sees a whole file or none, and a person sees one line when it fails."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from qjax.errors import QjaxError


def expand(path: str | Path) -> Path:
    """The path with ~ as the home folder; a ~ that names no user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises


def looks_like_a_path(name: str | Path) -> bool:
    """Whether the name of a model can be no name of the hub."""
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def reason(error: OSError) -> str:
    """What went wrong, without the errno and the path that str(error) would add."""
    return error.strerror or str(error).splitlines()[0]


def write_atomically(path: str | Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Writes `path` through a temporary file in the same folder, on disk before it takes the name.

    content: bytes, text (as UTF-8), or a function that writes the file whose path it is given.
    Raises QjaxError when the folder is missing, read-only or full; the earlier file, if any, is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        raise QjaxError(f"cannot write {path}: {reason(error)}; choose a writable folder with free space") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk. Raises OSError."""
    if path.is_dir() and os.name != "posix":
        return  # a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_output_folder(path: str | Path, *, overwrite: bool = False, replaces: Iterable[str] = ()) -> Path:
    """The folder `path`, made if need be.

    replaces: glob patterns of files that what comes next takes the place of; with `overwrite` they are removed, so that
    no reader mistakes them for a part of it. Raises QjaxError for a folder that holds anything, unless `overwrite`.
    """
    path = expand(path)
    if path.exists() and not path.is_dir():
        raise QjaxError(f"cannot write into {path}: it is a file; name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            if not overwrite:
                raise QjaxError(f"{path} is not empty; name a new folder or ask to overwrite")
            for pattern in replaces:
                for old in path.glob(pattern):
                    old.unlink()
    except OSError as error:
        raise QjaxError(f"cannot write into {path}: {reason(error)}; choose a writable folder") from error
    return path


def read_bytes(path: str | Path) -> bytes:
    """The file's content. Raises QjaxError when it is missing or unreadable."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise QjaxError(f"cannot read {path}: {reason(error)}") from error


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises QjaxError when it is missing, unreadable, no JSON or no object."""
    content = read_bytes(path)
    try:
        value = json.loads(content)
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise QjaxError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise QjaxError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def listing(items: Iterable[object], limit: int = 5) -> str:
    """The items joined by "; ", the rest of a long list as a count."""
    items = [str(item) for item in items]
    rest = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def require_writable(folder: Path) -> None:
    """Makes an output folder and proves that it can be written before anything is computed."""
    prepare_output_folder(folder, overwrite=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
