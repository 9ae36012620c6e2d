"""The table and the figure of layers' inputs show what their rows hold."""

import pytest

from qjax import QjaxError
from qjax.report.inputs import input_rows, inputs_table
from qjax.report.reports import captions, figures, tables

FOUND = [
    {"block": block, "layers": layers, "inputs": 64, "largest": 3.0 * block + 1, "kurtosis": 4.25, "outlier_channels": block,
     "times_median": 2.0}
    for block in (0, 1)
    for layers in ("attention/q,attention/k", "mlp/down")
]  # fmt: skip


def test_a_line_for_every_input():
    rows = input_rows("tiny", "abc", FOUND)
    assert len({row["key"] for row in rows}) == 4
    ((name, table),) = tables(rows)
    assert name == "inputs" and table.cells()[2] == ["tiny", "1", "attention/q,attention/k", "64", "4.00", "2.00", "4.25", "1"]
    with pytest.raises(QjaxError, match="'inputs' lacks kurtosis"):
        inputs_table([{**rows[0], "kurtosis": 1} for _ in range(1)] + [{k: v for k, v in rows[1].items() if k != "kurtosis"}])


def test_a_panel_for_every_model_of_several_blocks():
    rows = input_rows("tiny", "abc", FOUND) + input_rows("tiny-outliers", "def", FOUND)
    ((name, figure),) = figures(rows)
    axes = [each for each in figure.axes if each.has_data()]
    assert name == "inputs" and [each.get_title(loc="left") for each in axes] == ["tiny", "tiny-outliers"]
    assert next(line.get_ydata().tolist() for line in axes[0].lines if len(line.get_xdata()) == 2) == [1.0, 4.0]
    assert axes[0].get_xlim()[0] < 0 and axes[0].get_xscale() == "linear"  # block 0 is on it
    assert "tiny, tiny-outliers" in dict(captions(rows))["inputs"]
    assert not list(figures(rows[:2]))  # one block is no line
