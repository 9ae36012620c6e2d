"""Rows on disk survive a writer that is killed at any byte."""

import json

import pytest

from qjax.errors import QjaxError
from qjax.sweep.store import append_row, read_rows


def test_round_trip_keeps_order_and_values(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert read_rows(path) == []
    rows = [{"key": "a", "perplexity": 1 / 3}, {"key": "b", "window_nll": [1.0, 2.5], "text": "é\n"}]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows


def test_every_truncation_of_the_last_row_loses_that_row_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"key": "first"})
    complete = path.read_bytes()
    append_row(path, {"key": "second"})
    whole = path.read_bytes()
    for length in range(len(complete), len(whole)):
        path.write_bytes(whole[:length])
        assert read_rows(path) == [{"key": "first"}]
        append_row(path, {"key": "third"})
        assert read_rows(path) == [{"key": "first"}, {"key": "third"}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"key": "a"}) + "\nnot json\n" + json.dumps({"key": "b"}) + "\n")
    with pytest.raises(QjaxError, match="line 2"):
        read_rows(path)
