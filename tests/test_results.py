"""Committed results: every table is what its rows give, every figure can be drawn, every column is described.

Tables are equal byte for byte, but for numbers in CSV files, which have all digits: the last ones are those of a version of
NumPy.
"""

import contextlib
import csv
import io
import json
import math
from pathlib import Path

import pytest

from qjax.report.lists import columns_table
from qjax.report.rendering import to_csv, to_latex, to_markdown
from qjax.report.reports import captions, figures, tables
from qjax.sweep.columns import measurements
from qjax.sweep.store import LAYERS, ROWS, read_rows
from tests.dictionary import CELLS, COLUMNS, OTHERS, described, section, undescribed
from tests.dictionary import LAYERS as OF_LAYERS

RESULTS = COLUMNS.parent
README = RESULTS / "README.md"
FOLDERS = sorted(path.parent for path in RESULTS.glob(f"*/{ROWS}"))
OTHER_TEXTS = ("README.md", "compute_types.md")  # the latter is of its script (`test_experiments.py`)
LONGEST_CELL = 100  # letters, to be read at a glance
RENDERED = {"md": to_markdown, "tex": to_latex, "csv": to_csv}
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@every_folder
def test_tables_are_those_of_the_rows(folder: Path):
    found = tables(read_rows(folder / ROWS))
    made = {f"{name}.{suffix}": render(table) for name, table in found for suffix, render in RENDERED.items()}
    paths = [path for suffix in RENDERED for path in folder.glob(f"*.{suffix}") if path.name not in OTHER_TEXTS]
    committed = {path.name: path.read_text() for path in paths}
    assert sorted(made) == sorted(committed)
    assert [name for name, text in made.items() if not equal(name, committed[name], text)] == []
    cells = {cell.strip() for _, table in found for line in table.cells() for cell in line}
    assert [cell for cell in cells if len(cell) > LONGEST_CELL or cell in ("None", "nan")] == []


def equal(name: str, committed: str, made: str) -> bool:
    """Whether two tables are, in a CSV file but for the last digits of numbers."""
    if committed == made or not name.endswith(".csv"):
        return committed == made
    before, now = (list(csv.reader(io.StringIO(text))) for text in (committed, made))
    if [len(line) for line in before] != [len(line) for line in now]:
        return False
    pairs = [pair for lines in zip(before, now, strict=True) for pair in zip(*lines, strict=True) if len(set(pair)) > 1]
    with contextlib.suppress(ValueError):  # of words
        return all(math.isclose(*map(float, pair), rel_tol=1e-9) for pair in pairs)
    return False


def test_equal_but_for_last_digits():
    table = 'recipe,bits\n"rtn, int4",0.1\n'
    assert equal("a.csv", table, table.replace("0.1", "0.10000000000000002"))
    assert not equal("a.md", table, table.replace("0.1", "0.10000000000000002"))
    for other in (table.replace("0.1", "0.1001"), table.replace("int4", "int3"), table + "x,1\n", table.replace("0.1", "nan")):
        assert not equal("a.csv", table, other)


@every_folder
def test_figures_are_those_of_the_rows(folder: Path):
    rows = read_rows(folder / ROWS)
    drawn = {f"{name}.{suffix}" for name, _ in figures(rows) for suffix in ("png", "pdf")}
    assert drawn == {path.name for suffix in ("png", "pdf") for path in folder.glob(f"*.{suffix}")}
    written = {path.name: path.read_text() for path in folder.glob("*.caption.txt")}
    assert {f"{name}.caption.txt": text for name, text in captions(rows)} == written


@every_folder
def test_every_column_is_described(folder: Path):
    assert undescribed(read_rows(folder / ROWS), CELLS) == []
    layers = (folder / LAYERS).read_text().splitlines() if (folder / LAYERS).exists() else []
    assert undescribed(map(json.loads, layers), OF_LAYERS) == []


@every_folder
def test_every_folder_is_described(folder: Path):
    """In a line of the list, and in a README of its own that names the command."""
    assert f"| [`{folder.name}/`]({folder.name}/) | " in README.read_text()
    script = {"kernels": "kernel_benchmark"}.get(folder.name, folder.name)
    assert f"`python experiments/{script}.py`" in (folder / "README.md").read_text()


def test_every_table_is_whole():
    """No line of a table stands after a blank one, where it would be shown as text."""
    lines = [line for path in (README, COLUMNS) for line in ["", *path.read_text().splitlines()]]
    assert [
        line
        for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False)
        if line[:1] == "|" and not before and not after.startswith(("|---", "| :-"))
    ] == []


def test_the_data_dictionary_is_that_of_the_measurements():
    table = to_markdown(columns_table()).partition("\n\n")[2]
    assert table in section(CELLS), f"results/columns.md, {CELLS}: expected\n{table}"
    declared = [column.name for each in measurements().values() for column in each.columns]
    assert [row["column"] for row in columns_table().rows] == declared and len(declared) == len(set(declared)) > 90
    assert all(row["type"] and row["meaning"] for row in columns_table().rows)


def test_an_undescribed_column_is_found():
    assert undescribed([{"key": 1, "kex": 2, "accuracy:piqa": 3, "acuracy:piqa": 4, "kl:piqa": 5}], CELLS) == [
        "acuracy:piqa",
        "kex",
        "kl:piqa",
    ]
    assert "clipped" in described(OF_LAYERS) and "speedup" in described(OTHERS)
