"""Tables: golden text of a small sweep, what may not be mixed, what a terminal of some width shows."""

import csv
import io
import math
import subprocess
import sys

import pytest

from qjax.driver.layer import LayerRecord
from qjax.errors import QjaxError
from qjax.report.comparison import baseline_table
from qjax.report.lists import formats_table, recipes_table
from qjax.report.rendering import Table, TableColumn, latex_escape
from qjax.report.rerun_table import rerun_table
from qjax.report.tables import (
    layers_table,
    over_units,
    perplexity_table,
    split_tables,
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
)
from tests.report_rows import infinite_row, measured_row, sweep_rows

MARKDOWN = """\
**Perplexity of toy on python-docs (windows-512), 8 windows, 4,088 tokens**

| recipe                  | bits per weight | model bits per weight | size (MB) |   perplexity |     change (%) | weight error | quantize (s) | tokens per s |
| :---------------------- | --------------: | --------------------: | --------: | -----------: | -------------: | -----------: | -----------: | -----------: |
| none                    |          16.000 |                16.000 |      4.00 | 10.00 ± 0.25 |              - |            0 |         0.12 |         7300 |
| nf4-g64                 |           4.500 |                 7.375 |      1.12 | 10.01 ± 0.25 | ≈ +0.10 ± 0.20 |       0.0039 |         0.12 |         7300 |
| rtn(clip=mse):int4-g128 |           4.156 |                 7.117 |      1.04 | 10.20 ± 0.26 |   +2.02 ± 0.41 |       0.0039 |         0.12 |         7300 |
| rtn:int2-g128           |           2.141 |                 5.605 |      0.54 |   44.8 ± 1.1 |      +348 ± 22 |        0.062 |         0.12 |         7300 |

±: standard error over documents; of the change, of the difference from the unquantized model window by window. \
≈: the 95 % interval of the change holds zero, each change by itself. Measured on cpu: x86_64 x2.
"""  # noqa: E501

LATEX = r"""% \usepackage{booktabs}
\begin{table}
\centering
\small
\caption{Perplexity of toy on python-docs (windows-512), 8 windows, 4,088 tokens. $\pm$: standard error over documents; of the change, of the difference from the unquantized model window by window. $\approx$: the 95 \% interval of the change holds zero, each change by itself. Measured on cpu: x86\_64 x2.}
\begin{tabular}{lrrrrrrrr}
\toprule
recipe & bits per weight & model bits per weight & size (MB) & perplexity & change (\%) & weight error & quantize (s) & tokens per s \\
\midrule
none & 16.000 & 16.000 & 4.00 & 10.00 $\pm$ 0.25 & - & 0 & 0.12 & 7300 \\
nf4-g64 & 4.500 & 7.375 & 1.12 & 10.01 $\pm$ 0.25 & $\approx$ +0.10 $\pm$ 0.20 & 0.0039 & 0.12 & 7300 \\
rtn(clip=mse):int4-g128 & 4.156 & 7.117 & 1.04 & 10.20 $\pm$ 0.26 & +2.02 $\pm$ 0.41 & 0.0039 & 0.12 & 7300 \\
rtn:int2-g128 & 2.141 & 5.605 & 0.54 & 44.8 $\pm$ 1.1 & +348 $\pm$ 22 & 0.062 & 0.12 & 7300 \\
\bottomrule
\end{tabular}
\end{table}
"""  # noqa: E501

CSV = """\
recipe,bits_per_weight,model_bits_per_weight,size_bytes,perplexity,perplexity_stderr,perplexity_ratio,\
perplexity_ratio_stderr,weight_error,seconds_quantize,tokens_per_second
none,16.0,16.0,4000000,10.0,0.25,1.0,0.0,0.0,0.125,7300.4
"""


def shown(table: Table, width: int) -> list[str]:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width).print(to_rich(table))
    return text.getvalue().splitlines()


def test_markdown_is_golden():
    assert to_markdown(perplexity_table(sweep_rows())) == MARKDOWN


def test_latex_is_golden():
    assert to_latex(perplexity_table(sweep_rows())) == LATEX


def test_csv_keeps_every_digit():
    rows = sweep_rows()
    text = to_csv(perplexity_table(rows))
    assert text.startswith(CSV)
    for read in csv.DictReader(io.StringIO(text)):
        (row,) = [row for row in rows if row["recipe"] == read["recipe"]]
        assert all(float(read[key]) == row[key] for key in read if key != "recipe")


def test_order_of_rows_given_does_not_matter():
    rows = sweep_rows()
    assert to_markdown(perplexity_table(rows[::-1])) == to_markdown(perplexity_table(rows))


def test_infinite_and_missing_figures():
    rows = [
        measured_row("none", perplexity_stderr=math.nan),
        infinite_row(),
        measured_row("rtn:int3-g128", 0.1, math.nan, weight_error=None),
    ]
    lines = to_markdown(perplexity_table(rows)).splitlines()
    assert "| 10.00 |" in " ".join(lines[4].split())
    assert "11.05 ± 0.28 | +10.52 | -" in " ".join(lines[5].split())
    assert "∞ | ∞" in " ".join(lines[6].split())
    assert r"$\infty$" in to_latex(perplexity_table(rows))


def test_only_differences_beyond_noise_are_unmarked():
    rows = [measured_row("rtn:int4-g128", 0.019, 0.01), measured_row("rtn:int3-g128", 0.021, 0.01)]
    lines = to_markdown(perplexity_table(rows)).splitlines()
    assert "≈" in lines[4]
    assert "≈" not in lines[5]
    assert "≈" not in to_markdown(perplexity_table(rows[1:]))  # no mark, no explanation


def test_notes_say_what_errors_are_over():
    many, few = ({"window_nll": [1.0] * 6, "window_documents": documents} for documents in (range(6), [0, 0, 0, 1, 1, 2]))
    assert over_units([{}]) == "documents"
    assert over_units([many, {}]) == "6 documents (the largest has 17 % of the tokens)"
    assert over_units([few, {"draws": 3}]) == "blocks of windows of 3 documents and 3 draws of calibration data"
    uneven = {"window_nll": [1.0] * 6, "window_documents": [0, 1, 2, 3, 4, 4], "window_tokens": [1, 1, 1, 1, 2, 4]}
    assert over_units([uneven, {"draws": 2}, {"draws": 5}]).startswith(
        "5 documents (the largest has 60 % of the tokens) and 2 to 5"
    )
    one = over_units([many, {"order": "qep"}])
    assert (
        one == "6 documents (the largest has 17 % of the tokens) of one draw of calibration data"
    )  # what others change is not in ±
    assert over_units([many, {"order": "qep"}, {"order": "qep", "draws": 3}, {"order": None}]).endswith(
        " and 1 to 3 draws of calibration data"
    )
    assert "independent" in over_units([many, {"window_nll": [1.0]}])


def test_seed_is_a_column_where_it_differs():
    """Of rows without the losses of windows, which cannot be put together."""
    rows = [measured_row("gptq:int3-g128", 0.1, seed=seed) for seed in (0, 1)]
    assert "| seed |" in to_markdown(perplexity_table(rows))
    assert "seed" not in to_markdown(perplexity_table(rows[:1]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("convention", "sliding-512-256"),
        ("corpus_fingerprint", "other"),
        ("baseline", "toy2"),
        ("fingerprint", "f"),
        ("windows", 4),
    ],
)
def test_what_cannot_be_compared_is_not_mixed(key, value):
    rows = [*sweep_rows(), measured_row("rtn:int8-g128", **{key: value})]
    with pytest.raises(QjaxError, match=f"{key} .*{value}.*split_tables"):
        perplexity_table(rows)
    first, second = split_tables(rows)
    assert first == rows[:-1]
    assert second == rows[-1:]


@pytest.mark.parametrize(("name", "shown"), [("other", "model"), ("toy", "model's recipe")])
def test_models_of_one_baseline_are_told_apart(name, shown):
    own = measured_row("none")
    against = {"baseline": own["baseline"], "baseline_fingerprint": own["fingerprint"], "model_recipe": "nf4-g64"}
    other = measured_row("none", 0.1, nll_delta_low=0.08, nll_delta_high=0.12, model=name, fingerprint="f" * 16, **against)
    (rows,) = split_tables([other, own])
    table = perplexity_table(rows)
    assert table.headers()[1] == shown
    assert [row["fingerprint"] for row in table.rows] == [own["fingerprint"], "f" * 16]
    assert table.title.startswith("Perplexity of toy on") and "difference from the unquantized model" in table.notes[0]
    change = table.headers().index("change (%)")
    first, second = table.cells()
    assert first[change] == "-" and second[change].startswith("+10.5")
    seeded = [other, {**other, "seed": 1}, {**other, "baseline": "b", "baseline_fingerprint": "b"}]
    assert [len(group) for group in split_tables(seeded)] == [1, 1]  # no seed changes a model as it is


def test_no_rows():
    assert split_tables([]) == []
    with pytest.raises(QjaxError, match="needs rows"):
        perplexity_table([])


def test_the_last_measurement_of_a_cell_counts():
    old, new = measured_row("rtn:int4-g128", 0.2), measured_row("rtn:int4-g128", 0.1, code="beef", key="k2")
    other = measured_row("rtn:int4-g128", 0.3, calibration="c4")  # another cell: something else was measured
    assert split_tables([old, other, new]) == [[new, other]]


def test_no_seed_changes_the_unquantized_model():
    """Measured with two seeds it is one line, the last; quantized models are two."""
    recipes = ("none", "rtn:int4-g128")
    (table,) = split_tables([measured_row(recipe, seed=seed) for seed in (0, 1) for recipe in recipes])
    assert [(row["recipe"], row["seed"]) for row in table] == [("none", 1), ("rtn:int4-g128", 0), ("rtn:int4-g128", 1)]


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_terminal_table_fits_and_says_what_it_leaves_out(width):
    table = perplexity_table(sweep_rows())
    lines = shown(table, width)
    assert max(map(len, lines)) <= width
    assert ("Too narrow for: " in " ".join(" ".join(lines).split())) == (width < 110)
    if width >= 80:
        assert all(any(line.startswith(f"{row['recipe']} ") for line in lines) for row in table.rows)
        assert any("10.20 ± 0.26" in line and "+2.02 ± 0.41" in line for line in lines)
        assert "…" not in " ".join(lines)


def test_terminal_numbers_are_right_aligned():
    lines = [line for line in shown(perplexity_table(sweep_rows()), 140) if line.startswith(("none", "nf4", "rtn"))]
    assert len({len(line.rstrip()) for line in lines}) == 1


def test_markup_is_escaped():
    row = {"name": "a|b_c[red]", "value": -3.0e-5}
    table = Table(
        "50% & more", (TableColumn("name", "x_y", text=True), TableColumn("value", "v", lambda row, key: "-3.0e-5")), (row,)
    )
    assert r"| a\|b_c[red] | -3.0e-5 |" in to_markdown(table)
    assert r"a\textbar{}b\_c[red] & $-3.0\times10^{-5}$ \\" in to_latex(table)
    assert r"\caption{50\% \& more.}" in to_latex(table)
    assert "a|b_c[red]" in "\n".join(shown(table, 80))
    assert latex_escape("a\\b^~{}") == r"a\textbackslash{}b\textasciicircum{}\textasciitilde{}\{\}"


def test_formats_table():
    text = to_markdown(formats_table())
    assert "| int4-g128 " in text
    assert "4.156" in text
    assert r"max\|w\|/7.5" in text
    assert max(map(len, shown(formats_table(), 80))) <= 80


def test_recipes_table():
    text = to_markdown(recipes_table())
    assert "| rtn " in text
    assert "clip=none" in text


def test_layers_table():
    records = [
        LayerRecord("block_0/mlp/up/kernel", "rtn:int4-g128", 128, 256, 4.15625, 0.01, 0.0, seconds=0.5),
        LayerRecord("head/output/kernel", "none", 128, 512, 16.0),
    ]
    told = {row[0]: row[-2] for row in layers_table([records[0]._replace(tokens=4096), records[1]]).cells()}
    assert told == {"block_0/mlp/up": "4096", "head/output": "-"}
    lines = to_markdown(layers_table(records)).splitlines()
    assert "rtn:int4-g128" in lines[0]  # a recipe that all share is in the title
    squeezed = [" ".join(line.split()) for line in lines]
    assert squeezed[4] == "| block_0/mlp/up | 128 | 256 | 4.156 | 0.010 | 0 | 0.50 |"
    assert squeezed[5] == "| head/output | 128 | 512 | 16.000 | - | - | 0 |"


def test_importing_reports_is_light():
    code = "import sys, qjax.report.reports, qjax.report.memory; print({'jax', 'matplotlib', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_models_of_one_name_are_told_apart_by_their_recipe():
    """Two packed models of one name: in a table against a third, in titles, and of equal recipes."""
    rows = [
        measured_row("none", 0.1 * i, model="packed", model_recipe=recipe, fingerprint=f"f{i}", baseline="toy", key=f"k{i}")
        | {"baseline_fingerprint": "toy"}
        for i, recipe in enumerate(("nf4", "rtn:int3-g16"))
    ]
    assert perplexity_table(rows).headers()[:2] == ["recipe", "model's recipe"]
    assert [line[1] for line in perplexity_table(rows).cells()] == ["nf4", "rtn:int3-g16"]
    same = [{**row, "model_recipe": "nf4"} for row in rows]
    assert perplexity_table(same).headers()[:2] == ["recipe", "model's fingerprint"]
    alone = {**rows[1], "baseline": "packed", "baseline_fingerprint": "f1"}
    assert perplexity_table([alone]).title.startswith("Perplexity of packed (rtn:int3-g16) on python-docs")
    assert perplexity_table([rows[1]]).title.startswith("Perplexity of toy on python-docs")
    assert baseline_table(rows, rows[0]).title.startswith("Against none of packed (nf4), python-docs")
    assert rerun_table(rows[1], rows[1]).title.startswith("none of packed (rtn:int3-g16) measured again, python-docs")
