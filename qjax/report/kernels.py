"""The table of kernels: how long a product with a packed weight takes, from rows of the kind "kernels".

One row of the table is a weight in one format by one implementation; its columns are the numbers of rows of x (M).

    of copy    bytes of weight, x and y a second, in percent of the bandwidth of a copy on the same device
    x dense    time of the dense product (float32 on CPU, bfloat16 elsewhere) over the time of this one, from turns of one run
"""

import re
from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.numbers import fixed, number
from qjax.report.rendering import Column, Row, Table, digits

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
        Column("weight", "weight", text=True),
        Column("format", "format", text=True),
        Column("implementation", "implementation", text=True),
        *(Column(f"milliseconds_{size}", f"ms at\nM={size}", digits(3), rank=0 if size in shown else 1) for size in sizes),
        *(Column(f"of_copy_{size}", f"of copy (%)\nM={size}", _places(0)) for size in shown),
        *(Column(f"speedup_{size}", f"x dense\nM={size}", _places(2)) for size in shown),
    )
    copies = sorted({float(f"{number(row, 'copy_bytes_per_second') / 1e9:.3g}") for row in rows})
    copy = f"{copies[0]:g}" if len(copies) == 1 else f"{copies[0]:g} to {copies[-1]:g}"  # runs at other times
    types = " and ".join(sorted({str(row["dtype"]) for row in rows}))
    notes = (f"Type of x: {types}. A copy moves {copy} GB/s, read and written together.",)
    return Table(f"Products of M rows with a packed weight, {devices[0]}", columns, tuple(lines.values()), notes)


def _places(count: int):
    return lambda row, key: fixed(number(row, key), count)
