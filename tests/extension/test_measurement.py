"""A measurement from outside the package, declared in this one file: sweep, command, rows, tables, CSV, rerun, dictionary."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import registry
from qjax.checkpoints.huggingface import save_huggingface
from qjax.cli import app as cli
from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.windows import corpus_windows
from qjax.numbers import as_json
from qjax.report.rerun_table import rerun_table, unequal
from qjax.sweep import columns
from qjax.sweep.columns import BASELINE, Column, Measurement, column_of, data_dictionary, register_measurement
from qjax.sweep.request import request_of
from qjax.sweep.rerun import rerun
from qjax.sweep.store import ROWS, read_rows
from tests.conftest import byte_tokenizer, random_model, tiny_config

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
NAME = "logit_difference"
WRONG = (Column("wrong", float, "", "a number"),)


def logit_difference(cell):
    """Mean over tokens and vocabulary, nats, and its error over windows."""
    ours, theirs = (np.asarray(qjax.apply(model, cell.windows.tokens)) for model in (cell.model, cell.baseline))
    means = np.abs(ours - theirs).mean(axis=(1, 2))
    return {NAME: means.mean(), f"{NAME}_stderr": means.std(ddof=1) / np.sqrt(len(means)), "logit_largest": np.abs(ours).max()}


MEASUREMENT = Measurement(
    NAME,
    "Logits against {baseline}",
    (
        Column(NAME, float, "nats", "mean absolute difference of logits", given=BASELINE, header="logits\n(nats)"),
        Column(f"{NAME}_stderr", float | None, "nats", "its standard error over windows"),
        Column("logit_largest", float, "nats", "the largest logit", given=BASELINE, header="largest\nlogit"),
    ),
    measure=logit_difference,
    notes=("Differences from {baseline}.",),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, a text and rows of a sweep that asks for the measurement; the registry as it was, afterwards."""
    folder = tmp_path_factory.mktemp("measurement")
    save_huggingface(folder / "tiny", random_model(tiny_config(), byte_tokenizer()))
    (folder / "text.txt").write_text(TEXT)
    with registry.scoped():
        register_measurement(MEASUREMENT)
        sweep = qjax.Sweep(
            ("rtn:int4-g16", "rtn:int2-g16"),
            (qjax.load_corpus(f"text:{folder / 'text.txt'}"),),
            qjax.parse_convention("windows-32"),
            max_windows=3,
            measures=(NAME,),
        )
        qjax.run_sweep(qjax.load(folder / "tiny"), sweep, folder / "results")
        yield folder


def test_rows_hold_what_it_gives(work):
    none, int4, int2 = read_rows(work / "results" / ROWS)
    assert none[NAME] == 0 < int4[NAME] < int2[NAME] and int4[f"{NAME}_stderr"] > 0
    model = qjax.load(work / "tiny")
    quantized, _ = qjax.quantize(model, "rtn:int2-g16")
    tokens = corpus_windows(model, qjax.Corpus("text", [TEXT]), qjax.parse_convention("windows-32"), 3).tokens
    expected = np.abs(np.asarray(qjax.apply(quantized, tokens)) - np.asarray(qjax.apply(model, tokens))).mean()
    assert int2[NAME] == pytest.approx(float(expected), rel=1e-4)
    assert int2["measures"] == [NAME] and type(int2[NAME]) is float


def test_key_and_request_follow(work):
    rows = read_rows(work / "results" / ROWS)
    assert request_of(rows[1])["measures"] == [NAME]
    early = {name: value for name, value in rows[1].items() if name != "measures"}
    assert request_of(early)["measures"] == [NAME]  # a column says so too
    cells = {"model": qjax.load(work / "tiny"), "folder": work / "plain"}
    corpus = qjax.load_corpus(f"text:{work / 'text.txt'}")
    plain = qjax.run_sweep(
        cells["model"], qjax.Sweep(("rtn:int4-g16",), (corpus,), qjax.parse_convention("windows-32"), 3), cells["folder"]
    )
    assert plain[1]["key"] != rows[1]["key"] and plain[1]["nll"] == rows[1]["nll"] and NAME not in plain[1]


def test_table_csv_and_dictionary_follow(work):
    assert list(columns.measurements()) == [*columns.HOUSE, NAME]  # last, so that it sees what the others found
    rows = read_rows(work / "results" / ROWS)
    names = {path.name for path in qjax.write_reports(work / "results", rows)}
    assert {f"tiny-text-text.txt-windows-32-{NAME}.{suffix}" for suffix in ("md", "tex", "csv")} <= names
    text = (work / "results" / f"tiny-text-text.txt-windows-32-{NAME}.md").read_text()
    assert "**Logits against the unquantized model, tiny on" in text and "Differences from the unquantized model." in text
    assert "logits (nats)" in text and "| none" not in text  # of differences the baseline's says nothing
    with (work / "results" / f"tiny-text-text.txt-windows-32-{NAME}.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row[NAME]) for row in read] == [row[NAME] for row in rows[1:]]
    assert [float(row[f"{NAME}_stderr"]) for row in read] == [row[f"{NAME}_stderr"] for row in rows[1:]]
    (told,) = [row for row in data_dictionary() if row["column"] == NAME]
    assert (told["measurement"], told["type"], told["unit"]) == (NAME, "number", "nats")


def test_rerun_measures_it_again(work):
    row = read_rows(work / "results" / ROWS)[2]
    again = rerun(row, model=str(work / "tiny"), data=f"text:{work / 'text.txt'}")
    assert unequal(row, again) == [] and again[NAME] == row[NAME] and again["key"] == row["key"]
    assert [NAME, str(row[NAME]), "the same", "yes"] in rerun_table(row, again).cells()
    assert unequal(row, again | {NAME: row[NAME] * (1 + 1e-15)}) == [NAME]


def test_command(work, capsys):
    options = (
        "--data",
        f"text:{work / 'text.txt'}",
        "--max-windows",
        "3",
        "--recipes",
        "rtn:int2-g16",
        "--convention",
        "windows-32",
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sweep", str(work / "tiny"), *options, "--measure", NAME, "--out", str(work / "results")])
    printed = capsys.readouterr()
    assert stopped.value.code in (0, None) and "Logits against the unquantized model" in printed.out
    assert len(read_rows(work / "results" / ROWS)) == 3 and "(measured before)" in printed.err  # what the sweep measured
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(work / "tiny"), *options, "--measure", "logits", "--out", str(work / "results")])
    assert "measurement logits: allowed are divergence, speed, logit_difference" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("work")
def test_what_is_wrong_is_said():
    assert column_of(NAME).unit == "nats" and column_of(f"{NAME}:x") is None
    for changed, named in (
        ({"name": "speed"}, "the house's"),
        ({"name": "Logits"}, "no name"),
        ({"columns": (Column("kl", float, "", "taken"),)}, "got kl"),
        ({"columns": (Column("other", complex, "", "no type of JSON"),)}, "got other"),
        ({"columns": (Column("other", float, "", "", role="found"),)}, "got other"),
        ({"measure": None}, "measure="),
    ):
        with pytest.raises(QjaxError, match=named):
            register_measurement(MEASUREMENT._replace(**changed))


def test_a_measurement_that_gives_what_it_has_not_declared_is_named(work, tmp_path):
    corpus = qjax.load_corpus(f"text:{work / 'text.txt'}")
    sweep = qjax.Sweep(("none",), (corpus,), qjax.parse_convention("windows-32"), 1, measures=("wrong",))

    def wrong(cell):
        return {"wrong": "text", "undeclared": 1.0} if cell.sweep.seed else {"wrong": "text"}

    register_measurement(Measurement("wrong", "Wrong", WRONG, measure=wrong))
    for seed, named in ((0, "measurement wrong gives wrong,"), (1, "gives undeclared,")):
        with pytest.raises(QjaxError, match=named):
            qjax.run_sweep(qjax.load(work / "tiny"), sweep.__class__(**{**sweep.__dict__, "seed": seed}), tmp_path)
    for given, named in ((None, "NoneType"), ([1.0], "list")):
        register_measurement(MEASUREMENT._replace(name="wrong", columns=WRONG, measure=lambda cell, given=given: given))
        with pytest.raises(QjaxError, match=f"measurement wrong gives {named}, expected a dict"):
            qjax.run_sweep(qjax.load(work / "tiny"), sweep, tmp_path)
    assert read_rows(tmp_path / ROWS) == []


def test_numbers_of_numpy_and_jax_are_numbers():
    given = {"a": np.float32(0.5), "b": jnp.float32(0.5), "c": jnp.arange(2), "d": jnp.float32(np.nan), "e": jnp.bfloat16(2)}
    assert as_json(given) == {"a": 0.5, "b": 0.5, "c": [0, 1], "d": None, "e": 2.0}
    assert [type(value) for value in as_json(given).values()] == [float, float, list, type(None), float]


def test_what_no_text_changes_is_measured_once_and_its_source_is_part_of_the_key(work, tmp_path):
    model, calls = qjax.load(work / "tiny"), []
    corpora = tuple(Corpus(name, (text,), name) for name, text in (("a", TEXT), ("b", TEXT[::-1])))
    sweep = qjax.Sweep(("none",), corpora, qjax.parse_convention("windows-32"), 1, measures=("counted",))

    def counted(cell):
        calls.append(cell.corpus.name)
        return {"counted": len(calls)}

    def counted_otherwise(cell):
        return counted(cell)

    keys = []
    for measure in (counted, counted_otherwise):
        column = Column("counted", int, "", "how often it was measured")
        register_measurement(Measurement("counted", "Counted", (column,), measure=measure, on_every_text=False))
        rows = qjax.run_sweep(model, sweep, tmp_path)
        assert [row["counted"] for row in rows] == [len(calls)] * 2
        keys += [row["key"] for row in rows]
    assert calls == ["a", "a"] and len(set(keys)) == 4
