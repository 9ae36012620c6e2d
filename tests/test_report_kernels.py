"""The table and the figure of kernels show what their rows hold."""

import pytest

from qjax import QjaxError
from qjax.report.kernels import kernels_table
from qjax.report.reports import figures, tables


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


def test_a_table_for_every_device():
    fast = row("xla", 1, 5e-4, device="gpu: H100", dtype="bfloat16", copy_bytes_per_second=3e12)
    later = row("xla", 16, 1e-3, copy_bytes_per_second=3e10)
    found = dict(tables([row("xla", 1, 1e-3), fast, later]))
    assert list(found) == ["kernels-cpu", "kernels-gpu-H100"]
    assert [table.cells()[0][3] for table in found.values()] == ["1.00", "0.500"]
    assert [table.notes[0][:51] for table in found.values()] == [
        "Type of x: float32. A copy moves 20 to 30 GB/s, rea",
        "Type of x: bfloat16. A copy moves 3000 GB/s, read a",
    ]
    assert [name for name, _ in tables([fast])] == ["kernels"]


def joined(axes):
    """The lines themselves, without markers, bars and the dashed one."""
    return [line for line in axes.get_lines() if line.get_marker() == "None" and line.get_linestyle() == "-"]


def test_figure():
    """Times over the dense product's, by M, in a panel for each weight; none of the reference, none of one M."""
    rows = [row(name, size, 1e-3 * size) for name in ("xla", "reference", "bitsandbytes", "dense") for size in (1, 8)]
    wide = [{**each, "outputs": 128, "speedup": 1.0} for each in rows]
    ((name, figure),) = figures([*rows, *wide])
    assert name == "kernels" and [axes.get_title(loc="left") for axes in figure.axes] == ["64 x 32", "64 x 128"]
    assert [line for line in figure.axes[0].get_lines() if set(line.get_ydata()) == {1.0}]  # the dense product
    assert [list(line.get_ydata()) for line in joined(figure.axes[0])] == [[0.25, 2.0]] * 2
    named = [text.get_text() for axes in figure.axes for text in axes.texts] + [
        text.get_text() for legend in figure.legends for text in legend.get_texts()
    ]
    assert named == ["int4-g32", "int4-g32, bitsandbytes"]
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines() if line.get_marker() in "os"}) == 1
    assert not list(figures(rows[::2])) and not list(figures([each for each in rows if each["implementation"] == "dense"]))


def test_ticks_are_apart():
    ((_, figure),) = figures([row("xla", size, 1e-3) for size in (1, 8, 16, 32, 512)])
    assert list(figure.axes[0].get_xticks()) == [1, 8, 32, 512]


def test_figure_of_rows_of_several_runs():
    """A weight that lacks a line, a case that was measured again, and a library whose format is not ours."""
    rows = [row(name, size, 1e-3, format=fmt) for name, fmt in (("xla", "int4-g32"), ("marlin", "m4")) for size in (1, 8)]
    again = row("xla", 8, 8e-3)
    ((_, figure),) = figures([*rows, row("xla", 1, 1e-3, outputs=128), again])
    assert [list(line.get_ydata()) for line in joined(figure.axes[0])] == [[0.25, 2.0], [0.25, 0.25]]
    assert [list(line.get_xdata()) for line in joined(figure.axes[1])] == [[1]]
    assert not list(figures([{"key": "k", "kind": "kernels"}]))


def test_a_row_that_lacks_a_column_is_named():
    for changed in ({"key": "k", "kind": "kernels", "device": "cpu"}, {"key": "k", "kind": "memory", "model": "m"}):
        with pytest.raises(QjaxError, match=r"row k of the kind .* lacks (inputs|shapes), "):
            tables([changed])


def test_one_device():
    with pytest.raises(QjaxError, match="one device, got rows of 2: cpu, H100"):
        kernels_table([row("xla", 1, 1e-3), row("xla", 1, 1e-3, device="H100")])
