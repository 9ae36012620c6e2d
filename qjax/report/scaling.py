"""How cost grows, as a table of rows of the kind "scaling": exponents of time and peak memory, of every piece of work.

Along each axis (width, depth, vocabulary, tokens), of the rows that differ in it alone from most others: least squares of
log cost = a + p log size over the points, with the standard error of p (nan of two points).
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from qjax.errors import QjaxError
from qjax.report.rendering import Row, Table, TableColumn

SCALING = "scaling"
AXES = ("width", "depth", "vocabulary", "tokens")
NEEDED = (*AXES, "work", "device", "code", "versions", "seconds", "peak_bytes")


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(p, its standard error) of cost ~ size^p; nan of fewer than two sizes."""
    x, y = np.log(sizes), np.log(costs)
    if len(set(sizes)) < 2:
        return math.nan, math.nan
    x = x - x.mean()
    p = float(x @ y / (x @ x))
    rest = y - y.mean() - p * x
    return p, math.sqrt(float(rest @ rest) / (len(x) - 2) / float(x @ x)) if len(x) > 2 else math.nan


def scaling_table(rows: Sequence[Row]) -> Table:
    """Exponents of the last code and versions measured; raises QjaxError for a row of the kind without a needed column."""
    rows = [row for row in rows if row.get("kind") == SCALING]
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise QjaxError(f"row {row['key']} of the kind {SCALING!r} lacks {', '.join(missing)}; mend or remove it")
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in ("code", "versions", "device"))]
    middle = {axis: Counter(row[axis] for row in rows).most_common(1)[0][0] for axis in AXES}
    lines = []
    for work in dict.fromkeys(row["work"] for row in rows):
        for axis in AXES:
            along = [row for row in rows if row["work"] == work and all(row[a] == middle[a] for a in AXES if a != axis)]
            if len({row[axis] for row in along}) < 2:
                continue
            fits = {cost: exponent([row[axis] for row in along], [row[cost] for row in along]) for cost in NEEDED[-2:]}
            line = {"work": work, "axis": axis, "points": len(along), "from": min(row[axis] for row in along)}
            line["to"] = max(row[axis] for row in along)
            lines.append(line | {cost: _shown(*fit) for cost, fit in fits.items()})
    columns = (
        *(TableColumn(name, name, text=True) for name in ("work", "axis")),
        *(TableColumn(name, name) for name in ("from", "to", "points")),
        TableColumn("seconds", "exponent of time", text=True),
        TableColumn("peak_bytes", "of peak memory", text=True),
    )
    notes = (
        "Cost grows as size^p along one axis, the others as in the middle: "
        + ", ".join(f"{axis} {size}" for axis, size in middle.items())
        + f". Measured on {rows[-1]['device']}; peak memory is of the whole process.",
    )
    return Table("How cost grows", columns, tuple(lines), notes)


def _shown(p: float, error: float) -> str:
    p = round(p, 2) + 0.0  # no -0.00
    return f"{p:.2f}" if math.isnan(error) else f"{p:.2f} ± {error:.2f}"
