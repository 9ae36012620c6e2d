"""How fast we are against other libraries, as a table of rows of the kind "speed": a ratio of one round, their time over ours.

One line is a task of one model and one library: the median ratio over rounds, and the least and the largest. Of what was
measured more than once, the rounds of the last code and versions count.
"""

import statistics
from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.rendering import Row, Table, TableColumn, decimals

SPEED = "speed"
NEEDED = ("device", "code", "versions", "model", "task", "peer", "library", "round", "seconds", "peer_seconds", "ratio")


def speeds_table(rows: Sequence[Row]) -> Table:
    """Medians and extremes of ratios; raises QjaxError for a row of the kind without a column that is needed."""
    groups: dict[tuple, dict[int, Row]] = {}
    for row in (row for row in rows if row.get("kind") == SPEED):
        if missing := [name for name in NEEDED if name not in row]:
            raise QjaxError(f"row {row['key']} of the kind {SPEED!r} lacks {', '.join(missing)}; mend or remove it")
        held = groups.setdefault(tuple(row[name] for name in ("device", "model", "task", "peer")), {})
        if any((other["code"], other["versions"]) != (row["code"], row["versions"]) for other in held.values()):
            held.clear()
        held[row["round"]] = row
    columns = (
        TableColumn("model", "model", text=True),
        TableColumn("task", "task", text=True),
        TableColumn("peer", "against", text=True),
        TableColumn("ratio", "times as fast", decimals(2)),
        TableColumn("low", "least", decimals(2)),
        TableColumn("high", "largest", decimals(2)),
        TableColumn("rounds", "rounds"),
        TableColumn("seconds", "ours, s", decimals(3)),
        TableColumn("peer_seconds", "theirs, s", decimals(3)),
    )
    lines = tuple(_line(list(held.values())) for held in groups.values())
    libraries = sorted({part for held in groups.values() for row in held.values() for part in row["library"].split(", ")})
    devices = sorted({row["device"] for held in groups.values() for row in held.values()})
    notes = (
        "Times as fast: their time over ours in one round, the median over rounds; least and largest of the rounds beside it.",
        f"Against {', '.join(libraries)} on {' and '.join(devices)}.",
    )
    return Table("Speed against other libraries", columns, lines, notes)


def _line(rows: Sequence[Row]) -> dict[str, object]:
    ratios = [row["ratio"] for row in rows]
    middle = {name: statistics.median(row[name] for row in rows) for name in ("ratio", "seconds", "peer_seconds")}
    named = {name: rows[0][name] for name in ("model", "task", "peer")}
    return named | middle | {"low": min(ratios), "high": max(ratios), "rounds": len(rows)}
