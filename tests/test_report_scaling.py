"""Exponents of cost: a power law is found again, with the error of its scatter."""

import math

import pytest

from qjax.errors import QjaxError
from qjax.report.reports import captions, figures, tables
from qjax.report.scaling import exponent, scaling_table

MIDDLE = {"width": 512, "depth": 8, "vocabulary": 8192, "tokens": 4096}


def row(work: str, seconds: float, **sizes: int) -> dict[str, object]:
    made = {"key": f"{work} {sizes}", "kind": "scaling", "device": "cpu", "code": "a", "versions": "1", "peak_bytes": 10**9}
    return made | MIDDLE | sizes | {"work": work, "seconds": seconds, "parameters": 10**6}


def test_exponent():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx((2, 0))
    p, error = exponent([1, math.e, math.e**2], [1, math.e**2, math.e**2])
    assert p == pytest.approx(1) and error == pytest.approx(math.sqrt(2 / 3 / 2))  # residuals -1/3, 2/3, -1/3 of spread 2
    assert math.isnan(exponent([1, 2], [1, 4])[1]) and math.isnan(exponent([2, 2], [1, 4])[0])


def test_exponents_along_each_axis():
    rows = [row("gptq", (width / 512) ** 3, width=width) for width in (256, 512, 1024)]
    rows += [row("gptq", depth / 8, depth=depth) for depth in (4, 16)] + [row("rtn", 1.0)]
    ((name, table),) = tables(rows)
    assert name == "scaling"
    assert [(line["work"], line["axis"], line["points"], line["seconds"]) for line in table.rows] == [
        ("gptq", "width", 3, "3.00 ± 0.00"),
        ("gptq", "depth", 3, "1.00 ± 0.00"),
    ]
    assert {line["peak_bytes"] for line in table.rows} == {"0.00 ± 0.00"}


def test_a_panel_for_each_axis():
    rows = [row("gptq", width / 512, width=width) for width in (1024, 256, 512)]
    rows += [row("load", 1.0), row("load", 2.0, vocabulary=32768), {**row("load", 9.0, depth=2), "code": "earlier"}]
    rows.insert(0, rows.pop())
    drawn = dict(figures(rows))
    assert list(drawn) == ["scaling-time", "scaling-memory"]
    panels = [axes for axes in drawn["scaling-time"].axes if axes.has_data()]
    assert [axes.get_xlabel() for axes in panels] == ["width", "vocabulary / 1024"]
    lines = [[line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) > 1] for axes in panels]
    assert lines[0][0] == [[256, 0.5], [512, 1], [1024, 2]] and lines[1][0] == [[8, 1], [32, 2]]
    memory = drawn["scaling-memory"].axes[0]
    assert next(line.get_ydata().tolist() for line in memory.lines if len(line.get_xdata()) > 1) == [1.0] * 3
    assert "width 512, depth 8, vocabulary 8,192, tokens 4,096" in dict(captions(rows))["scaling-memory"]
    assert not list(figures(rows[-1:]))  # a point is no line


def test_a_row_that_lacks_a_column():
    broken = row("rtn", 1.0)
    del broken["depth"]
    with pytest.raises(QjaxError, match="lacks depth"):
        scaling_table([broken])
