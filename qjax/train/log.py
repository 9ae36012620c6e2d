"""The rows of a run, a JSON object for every step, and their figure."""

import json
from collections.abc import Callable
from pathlib import Path

from qjax.files import write_atomically
from qjax.numbers import as_json
from qjax.train.loop import Told

ROWS = "training.jsonl"


def step_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a run so far; none where there is no file. A last line without its end, of a killed run, is no row."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def step_log(path: Path) -> Callable[[Told], None]:
    """A function that adds a row for each step that it is told of; rows of that step and later ones, of a killed run, go."""
    rows: list[dict[str, object]] | None = None

    def add(told: Told) -> None:
        nonlocal rows
        if rows is None:
            rows = [row for row in step_rows(path) if row["step"] < told.step]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        row = as_json({name: value for name, value in told._asdict().items() if name != "seconds_left"})
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    return add
