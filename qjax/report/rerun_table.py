"""A committed row and the same cell measured again, column by column."""

import json
import math
from collections.abc import Sequence

import numpy as np

from qjax.report.rendering import Row, Table, TableColumn
from qjax.sweep.columns import VARYING, column_of, with_roles
from qjax.sweep.rows import named_model

# Between kinds of machines: gptq:int4 on x86-64 with and without AVX-512 differs by 5e-5 of its perplexity; its codes of a few
# weights, and so a window's loss, by more.
RELATIVE, ABSOLUTE = 1e-3, 1e-3


def _circumstances() -> list[str]:
    """Where and by what a row was made, which another run may change though nothing is wrong."""
    return [name for name in with_roles("machine", "made") if name not in ("key", "time")]


def unequal(old: Row, new: Row) -> list[str]:
    """The columns of the old row that should be the same and are not. Columns made since do not count.

    On the same kind of machine the same to the last bit, on another as near as figures of two kinds are (RELATIVE, ABSOLUTE).
    """
    same = _equal if old.get("device") == new.get("device") else _near
    return [name for name in old if _is_stable(name) and (name not in new or not same(old[name], new[name]))]


def _near(one: object, other: object) -> bool:
    """Of lists (losses of windows, answers) their means: single windows differ more, since codes do."""
    if type(one) is int and type(other) is int:
        return one == other
    if _is_number(one) and _is_number(other):
        return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(one, list) and isinstance(other, list) and one and len(one) == len(other) and _are_numbers([*one, *other]):
        return _near(float(np.mean(one)), float(np.mean(other)))
    return _equal(one, other)


def rerun_table(old: Row, new: Row) -> Table:
    """Every measured column, old and new; the notes name what differs and where circumstances do."""
    differing = set(unequal(old, new))
    told = {*with_roles("asked", "named", "told", "machine", "made")}  # fingerprints guarantee it: shown only where it differs
    names = [name for name in dict.fromkeys([*old, *new]) if name in differing or name not in told]
    rows = [
        {"column": name, "old": _text(old, name), "new": _text(new, name, old), "equal": _verdict(name, old, new, differing)}
        for name in names
    ]
    columns = (
        TableColumn("column", "column", text=True),
        TableColumn("old", "old"),
        TableColumn("new", "new"),
        TableColumn("equal", "equal?", text=True),
    )
    notes = [f"Different: {', '.join(sorted(differing))}." if differing else "All columns that should be equal are equal."]
    if old.get("device") != new.get("device"):
        notes.append(f"Another kind of machine: figures count as equal within {RELATIVE:.1%} or {ABSOLUTE:g}.")
    changed = [name for name in _circumstances() if old.get(name) != new.get(name)]
    notes += [f"{name}: {_change(str(old.get(name)), str(new.get(name)))}." for name in changed]
    title = f"{old['recipe']} of {named_model(old)} measured again, {old['corpus']} ({old['convention']}), key {old['key']}"
    return Table(title, columns, tuple(rows), tuple(notes))


def _is_stable(name: str) -> bool:
    return (column := column_of(name)) is None or column.role not in VARYING


def _equal(one: object, other: object) -> bool:
    return json.dumps(one) == json.dumps(other)


def _verdict(name: str, old: Row, new: Row, differing: set[str]) -> str:
    if name not in old:
        return "not in old"
    if name in differing:
        return "NO"
    return "yes" if _equal(old[name], new.get(name)) else "may differ"


def _text(row: Row, name: str, old: Row | None = None) -> str:
    """A value with every digit; of a list its length, and the largest difference from the old one."""
    value = row.get(name)
    if old and name in old and _equal(old[name], value):
        return "the same"
    if not isinstance(value, list):
        return "" if value is None else str(value)
    text = f"{len(value)} values"
    before = old.get(name) if old else None
    if isinstance(before, list) and len(before) == len(value) and before != value and _are_numbers([*value, *before]):
        text += f", up to {float(np.abs(np.subtract(value, before)).max()):.2g} off"
    return text


def _are_numbers(values: Sequence[object]) -> bool:
    return all(map(_is_number, values))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _change(old: str, new: str) -> str:
    """Of comma-separated lists the parts that differ."""
    before, after = (text.split(", ") for text in (old, new))
    gone, come = ([part for part in one if part not in other] for one, other in ((before, after), (after, before)))
    return f"{', '.join(gone) or 'nothing'} -> {', '.join(come) or 'nothing'}"
