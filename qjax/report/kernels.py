"""The table of kernels: how long a product with a packed weight takes, from rows of the kind "kernels".

One row of the table is a weight in one format by one implementation; its columns are the numbers of rows of x (M).

    of copy    bytes of weight, x and y a second, in percent of the bandwidth of a copy on the same device
    x dense    time of the dense product (float32 on CPU, bfloat16 elsewhere) over the time of this one, from turns of one run
"""

from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.numbers import fixed, number
from qjax.report.rendering import Column, Row, Table, digits

SUMMARISED = (1, 16)  # the M of which bandwidth and speed are shown


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
    copy = number(rows[0], "copy_bytes_per_second") / 1e9
    notes = (f"Type of x: {rows[0]['dtype']}. A copy moves {copy:.3g} GB/s, read and written together.",)
    return Table(f"Products of M rows with a packed weight, {devices[0]}", columns, tuple(lines.values()), notes)


def _places(count: int):
    return lambda row, key: fixed(number(row, key), count)
