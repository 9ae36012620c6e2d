"""A folder's tables and figures: each where the rows fill it; rows of other kinds; sensitivity; calibration that differs."""

import pytest

from qjax.errors import QjaxError
from qjax.report.comparison import comparison_tables
from qjax.report.memory import memory_row, memory_table
from qjax.report.rendering import to_markdown
from qjax.report.reports import FIGURES, FOLDER_TABLES, TABLES, figures, tables, write_reports
from qjax.report.seeds import seeds_table
from qjax.report.sensitivity import sensitivity_table
from qjax.report.tables import perplexity_table, split_tables
from qjax.sweep.store import ROWS, append_rows, read_rows
from tests.report_rows import alone_row, calibrated_rows, measured_row, sweep_rows

STEM = "toy-python-docs-windows-512"


def names(rows) -> list[str]:
    return [name for name, _ in tables(rows)]


def test_rows_of_other_kinds_stand_beside_cells(tmp_path):
    shapes, others = [(256, 512), (256, 512), (512, 256)], [(1000, 2)]
    append_rows(tmp_path / ROWS, [memory_row("big", shapes, others), *sweep_rows()])
    rows = read_rows(tmp_path / ROWS)
    assert names(rows) == [STEM, "memory"]
    assert to_markdown(tables(rows)[1][1]) == to_markdown(memory_table(shapes, others, title="big"))
    assert split_tables(rows) == [sweep_rows()]
    assert names(rows[:1]) == ["memory"]  # a folder without cells
    assert {path.name for path in write_reports(tmp_path, rows[:1])} == {"memory.md", "memory.tex", "memory.csv"}
    with pytest.raises(QjaxError, match="rows of 2"):
        tables([rows[0], memory_row("other", shapes)])
    with pytest.raises(QjaxError, match="needs rows"):
        tables([])


def test_a_row_of_another_kind_needs_a_key(tmp_path):
    append_rows(tmp_path / ROWS, [{"kind": "memory"}])
    with pytest.raises(QjaxError, match=r"line 1 .*key"):
        read_rows(tmp_path / ROWS)


def test_suffixes_are_unique():
    for exhibits in (TABLES, FIGURES, FOLDER_TABLES):
        assert len({exhibit.suffix for exhibit in exhibits}) == len(exhibits)


def test_places_quantized_alone():
    rows = [
        measured_row("none"),
        alone_row(r"^block_0/", 0.01),
        alone_row(r"mlp/down", 0.05),
        alone_row("^block_1/", 0.001, 0.002),
    ]
    assert [row.get("place") for row in rows] == [None, "block 0", "mlp/down", "block 1"]
    assert rows[1]["place_recipe"] == "gptq(clip=mse):int3-g128" and rows[1]["block"] == 0 and rows[2]["block"] is None
    assert names(rows) == [f"{STEM}-sensitivity"]
    lines = [line.split(" | ")[1:] for line in to_markdown(sensitivity_table(rows)).splitlines()[4:7]]
    assert [line[0].strip() for line in lines] == ["mlp/down", "block 0", "block 1"]  # the costliest first
    assert "≈" in lines[2][2] and "≈" not in lines[1][2]
    whole = measured_row("gptq(clip=mse):int3-g128", 0.1)
    assert names([*rows, whole]) == [STEM, f"{STEM}-sensitivity"]
    assert [row["place"] for row in sensitivity_table([*rows, whole]).rows] == ["whole model", "mlp/down", "block 0", "block 1"]
    assert len(sensitivity_table([*rows, measured_row("rtn:int4-g128", 0.1)]).rows) == 3
    with pytest.raises(QjaxError, match="qjax sensitivity"):
        sensitivity_table(sweep_rows())


def test_devices_stand_in_tables_of_their_own_and_a_limit_that_changed_nothing_does_not():
    rows = [measured_row("none"), measured_row("rtn:int4-g128", 0.1)]
    other = [row | {"device": "gpu: H100"} for row in rows]
    assert names([*rows, *other]) == [f"{STEM}-cpu-x86_64-x2", f"{STEM}-gpu-H100"]
    assert [len(table.rows) for _, table in tables([*rows, *other])] == [2, 2]
    (table,) = [table for _, table in tables([*rows, *(row | {"max_windows": 8} for row in rows)])]
    assert len(table.rows) == 2


def test_rows_that_fill_nothing_and_figures_that_are_none_are_named():
    with pytest.raises(QjaxError, match="no table or figure shows rows of the kind other"):
        tables([{"kind": "other", "key": "k"}])
    with pytest.raises(QjaxError, match="nll_delta_low is 'abc', expected a number"):
        tables([measured_row("none"), measured_row("rtn:int4-g128", nll_delta_low="abc")])


def test_the_default_order_is_named_beside_others():
    orders = {
        f"gptq:int3-g128{at}": order for at, order in (("", "qep"), ("@block", "block"), ("@qep(alpha=0.5)", "qep(alpha=0.5)"))
    }
    rows = [
        measured_row("none"),
        *(measured_row(recipe, 0.1 + 0.01 * i, order=orders[recipe]) for i, recipe in enumerate(orders)),
    ]
    lines = {line[0] for line in dict(tables([*rows, measured_row("awq:int3-g128", 0.2, order="qep")]))[STEM].cells()}
    gptq = {f"gptq:int3-g128@{order}" for order in orders.values()}
    assert lines == {"none", "awq:int3-g128", *gptq}  # what has one order alone keeps its name
    assert dict(tables(rows[:2]))[STEM].cells()[1][0] == "gptq:int3-g128"
    again = [row | {"seed": 1, "window_nll": [1.0]} for row in rows[1:]]  # draws are one line
    first = [row | {"window_nll": [0.0], "window_tokens": [1]} for row in rows]
    assert sorted(line[0] for line in dict(tables([*first, *again]))[STEM].cells()) == sorted(["none", *gptq])


@pytest.mark.parametrize(("errors", "noise"), [(12.6, True), (12.8, False)])  # t of one degree of freedom: 12.706
def test_two_seeds_are_within_noise_by_students_t(errors, noise):
    rows = [measured_row("none", window_nll=[600.0] * 8, window_tokens=[100] * 8)]
    for seed, change in enumerate((1e-5 * (errors - 1), 1e-5 * (errors + 1))):  # their mean has an error of 1e-5
        losses = {"window_nll": [600.0 + 100 * change] * 8, "window_tokens": [100] * 8}
        rows.append(measured_row("gptq:int3-g128", change, seed=seed, **losses))
    for table in (seeds_table(rows), perplexity_table(rows)):
        assert any("≈" in cell for cell in table.cells()[-1]) == noise


def test_a_seed_that_diverged_leaves_every_table_and_figure():
    rows = [row for row in calibrated_rows() if row.get("calibration", "c4") == "c4"]
    bad = rows[-1]
    infinite = dict.fromkeys(("perplexity", "nll", "nll_delta", "nll_delta_low", "nll_delta_high", "perplexity_ratio"), "inf")
    unknown = dict.fromkeys(("perplexity_stderr", "nll_delta_stderr", "perplexity_ratio_stderr"))
    rows[-1] = bad | infinite | unknown | {"window_nll": ["inf", None, *bad["window_nll"][2:]]}
    assert names(rows) == [STEM, f"{STEM}-seeds"]
    cells = dict(tables(rows))[f"{STEM}-seeds"].cells()
    assert [" ∞" in f" {' '.join(line)}" for line in cells] == [False, True]  # 8 windows; 32, of which one seed diverged
    assert [name for name, _ in figures(rows)] == [f"{STEM}-recipes"]
    worse, better = (comparison_tables(*pair, ("a", "b"))[0] for pair in ((rows[-2:], rows[-2:]), ([bad], rows[-1:])))
    assert [line[-1] for line in worse.cells()] == ["-"] and better.cells()[0][-2:] == ["∞", "-"]


def test_calibration_is_a_column_where_it_tells_rows_apart():
    rows = calibrated_rows()
    headers = perplexity_table(rows).headers()
    assert "calibration text" in headers and "calibration windows" in headers and "tokens a window" not in headers
    assert names(rows) == [STEM, f"{STEM}-seeds"]
    assert [len(table.rows) for _, table in tables(rows)] == [5, 4]  # 2 texts x 2 numbers of windows, each of 2 seeds
    same = [row for row in rows if row.get("calibration") in (None, "c4") and row.get("calibration_windows") in (None, 8)]
    assert not any("calibration" in header for header in perplexity_table(same).headers())
