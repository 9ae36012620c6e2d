"""Sweeps with tasks, divergence and speed: columns, differences from the baseline, tables and figures from rows alone."""

import importlib.util
import json
import math

import numpy as np
import pytest

from qjax.cli.app import main
from qjax.driver.layer import LayerRecord
from qjax.evaluate.choices import accuracy
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.divergence import divergence
from qjax.evaluate.questions import last_word, make_task, multiple_choice
from qjax.evaluate.statistics import accuracy_difference
from qjax.evaluate.windows import parse_convention
from qjax.report.reports import write_reports
from qjax.sweep.runner import Sweep, run_sweep
from qjax.sweep.store import ROWS, read_rows
from tests.dictionary import CELLS, LAYERS, undescribed

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
CORPUS = Corpus("dickens", (TEXT,), "f1")
WORDS = TEXT.split()
CHOICES = make_task(
    "which", [multiple_choice(f"it {w}", [f"the {v}" for v in WORDS[i : i + 3]], i % 3) for i, w in enumerate(WORDS[:40])]
)
LAST = make_task("last", [last_word(f"it was the {word}", "of") for word in WORDS[:20]])
OPTIONS = {"tasks": (CHOICES, LAST), "divergence": True, "speed": True}


def plan(*recipes, **changes):
    return Sweep(recipes, (CORPUS,), parse_convention("windows-32"), **(OPTIONS | changes))


@pytest.fixture(scope="module")
def rows(tiny_model, tmp_path_factory):
    return run_sweep(tiny_model, plan("rtn:int8-g16", "rtn:int2-g16"), tmp_path_factory.mktemp("sweep"))


def test_columns_are_what_the_measurements_give(tiny_model, rows):
    from qjax.driver.decoder import quantize

    quantized, _ = quantize(tiny_model, "rtn:int2-g16")
    baseline, _, row = rows
    before, after = accuracy(tiny_model, CHOICES), accuracy(quantized, CHOICES)
    assert (baseline["accuracy:which"], row["accuracy:which"]) == (before.value, after.value)
    assert row["answers:which"] == list(after.answers) and row["answers_norm:which"] == list(after.answers_normalised)
    expected = accuracy_difference(np.equal(after.answers, after.gold), np.equal(before.answers, before.gold))
    assert row["accuracy_delta:which"] == expected.value == pytest.approx(after.value - before.value)
    assert (row["accuracy_delta_low:which"], row["accuracy_delta_high:which"]) == (expected.low, expected.high)
    assert row["flips:which"] * 40 == row["flips_to_wrong:which"] + row["flips_to_right:which"] > 0
    assert row["word_perplexity:last"] > 1 and row["accuracy_norm:last"] is None
    found = divergence(quantized, tiny_model, CORPUS, "windows-32")
    assert row["nll_delta_low"] < row["nll_delta"] < row["nll_delta_high"]
    assert row["kl"] == pytest.approx(found.kl) and row["top1_agreement"] == pytest.approx(found.top1)
    assert row["accuracy_mean_delta"] == pytest.approx((row["accuracy_delta:which"] + row["accuracy_delta:last"]) / 2)
    for column in ("accuracy", "accuracy_delta"):  # two independent tasks
        errors = [row[f"{column}_stderr:{task}"] for task in ("which", "last")]
        name = column.replace("accuracy", "accuracy_mean")
        assert row[f"{name}_stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert row["running_bytes:packed"] < row["running_bytes:dense"] == baseline["running_bytes:dense"]


def test_the_baseline_differs_in_nothing_from_itself(rows):
    baseline = rows[0]
    assert baseline["kl"] <= 1e-6 and baseline["top1_agreement"] == 1
    for task in ("which", "last"):
        assert (baseline[f"accuracy_delta:{task}"], baseline[f"accuracy_delta_stderr:{task}"], baseline[f"flips:{task}"]) == (
            0,
            0,
            0,
        )


def test_rows_are_flat_and_resume(tiny_model, rows, tmp_path):
    assert json.loads(json.dumps(rows)) == rows
    assert not any(isinstance(value, dict) for row in rows for value in row.values())
    plain = run_sweep(tiny_model, plan("nf4", tasks=(), divergence=False, speed=False), tmp_path)
    assert not any(":" in key or key in ("tasks", "kl") for row in plain for key in row)
    more = run_sweep(tiny_model, plan("nf4", divergence=False, speed=False, tasks=(LAST,)), tmp_path)
    assert not {row["key"] for row in plain} & {row["key"] for row in more}
    assert run_sweep(tiny_model, plan("nf4", divergence=False, speed=False, tasks=(LAST,)), tmp_path) == more
    farther = run_sweep(tiny_model, plan("nf4", divergence=True, speed=False, tasks=()), tmp_path)
    assert not {row["key"] for row in plain} & {row["key"] for row in farther} and "kl" in farther[1]
    assert len(read_rows(tmp_path / ROWS)) == 6


def test_every_column_is_in_the_data_dictionary(rows):
    assert undescribed(rows, CELLS) == []
    assert undescribed([{"key": "", **dict.fromkeys(LayerRecord._fields)}], LAYERS) == []


def test_reports_are_made_from_rows_alone(rows, tmp_path):
    rows = json.loads(json.dumps(rows))
    other = [row | {"seed": 1, "key": f"{row['key']}1"} for row in rows]
    for row in other[1:]:  # a seed that drew something else
        row["window_nll"] = [nll + 0.01 for nll in row["window_nll"]]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    names = {path.name for path in write_reports(tmp_path / "one", [*rows, *other])}
    write_reports(tmp_path / "two", [*rows, *other])
    stem = "random-dickens-windows-32"
    for kind in ("", "-accuracy", "-divergence", "-tradeoff", "-seeds"):
        assert {f"{stem}{kind}.{suffix}" for suffix in ("md", "tex", "csv")} <= names
    assert {f"{stem}-tradeoff.{suffix}" for suffix in ("png", "pdf", "caption.txt")} <= names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one" / f"{stem}-accuracy.md").read_text()
    assert "which change (points)" in text and "last flips (%)" in text and "≈" in text


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "t.jsonl"
    lines = [json.dumps({"query": f"Question: what is {i}?", "choices": ["a", "the number"], "gold": i % 2}) for i in range(12)]
    path.write_text("\n".join(lines))
    return path


def test_commands(task_file, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    code, out, _ = run("eval", "bundled", "--tasks", f"arc_easy:{task_file}", "--max-questions", 10)
    assert code == 0 and "on arc_easy: accuracy" in out and "[10 questions" in out
    assert "perplexity" not in out
    text = ("--data", "python-docs", "--max-windows", 1)
    _, out, _ = run("eval", "bundled", "--tasks", f"arc_easy:{task_file}", "--max-questions", 2, *text)
    assert "accuracy" in out and "perplexity" in out
    code, out, _ = run(
        "sweep",
        "--recipes",
        "rtn:int2-g128",
        "--max-windows",
        2,
        "--tasks",
        f"arc_easy:{task_file}",
        "--divergence",
        "--out",
        tmp_path / "s",
    )
    assert code == 0 and "Accuracy of bundled (12 of arc_easy questions)" in out and "KL mean" in out
    code, out, _ = run("generate", "bundled", "--prompt", "Return the", "--tokens", 5, "--recipe", "rtn:int8-g128", "--packed")
    assert code == 0 and out.startswith("Return the") and len(out) > len("Return the\n")
    code, _, error = run("eval", "bundled", "--tasks", "arc_esy")
    assert code == 2 and "did you mean arc_easy" in error and error.count("\n") == 1
    code, _, error = run("generate", "bundled", "--prompt", "a", "--tokens", 1000)
    assert code == 2 and "do not fit" in error
    if importlib.util.find_spec("lm_eval") is None:
        code, _, error = run("eval", "bundled", "--lm-eval", "piqa")
        assert code == 2 and "pip install lm-eval" in error
