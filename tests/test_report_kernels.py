"""The table of kernels shows what its rows hold."""

import pytest

from qjax import QjaxError
from qjax.report.kernels import kernels_table


def row(implementation: str, rows: int, seconds: float, **changes) -> dict[str, object]:
    """A measured product of which 10 MB were moved, where a copy moves 20 GB/s and the dense product takes 4 ms."""
    fraction = 1e7 / seconds / 2e10
    about = {"kind": "kernels", "device": "cpu", "inputs": 64, "outputs": 32, "format": "int4-g32", "dtype": "float32"}
    measured = {"seconds": seconds, "bandwidth_fraction": fraction, "speedup": 4e-3 / seconds, "copy_bytes_per_second": 2e10}
    return about | {"implementation": implementation, "rows": rows} | measured | changes


def test_table():
    rows = [row("xla", 1, 1e-3), row("xla", 512, 8e-3), row("reference", 1, 2e-3), {"kind": "memory"}]
    table = kernels_table(rows)
    headers = table.headers()
    assert headers[3:] == ["ms at M=1", "ms at M=512", "of copy (%) M=1", "x dense M=1"]
    assert table.cells() == [
        ["64 x 32", "int4-g32", "xla", "1.00", "8.00", "50", "4.00"],
        ["64 x 32", "int4-g32", "reference", "2.00", "-", "25", "2.00"],
    ]
    assert "cpu" in table.title and "20 GB/s" in table.notes[0]


def test_one_device():
    with pytest.raises(QjaxError, match="one device, got rows of 2: cpu, H100"):
        kernels_table([row("xla", 1, 1e-3), row("xla", 1, 1e-3, device="H100")])
