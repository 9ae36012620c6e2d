"""Names that come from outside break no report: each output shows them, and nothing of them is obeyed."""

import csv
import io

import pytest

from qjax.printable import printable
from qjax.report.rendering import Table, TableColumn, to_csv, to_latex, to_markdown, to_rich
from qjax.report.reports import report_names, tables, write_reports
from tests.report_rows import measured_row

NAMES = {
    "formula": "$^$",
    "half a formula": r"a\$b$",
    "lines": "one\ntwo\r\nthree",
    "codes": "\x1b[31mred\x1b]0;title\x07",
    "direction": "abc\u202egpj",
    "html": "<script>alert(1)</script>",
    "link": "[click](http://a.b)",
    "columns": "a|b\\|c",
    "markup": "[bold]x[/nothing]",
    "spreadsheet": "=1+cmd|' /C calc'!A0",
    "long": "very-" * 60,
    "empty": "",
}


def rows_of(name):
    made = (("none", 0), ("nf4", 0.1), ("rtn:int4-g128", 0.2))
    return [measured_row(recipe, delta, model=name, baseline=name, corpus=name) for recipe, delta in made]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["$^$", "".join(NAMES[name] for name in NAMES if name != "long")])
def test_every_report_is_written(name, tmp_path):
    """The first is what killed matplotlib, after all was measured."""
    paths = write_reports(tmp_path, rows_of(name))
    assert {path.suffix for path in paths} == {".md", ".tex", ".csv", ".png", ".pdf", ".txt"}
    assert all(path.parent == tmp_path and not path.name.startswith(("-", ".")) for path in paths)


def test_files_have_short_names():
    assert all(0 < len(name) < 250 for text in NAMES.values() for name in report_names([rows_of(text)]))


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_obeys_nothing(name):
    from rich.console import Console

    for _, table in tables(rows_of(NAMES[name])):
        console = Console(file=io.StringIO(), width=200)
        console.print(to_rich(table))
        assert all(letter == "\n" or letter.isprintable() for letter in console.file.getvalue())


def one_cell(name):
    return Table(
        f"Of {name}", (TableColumn("model", "model", text=True), TableColumn("n", "n")), ({"model": name, "n": -1.5},), (name,)
    )


def test_markdown():
    lines = {key: to_markdown(one_cell(name)).splitlines() for key, name in NAMES.items()}
    assert {len(each) for key, each in lines.items() if key != "empty"} == {7}
    assert {each[4].replace(r"\\", "").replace(r"\|", "").count("|") for each in lines.values()} == {3}
    assert lines["html"][0] == "**Of &lt;script>alert(1)&lt;/script>**" and "<" not in "".join(lines["html"])
    assert "](" not in "".join(lines["link"])
    assert lines["columns"][4] == r"| a\|b\\\|c | -1.5 |" and lines["lines"][4] == "| one two  three | -1.5 |"


def test_latex_is_one_row():
    for name in NAMES.values():
        assert to_latex(one_cell(name)).count("\n") == to_latex(one_cell("a")).count("\n")


def test_csv():
    for key, name in NAMES.items():
        header, (model, number) = csv.reader(io.StringIO(to_csv(one_cell(name))))
        assert header == ["model", "n"] and number == "-1.5"
        assert model == (f"'{name}" if key == "spreadsheet" else printable(name))


@pytest.mark.parametrize(
    ("value", "shown"),
    [("-1 to 1", "-1 to 1"), ("+0.1 (MMLU)", "+0.1 (MMLU)"), ("-", "-"), ("-1+cmd|' /C'!A0", "'-1+cmd|' /C'!A0")]
    + [(text, f"'{text}") for text in ("@SUM(1)", "+HYPERLINK(1)", "-A1", "=1")],
)
def test_formulas_in_csv(value, shown):
    assert next(csv.reader(to_csv(one_cell(value)).splitlines()[1:]))[0] == shown


def test_printable():
    assert printable("qjax Ωmega 模型 \N{GRINNING FACE}") == "qjax Ωmega 模型 \N{GRINNING FACE}"
    assert printable("a\tb\nc\x00\x1b\u200f\ud800") == "a b c����"
