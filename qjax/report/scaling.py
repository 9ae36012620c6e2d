"""How cost grows, as a table and figures of rows of the kind "scaling": time and peak memory of every piece of work.

Along each axis (width, depth, vocabulary, tokens), of the rows that differ in it alone from most others: least squares of
log cost = a + p log size over the points, with the standard error of p (nan of two points).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.report.drawing import look
from qjax.report.panels import Line, Panel, panels_figure
from qjax.report.rendering import Row, Table, TableColumn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALING = "scaling"
AXES = {
    "width": ("width", 1),
    "depth": ("layers", 1),
    "vocabulary": ("vocabulary / 1024", 1024),
    "tokens": ("tokens / 1024", 1024),
}
COSTS = {"seconds": ("time (s)", 1), "peak_bytes": ("peak memory (GB)", 1e9)}
NEEDED = (*AXES, *COSTS, "parameters", "work", "device", "code", "versions")
LOOKS = {"load": "nf4", "perplexity": "awq+gptq"}  # drawn as a method that is not measured here


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(p, its standard error) of cost ~ size^p; nan of fewer than two sizes."""
    x, y = np.log(sizes), np.log(costs)
    if len(set(sizes)) < 2:
        return math.nan, math.nan
    x = x - x.mean()
    p = float(x @ y / (x @ x))
    rest = y - y.mean() - p * x
    return p, math.sqrt(float(rest @ rest) / (len(x) - 2) / float(x @ x)) if len(x) > 2 else math.nan


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the kind that are of the last code, versions and device; raises QjaxError for one without a needed column."""
    rows = [row for row in rows if row.get("kind") == SCALING]
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise QjaxError(f"row {row['key']} of the kind {SCALING!r} lacks {', '.join(missing)}; mend or remove it")
    return [row for row in rows if all(row[name] == rows[-1][name] for name in ("code", "versions", "device"))]


def _middle(rows: Sequence[Row]) -> dict[str, int]:
    return {axis: Counter(row[axis] for row in rows).most_common(1)[0][0] for axis in AXES}


def _along(rows: Sequence[Row], work: str, axis: str) -> list[Row]:
    """The rows of a piece of work that differ from the middle along the axis alone; none of one size."""
    middle = _middle(rows)
    found = [row for row in rows if row["work"] == work and all(row[a] == middle[a] for a in AXES if a != axis)]
    return sorted(found, key=lambda row: row[axis]) if len({row[axis] for row in found}) > 1 else []


def scaling_table(rows: Sequence[Row]) -> Table:
    """Exponents, of the rows that are `latest`."""
    rows = latest(rows)
    lines = []
    for work in dict.fromkeys(row["work"] for row in rows):
        for axis in AXES:
            along = _along(rows, work, axis)
            if not along:
                continue
            fits = {cost: exponent([row[axis] for row in along], [row[cost] for row in along]) for cost in COSTS}
            line = {"work": work, "axis": axis, "points": len(along), "from": along[0][axis], "to": along[-1][axis]}
            lines.append(line | {cost: _shown(*fit) for cost, fit in fits.items()})
    columns = (
        *(TableColumn(name, name, text=True) for name in ("work", "axis")),
        *(TableColumn(name, name) for name in ("from", "to", "points")),
        TableColumn("seconds", "exponent of time", text=True),
        TableColumn("peak_bytes", "of peak memory", text=True),
    )
    notes = (f"Cost grows as size^p along one axis, {_others(rows)}; peak memory is of the whole process.",)
    return Table("How cost grows", columns, tuple(lines), notes)


def has_scaling(rows: Sequence[Row]) -> bool:
    """Whether any piece of work was measured at several sizes."""
    rows = latest(rows)
    return any(_along(rows, row["work"], axis) for row in rows for axis in AXES)


def scaling_figure(cost: str, rows: Sequence[Row], width: str = "single") -> "Figure":
    """A panel for each axis, a line for each piece of work. cost: "seconds" | "peak_bytes"."""
    rows = latest(rows)
    name, unit = COSTS[cost]
    panels = []
    for axis, (shown, each) in AXES.items():
        lines = []
        for work in dict.fromkeys(row["work"] for row in rows):
            along = _along(rows, work, axis)
            if along:
                x, y = np.array([(row[axis] / each, row[cost] / unit) for row in along], float).T
                lines.append(Line(work, look(LOOKS.get(work, work)), x, np.repeat(y[:, None], 3, axis=1)))
        if lines:
            ticks = sorted({x for line in lines for x in line.x})
            panels.append(Panel(lines, shown, name, ticks=ticks))
    return panels_figure(panels, width, shared=True)


def scaling_caption(cost: str, rows: Sequence[Row]) -> str:
    """Of `scaling_figure`."""
    what = {
        "seconds": "Time of each piece of work, the second time it is done, so without compilation,",
        "peak_bytes": "Peak memory of a process that loads the model and does one piece of work,",
    }
    return f"{what[cost]} against one size, {_others(latest(rows))}.\n"


def _others(rows: Sequence[Row]) -> str:
    sizes = ", ".join(f"{axis} {size:,}" for axis, size in _middle(rows).items())
    return f"the others as in the middle ({sizes}); random Llamas, on {rows[-1]['device']}"


def _shown(p: float, error: float) -> str:
    p = round(p, 2) + 0.0  # no -0.00
    return f"{p:.2f}" if math.isnan(error) else f"{p:.2f} ± {error:.2f}"
