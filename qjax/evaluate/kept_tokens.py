"""The tokens of a text, kept in the user's cache folder: cutting a megabyte takes a second, and the same text is measured again
and again. A file holds what one tokenizer, of one version of its library, makes of one text, and is named by the digest of all
three: the SHA-256 of the rest, then ids and bytes of every token in int32.
"""

import contextlib
import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qjax.cache import cache_folder
from qjax.errors import QjaxError
from qjax.files import write_atomically
from qjax.untrusted import read_bytes

if TYPE_CHECKING:
    from qjax.models.tokenizer import Tokenizer

SHORTEST = 2**17  # characters; less is encoded as fast as it is looked up
VERSION = 2  # of what the files hold


def encode_kept(tokenizer: "Tokenizer", text: str) -> tuple[np.ndarray, np.ndarray]:
    """tokenizer.encode_with_bytes(text), of long texts from the file that an earlier call wrote where there is one."""
    base = cache_folder()
    if len(text) < SHORTEST or base is None:
        return tokenizer.encode_with_bytes(text)
    content = text.encode("utf-8", "surrogatepass")
    path = base / "tokens" / _digest(tokenizer, content)
    found = _read(path, len(content))
    if found is None:
        found = tokenizer.encode_with_bytes(text)
        with contextlib.suppress(OSError, QjaxError):  # nowhere to keep it
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, found)
    return found


def _digest(tokenizer: "Tokenizer", content: bytes) -> str:
    parts = (str(VERSION), importlib.metadata.version("tokenizers"), tokenizer.inner.to_str())
    return hashlib.sha256(b"\0".join([*(part.encode() for part in parts), content])).hexdigest()


def _read(path: Path, nbytes: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What a file holds; None where there is none, or one that is broken or of another text."""
    try:
        held = read_bytes(path, limit=32 + 16 * nbytes)  # a token of no byte for each byte, at most
    except QjaxError:
        return None
    if hashlib.sha256(held[32:]).digest() != held[:32]:
        return None
    ids, counts = np.frombuffer(held, np.int32, offset=32).reshape(2, -1)
    return (ids, counts) if counts.sum() == nbytes else None


def _write(path: Path, found: tuple[np.ndarray, np.ndarray]) -> None:
    content = np.stack(found).astype(np.int32).tobytes()
    write_atomically(path, hashlib.sha256(content).digest() + content)
