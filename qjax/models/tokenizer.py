"""Text <-> token ids, a thin wrapper of Hugging Face's tokenizers library (`tokenizer.json`)."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.models.tokenizer_file import LARGEST_ID
from qjax.models.tokenizer_trial import TOKENIZER_BYTES, no_panic, parse_safely
from qjax.untrusted import read_bytes

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Build it with `load_tokenizer` or `wrap_tokenizer`.

    vocabulary_size: the largest id plus one, added tokens included.
    adds_bos: its post-processor puts `bos_id` before a text, as a call of Hugging Face's tokenizer would.
    chat_template: Jinja text that makes a text of a chat's messages.
    """

    inner: "tokenizers.Tokenizer"
    vocabulary_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    chat_template: str | None = None

    def encode(self, text: str, *, special_tokens: bool = False) -> np.ndarray:
        """int32 ids (tokens,). Special tokens that the post-processor adds come only with `special_tokens`.

        Raises QjaxError for text that UTF-8 cannot hold (lone surrogates).
        """
        _code_points(text)
        with no_panic("encode this text"):
            return np.array(self.inner.encode(text, add_special_tokens=special_tokens).ids, np.int32)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids (tokens,) without special tokens, and the int32 number of UTF-8 bytes of the text each stands for.

        The counts add up to the whole text: what a tokenizer skips (a trimmed space) counts to the next token or, at the
        end, to the last. Where one character is spread over several tokens its bytes count to the first of them.
        """
        points = _code_points(text)
        with no_panic("encode this text"):
            encoding = self.inner.encode(text, add_special_tokens=False)
            ids = np.array(encoding.ids, np.int32)
        if ids.size == 0:
            return ids, ids.copy()
        widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
        position = np.concatenate([[0], np.cumsum(widths)])  # in bytes, of every character
        ends = np.array(encoding.offsets, np.int64)[:, 1]  # in characters
        reached = np.maximum.accumulate(position[ends])
        reached[-1] = position[-1]
        return ids, np.diff(reached, prepend=0).astype(np.int32)

    def decode(self, ids: Iterable[int], *, special_tokens: bool = False) -> str:
        """Text of ids; special tokens such as the beginning of text are shown only with `special_tokens`."""
        ids = [int(i) for i in ids]
        with no_panic("decode these tokens"):
            return self.inner.decode(ids, skip_special_tokens=not special_tokens)

    def to_json(self) -> str:
        """The content of a tokenizer.json that `load_tokenizer` reads back."""
        return self.inner.to_str(pretty=True)


def wrap_tokenizer(inner: "tokenizers.Tokenizer", *, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
    """A Tokenizer from the library's. bos_id, eos_id: what the model's configuration says; the post-processor, which
    knows what stands before a text, has the last word on bos_id. Truncation and padding are switched off."""
    inner.no_truncation()
    inner.no_padding()
    with no_panic("encode 'a'"):
        framed = inner.encode("a")
    adds_bos = bool(framed.special_tokens_mask) and framed.special_tokens_mask[0] == 1
    size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < size <= LARGEST_ID + 1 or max(framed.ids, default=0) >= size:
        largest = max(size - 1, *framed.ids)
        raise QjaxError(
            f"the tokenizer has the token id {largest} beside a vocabulary of {size}; expected ids of the vocabulary"
        )
    return Tokenizer(inner, size, framed.ids[0] if adds_bos else bos_id, eos_id, adds_bos)


def load_tokenizer(path: str | Path, *, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer in the file `path` (a tokenizer.json).

    Raises QjaxError when it is missing, corrupt, or made so that using it is not safe (`tokenizer_trial.py`).
    """
    path = Path(path)
    content = read_bytes(path, TOKENIZER_BYTES)
    try:
        return wrap_tokenizer(parse_safely(content), bos_id=bos_id, eos_id=eos_id)
    except QjaxError as error:
        raise QjaxError(f"{path}: {error}; get an intact tokenizer.json") from error


def _code_points(text: str) -> np.ndarray:
    try:
        return np.frombuffer(text.encode("utf-32-le"), np.uint32)
    except UnicodeEncodeError as error:
        raise QjaxError(f"the text has a lone surrogate at character {error.start}, which UTF-8 cannot hold") from error
