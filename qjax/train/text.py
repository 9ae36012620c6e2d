"""Training text that every machine has: the standard library, the installed packages, and their documentation.

Documents are code or prose (`python-docs`' calibration side, the docstrings and documents of installed packages), so that a
trainer can weight them. Nothing held out may leak in: held-out standard-library modules are left out as files, pydoc_data
never enters, copies of the standard library are skipped (`multiprocess`, vendored packages, setuptools' distutils), and any
line of 30 characters or more that a held-out document also has is dropped from every other text.

What is installed decides the text, so a model's card records packages, versions and byte counts.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from qjax.evaluate.corpora import docstrings, is_held_out, load_corpus, standard_library_modules

SHORTEST_HELD_OUT_LINE = 30  # characters; shorter lines are shared by chance
SMALLEST_FILE, LARGEST_FILE = 200, 250_000  # bytes; larger sources are generated tables as a rule

_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "testing", "_tests", "idle_test", "_vendor", "_vendored", "vendor", "vendored", "_distutils"}
    | {"__pycache__", "node_modules", "data", "_data", "mpl-data", "multiprocess", "backports", "qjax", "licenses", "unicode"}
)


class Document(NamedTuple):
    """One text of the training set."""

    source: str  # "standard library", "python-docs" or the name of a package's directory
    prose: bool
    text: str


def training_documents(*, package_bytes: int = 3_000_000) -> list[Document]:
    """Every document once, in an order fixed by a hash; a package gives at most `package_bytes` of code and as much of prose.

    With `package_bytes=0` the text is the standard library's alone. Raises QjaxError where Python has no sources.
    """
    held_out = held_out_lines(load_corpus("python-docs", "test").documents)
    documents = [
        *(Document("python-docs", True, text) for text in load_corpus("python-docs", "calibration").documents),
        *_standard_library(),
        *(_packages(Path(sysconfig.get_path("purelib")), package_bytes) if package_bytes else ()),
    ]
    unique = {}
    for document in documents:
        text = without_lines(document.text, held_out)
        if len(text) >= SMALLEST_FILE:
            unique.setdefault(hashlib.sha256(text.encode("utf-8", "replace")).digest(), document._replace(text=text))
    return [unique[key] for key in sorted(unique)]


def held_out_lines(documents: Iterable[str]) -> frozenset[str]:
    """The lines of held-out documents that no training text may have, normalised."""
    lines = (_normalise(line) for document in documents for line in document.split("\n"))
    return frozenset(line for line in lines if len(line) >= SHORTEST_HELD_OUT_LINE)


def without_lines(text: str, held_out: frozenset[str]) -> str:
    """`text` less the lines that, up to white space, quotes and comment signs, are in `held_out`."""
    return "\n".join(line for line in text.split("\n") if _normalise(line) not in held_out)


def _normalise(line: str) -> str:
    return " ".join(line.strip(" \t\"'#*rRuU").split())


def _standard_library() -> Iterator[Document]:
    for name, path in standard_library_modules():
        text = _read(path)
        if text and not is_held_out(f"module:{name}"):
            yield Document("standard library", False, text)


def _packages(site: Path, package_bytes: int) -> Iterator[Document]:
    files = defaultdict(list)
    for path in site.rglob("*"):
        parts = path.relative_to(site).parts
        wanted = path.suffix in (".py", ".rst", ".md", ".txt") and not parts[0].endswith((".dist-info", ".egg-info"))
        if (wanted or path.name == "METADATA") and _SKIPPED_DIRECTORIES.isdisjoint(parts) and path.is_file():
            files[parts[0].split("-")[0]].append(path)
    for package in sorted(files):
        left = {True: package_bytes, False: package_bytes}
        for path in sorted(files[package], key=lambda path: _order(path.relative_to(site))):
            text = _read(path)
            if path.name == "METADATA":
                text = text.partition("\n\n")[2]  # the description, without the header fields
            for prose, part in _prose_and_code(path, text):
                if part and len(part) <= left[prose]:
                    left[prose] -= len(part)
                    yield Document(package, prose, part)


def _order(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


def _prose_and_code(path: Path, text: str) -> Iterator[tuple[bool, str]]:
    if path.suffix == ".py":
        yield False, text
        yield True, "\n\n".join(docstrings(text)) if text else ""
    else:
        yield True, text


def _read(path: Path) -> str:
    """The file's text, or nothing where it is too small, too large, no UTF-8, or a table rather than text."""
    if not SMALLEST_FILE <= path.stat().st_size <= LARGEST_FILE:
        return ""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""
    letters = sum(map(str.isalpha, text))
    digits = sum(map(str.isdigit, text))
    ascii_only = len(text.encode()) < 1.05 * len(text)
    longest = max(map(len, text.split("\n")))
    return text if ascii_only and digits < 0.15 * max(letters, 1) and longest < 1000 else ""
