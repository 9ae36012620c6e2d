"""The tokens of a text, kept in the user's cache folder: cutting a megabyte takes a second, and the same text is measured again
and again. A file holds what one tokenizer, of one version of its library, makes of one text, and is named by the digest of all
three.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qjax.cache import cache_folder

if TYPE_CHECKING:
    from qjax.models.tokenizer import Tokenizer

SHORTEST = 2**17  # characters; less is encoded as fast as it is looked up
VERSION = 1  # of what the files hold


def encode_kept(tokenizer: "Tokenizer", text: str) -> tuple[np.ndarray, np.ndarray]:
    """tokenizer.encode_with_bytes(text), of long texts from the file that an earlier call wrote where there is one."""
    base = cache_folder()
    if len(text) < SHORTEST or base is None:
        return tokenizer.encode_with_bytes(text)
    content = text.encode("utf-8", "surrogatepass")
    path = base / "tokens" / f"{_digest(tokenizer, content)}.npz"
    found = _read(path, len(content))
    if found is None:
        found = tokenizer.encode_with_bytes(text)
        with contextlib.suppress(OSError):  # nowhere to keep it
            _write(path, found)
    return found


def _digest(tokenizer: "Tokenizer", content: bytes) -> str:
    parts = (str(VERSION), importlib.metadata.version("tokenizers"), tokenizer.inner.to_str())
    return hashlib.sha256(b"\0".join([*(part.encode() for part in parts), content])).hexdigest()


def _read(path: Path, nbytes: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What a file holds; None where there is none, or one that is broken."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            ids, counts = file["ids"], file["bytes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = ids.dtype == counts.dtype == np.int32 and ids.ndim == 1 and ids.shape == counts.shape and counts.sum() == nbytes
    return (ids, counts) if whole else None


def _write(path: Path, found: tuple[np.ndarray, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        np.savez(file, ids=found[0], bytes=found[1])
    part.replace(path)
