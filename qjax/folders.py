"""Folders that are written: whole or not at all, and never over what is read.

    .NAME.PLACE-PID.tmp  a file or folder that a process is writing or taking away; of a dead one, the next run sweeps it
    .NAME.qjax-old       what had the name, between the two renamings of `take_name`

Whoever finds NAME missing takes .NAME.qjax-old (`standing`): a kill at any moment leaves the old folder or the new one to be
loaded.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from qjax.errors import QjaxError
from qjax.files import expand, sync, temporary_of, unwritable
from qjax.place import is_gone, place_mark
from qjax.untrusted import is_folder, status

OF_MODELS = ("qjax.json", "config.json")  # which say what a model's folder is
DAY = 86400.0  # seconds after which what another machine was writing counts as left behind


def standing(path: Path) -> Path:
    """The folder called `path`: itself, or what a killed run has put aside and not replaced yet."""
    if status(path) is not None or not path.name:
        return path
    old = _old(path)
    return old if status(old) is not None else path


@contextlib.contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into, which takes the name `path` when the body ends; until then whoever reads finds what was there.

    replaces: glob patterns of files that the new ones stand for; others of an earlier folder are kept. Raises QjaxError for a
    folder that holds anything, unless `overwrite`, and where it cannot be written; nothing is left behind then.
    """
    target = require_place(path, overwrite=overwrite)
    temporary = temporary_of(target)
    try:
        _remove(temporary)
        temporary.mkdir()
        yield temporary
        take_name(temporary, target, replaces)
    except QjaxError as error:
        raise QjaxError(str(error).replace(str(temporary), str(target))) from error
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        _remove(temporary)


def require_place(path: str | Path, *, overwrite: bool = False) -> Path:
    """The place of a model's folder, resolved, after proof that one may be made there; it is not made yet.

    Raises QjaxError for a folder that holds anything, unless `overwrite`, or a sweep's rows, for one that cannot be replaced,
    and for a file.
    """
    path = expand(path)
    try:
        status(path)  # or it is a link to nothing
        target = path.resolve()
        if target.exists() and not target.is_dir():
            raise QjaxError(f"cannot write {path}: it is a file; name a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        _probe(target.parent)
        sweep(target.parent)
        if standing(target) != target:
            _old(target).rename(target)
        if (target / "rows.jsonl").exists():
            raise QjaxError(f"{path} holds the results of a sweep; name another folder for a model")
        if not overwrite and target.exists() and any(target.iterdir()):
            raise QjaxError(f"{path} is not empty; name a new folder or ask to overwrite")
        if Path.cwd().is_relative_to(target):
            raise QjaxError(f"{path} is the folder you are in, which cannot be replaced; name a folder in it")
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error
    return target


def require_file(path: str | Path, suffix: str, *, overwrite: bool = False) -> Path:
    """The path of a file that may be written. Raises QjaxError for one of another ending, a folder, and, unless `overwrite`, a
    file that is there.
    """
    path = expand(path)
    if path.suffix.lower() != suffix:
        raise QjaxError(f"cannot write {path}: name a file that ends in {suffix}")
    try:
        if path.is_dir():
            raise QjaxError(f"cannot write {path}: it is a folder; name a file")
        if path.exists() and not overwrite:
            raise QjaxError(f"{path} is there; name a new file or ask to overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        _probe(path.parent)
        sweep(path.parent)
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error
    return path


def take_name(new: Path, target: Path, replaces: Iterable[str] = ()) -> None:
    """Gives a finished folder its name, in the place of one that has it, of which files that match `replaces`, as all of the
    new one's do, go and others are kept. Raises OSError.
    """
    if target.exists():
        gone = {old for pattern in replaces for old in target.glob(pattern)}
        for kept in target.iterdir():
            if kept not in gone:
                _remove(new / kept.name)  # of a killed run, perhaps half
                _link(kept, new / kept.name)  # in both folders, so that a kill loses it in neither
        sync(new)
        _remove(_old(target))
        target.rename(_old(target))
    new.rename(target)
    sync(target.parent)
    _remove(_old(target))


def prepare_output_folder(path: str | Path) -> Path:
    """A folder that files are added to, made where it is missing, after proof that it can be written."""
    path = expand(path)
    try:
        if status(path) and not path.is_dir():
            raise QjaxError(f"cannot write {path}: it is a file; name a folder")
        path.mkdir(parents=True, exist_ok=True)
        _probe(path)
        sweep(path)
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error
    return path


def prepare_results_folder(path: str | Path) -> Path:
    """`prepare_output_folder` for rows and what is made of them. Raises QjaxError for a model's folder, which has rows of its
    own.
    """
    path = expand(path)
    if is_folder(path) and (held := next((name for name in OF_MODELS if status(path / name)), None)):
        raise QjaxError(f"{path} holds a model ({held}); name another folder for results")
    return prepare_output_folder(path)


def refuse_inputs(output: str | Path, inputs: Iterable[str | Path], *, inside: bool = False) -> None:
    """Raises QjaxError where the folder to be written is one of the folders that are read, by whatever path; inside: or holds
    one of them.
    """
    output = expand(output)
    for each in map(expand, inputs):
        if not (output.exists() and each.exists()):
            continue
        if output.samefile(each) or (inside and output.resolve() in each.resolve().parents):
            raise QjaxError(f"{output} is what is read ({each}), and writing it would destroy that; name another folder")


def sweep(folder: Path) -> None:
    """Takes away what killed processes were writing in a folder."""
    for path in folder.iterdir():
        if named := re.fullmatch(r"\..+\.([0-9a-f]{8})-(\d+)\.tmp", path.name):
            with contextlib.suppress(OSError):  # gone meanwhile, or not ours to take away
                if _is_left(path, named[1], int(named[2])):
                    _remove(path)


def _is_left(path: Path, place: str, process: int) -> bool:
    """Whether a temporary's process is gone; one of another place cannot be asked, only waited for."""
    if place == place_mark() and os.name == "posix":
        return is_gone(process)
    return time.time() - path.lstat().st_mtime > DAY


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.qjax-old"  # with_name refuses "." and "/"


def _probe(folder: Path) -> None:
    probe = temporary_of(folder / "probe")
    probe.write_bytes(b"")
    probe.unlink(missing_ok=True)  # another thread may be faster


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _remove(path: Path) -> None:
    """A file or a folder, which first loses its name, so that none is found half there."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".tmp":
            path = path.rename(temporary_of(path))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
