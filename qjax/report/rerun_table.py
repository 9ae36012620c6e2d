"""A committed row and the same cell measured again, column by column."""

import json
from collections.abc import Sequence

import numpy as np

from qjax.report.rendering import Row, Table, TableColumn
from qjax.sweep.columns import VARYING, column_of, with_roles
from qjax.sweep.rows import named_model


def _circumstances() -> list[str]:
    """Where and by what a row was made, which another run may change though nothing is wrong."""
    return [name for name in with_roles("machine", "made") if name not in ("key", "time")]


def unequal(old: Row, new: Row) -> list[str]:
    """The columns of the old row that should be the same to the last bit and are not. Columns made since do not count."""
    return [name for name in old if _is_stable(name) and (name not in new or not _equal(old[name], new[name]))]


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
    return all(isinstance(value, (int, float)) for value in values)


def _change(old: str, new: str) -> str:
    """Of comma-separated lists the parts that differ."""
    before, after = (text.split(", ") for text in (old, new))
    gone, come = ([part for part in one if part not in other] for one, other in ((before, after), (after, before)))
    return f"{', '.join(gone) or 'nothing'} -> {', '.join(come) or 'nothing'}"
