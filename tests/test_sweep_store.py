"""Rows on disk survive a writer that is killed at any byte."""

import json
from pathlib import Path

import pytest

from qjax import untrusted
from qjax.errors import QjaxError
from qjax.sweep.rows import complete
from qjax.sweep.store import Reader, append_row, append_rows, read_rows


def row(key, **changes):
    """The least that a row holds."""
    names = ("recipe", "method", "format", "model", "corpus", "convention", "fingerprint")
    figures = {"bits_per_weight": 4.5, "size_bytes": 10, "tokens": 5, "perplexity": 3.0, "nll": 1.1}
    return complete({"key": key} | dict.fromkeys(names, "x") | figures | changes)


def test_round_trip_keeps_order_and_values(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert read_rows(path) == []
    rows = [row("a", perplexity=1 / 3), row("b", window_nll=[1.0, None, "inf"], text="é\n", perplexity="inf")]
    for each in rows:
        append_row(path, each)
    assert read_rows(path) == rows


def test_every_truncation_of_the_last_row_loses_that_row_only(tmp_path):
    """And one that takes its newline alone not even that."""
    path = tmp_path / "rows.jsonl"
    append_row(path, row("first"))
    complete = path.read_bytes()
    append_row(path, row("second"))
    whole = path.read_bytes()
    for length in range(len(complete), len(whole)):
        path.write_bytes(whole[:length])
        kept = [row("first"), row("second")][: 1 + (length == len(whole) - 1)]
        assert read_rows(path) == kept
        append_row(path, row("third"))
        assert read_rows(path) == [*kept, row("third")]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("not json", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("{}", "key, model, fingerprint, recipe"),
        (json.dumps(row("b", bits_per_weight=None)), "bits_per_weight"),
        (json.dumps(row("b", recipe=3)), "recipe"),
        (json.dumps(row("b", perplexity="abc")), "perplexity"),
        (json.dumps(row("b", windows=None)), "windows"),
        (json.dumps(row("b", seed="x")), "seed"),
        (json.dumps(row("b", window_nll=3.0)), "window_nll"),
        (json.dumps(row("b", window_nll=[1.0, "x"])), "window_nll"),
        (json.dumps(row("b", rms_dp=True)), "rms_dp"),
        (
            json.dumps(row("b", **{"kl": "many", "answers:piqa": [1, 2.5], "word_perplexity:x": {}})),
            "kl, answers:piqa, word_p",
        ),
    ],
)
def test_a_damaged_or_foreign_line_is_named(tmp_path, line, named):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row("a")), line, json.dumps(row("c")), ""]))
    with pytest.raises(QjaxError, match=f"line 2.*{named}"):
        read_rows(path)


def test_a_disk_that_is_full_is_named(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    with pytest.raises(QjaxError, match=r"cannot write .*rows\.jsonl"):
        append_row(tmp_path / "rows.jsonl", row("a"))


def test_what_is_read_again_is_what_was_added(tmp_path, monkeypatch):
    """By each reader its own; half a line once it is whole, one without its newline twice, a new file from its beginning."""
    path = tmp_path / "rows.jsonl"
    reader = Reader(path)
    assert list(reader.rows()) == []
    append_rows(path, [row("a"), row("b")])
    assert [each["key"] for each in reader.rows()] == ["a", "b"]
    with monkeypatch.context() as patched:
        patched.setattr(untrusted, "lines", None)
        assert list(reader.rows()) == []  # without opening it
    whole = json.dumps(row("c")).encode()
    for content, found in {whole[:50]: [], whole: ["c"], whole + b"\n": ["c"], whole + b"\n" + whole[:9]: []}.items():
        path.write_bytes(b"".join(json.dumps(row(key)).encode() + b"\n" for key in "ab") + content)
        assert [each["key"] for each in reader.rows()] == found
    append_row(path, row("d"))  # cuts half a line off
    assert [each["key"] for each in reader.rows()] == ["d"]
    path.write_text(path.read_text() + "no row\n")
    with pytest.raises(QjaxError, match="line 5 is not a JSON object"):
        list(reader.rows())
    path.unlink()
    append_row(path, row("e"))
    assert [each["key"] for each in reader.rows()] == ["e"] and [each["key"] for each in Reader(path).rows()] == ["e"]
