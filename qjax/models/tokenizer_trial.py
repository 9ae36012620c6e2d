"""A tokenizer.json is tried before it is trusted.

The tokenizers library is written in Rust: what it is not prepared for in a file ends in a panic (an exception that is no
`Exception`), in an abort of the process, or in all of the memory. So a file is checked as JSON (`tokenizer_file.py`) and
used once, in a child process with limits on memory and time unless it is small and of plain parts. The child imports no JAX and
takes some 0.1 s, for the largest files some seconds; that a file passed is remembered by its digest in the user's cache folder.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qjax.cache import cache_folder
from qjax.errors import QjaxError, one_line
from qjax.models.tokenizer_file import PLAIN_BYTES, faults, is_plain
from qjax.untrusted import json_object

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_BYTES = 2**27  # of a file; the largest in use have 33 MB
VERSION = 1  # of the trial; verdicts of others do not count
MEMORY, MEMORY_PER_BYTE = 2**30, 32  # of the child, bytes of addresses
SECONDS, SECONDS_PER_MB = 8, 1  # of the child's processor; four times as much by the clock
CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from qjax.models import tokenizer_trial as t; t.child()"
WORDS = "The quick brown fox, 12345 times:\n\n\treturn x[i] += 3.14;  # é 漢字 😀 مرحبا नमस्ते\r\n"


def parse_safely(content: bytes) -> "tokenizers.Tokenizer":
    """The tokenizer in a tokenizer.json; raises QjaxError, "the tokenizer ...", for one that cannot be used safely."""
    if len(content) <= PLAIN_BYTES:
        parsed = json_object(content, "the tokenizer")
        _require(faults(parsed))
        if is_plain(parsed):
            inner = parse(content)
            _require(exercise(inner))
            return inner
    verdict = _verdict(content)
    if verdict is None or not verdict.exists():
        _require(_faults_of_child(content))
        if verdict is not None:
            with contextlib.suppress(OSError):  # nowhere to keep it: the file is tried again next time
                verdict.parent.mkdir(parents=True, exist_ok=True)
                verdict.touch()
    return parse(content)


def _require(found: list[str]) -> None:
    if found:
        raise QjaxError(f"the tokenizer {'; it '.join(found[:3])}")


def _verdict(content: bytes) -> Path | None:
    """The file that says of this content that it passed."""
    folder = cache_folder()
    library = importlib.metadata.version("tokenizers")
    return folder and folder / "tokenizers" / f"{hashlib.sha256(content).hexdigest()}-{library}-{VERSION}"


def _faults_of_child(content: bytes) -> list[str]:
    """What the child says of a file, or what became of the child."""
    path = json.dumps([str(Path(each).absolute()) for each in sys.path if each])
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0", "MALLOC_ARENA_MAX": "1"}
    seconds = _seconds(content)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", CHILD, path],
            input=content,
            capture_output=True,
            timeout=4 * seconds,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"takes more than {4 * seconds} s for a page of text"]
    except OSError as error:
        return [f"cannot be tried in a process of its own ({error})"]
    with contextlib.suppress(ValueError):
        found = json.loads(done.stdout)
        if done.returncode == 0 and isinstance(found, list):
            return found
    last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
    return [
        f"ends the process that tries it, or takes more than {_memory(content) >> 20} MiB of memory or {seconds} s "
        f"(exit {done.returncode}: {one_line(last, 200)})"
    ]


def child() -> None:
    """What the child does: prints the faults of the file on its standard input."""
    content = sys.stdin.buffer.read()
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        for limit, value in ((resource.RLIMIT_AS, _memory(content)), (resource.RLIMIT_CPU, _seconds(content))):
            with contextlib.suppress(ValueError, OSError):  # a lower one is set already
                resource.setrlimit(limit, (value, value))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        found = faults(json_object(content, "the tokenizer", TOKENIZER_BYTES)) or exercise(parse(content), thorough=True)
    except QjaxError as error:
        found = [str(error).removeprefix("the tokenizer ")]
    print(json.dumps(found))


def _memory(content: bytes) -> int:
    return MEMORY + MEMORY_PER_BYTE * len(content)


def _seconds(content: bytes) -> int:
    return SECONDS + SECONDS_PER_MB * (len(content) // 10**6)


def parse(content: bytes) -> "tokenizers.Tokenizer":
    """The library's tokenizer, which neither cuts nor pads texts. Raises QjaxError."""
    import tokenizers

    with no_panic("be read"):
        inner = tokenizers.Tokenizer.from_buffer(content)
        inner.no_truncation()
        inner.no_padding()
    return inner


def exercise(inner: "tokenizers.Tokenizer", *, thorough: bool = False) -> list[str]:
    """Faults that show when texts of all scripts go forth and back. thorough: of all characters of the basic plane."""
    points = [point for point in range(1, 2**16, 1 if thorough else 61) if not 0xD800 <= point < 0xE000]
    texts = [WORDS, "".join(map(chr, range(1, 256)))]
    texts.append(" ".join("".join(map(chr, points[start : start + 32])) for start in range(0, len(points), 32)))
    try:
        with no_panic("encode and decode a page of text"):
            size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            for text in texts:
                ids = inner.encode(text).ids
                if max(ids, default=0) >= size:
                    return [f"makes the token {max(ids)}, its vocabulary ends at {size - 1}"]
                inner.decode(ids, skip_special_tokens=False)
    except QjaxError as error:
        return [str(error).removeprefix("the tokenizer ")]
    return []


@contextlib.contextmanager
def no_panic(doing: str):
    """Turns the library's exceptions, panics among them, into a QjaxError: the tokenizer cannot {doing}."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Ctrl-C
            raise
        raise QjaxError(f"the tokenizer cannot {doing} ({one_line(str(error), 300)})") from None
