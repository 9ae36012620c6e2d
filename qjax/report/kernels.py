"""How long a product with a packed weight takes, as a table and a figure of rows of the kind "kernels".

One row of the table is a weight in one format by one implementation; its columns are the numbers of rows of x (M). The figure
has a panel for each weight, and the time over the dense product's against M.

    of copy    bytes of weight, x and y a second, in percent of the bandwidth of a copy on the same device
    x dense    time of the dense product (float32 on CPU, bfloat16 elsewhere) over the time of this one, from turns of one run
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.report.drawing import GREY, METHOD_STYLES, Look, look, method_style
from qjax.report.panels import Line, Panel, panels_figure
from qjax.report.rendering import Row, Table, TableColumn, decimals, digits, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = ("xla", "pallas_tpu", "pallas_gpu")
APART = 3  # times: M that are named at the axis
SUMMARISED = (1, 16)  # the M of which bandwidth and speed are shown
NEEDED = (
    *("device", "inputs", "outputs", "rows", "format", "implementation", "dtype"),
    *("seconds", "speedup", "bandwidth_fraction", "copy_bytes_per_second"),
)


def by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of kernels of each device by its name as part of a file name, "" where there is one device alone.

    Raises QjaxError for a row without a column that the table needs.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("kind") == "kernels":
            missing = [name for name in NEEDED if name not in row]
            if missing:
                raise QjaxError(f"row {row['key']} of the kind 'kernels' lacks {', '.join(missing)}; mend or remove it")
            groups.setdefault(re.sub(r"[^A-Za-z0-9._]+", "-", str(row["device"])).strip("-"), []).append(row)
    return groups if len(groups) > 1 else {"": next(iter(groups.values()))}


def kernels_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of every implementation; raises QjaxError where there are no such rows, or some of several devices."""
    rows = [row for row in rows if row.get("kind") == "kernels"]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    if len(devices) != 1:
        raise QjaxError(f"a table of kernels is of one device, got rows of {len(devices)}: {', '.join(map(str, devices))}")
    lines: dict[tuple, dict[str, object]] = {}
    for row in rows:
        case = (row["inputs"], row["outputs"], row["format"], row["implementation"])
        line = lines.setdefault(case, {**row, "weight": f"{row['inputs']} x {row['outputs']}"})
        size = row["rows"]
        line[f"milliseconds_{size}"] = 1e3 * row["seconds"]
        line[f"of_copy_{size}"], line[f"speedup_{size}"] = 100 * row["bandwidth_fraction"], row["speedup"]
    sizes = sorted({row["rows"] for row in rows})
    shown = [size for size in SUMMARISED if size in sizes]
    columns = (
        TableColumn("weight", "weight", text=True),
        TableColumn("format", "format", text=True),
        TableColumn("implementation", "implementation", text=True),
        *(TableColumn(f"milliseconds_{size}", f"ms at\nM={size}", digits(3), rank=0 if size in shown else 1) for size in sizes),
        *(TableColumn(f"of_copy_{size}", f"of copy (%)\nM={size}", decimals(0)) for size in shown),
        *(TableColumn(f"speedup_{size}", f"x dense\nM={size}", decimals(2)) for size in shown),
    )
    copies = sorted({float(f"{number(row, 'copy_bytes_per_second') / 1e9:.3g}") for row in rows})
    copy = f"{copies[0]:g}" if len(copies) == 1 else f"{copies[0]:g} to {copies[-1]:g}"  # runs at other times
    types = " and ".join(sorted({str(row["dtype"]) for row in rows}))
    notes = (f"Type of x: {types}. A copy moves {copy} GB/s, read and written together.",)
    return Table(f"Products of M rows with a packed weight, {devices[0]}", columns, tuple(lines.values()), notes)


def has_kernels(rows: Sequence[Row]) -> bool:
    """Whether there are times of packed products, at several M."""
    return len({row.get("rows") for row in rows if row.get("kind") == "kernels" and row.get("implementation") in OURS}) > 1


def kernels_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """A panel for each weight: time over that of the dense product, of the same turns, by M; a line for each format and
    implementation but the reference, which decodes the whole weight and is in the table. Rows are of one device.

    What is not ours is grey.
    """
    rows = [row for row in rows if row.get("kind") == "kernels" and row["implementation"] not in ("dense", "reference")]
    last = {(row["inputs"], row["outputs"], *_line(row), row["rows"]): row for row in rows}  # measured of each case
    points: dict[tuple, dict[tuple, list[tuple[float, float]]]] = {}
    for row in sorted(last.values(), key=lambda row: row["rows"]):
        weight = points.setdefault((row["inputs"], row["outputs"]), {})
        weight.setdefault(_line(row), []).append((row["rows"], 1 / row["speedup"]))
    order = list(dict.fromkeys(map(_line, rows)))
    sizes = sorted({row["rows"] for row in rows})
    ticks = sizes[:1]
    for size in sizes:
        ticks += [size] * (size >= APART * ticks[-1])
    panels = []
    for inputs, outputs in dict.fromkeys((row["inputs"], row["outputs"]) for row in rows):
        there = [(line, np.array(points[inputs, outputs][line])) for line in order if line in points[inputs, outputs]]
        lines = [Line(_name(*line), _look(*line, order), xy[:, 0], np.repeat(xy[:, 1:], 3, axis=1)) for line, xy in there]
        panels.append(Panel(lines, "M, rows of x", "time / dense product's", f"{inputs} x {outputs}", across=1, ticks=ticks))
    return panels_figure(panels, width, shared=True)


def _line(row: Row) -> tuple[str, str]:
    return str(row["format"]), str(row["implementation"])


def _name(fmt: str, implementation: str) -> str:
    return fmt if implementation in OURS else f"{fmt}, {implementation}"


def _look(fmt: str, implementation: str, order: Sequence[tuple[str, str]]) -> Look:
    """Of ours a colour and a marker each, as those of the methods."""
    ours = [line for line in order if line[1] in OURS]
    if implementation not in OURS:
        return Look(GREY, method_style(implementation)[1], "white")
    return look(list(METHOD_STYLES)[ours.index((fmt, implementation)) % len(METHOD_STYLES)])
