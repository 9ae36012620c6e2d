"""Corpora: the text that perplexity is measured on and that calibration reads.

`load_corpus(spec, split)` turns a spec into documents. What a spec may be:

    python-docs    built in, no network: the language-reference topics and the docstrings of the standard library
    text:PATH      one UTF-8 file as one document (.gz accepted); the split is ignored
    jsonl:PATH     a JSON object on each line, the document in its field "text" (.gz accepted); the split is ignored
    wikitext2      wikitext-2-raw-v1, rows of the test or the train part, as GPTQ's scripts take them
    ptb            Penn Treebank (ptb_text_only), sentences of the test or the train part
    c4             allenai/c4 en: the head of the first validation shard, or of the first train shard

`python-docs` is split by the SHA-256 of a document's name (a topic or a dotted module name), so a document stays on its
side in every Python version though its text may change; the fingerprint tells the texts apart. A quarter is held out
("test"), the rest is "calibration". Documents are ordered by the same hash: the head of the corpus is a random mix of
topics and docstrings. Topics quote each other, so paragraphs of the held-out side are dropped from the calibration side.

How the joined text is cut into windows is the business of a perplexity convention, not of a corpus.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import itertools
import logging
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from qjax.errors import QjaxError
from qjax.files import expand
from qjax.untrusted import decode, parse_json, read_unpacked, split_lines, status

Split = Literal["test", "calibration"]
T = TypeVar("T")
Render = Callable[[dict], str]  # a chat -> its text

BLANK_LINE = "\n\n"
HELD_OUT_FRACTION = 0.25
SHORTEST_DOCUMENT = 200  # bytes; a module whose docstrings are shorter says nothing
SHORTEST_SHARED_PARAGRAPH = 60  # characters; shorter paragraphs ("New in version 3.8.") are shared by chance

# Directories of the standard library that hold tests, generated data or somebody else's packages.
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "_bundled", "__phello__", "__pycache__"}
    | {"pydoc_data", "lib-dynload", "turtledemo"}
)


class _Corpus(NamedTuple):
    name: str
    documents: tuple[str, ...]
    fingerprint: str
    separator: str
    lines: bool


class Corpus(_Corpus):
    """Documents and where they come from: of `load_corpus`, or texts in memory, as Corpus("mine", ["a text", "another"]).

    name: the spec, with a path cut to its file name. fingerprint: first 16 hex digits of the SHA-256 of the joined documents,
    in UTF-8; made where it is not given. separator: joins the documents; a blank in ptb and c4, as GPTQ's scripts join them.
    lines: the documents are lines of articles, as WikiText's rows are. Raises QjaxError for documents that are no texts.
    """

    __slots__ = ()

    def __new__(
        cls,
        name: str,
        documents: Iterable[str],
        fingerprint: str | None = None,
        separator: str = BLANK_LINE,
        lines: bool = False,
    ):
        documents = (documents,) if isinstance(documents, str) else tuple(documents)
        if wrong := next((type(each).__name__ for each in documents if not isinstance(each, str)), None):
            raise QjaxError(f"corpus {name!r}: expected texts, got {wrong}; give a list of str")
        mark = fingerprint_of(documents, separator) if fingerprint is None else fingerprint
        return super().__new__(cls, name, documents, mark, separator, lines)


def load_corpus(spec: str, split: Split = "test", *, render: Render | None = None) -> Corpus:
    """Load the documents that `spec` names (the module's docstring lists the specs). render: makes a text of a chat in a jsonl
    file (`train.chat.chat_renderer`).

    Raises QjaxError for an unknown spec or split, a missing, empty, binary or malformed file, and for a corpus that cannot be
    fetched (no network, or the datasets package missing).
    """
    if split not in ("test", "calibration"):
        raise QjaxError(f"split {split!r}: expected 'test' or 'calibration'")
    kind, _, path = spec.partition(":")
    if path and kind in _FILE_READERS:
        documents = _FILE_READERS[kind](expand(path), spec, render)
        name = f"{kind}:{Path(path).name}"
    elif spec in _NAMED:
        documents, name = _NAMED[spec](split), spec
    else:
        raise QjaxError(_unknown(spec))
    if not any(document.strip() for document in documents):
        raise QjaxError(f"corpus {spec!r} ({split}) is empty: expected at least one document with text")
    separator = _SEPARATORS.get(name, BLANK_LINE)
    return Corpus(name, documents, separator=separator, lines=name in _OF_LINES)


def is_spec(text: str) -> bool:
    """Whether a text is the name of one."""
    kind, _, path = text.partition(":")
    return text in _NAMED or bool(path and kind in _FILE_READERS)


def require_spec(spec: str) -> None:
    """Raises QjaxError for what names no corpus, and for a file that does not exist; nothing is read."""
    _, colon, path = spec.partition(":")
    if not is_spec(spec):
        raise QjaxError(_unknown(spec))
    if colon and not status(expand(path)):
        raise QjaxError(f"corpus {spec!r}: no such file; expected the path of a text file")


def load_corpora(specs: Iterable[str], split: Split = "test") -> tuple[Corpus, ...]:
    """Every corpus named; raises what `load_corpus` raises."""
    return tuple(load_corpus(spec, split) for spec in specs)


def fingerprint_of(documents: Iterable[str], separator: str = BLANK_LINE) -> str:
    """First 16 hex digits of the SHA-256 of the joined documents."""
    return hashlib.sha256(separator.join(documents).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def article_starts(corpus: Corpus) -> np.ndarray:
    """(articles,) int64: where each article begins in the joined text, in UTF-8 bytes; the first begins at 0.

    Articles are what errors take as independent: the documents, or, in a single text, what WikiText's headings (" = Title = ")
    and "<|endoftext|>" tell apart.
    """
    if len(corpus.documents) > 1 and not corpus.lines:
        gap = len(corpus.separator.encode())
        sizes = [len(document.encode("utf-8", "surrogatepass")) + gap for document in corpus.documents]
        return np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)])
    text = corpus.separator.join(corpus.documents)
    at = sorted({0, *(match.start() for match in _ARTICLE.finditer(text))})
    pieces = (text[start:end] for start, end in itertools.pairwise(at))
    return np.cumsum([0, *(len(piece.encode("utf-8", "surrogatepass")) for piece in pieces)], dtype=np.int64)


def corpus_names() -> tuple[str, ...]:
    """What a corpus spec may be, for help texts and messages."""
    return (*_NAMED, *(f"{kind}:PATH" for kind in _FILE_READERS))


def _unknown(spec: str) -> str:
    kind = spec.partition(":")[0]
    near = difflib.get_close_matches(kind, (*_NAMED, *_FILE_READERS), n=2, cutoff=0.5)
    names = [name if name in _NAMED else f"{name}:PATH" for name in near]
    hint = f" (did you mean {' or '.join(names)}?)" if names else ""
    if not names and spec and status(expand(spec)):
        hint = f" (a file is given as text:{spec})"
    return f"unknown corpus {spec!r}{hint}: expected one of {', '.join(corpus_names())}"


# --- python-docs ---------------------------------------------------------------------------------------------------------


def is_held_out(name: str) -> bool:
    """Whether the `python-docs` document of this name ("topic:assert", "module:json.decoder") is on the held-out side."""
    return _hash(name) < HELD_OUT_FRACTION


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def standard_library_modules() -> Iterator[tuple[str, Path]]:
    """(dotted module name, path of its source) of the standard library's own modules, sorted by name; tests left out.

    Raises QjaxError where Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _SKIPPED_DIRECTORIES]
        for stem in (file.removesuffix(".py") for file in files if file.endswith(".py")):
            if stem.isidentifier():
                parts = (*Path(folder).relative_to(root).parts, *(() if stem == "__init__" else (stem,)))
                modules[".".join(parts)] = Path(folder, f"{stem}.py")
    if not modules:
        raise QjaxError(f"no Python sources under {root}: 'python-docs' needs them; use text:PATH instead")
    yield from sorted(modules.items())


def held_out_modules() -> dict[str, Path]:
    """Name and source path of each standard-library module on the held-out side: no training text may contain these files."""
    return {name: path for name, path in standard_library_modules() if is_held_out(f"module:{name}")}


def docstrings(source: str) -> list[str]:
    """The docstrings of a module, its classes and functions in order of appearance, dedented; empty if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and text.strip():
                found.append(inspect.cleandoc(text))
        bodies = (getattr(node, field, ()) for field in ("body", "orelse", "finalbody"))
        stack.extend(reversed([child for body in bodies for child in body]))
    return found


def without_paragraphs(document: str, paragraphs: frozenset[str]) -> str:
    """`document` less each paragraph that is, up to white space, one of `paragraphs` (see `long_paragraphs`)."""
    kept = [part for part in document.split("\n\n") if " ".join(part.split()) not in paragraphs]
    return "\n\n".join(kept)


def long_paragraphs(documents: Iterable[str]) -> frozenset[str]:
    """The paragraphs of the documents that are too long to be shared by chance, with white space collapsed."""
    paragraphs = (" ".join(part.split()) for document in documents for part in document.split("\n\n"))
    return frozenset(paragraph for paragraph in paragraphs if len(paragraph) >= SHORTEST_SHARED_PARAGRAPH)


def _python_docs(split: Split) -> tuple[str, ...]:
    test = _python_docs_side(held_out=True)
    if split == "test":
        return test
    shared = long_paragraphs(test)
    stripped = (without_paragraphs(document, shared) for document in _python_docs_side(held_out=False))
    return tuple(document for document in stripped if len(document.encode()) >= SHORTEST_DOCUMENT)


def _python_docs_side(*, held_out: bool) -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise QjaxError(f"this Python has no pydoc_data ({error}): 'python-docs' needs it; use text:PATH") from error
    documents = {f"topic:{name}": text.strip() for name, text in topics.items() if is_held_out(f"topic:{name}") == held_out}
    for module, path in standard_library_modules():
        name = f"module:{module}"
        if is_held_out(name) == held_out:
            documents[name] = "\n\n".join(docstrings(path.read_text("utf-8", "replace")))
    names = sorted(documents, key=_hash)
    return tuple(documents[name] for name in names if len(documents[name].encode()) >= SHORTEST_DOCUMENT)


# --- files ---------------------------------------------------------------------------------------------------------------


def _read(path: Path, spec: str) -> str:
    try:
        if not status(path):
            raise QjaxError("no such file; expected the path of a text file")
        text = decode(read_unpacked(path), "the file")
    except QjaxError as error:
        raise QjaxError(f"corpus {spec!r}: {error}") from error
    if "\0" in text:
        raise QjaxError(f"corpus {spec!r}: holds NUL bytes, so it is no text file; expected UTF-8 text")
    if not text.strip():
        raise QjaxError(f"corpus {spec!r}: the file is empty; expected text")
    return text.replace("\r\n", "\n")


def _text(path: Path, spec: str, render: Render | None) -> tuple[str, ...]:
    del render
    return (_read(path, spec),)


def _jsonl(path: Path, spec: str, render: Render | None) -> tuple[str, ...]:
    documents = []
    for number, line in enumerate(split_lines(_read(path, spec), f"corpus {spec!r}: the file"), 1):
        if not line.strip():
            continue
        document = parse_json(line, f"corpus {spec!r}: line {number}")
        chat = isinstance(document, dict) and "text" not in document and {"messages", "conversations"} & document.keys()
        if chat and render:
            try:
                document = {"text": render(document)}
            except QjaxError as error:
                raise QjaxError(f"corpus {spec!r}: line {number}: {error}") from error
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            more = "; chats are for training: `qjax train` renders them by the model's chat template" if chat else ""
            raise QjaxError(
                f'corpus {spec!r}: line {number} has no string field "text"; expected {{"text": ...}} on each line{more}'
            )
        documents.append(document["text"])
    return tuple(documents)


# --- the datasets package ------------------------------------------------------------------------------------------------


def _wikitext2(split: Split) -> tuple[str, ...]:
    part = "test" if split == "test" else "train"
    return _fetch("wikitext2", "text", "Salesforce/wikitext", "wikitext-2-raw-v1", split=part)


def _ptb(split: Split) -> tuple[str, ...]:
    # The data set itself is a script, which newer versions of datasets refuse; the hub's Parquet copy of it is the same rows.
    part = "test" if split == "test" else "train"
    location = {"revision": "refs/convert/parquet", "split": part}
    return _fetch("ptb", "sentence", "ptb-text-only/ptb_text_only", "penn_treebank", **location)


def _c4(split: Split) -> tuple[str, ...]:
    # GPTQ's evaluation takes the first 1100 validation documents; calibration draws from the head of the first train shard.
    if split == "test":
        files, part = {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "validation[:1100]"
    else:
        files, part = {"train": "en/c4-train.00000-of-01024.json.gz"}, "train[:8192]"
    return _fetch("c4", "text", "allenai/c4", data_files=files, split=part)


def _fetch(name: str, column: str, *location: str, **options: object) -> tuple[str, ...]:
    return fetch(f"corpus {name!r}", "use text:PATH", lambda rows: tuple(rows[column]), *location, **options)


def fetch(what: str, instead: str, read: Callable[[object], T], *location: str, **options: object) -> T:
    """read(rows) of a data set on the hub, which `datasets` downloads once and keeps.

    what: of the message where that fails, whatever the reason. instead: how to do without. Raises QjaxError.
    """
    try:
        import datasets
    except ImportError as error:
        raise QjaxError(f"{what} needs the datasets package: pip install datasets, or {instead}") from error
    hub_log = logging.getLogger("huggingface_hub")  # tells each failed attempt; the error below tells the last
    level = hub_log.level
    try:
        hub_log.setLevel(logging.ERROR)
        return read(datasets.load_dataset(*location, **options))
    except Exception as error:  # hub, HTTP, cache and script errors share no base class
        reason = " ".join(str(error).split())[:160]
        raise QjaxError(
            f"{what} cannot be fetched ({type(error).__name__}: {reason}); it needs the network once; or {instead}"
        ) from error
    finally:
        hub_log.setLevel(level)


_NAMED: dict[str, Callable[[Split], tuple[str, ...]]] = {
    "python-docs": _python_docs,
    "wikitext2": _wikitext2,
    "ptb": _ptb,
    "c4": _c4,
}
_SEPARATORS = {"ptb": " ", "c4": " "}
_OF_LINES = ("wikitext2", "ptb")
_ARTICLE = re.compile(r"^ = [^=\n]+ = *$|<\|endoftext\|>", re.MULTILINE)
_FILE_READERS: dict[str, Callable[[Path, str, Render | None], tuple[str, ...]]] = {"text": _text, "jsonl": _jsonl}
