"""Any model as the baseline of a sweep, and models that are quantized already: differences, keys, tables, commands."""

import dataclasses

import pytest

import qjax
from qjax.checkpoints.huggingface import save_huggingface
from qjax.cli import app as cli
from qjax.errors import QjaxError
from qjax.evaluate.questions import make_task, multiple_choice
from qjax.report.comparison import baseline_table
from qjax.report.dots import dots_figure
from qjax.report.rendering import to_markdown
from qjax.report.reports import tables
from qjax.report.rerun_table import unequal
from qjax.sweep.rerun import rerun
from qjax.sweep.runner import run_sweep
from qjax.sweep.store import ROWS, read_rows
from tests.conftest import byte_tokenizer, random_model, tiny_config

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
WORDS = TEXT.split()
QUESTIONS = [multiple_choice(f"it {word}", [f"the {v}" for v in WORDS[i : i + 3]], i % 3) for i, word in enumerate(WORDS[:12])]
TASK = make_task("which", QUESTIONS)
EQUAL = (
    *("nll", "nll_delta", "nll_delta_stderr", "nll_delta_low", "perplexity_ratio", "kl", "top1_agreement", "rms_dp"),
    *("accuracy_delta:which", "flips:which", "size_bytes", "bits_per_weight", "model_bits_per_weight"),
)
RECIPE = "rtn:int3-g16"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folders `tiny` and `packed` (the same quantized), their models, and rows: of a sweep of tiny, of packed against it."""
    folder = tmp_path_factory.mktemp("baseline")
    save_huggingface(folder / "tiny", random_model(tiny_config(), byte_tokenizer()))
    (folder / "text.txt").write_text(TEXT)
    tiny = qjax.load(folder / "tiny")
    qjax.save(folder / "packed", qjax.quantize(tiny, RECIPE)[0]._replace(name="packed"))
    packed = qjax.load(folder / "packed")
    corpus = qjax.load_corpus(f"text:{folder / 'text.txt'}")
    sweep = qjax.Sweep((RECIPE,), (corpus,), qjax.parse_convention("windows-32"), 4, tasks=(TASK,), divergence=True)
    own = run_sweep(tiny, sweep, folder / "results")
    against = dataclasses.replace(sweep, recipes=("none",), baseline=tiny)
    return folder, tiny, packed, sweep, own, run_sweep(packed, against, folder / "results")


def test_differences_are_those_of_the_recipe(work):
    _, tiny, packed, _, own, other = work
    assert [(row["model"], row["recipe"], row["model_recipe"]) for row in other] == [
        (tiny.name, "none", "none"),
        (packed.name, "none", RECIPE),
    ]
    assert other[0] == own[0]  # the baseline's row is that of its own sweep
    for column in EQUAL:
        assert other[1][column] == own[1][column], column
    assert own[0]["weight_error"] == 0 < own[1]["weight_error"] and other[1]["weight_error"] is None  # its own is not known
    assert other[1]["kl"] > 0 and other[1]["nll_delta"] != 0
    assert (other[1]["baseline"], other[1]["baseline_fingerprint"]) == (tiny.name, own[0]["fingerprint"]) != packed.name


def test_a_quantized_model_alone_is_its_own_baseline(work, tmp_path):
    _, _, packed, sweep, _, other = work
    (row,) = run_sweep(packed, dataclasses.replace(sweep, recipes=("none",)), tmp_path)
    assert row["nll"] == other[1]["nll"] and row["nll_delta"] == 0 and row["baseline"] == packed.name
    assert row["key"] != other[1]["key"]  # the baseline is part of what was asked
    assert "difference from packed" in to_markdown(tables([row])[0][1]).replace("\n", " ")
    (same,) = run_sweep(packed, dataclasses.replace(sweep, recipes=("none",), baseline=packed), tmp_path)
    assert same == row


def test_models_of_one_baseline_share_a_table(work):
    folder, _, _, _, own, other = work
    rows = read_rows(folder / "results" / ROWS)
    assert rows == [*own, other[1]]
    found = dict(tables(rows))
    table = found["tiny-text-text.txt-windows-32"]
    assert [(row["model"], row["recipe"]) for row in table.rows] == [("tiny", "none"), ("packed", "none"), ("tiny", RECIPE)]
    assert {"model", "model's recipe"} <= set(table.headers()) and "difference from the unquantized model" in table.notes[0]
    change = table.headers().index("change (%)")
    assert [line[change] == "-" for line in table.cells()] == [True, False, False]
    assert [row["model"] for row in found["tiny-text-text.txt-windows-32-divergence"].rows] == ["packed", "tiny"]
    names = [text.get_text() for axes in dots_figure(rows).axes for text in axes.get_yticklabels()]
    assert names == ["rtn, tiny", f"none, packed, {RECIPE}"]


def test_recipes_of_a_quantized_model_are_refused(work, tmp_path):
    _, _, packed, sweep, _, _ = work
    with pytest.raises(QjaxError, match="quantized already"):
        run_sweep(packed, sweep, tmp_path)
    assert not (tmp_path / ROWS).exists()


def test_kernels_that_are_quantized_are_left_by_a_rule(work, tmp_path):
    """The rest of a model that is quantized in part."""
    _, tiny, _, sweep, _, _ = work
    part, _ = qjax.quantize(tiny, RECIPE, rules=["block_1=none"])
    part = part._replace(name="part")
    with pytest.raises(QjaxError, match=r"quantized already.*block_0/"):
        run_sweep(part, sweep, tmp_path)
    asked = dataclasses.replace(sweep, recipes=("rtn:int8-g16",), rules=("block_0=none",), baseline=tiny, tasks=())
    rows = run_sweep(part, asked, tmp_path)
    whole, report = qjax.quantize(tiny, RECIPE, rules=["block_1=rtn:int8-g16"])
    assert rows[2]["recipe"] == "rtn:int8-g16; block_0=none" and rows[2]["model_recipe"] == part.recipe
    assert rows[2]["nll"] == qjax.perplexity(whole, sweep.corpora[0], "windows-32", max_windows=4).nll
    assert rows[2]["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert rows[1]["bits_per_weight"] < rows[2]["bits_per_weight"]  # only what is quantized counts


@pytest.mark.parametrize("changes", [{"context": 16}, {"vocabulary_size": 300}])
def test_baselines_of_another_shape_are_refused(work, tmp_path, changes):
    _, tiny, packed, sweep, _, _ = work
    other = tiny._replace(config=dataclasses.replace(tiny.config, **changes), name="random")
    with pytest.raises(QjaxError, match=r"baseline random: expected the vocabulary, tokenizer and context of packed"):
        run_sweep(packed, dataclasses.replace(sweep, recipes=("none",), baseline=other), tmp_path)


def test_a_baseline_with_another_tokenizer_is_refused(work, tmp_path):
    _, tiny, packed, sweep, _, _ = work
    other = tiny._replace(params=packed.params, tokenizer=byte_tokenizer(bos=True))
    with pytest.raises(QjaxError, match="other tokens of the same text"):
        run_sweep(packed, dataclasses.replace(sweep, recipes=("none",), baseline=other), tmp_path)


def test_one_block_against_any_baseline_and_its_rerun(work, tmp_path):
    """Placement is a column, and rerun asks for the same block against the same baseline."""
    folder, tiny, packed, sweep, _, _ = work
    asked = dataclasses.replace(sweep, one_block=True, blocks=(1,), baseline=packed, tasks=(), divergence=False)
    rows = run_sweep(tiny, asked, tmp_path)
    assert [(row["model"], row["recipe"], row["block"]) for row in rows] == [
        ("packed", "none", None),
        ("tiny", "none", None),
        ("tiny", f"none; ^block_1/={RECIPE}", 1),
    ]
    placed = rows[2]
    assert (placed["place"], placed["place_recipe"], placed["rules"]) == ("block 1", RECIPE, [f"^block_1/={RECIPE}"])
    assert "place" not in rows[1] and placed["nll_delta"] == pytest.approx(placed["nll"] - rows[0]["nll"])
    places = {"model": str(folder / "tiny"), "data": f"text:{folder / 'text.txt'}"}
    again = rerun(placed, **places, baseline=str(folder / "packed"))
    assert unequal(placed, again) == [] and again["key"] == placed["key"]
    with pytest.raises(QjaxError, match=r"baseline .* is not what the row was measured with"):
        rerun(placed, **places, baseline=str(folder / "tiny"))


def test_any_row_is_the_baseline_of_a_comparison(work):
    _, _, _, _, own, other = work
    rows = [*own, other[1]]
    table = baseline_table(rows, own[1], "nll")
    assert [(row["model"], row["recipe"]) for row in table.rows] == [("tiny", "none"), ("packed", "none")]
    assert [row["difference"] for row in table.rows] == [own[0]["nll"] - own[1]["nll"], 0.0]
    assert table.rows[0]["difference_stderr"] == pytest.approx(own[1]["nll_delta_stderr"])
    with pytest.raises(QjaxError, match="no other row has the corpus_fingerprint"):
        baseline_table([own[0], own[1] | {"windows": 3}], own[0])


def test_commands(work, tmp_path, capsys):
    folder, _, _, _, own, other = work

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*map(str, arguments)])
        printed = capsys.readouterr()
        return stopped.value.code or 0, " ".join(printed.out.split()), " ".join(printed.err.split())

    options = ("--data", f"text:{folder / 'text.txt'}", "--convention", "windows-32", "--max-windows", 4, "--out", tmp_path)
    code, _, errors = run("sweep", folder / "packed", "--baseline", folder / "tiny", *options)
    assert code == 0, errors
    rows = read_rows(tmp_path / ROWS)
    assert [(row["model"], row["recipe"]) for row in rows] == [("tiny", "none"), ("packed", "none")]
    assert rows[1]["nll_delta"] == other[1]["nll_delta"]
    code, printed, _ = run("compare", folder / "results", "--baseline", RECIPE, "--metric", "kl")
    assert code == 0 and f"Against {RECIPE} of tiny" in printed
    code, printed, _ = run("compare", folder / "results", tmp_path, "--baseline", own[0]["key"][:8])
    assert code == 0 and "Against none of tiny," in printed
    assert run("compare", folder / "results")[0] == 2
    code, _, errors = run("sweep", folder / "packed", "--recipes", "nf4", *options)
    assert code == 2 and "quantized already" in errors
