"""The rows of a run, a JSON object for every step, and their figure."""

import json
from collections.abc import Callable
from pathlib import Path

from qjax.errors import QjaxError
from qjax.files import write_atomically
from qjax.numbers import as_json
from qjax.sweep.store import Reader
from qjax.train.loop import Told

ROWS = "training.jsonl"
NUMBERS = [name for name in Told._fields if name != "seconds_left"]  # of a row, for which nobody waits any more


def step_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a run so far, without the unfinished one of a killed run; none where there is no file.

    Raises QjaxError, which names the line, for what is no row of a step.
    """
    rows = []
    for number, row in Reader(path).objects():
        if wrong := [name for name in NUMBERS if type(row.get(name)) not in (int, float)]:
            raise QjaxError(f"{path}: line {number} has no number in {', '.join(wrong)}; mend or remove that line")
        rows.append(row)
    return rows


def step_log(path: Path) -> Callable[[Told], None]:
    """A function that adds a row for each step that it is told of; rows of that step and later ones, of a killed run, go."""
    rows: list[dict[str, object]] | None = None

    def add(told: Told) -> None:
        nonlocal rows
        if rows is None:
            rows = [row for row in step_rows(path) if row["step"] < told.step]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        row = as_json({name: getattr(told, name) for name in NUMBERS})
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    return add
