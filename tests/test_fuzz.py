"""A few hundred inputs of every fuzzer, always the same; `python -m tests.fuzz` goes on from there."""

import os

import pytest

from tests.fuzz import seeds
from tests.fuzz.attempt import attempt
from tests.fuzz.readers import READERS, read_unchanged

INPUTS = {  # of slow readers; 40 of others
    **dict.fromkeys(("tokenizer", "checkpoint", "packed"), 12),
    **{"quantized": 24, "gguf": 20, "architecture": 20, "split": 20, "converted": 8},
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="makes pipes and links")


@pytest.mark.parametrize("reader", [name for name in READERS if name != "training"])  # orbax leaves coroutines behind
def test_inputs_that_are_nearly_right(reader, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = [attempt(reader, 1, index, tmp_path / "input") for index in range(INPUTS.get(reader, 40))]
    assert {index: each.fault for index, each in enumerate(found) if each.fault} == {}
    assert any(each.read for each in found), "all were refused: none shows that the reader's end is reached"


@pytest.mark.filterwarnings("ignore:the checkpoint's weights are read")
def test_inputs_are_right_before_they_are_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert read_unchanged(tmp_path) == len(seeds.models()) + len(seeds.tokenizers()) >= 19 + 5 + 16 + 9


def test_faults_are_seen(tmp_path, monkeypatch):
    """Other exceptions, messages of several lines, and memory."""
    from qjax.errors import QjaxError
    from tests.fuzz import attempt as judge

    class Odd(QjaxError):
        def __init__(self, message):
            Exception.__init__(self, message)

    def failing(error):
        def read(folder):
            raise error

        return READERS["text"]._replace(read=read)

    for error, said in ((ValueError("x"), "ValueError"), (Odd("two\nlines"), "not one"), (Odd("x" * 1_001), "1001 characters")):
        monkeypatch.setitem(judge.READERS, "text", failing(error))
        assert said in attempt("text", 0, 0, tmp_path / "input").fault
    monkeypatch.setitem(judge.READERS, "text", failing(QjaxError("a right one")))
    assert attempt("text", 0, 0, tmp_path / "input")[:2] == (False, None)
    monkeypatch.setattr(judge, "MEMORY", 2**24)
    monkeypatch.setitem(judge.READERS, "text", READERS["text"]._replace(read=lambda folder: b"x" * 2**26))
    if judge.FORGET.exists():
        assert "MiB" in attempt("text", 0, 0, tmp_path / "input").fault


def test_a_run_of_so_many_inputs(tmp_path, monkeypatch, capsys):
    """Ends with them; where the seconds are over before, with exit code 1."""
    from tests.fuzz.__main__ import main

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # main changes it
    for seconds, code, tried in (("0", 1, 0), ("100", 0, 3)):
        monkeypatch.setattr("sys.argv", ["fuzz", "--only", "rule", "--seed", "1", "--inputs", "3", "--seconds", seconds])
        assert main() == code
        assert f"{tried} inputs, 0 at fault" in capsys.readouterr().out
