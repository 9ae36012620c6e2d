"""A row's cell measured again, and two folders compared: what a person sees, and every mistake one line and exit code 2."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax.checkpoints import load as load_module
from qjax.checkpoints.huggingface import save_huggingface
from qjax.cli import app as cli
from qjax.errors import QjaxError
from qjax.evaluate.corpora import load_corpus
from qjax.evaluate.tasks import load_task
from qjax.report.comparison import comparison_tables, match_rows
from qjax.report.rerun_table import rerun_table, unequal
from qjax.sweep.cells import canonical
from qjax.sweep.request import find_row, request_of
from qjax.sweep.rows import recipe_without_rules, restated
from qjax.sweep.store import ROWS, append_row, append_rows, read_rows

from .conftest import byte_tokenizer, random_model, tiny_config
from .paths import REPOSITORY
from .report_rows import measured_row
from .test_cli import TEXT, fails

COMMITTED = sorted(REPOSITORY.glob(f"results/*/{ROWS}"))


def invoke(capsys, *arguments) -> tuple[int, str]:
    """Exit code and stdout, white space squeezed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, " ".join(captured.out.split())


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model, texts, questions, and a folder of rows with everything a row may hold."""
    folder = tmp_path_factory.mktemp("work")
    save_huggingface(folder / "tiny", random_model(tiny_config(), byte_tokenizer()))
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text("The quick brown fox jumps over the lazy dog, and back again. " * 20)
    questions = [{"query": f"What is {i}?", "choices": ["a", "the number"], "gold": i % 2} for i in range(6)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    model = qjax.load(folder / "tiny")
    sweep = qjax.Sweep(
        ("gptq:int3-g16@parallel",),
        (load_corpus(f"text:{folder / 'text.txt'}"),),
        qjax.parse_convention("windows-32"),
        max_windows=6,
        rules=("mlp=none",),
        seed=3,
        tasks=(load_task(f"piqa:{folder / 'q.jsonl'}", 4),),
        divergence=True,
        calibration=qjax.load_calibration(model, f"text:{folder / 'other.txt'}", windows=4, seed=3),
    )
    qjax.run_sweep(model, sweep, folder / "results")
    return folder


def places(work: Path) -> list[object]:
    """Where the model and texts of the rows are."""
    return [
        *("--model", work / "tiny", "--data", f"text:{work / 'text.txt'}"),
        *("--calibration", f"text:{work / 'other.txt'}", "--tasks", f"piqa:{work / 'q.jsonl'}"),
    ]


def test_rerun_gives_the_same_row(work, capsys):
    before = sorted(path.name for path in (work / "results").iterdir())
    row = read_rows(work / "results" / ROWS)[1]
    code, printed = invoke(capsys, "rerun", work / "results", "--row", row["key"][:6], *places(work))
    assert code == 0
    assert "All columns that should be equal are equal." in printed
    assert f"key {row['key']}" in printed
    for column in ("nll_delta", "kl", "accuracy:piqa"):
        assert f"{column} {row[column]} the same yes" in printed
    assert sorted(path.name for path in (work / "results").iterdir()) == before


def test_rerun_calibrates_in_the_row_s_type(work, tmp_path, capsys):
    model, text = qjax.load(work / "tiny"), load_corpus(f"text:{work / 'text.txt'}")
    tokens = qjax.load_calibration(model, f"text:{work / 'other.txt'}", windows=4, compute="bfloat16")
    given = {"max_windows": 2, "calibration": tokens}
    sweep = qjax.Sweep(("gptq:int3-g16@parallel",), (text,), qjax.parse_convention("windows-32"), **given)
    _, row = qjax.run_sweep(model, sweep, tmp_path)
    code, printed = invoke(capsys, "rerun", tmp_path, "--row", row["key"], *places(work))
    assert code == 0 and f"key {row['key']}" in printed
    append_row(tmp_path / ROWS, row | {"key": "float32", "calibration_compute": None})
    code, printed = invoke(capsys, "rerun", tmp_path, "--row", "float32", *places(work))
    assert code == 1 and "Different: " in printed


def test_a_row_that_is_not_what_is_measured_is_exit_code_1(work, tmp_path, capsys):
    row = read_rows(work / "results" / ROWS)[0]
    changed = row | {"nll": row["nll"] + 1e-12, "versions": "qjax 0.0.1", "seconds_evaluate": 77.0}
    append_row(tmp_path / ROWS, changed)
    code, printed = invoke(capsys, "rerun", tmp_path, "--row", "none", *places(work))
    assert code == 1
    assert "Different: nll." in printed and "versions: qjax 0.0.1 -> " in printed


def test_mistakes_are_one_line(work, tmp_path, capsys, monkeypatch):
    rows = read_rows(work / "results" / ROWS)
    results = work / "results"
    key = rows[1]["key"]
    assert "no such folder" in fails(capsys, "rerun", work / "missing", "--row", key)
    assert "no row 'zzz'" in fails(capsys, "rerun", results, "--row", "zzz")
    assert "2 rows of" in fails(capsys, "rerun", results, "--row", "")
    assert "no row 'rtn:int4-g128'" in fails(capsys, "rerun", results, "--row", "rtn:int4-g128")
    monkeypatch.setattr(load_module, "download", None)  # the hub is not asked
    assert "the row's model 'tiny' is no folder here; say with --model" in fails(capsys, "rerun", results, "--row", key)
    shutil.copytree(work / "tiny", tmp_path / "changed")
    weights = load_file(tmp_path / "changed" / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] + 0.01}, tmp_path / "changed" / "model.safetensors")
    moved = ["--model", tmp_path / "changed", *places(work)[2:]]
    assert "not what the row was measured with" in fails(capsys, "rerun", results, "--row", key, *moved)
    other = [*places(work)[:2], "--data", f"text:{work / 'other.txt'}", *places(work)[4:]]
    assert "other.txt', named for the row's 'text:text.txt'," in fails(capsys, "rerun", results, "--row", key, *other)
    assert "say with --data where it is" in fails(capsys, "rerun", results, "--row", key, *places(work)[:2])
    append_row(tmp_path / ROWS, {"key": "m", "kind": "memory"})
    assert "no cell of a sweep" in fails(capsys, "rerun", tmp_path, "--row", "m")
    assert "no such folder" in fails(capsys, "compare", results, work / "missing")
    assert "holds no rows of a sweep" in fails(capsys, "compare", results, tmp_path)
    assert "no row has the metric 'nil'" in fails(capsys, "compare", results, results, "--metric", "nil")


def test_compare_folders(work, tmp_path, capsys):
    rows = read_rows(work / "results" / ROWS)
    append_rows(tmp_path / ROWS, [rows[0], rows[1] | {"recipe": "rtn:int2-g16", "key": "only"}])
    code, printed = invoke(capsys, "compare", work / "results", tmp_path)
    assert code == 0
    assert "Rows that only one folder has" in printed and "rtn:int2-g16" in printed and "only" in printed
    shutil.copy(work / "results" / ROWS, tmp_path / ROWS)
    code, printed = invoke(capsys, "compare", work / "results", tmp_path, "--metric", "accuracy:piqa")
    assert "Rows that only one folder has" not in printed and "+" not in printed


def shifted(row: dict, step: float) -> dict:
    """The row with losses that are on average 0.01 nats a token higher, by windows of 10 tokens."""
    window_nll = [nll + 0.1 + step * sign for nll, sign in zip(row["window_nll"], (1, -1, 1, -1), strict=True)]
    nll = sum(window_nll) / 40
    return row | {"window_nll": window_nll, "nll": nll, "perplexity": math.exp(nll)}


def test_differences_are_paired_and_marked_beyond_two_errors():
    old = measured_row("rtn:int4-g128") | {"window_nll": [10.0, 30.0, 20.0, 40.0], "window_tokens": [10] * 4, "nll": 2.5}
    old["perplexity"] = math.exp(2.5)
    for step, error, mark in ((0.03, 0.03 / 10 / math.sqrt(3), " *"), (0.3, 0.3 / 10 / math.sqrt(3), "")):
        (table,) = comparison_tables([measured_row("none"), old], [shifted(old, step)], ("a", "b"), "nll")[:1]
        (row,) = table.rows
        assert (row["difference"], row["difference_stderr"]) == pytest.approx((0.01, error))
        assert table.cells()[0][-1].endswith(mark) and ("*" in table.cells()[0][-1]) == bool(mark)
        perplexity = comparison_tables([old], [shifted(old, step)], ("a", "b"))[0].rows[0]
        assert perplexity["difference_stderr"] == pytest.approx(error * math.exp(2.505), rel=1e-4)


def test_accuracies_are_paired_question_by_question():
    answers = {
        "gold:cloze": [0, 1, 2, 3] * 25,
        "answers:cloze": [0] * 100,
        "accuracy:cloze": 0.25,
        "accuracy_stderr:cloze": 0.043,
    }
    old = measured_row("rtn:int4-g128", **answers)
    better = [1 if i < 8 and i % 4 == 1 else 0 for i in range(100)]
    new = old | {"answers:cloze": better, "accuracy:cloze": 0.27}
    row = comparison_tables([old], [new], ("a", "b"), "accuracy:cloze")[0].rows[0]
    # Of 100 answers 2 became right and none wrong, half an answer is added to each of four outcomes; two unpaired have 0.06.
    assert row["difference_stderr"] == pytest.approx(math.sqrt((3 / 102 + 1 / 102 - (2 / 102) ** 2) / 102))


def test_rows_match_by_what_was_asked():
    rows = [measured_row("rtn:int4-g128", 0.1), measured_row("gptq:int4-g128", 0.1, seed=1, calibration_windows=8)]
    other = [
        rows[0] | {"key": "x", "code": "y", "versions": "z", "nll": 3.0},
        rows[1] | {"calibration_windows": 16},
        measured_row("rtn:int4-g128", fingerprint="another model"),
        {"key": "m", "kind": "memory"},
    ]
    pairs, gone, come = match_rows(rows, other)
    assert [(old["recipe"], new["key"]) for old, new in pairs] == [("rtn:int4-g128", "x")]
    assert gone == [rows[1]] and come == other[1:3]
    baseline = measured_row("none")
    assert match_rows([baseline], [baseline | {"seed": 5}])[0]  # no seed changes the unquantized model


def test_other_questions_change_what_is_of_questions_alone():
    old = measured_row("rtn:int4-g128", **{"tasks": "cloze(1201,ab)", "questions:cloze": 1201, "accuracy:cloze": 0.5})
    new = old | {"tasks": "cloze(400,cd)", "questions:cloze": 400}
    assert comparison_tables([old], [new], ("a", "b"))[0].cells()[0][-1] == "0"
    (table,) = comparison_tables([old], [new], ("a", "b"), "accuracy:cloze")
    assert "Rows that only" in table.title and "differ in tasks (cloze(1201,ab); cloze(400,cd))." in table.notes[0]
    (table,) = comparison_tables([old], [new | {"tasks": old["tasks"]}], ("a", "b"), "questions:cloze")
    assert table.cells() == [["rtn:int4-g128", "1201", "400", "-801"]]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_rows_hold_what_a_rerun_needs(path):
    for row in (row for row in read_rows(path) if "kind" not in row):
        asked = request_of(row)
        recipe, block = asked["recipe"], asked["block"]
        placed = [recipe] if block is None else ["none", f"^block_{block}/={recipe}"]
        assert "; ".join([*placed, *asked["rules"]]) == row["recipe"], row["key"]
        now = restated(row)  # and it stays what it is: earlier versions spelled some recipes otherwise
        assert canonical([recipe]) == [recipe_without_rules(now) if block is None else now["place_recipe"]], row["key"]
        assert restated(now) == now and (now == row or "refine=" in row["recipe"]), row["key"]
        assert " ".join(map(str, asked["tasks"])) == row.get("tasks", ""), row["key"]
        assert ("divergence" in asked["measures"]) == ("kl_p99" in row), row["key"]
        assert ("speed" in asked["measures"]) == ("decode_tokens_per_second:packed" in row), row["key"]


def test_rows_without_what_is_needed_say_what():
    row = measured_row("rtn:int4-g128")
    del row["corpus_fingerprint"]
    with pytest.raises(QjaxError, match="lacks corpus_fingerprint"):
        request_of(row)
    for tasks in ("garbage", "cloze(8,ab) garbage"):
        with pytest.raises(QjaxError, match=r"tasks are .*garbage.*NAME"):
            request_of(measured_row("rtn:int4-g128", tasks=tasks))
    given = measured_row("gptq:int4-g128", order="qep", calibration="given tokens", calibration_source="")
    with pytest.raises(QjaxError, match=r"calibration_windows.*not read from a text"):
        request_of(given)


def test_rows_are_found_by_key_and_by_recipe():
    rows = [measured_row("rtn:nf4-g64", key="ab1"), measured_row("none", key="ab"), measured_row("none", key="cd", corpus="c4")]
    rows[2] |= {"model": "packed", "model_recipe": "nf4"}
    assert find_row(rows, "ab", "f")["recipe"] == "none"  # a whole key, though another begins with it
    assert find_row(rows, "nf4", "f")["key"] == "ab1"
    with pytest.raises(QjaxError, match=r"2 .* 'none'.*: ab \(toy, python-docs, seed 0\), cd \(packed \(nf4\), c4, seed 0\)"):
        find_row(rows, "none", "f")
    again = [measured_row("none", 0.1 * i, key=f"k{i}", code=f"{i}", versions=f"{i}", max_windows=i) for i in range(3)]
    assert find_row(again, "none", "f")["key"] == "k2"  # the newest of one cell
    assert find_row(again, "k1", "f")["key"] == "k1"
    calibrated = [measured_row("gptq:int3-g128", key=f"{i}", calibration="c4", calibration_windows=i) for i in (8, 32)]
    with pytest.raises(QjaxError, match=r"8 \(toy, python-docs, seed 0, 8 windows of c4\), 32 \("):
        find_row(calibrated, "gptq:int3-g128", "f")


def test_what_must_be_equal():
    old = measured_row("rtn:int4-g128", **{"answers:cloze": [1, 2], "seconds_task:cloze": 3.0})
    assert unequal(old, old | {"tokens_per_second": 1.0, "seconds_task:cloze": 1.0, "since": 5}) == []
    assert unequal(old, old | {"answers:cloze": [1, 3]}) == ["answers:cloze"]
    new = {name: value for name, value in old.items() if name != "bits_per_weight"}
    assert unequal(old, new) == ["bits_per_weight"]
    cells = {line[0]: line[1:] for line in rerun_table(old, old | {"answers:cloze": [1, 3]}).cells()}
    assert cells["answers:cloze"] == ["2 values", "2 values, up to 1 off", "NO"]
