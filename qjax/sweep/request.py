"""From a row back to what was asked for: all that is needed to measure its cell again.

Paths are no part of a row, which holds a text's file name and a model's name; fingerprints say whether what is found under such
a name is what was measured. Calibration windows are drawn by the sweep's seed.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qjax.errors import QjaxError
from qjax.sweep.cells import canonical
from qjax.sweep.columns import Row
from qjax.sweep.rows import cell_columns, complete, named_model, recipe_without_rules

NEEDED = ("model", "fingerprint", "recipe", "corpus", "corpus_fingerprint", "convention", "seed")
OWN_LOSS = "own-loss"  # the convention of rows of `sweep_function`
CALIBRATION = ("calibration", "calibration_fingerprint", "calibration_windows", "calibration_window_tokens")


class AskedTask(NamedTuple):
    """A task by name, its number of questions and the start of their fingerprint."""

    name: str
    questions: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name}({self.questions},{self.fingerprint})"


def request_of(row: Row) -> dict[str, object]:
    """The columns of what a row was asked for; its tasks one by one, its recipe without rules, of a block alone that there.

    Raises QjaxError for rows that are no cells of a sweep, or that lack what is needed.
    """
    if "kind" in row:
        raise QjaxError(f"row {row['key']} is of the kind {row['kind']!r}, no cell of a sweep; its experiment makes it again")
    if row.get("convention") == OWN_LOSS:
        raise QjaxError(
            f"row {row['key']} is of a function with a loss of its own, which no row holds; call qjax.sweep_function with them "
            "again, into an empty folder, and see `qjax compare`"
        )
    row = complete(row)
    missing = [name for name in (*NEEDED, *(CALIBRATION if row.get("order") is not None else ())) if row.get(name) is None]
    if row.get("order") is not None and row.get("calibration_source") == "":
        missing.append("calibration_source (the tokens were given, not read from a text)")
    text = str(row.get("tasks") or "")
    found = re.findall(r"(\S.*?)\((\d+),([0-9a-f]+)\)(?: |$)", text)
    tasks = [AskedTask(name, int(count), fingerprint) for name, count, fingerprint in found]
    if " ".join(map(str, tasks)) != text:
        raise QjaxError(
            f"row {row['key']}: tasks are {text!r}, expected NAME(QUESTIONS,FINGERPRINT), one or more; mend the row"
        )
    if missing:
        raise QjaxError(f"row {row['key']} cannot be measured again, it lacks {', '.join(missing)}")
    placed = {"recipe": row["place_recipe"], "rules": row["rules"][:-1]} if row.get("block") is not None else {}
    return row | {"recipe": recipe_without_rules(row), "tasks": tasks} | placed


def find_row(rows: Sequence[Row], wanted: str, where: str, *, any_draw: bool = False) -> Row:
    """The row whose key begins with `wanted`, or whose recipe it is; of rows of one cell, measured again with other
    code, the last. where: the rows' file, for messages. any_draw: of rows that differ in their seed alone any will do.

    Raises QjaxError where there is none, or where several cells have it.
    """
    found = [row for row in rows if row["key"] == wanted] or [row for row in rows if str(row["key"]).startswith(wanted)]
    if not found:
        names = {wanted, *_canonical(wanted)}
        found = [row for row in rows if row.get("recipe") in names]
    if not found:
        raise QjaxError(f"{where} has no row {wanted!r}; give the start of a row's key, or a recipe of {_few(rows, 'recipe')}")
    cells = list({row["key"] if "kind" in row else cell_columns(row, any_draw=any_draw): row for row in found}.values())
    if len(cells) > 1:
        raise QjaxError(f"{len(cells)} rows of {where} are {wanted!r}; give more of one key: {_listed(map(_cell, cells))}")
    return cells[0]


def _cell(row: Row) -> str:
    """A row's key and what tells cells of one recipe apart."""
    if "kind" in row:
        return f"{row['key']} ({row['kind']})"
    calibrated = f", {row.get('calibration_windows')} windows of {row['calibration']}" if row.get("calibration") else ""
    calibrated += f" in {row['calibration_compute']}" if row.get("calibration_compute") else ""
    return f"{row['key']} ({named_model(row)}, {row['corpus']}, seed {row.get('seed')}{calibrated})"


def _canonical(recipe: str) -> list[str]:
    try:
        return canonical([recipe])
    except QjaxError:  # no recipe at all
        return []


def _few(rows: Sequence[Row], column: str, most: int = 6) -> str:
    return _listed((str(row[column]) for row in rows if column in row), most)


def _listed(values: Iterable[str], most: int = 6) -> str:
    values = list(dict.fromkeys(values))
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")
