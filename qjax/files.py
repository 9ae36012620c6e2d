"""Writing files so that a reader sees a whole file or none, one writer at a time where that matters, and a person sees one line
when it fails.

Reading is in `untrusted.py`.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qjax.errors import QjaxError
from qjax.place import place_mark


def expand(path: str | Path) -> Path:
    """The path with ~ as the home folder; a ~ that names no user stays as it is. Raises QjaxError for an empty one, which would
    be the folder one is in.
    """
    if not str(path):
        raise QjaxError("an empty path names nothing; give one, or . for the folder you are in")
    try:
        return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises
    except ValueError:  # no name of a user at all
        return Path(path)


def looks_like_a_path(name: str | Path) -> bool:
    """Whether the name of a model can be no name of the hub."""
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def reason(error: OSError) -> str:
    """What went wrong, without the errno and the path that str(error) would add."""
    return error.strerror or str(error) or type(error).__name__


def unwritable(path: str | Path, error: OSError | ValueError) -> QjaxError:
    """The error of a file or folder that cannot be written."""
    why = reason(error) if isinstance(error, OSError) else str(error)
    return QjaxError(f"cannot write {path}: {why}; choose a writable folder with free space, and run again")


def write_atomically(path: str | Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Writes `path` through a temporary file in the same folder, on disk before it takes the name.

    content: bytes, text (as UTF-8), or a function that writes the file whose path it is given.
    Raises QjaxError when the folder is missing, read-only or full; the earlier file, if any, is then untouched.
    """
    path = expand(path)
    temporary = temporary_of(path)
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
        raise unwritable(path, error) from error


def temporary_of(path: Path) -> Path:
    """Beside `path`: what this process calls it until it is whole (`folders.py` sweeps those of dead processes)."""
    name = path.name.encode()[:200].decode(errors="ignore")  # a name has room for 255 bytes
    return path.with_name(f".{name}.{place_mark()}-{os.getpid()}.tmp")


@contextlib.contextmanager
def locked(file: Path, *, on_wait: Callable[[], None], patience: float = 0.0) -> Iterator[None]:
    """Holds a lock file, which stays: of all processes on all machines that see it, one at a time; not to be nested.

    A process that dies gives it back. on_wait: called whenever another has had it for `patience` seconds; what it raises ends
    the waiting. Raises QjaxError where the file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            on_wait()
        except OSError as error:
            raise unwritable(file, error) from error
    try:
        yield
    finally:
        lock.release()


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


def listing(items: Iterable[object], limit: int = 5) -> str:
    """The items joined by "; ", the rest of a long list as a count."""
    items = [str(item) for item in items]
    rest = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {rest} more" if rest > 0 else "")
