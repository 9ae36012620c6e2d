"""Committed results: every table is what its rows give, byte for byte, and every figure can be drawn from them."""

from pathlib import Path

import pytest

from qjax.report.reports import write_reports
from qjax.sweep.store import LAYERS, ROWS, read_rows

RESULTS = Path(__file__).parents[1] / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob(f"*/{ROWS}"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_rows(folder, tmp_path):
    written = write_reports(tmp_path, read_rows(folder / ROWS))
    assert {path.name for path in written} == {path.name for path in folder.iterdir()} - {ROWS, LAYERS}
    for path in written:
        if path.suffix in (".md", ".tex", ".csv"):
            assert path.read_bytes() == (folder / path.name).read_bytes()


def test_every_folder_is_described():
    described = (RESULTS / "README.md").read_text()
    assert FOLDERS
    assert all(f"`{folder.name}/`" in described for folder in FOLDERS)
