"""Tokens kept between runs are those that the tokenizer makes, and a broken or foreign file is none."""

import types

import numpy as np
import pytest

from qjax.evaluate import kept_tokens
from qjax.evaluate.kept_tokens import SHORTEST, encode_kept


class Counting:
    """A tokenizer of bytes that counts its calls."""

    def __init__(self, name: str = "one"):
        self.calls, self.inner = 0, types.SimpleNamespace(to_str=lambda: name)

    def encode_with_bytes(self, text):
        self.calls += 1
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return ids, np.ones_like(ids)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qjax" / "tokens"


LONG = "é" * SHORTEST


def test_a_long_text_is_encoded_once(folder):
    first, second = Counting(), Counting()
    for each in (first, second):
        ids, counts = encode_kept(each, LONG)
        np.testing.assert_array_equal(ids, np.frombuffer(LONG.encode(), np.uint8))
        assert counts.sum() == 2 * SHORTEST and ids.dtype == counts.dtype == np.int32
    assert (first.calls, second.calls) == (1, 0)
    assert len(list(folder.iterdir())) == 1


def test_other_texts_tokenizers_and_short_texts_are_encoded(folder):
    encode_kept(Counting(), LONG)
    for name, text in (("one", LONG + "a"), ("two", LONG), ("one", "short")):
        each = Counting(name)
        encode_kept(each, text)
        assert each.calls == 1
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("broken", [b"", b"x" * 72, None])
def test_a_broken_file_is_made_again(folder, broken):
    encode_kept(Counting(), LONG)
    (path,) = folder.iterdir()
    if broken is None:  # of another text
        kept_tokens._write(path, (np.zeros(3, np.int32), np.ones(3, np.int32)))
    else:
        path.write_bytes(broken)
    each = Counting()
    assert len(encode_kept(each, LONG)[0]) == 2 * SHORTEST and each.calls == 1


def test_without_a_folder_to_write_to(folder, monkeypatch):
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    assert len(encode_kept(Counting(), LONG)[0]) == 2 * SHORTEST
    monkeypatch.setattr(kept_tokens, "cache_folder", lambda: None)
    assert len(encode_kept(Counting(), LONG)[0]) == 2 * SHORTEST
