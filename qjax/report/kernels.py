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
from qjax.formats import INTEGERS, parse_format
from qjax.report.drawing import (
    COLUMN_GAP,
    GREY,
    LINE_STYLES,
    POINT,
    Name,
    ink,
    lay_out,
    method_style,
    name_column,
    new_figure,
    scale_values,
    text_size,
    write_titles,
)
from qjax.report.rendering import Row, Table, TableColumn, decimals, digits, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = ("xla", "pallas_tpu", "pallas_gpu")
MOST_SIZES = 7  # M named at the axis
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

    Integers have one colour and a line style each, codebooks their own colours; what is not ours is grey.
    """
    rows = [row for row in rows if row.get("kind") == "kernels" and row["implementation"] not in ("dense", "reference")]
    last = {(row["inputs"], row["outputs"], *_line(row), row["rows"]): row for row in rows}  # measured of each case
    rows = list(last.values())
    weights = list(dict.fromkeys((row["inputs"], row["outputs"]) for row in rows))
    lines = list(dict.fromkeys(map(_line, rows)))
    sizes = sorted({row["rows"] for row in rows})
    names = {line: line[0] if line[1] in OURS else f"{line[0]}, {line[1]}" for line in lines}
    styles = _styles(lines)
    with new_figure(width, len(weights)) as (figure, grid):
        times = np.array([*(1 / row["speedup"] for row in rows), 1.0])
        scale_values(grid[0].yaxis, times, np.zeros(len(times)))
        write_titles(
            figure,
            f"products with packed weights, {rows[0]['device']}",
            x="M, rows of x",
            y="time over the dense product's",
            panels=[f"{inputs} x {outputs}" for inputs, outputs in weights],
        )
        lay_out(figure)
        longest = max(text_size(figure, name)[0] for name in names.values())
        for axes in grid:
            _scale_rows(axes, sizes, longest + COLUMN_GAP)
        for axes, weight in zip(grid, weights, strict=True):
            axes.plot([axes.get_xlim()[0], sizes[-1]], [1, 1], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
            here = [row for row in rows if (row["inputs"], row["outputs"]) == weight]
            there = [line for line in lines if line in map(_line, here)]
            ends = [_draw(axes, [row for row in here if _line(row) == line], styles[line]) for line in there]
            labels = [Name(names[line], end, ink(styles[line]["color"])) for line, end in zip(there, ends, strict=True)]
            name_column(axes, labels, side="right")
    return figure


def _line(row: Row) -> tuple[str, str]:
    return str(row["format"]), str(row["implementation"])


def _styles(lines: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, object]]:
    """How each line is drawn."""
    styles, integers = {}, 0
    for fmt, implementation in lines:
        if implementation not in OURS:
            styles[fmt, implementation] = {"color": GREY, "marker": method_style(implementation)[1], "linestyle": "-"}
            continue
        grid = parse_format(fmt).grid
        colour, marker = method_style("rtn" if grid in INTEGERS else grid)
        style = LINE_STYLES[integers % len(LINE_STYLES) if grid in INTEGERS else 0]
        styles[fmt, implementation] = {"color": colour, "marker": marker, "linestyle": style}
        integers += grid in INTEGERS
    return styles


def _scale_rows(axes: "Axes", sizes: Sequence[int], names: float) -> None:
    """A logarithmic axis of M, with room for names at the right, points."""
    from matplotlib.ticker import FixedLocator, NullLocator

    room = min(0.6, names * axes.figure.dpi / POINT / axes.bbox.width)
    low, high = sizes[0] / 1.3, sizes[-1] * 1.1
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high * (high / low) ** (room / (1 - room)))
    axes.xaxis.set(major_locator=FixedLocator(sizes, nbins=MOST_SIZES), minor_locator=NullLocator(), major_formatter="{x:g}")


def _draw(axes: "Axes", rows: Sequence[Row], style: dict[str, object]) -> tuple[float, float]:
    """Draws a line; its last point."""
    points = sorted((row["rows"], 1 / row["speedup"]) for row in rows)
    axes.plot(*zip(*points, strict=True), markersize=3, **style)
    return points[-1]
