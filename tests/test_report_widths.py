"""The table of methods by width on handmade rows."""

import pytest

from qjax.errors import QjaxError
from qjax.report.rendering import to_csv, to_markdown
from qjax.report.series import has_widths, widths_table
from tests.report_rows import measured_row

METHODS = ("rtn", "gptq(clip=mse)")
FORMATS = ("int3-g128", "int4-channel", "int4-g128", "int4-g32")


def sweep():
    rows = [measured_row(f"{method}:{fmt}", 0.01 * i) for i, method in enumerate(METHODS, 1) for fmt in FORMATS]
    return [measured_row("none"), *rows, measured_row("nf4-g64", 0.02)]


def test_a_line_a_format_and_a_column_a_method():
    table = widths_table(sweep())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in to_markdown(table).splitlines()[2:8]]
    assert lines[0] == ["format", "bits per weight", *METHODS]
    assert [line[0] for line in lines[2:]] == ["int4-g32", "int4-g128", "int4-channel", "int3-g128"]
    assert lines[2][2:] == ["≈ +1.0 ± 1.0", "+2.0 ± 1.0"]
    assert to_csv(table).startswith("format,bits_per_weight,ratio:rtn,ratio_stderr:rtn,")


def test_a_cell_that_was_not_measured_is_empty():
    rows = [row for row in sweep() if row["recipe"] != "gptq(clip=mse):int4-g32"]
    assert widths_table(rows).cells()[0][2:] == ["≈ +1.0 ± 1.0", "-"]


def test_shown_for_several_methods_widths_and_groupings_alone():
    rows = sweep()
    assert has_widths(rows)
    for left in ("int3", "rtn", "g"):  # no other width, method, grouping
        assert not has_widths([row for row in rows if left not in row["recipe"]])
    with pytest.raises(QjaxError, match="integer"):
        widths_table([measured_row("none"), measured_row("nf4-g64", 0.02)])
