"""The sweep loop: rows, resuming, provenance, a kill at any moment, one compilation for all cells."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.calibrate.tokens import Calibration, as_calibration
from qjax.driver.layer import problem_of
from qjax.errors import QjaxError, QjaxWarning
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.windows import parse_convention
from qjax.models import walk
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import compute_dtype, losses_of
from qjax.numbers import NotFiniteError
from qjax.recipe import method_name, parse_recipe
from qjax.report.reports import write_reports
from qjax.sweep import quantizer, worker
from qjax.sweep.measurements import provenance
from qjax.sweep.measurements.perplexity import difference
from qjax.sweep.record import digest
from qjax.sweep.runner import Sweep, Watcher, cell_states, run_sweep
from qjax.sweep.store import LAYERS, ROWS, read_rows, write_rows

from .conftest import FAMILY_CHANGES, byte_tokenizer, random_model, some_slow, tiny_config

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
CORPORA = (Corpus("dickens", (TEXT,), "f1"), Corpus("reversed", (TEXT[::-1],), "f2"))
FIVE = ("rtn:int8-channel", "rtn:int4-channel", "rtn:int3-channel", "nf4")  # with the baseline, on two texts
REQUIRED = {
    *("recipe", "model", "corpus", "convention", "bits_per_weight", "model_bits_per_weight", "size_bytes", "perplexity"),
    *("perplexity_stderr", "perplexity_ratio", "nll", "tokens", "bits_per_byte", "seconds_quantize", "seconds_evaluate"),
    *("tokens_per_second", "peak_rss_bytes", "seed", "versions", "device", "fingerprint", "key", "corpus_fingerprint"),
}


def plan(*recipes, **changes):
    options = {"corpora": CORPORA, "convention": parse_convention("windows-32")}
    return Sweep(recipes=tuple(recipes), **(options | changes))


def measured(rows):
    """What must be equal between runs: everything but times and memory."""
    noisy = ("time", "seconds_quantize", "seconds_evaluate", "tokens_per_second", "peak_rss_bytes")
    return [{key: value for key, value in row.items() if key not in noisy} for row in rows]


@pytest.mark.parametrize("family", some_slow(FAMILY_CHANGES))
def test_every_family(family, tmp_path):
    model = random_model(tiny_config(**FAMILY_CHANGES[family]), byte_tokenizer())
    calibration = as_calibration(model, np.random.default_rng(0).integers(0, 256, (4, 32)))
    recipes = ("rtn:int8-g16", "awq+gptq:int8-g16@parallel")
    rows = run_sweep(
        model, plan(*recipes, corpora=CORPORA[:1], max_windows=4, calibration=calibration, divergence=True), tmp_path
    )
    assert [row["recipe"] for row in rows] == ["none", *recipes]
    assert all(abs(row["perplexity_ratio"] - 1) < 0.02 and row["kl"] < 1e-2 for row in rows)


def test_rows_are_flat_complete_and_on_disk(tiny_model, tmp_path):
    rows = run_sweep(tiny_model, plan("rtn:int8-channel", "rtn:int2-channel"), tmp_path)
    assert [(row["recipe"], row["corpus"]) for row in rows] == [
        (recipe, corpus) for recipe in ("none", "rtn:int8-channel", "rtn:int2-channel") for corpus in ("dickens", "reversed")
    ]
    assert json.loads(json.dumps(rows)) == read_rows(tmp_path / ROWS)
    for row in rows:
        assert set(row) >= REQUIRED
        assert row["tokens"] == sum(row["window_tokens"])
        assert not any(isinstance(value, dict) for value in row.values())
    baseline, _, int8, _, int2, _ = rows
    assert (baseline["perplexity_ratio"], baseline["nll_delta_stderr"]) == (1.0, 0.0)
    assert baseline["bits_per_weight"] == 32
    assert abs(int8["perplexity_ratio"] - 1) < 0.01
    assert abs(int2["perplexity_ratio"] - 1) > 0.01
    assert int8["perplexity_ratio"] == pytest.approx(int8["perplexity"] / baseline["perplexity"])
    assert int2["size_bytes"] < int8["size_bytes"] < baseline["size_bytes"]


def test_a_row_sums_up_its_layers(tiny_model, tmp_path):
    """Mean errors, and the largest damping that any layer needed."""
    rules = ("attention|mlp/gate|block_1=none", "mlp/up=gptq(damp=0.2):int8-g16@parallel")
    tokens = as_calibration(tiny_model, np.random.default_rng(0).integers(0, 256, (4, 32)))
    asked = plan("gptq:int8-g16@parallel", corpora=CORPORA[:1], max_windows=2, calibration=tokens, rules=rules)
    row = run_sweep(tiny_model, asked, tmp_path)[-1]
    layers = [json.loads(line) for line in (tmp_path / LAYERS).read_text().splitlines()]
    assert [layer["path"] for layer in layers] == ["block_0/mlp/down/kernel", "block_0/mlp/up/kernel"]
    assert [layer["damp"] for layer in layers] == pytest.approx([0.01, 0.2])
    assert row["damp"] == pytest.approx(0.2)
    for name in ("weight_error", "output_error"):
        assert row[name] == pytest.approx(np.mean([layer[name] for layer in layers]))


def test_running_again_measures_nothing(tiny_model, tmp_path):
    first = run_sweep(tiny_model, plan("nf4"), tmp_path)
    seen = []

    class Log(Watcher):
        def row(self, row, is_new):
            seen.append(is_new)

    assert run_sweep(tiny_model, plan("nf4"), tmp_path, Log()) == first
    assert seen == [False] * 4
    assert len(read_rows(tmp_path / ROWS)) == 4
    # Another seed, text, convention or model is another cell.
    other = tiny_model._replace(params=jax.tree.map(lambda leaf: leaf * 1.01, tiny_model.params))
    assert model_fingerprint(other) != model_fingerprint(tiny_model)
    smaller = {"convention": parse_convention("windows-16")}
    for model, changed in ((tiny_model, {"seed": 1}), (tiny_model, smaller), (other, {})):
        run_sweep(model, plan("nf4", corpora=CORPORA[:1], **changed), tmp_path)
    assert len({row["key"] for row in read_rows(tmp_path / ROWS)}) == 10


def test_one_text_in_other_documents_is_another_cell(tiny_model, tmp_path):
    """Errors are over documents, and windows are spread over them."""
    divided = (Corpus("wise", parts, separator="") for parts in ((TEXT,), (TEXT[:200], TEXT[200:]), (TEXT[:300], TEXT[300:])))
    states = [cell_states(tiny_model, plan("none", corpora=(corpus,)), tmp_path) for corpus in divided]
    assert len({row["corpus_fingerprint"] for (row,) in states}) == 1 and len({row["key"] for (row,) in states}) == 3


def test_a_models_fingerprint_is_of_all_that_it_is(tiny_model):
    """Weights, configuration and tokenizer: the same tokens of another vocabulary are another text."""
    leaves, tree = jax.tree.flatten(tiny_model.params)
    others = [
        tiny_model._replace(tokenizer=byte_tokenizer(bos=True)),
        tiny_model._replace(tokenizer=None),
        tiny_model._replace(config=dataclasses.replace(tiny_model.config, rope_theta=5e5)),
        tiny_model._replace(params=jax.tree.unflatten(tree, [*leaves[:-1], leaves[-1].at[0].add(1e-6)])),
    ]
    assert len({model_fingerprint(model) for model in (tiny_model, *others)}) == 5
    assert model_fingerprint(tiny_model._replace(tokenizer=byte_tokenizer(), name="x")) == model_fingerprint(tiny_model)


def test_two_runs_agree_to_the_last_bit(tiny_model, tmp_path):
    rows = [run_sweep(tiny_model, plan("rtn:int3-g16", "nf4-dq"), tmp_path / name) for name in ("a", "b")]
    assert measured(rows[0]) == measured(rows[1])


def test_all_cells_share_one_compiled_forward_pass(tiny_model, tmp_path):
    embed, block, *_ = (walk.compiled(part.module) for part in walk.parts(tiny_model.config, compute_dtype()))
    programs = (embed, block, losses_of)
    for program in programs:
        program.clear_cache()
    run_sweep(tiny_model, plan("rtn:int4-g16"), tmp_path / "a")
    assert [program._cache_size() for program in programs] == [1, 1, 1]
    run_sweep(tiny_model, plan("rtn:int3-g8", "nf4", "rtn:int8-channel"), tmp_path / "b")
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_errors_come_before_any_work(tiny_model, tmp_path):
    class Fail(Watcher):
        def cell(self, *args):
            raise AssertionError("a cell began")

    for wrong, named in (
        (plan("rtn:int4-q"), "'q'"),
        (plan("nf4", rules=("nothing=none",)), "matches no kernel"),
        (plan("nf4", corpora=(Corpus("short", ("abc",), "f3"),)), "short: the text has 3 tokens"),
    ):
        with pytest.raises(QjaxError, match=named):
            run_sweep(tiny_model, wrong, tmp_path, Fail())


def test_calibrating_on_the_text_that_is_measured_is_refused(tiny_model, tmp_path):
    """By the text's fingerprint, whatever it is called, and only where a recipe reads calibration data."""
    tokens = np.zeros((2, 32), np.int32)
    calibration = Calibration(tokens, None, "of another name", CORPORA[1].fingerprint)
    with pytest.raises(QjaxError, match="reversed is both measured and calibrated on"):
        run_sweep(tiny_model, plan("rtn:int4-g16", "gptq:int4-g16@parallel", calibration=calibration), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert len(run_sweep(tiny_model, plan("none", corpora=CORPORA[1:], max_windows=2, calibration=calibration), tmp_path)) == 1


def test_texts_of_one_name_are_told_apart(tiny_model, tmp_path):
    """Two files may share a name; the same text twice is measured once, which is said."""
    one, other = (Corpus("text:val.txt", corpus.documents, corpus.fingerprint) for corpus in CORPORA)
    again = one._replace(name="text:copy.txt")
    with pytest.warns(QjaxWarning, match=r"^text:copy\.txt is left out: it is the text of text:val.txt"):
        rows = run_sweep(tiny_model, plan("nf4", corpora=(one, other, again)), tmp_path)
    assert [row["corpus_fingerprint"] for row in rows] == ["f1", "f2"] * 2
    expected = run_sweep(tiny_model, plan("nf4"), tmp_path / "expected")
    assert [row["nll"] for row in rows] == [row["nll"] for row in expected] and len({row["nll"] for row in rows}) == 4


def test_recipes_of_several_orders_in_one_sweep(tiny_model, tmp_path, monkeypatch):
    """Only those of the order `parallel` are quantized together, wherever they stand."""
    monkeypatch.setattr(quantizer, "MOST_TOGETHER", 2)
    tokens = as_calibration(tiny_model, np.random.default_rng(0).integers(0, 256, (4, 32)))
    recipes = ("gptq:int4-g16@block", "gptq:int4-g16@parallel", "gptq:int3-g16@parallel")
    asked = plan(*recipes, corpora=CORPORA[:1], max_windows=1, calibration=tokens, rules=("attention|gate|up|block_0=none",))
    rows = run_sweep(tiny_model, asked, tmp_path)
    assert [row["order"] for row in rows] == [None, "block", "parallel", "parallel"]


def test_rules_apply_to_none_and_the_baseline_stays(tiny_model, tmp_path):
    rows = run_sweep(tiny_model, plan("none", rules=("block_1=nf4",), corpora=CORPORA[:1]), tmp_path)
    assert [row["recipe"] for row in rows] == ["none", "none; block_1=rtn:nf4-g64"]
    assert rows[1]["bits_per_weight"] < 6 < rows[0]["bits_per_weight"]
    assert rows[1]["nll"] != rows[0]["nll"]
    write_reports(tmp_path, rows)


def test_a_recipe_that_breaks_the_model_gets_no_row_and_the_sweep_goes_on(tiny_model, tmp_path, monkeypatch):
    honest = quantizer.quantize_together

    def diverge(model, requests, **options):
        ((quantized, report),) = honest(model, requests, **options)
        if requests[0][0] == "rtn:int2-channel":
            quantized = quantized._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))
        return [(quantized, report)]

    monkeypatch.setattr(quantizer, "quantize_together", diverge)
    asked = plan("rtn:int2-channel", "nf4", corpora=CORPORA[:1])
    with pytest.raises(
        NotFiniteError, match=r"^rtn:int2-channel on \w+ has no row: .* losses on .* not finite.*other row is in"
    ):
        run_sweep(tiny_model, asked, tmp_path)
    assert [row["recipe"] for row in read_rows(tmp_path / ROWS)] == ["none", "rtn:nf4-g64"]
    monkeypatch.undo()
    assert [row["recipe"] for row in run_sweep(tiny_model, asked, tmp_path)] == ["none", "rtn:int2-channel", "rtn:nf4-g64"]
    broken = tiny_model._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, tiny_model.params))
    with pytest.raises(NotFiniteError, match="not finite"):
        run_sweep(broken, plan("nf4"), tmp_path / "broken")
    assert not (tmp_path / "broken" / ROWS).exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("gptq(static_groups=false):int4-g16", "block_0/attention/.*static_groups=false with act_order"),
        ("gptq(panel=0):int4-g16", "block_0/attention/.*panel at least 1"),
        ("awq(ratios=0):int4-g8", "block_0/attention/.*ratios at least 1; .*ratios=0"),
        ("awq(loss=module,ratios=0)+gptq:int4-g8", "block_0/attention/.*ratios=0"),
        ("hqq:int4-g8", "block_0/attention/.*hqq: int4-g8 has no real zero points"),
        ("gptq:int4-g8@qep(alpha=2)", "alpha is between 0 and 1.*alpha=2"),
    ],
)
def test_options_that_contradict_each_other_are_found_before_anything_is_measured(tiny_model, tmp_path, recipe, message):
    tokens = qjax.Calibration(np.zeros((2, 32), np.int32))
    with pytest.raises(QjaxError, match=message):
        run_sweep(tiny_model, plan("rtn:int4-g16", recipe, calibration=tokens), tmp_path)
    assert not (tmp_path / ROWS).exists()


@pytest.mark.usefixtures("registries")
def test_methods_that_jax_cannot_trace_are_not_looked_into():
    def steps(weights, fmt, *, abs_mean):
        return np.asarray(abs_mean)

    def picks(weights, fmt, *, abs_mean):
        return abs_mean[abs_mean > 0]

    for name, function in (("steps", steps), ("picks", picks)):
        qjax.register(function, transform=True)
        assert problem_of(parse_recipe(f"{name}+rtn:int4-g8"), (16, 4)) is None
    for options in ("awq(loss=module)+gptq:int4-g8", "smoothquant(search=true)+rtn:int8-channel/int8-token@parallel"):
        assert problem_of(parse_recipe(options), (16, 4)) is None


def test_an_order_out_of_range_is_found_before_anything_is_measured(tiny_model, tmp_path):
    tokens = qjax.Calibration(np.zeros((2, 32), np.int32))
    for asked in (plan("gptq:int4-g8", order="qep(damp=-1)"), plan("none", rules=("mlp=gptq:int4-g8@qep(damp=-1)",))):
        with pytest.raises(QjaxError, match=r"damp not negative.*damp=-1"):
            run_sweep(tiny_model, dataclasses.replace(asked, calibration=tokens), tmp_path)
    assert not (tmp_path / ROWS).exists()


def test_layers_are_there_once_after_a_stop_between_them_and_their_row(tiny_model, tmp_path, monkeypatch):
    def written(path, rows):
        if path.name == ROWS and rows[0]["recipe"] != "none":
            raise KeyboardInterrupt
        write_rows(path, rows)

    with monkeypatch.context() as stopped:
        stopped.setattr(worker, "write_rows", written)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(tiny_model, plan("nf4", corpora=CORPORA[:1]), tmp_path)
    with (tmp_path / LAYERS).open("r+b") as file:  # and in the middle of a line
        file.truncate(file.seek(0, os.SEEK_END) - 40)
    rows = run_sweep(tiny_model, plan("nf4", corpora=CORPORA[:1]), tmp_path)
    layers = [json.loads(line) for line in (tmp_path / LAYERS).read_text().splitlines()]
    found = [(row["key"], row["path"]) for row in layers]
    assert len(set(found)) == len(found) == 14
    assert {key for key, _ in found} == {rows[1]["key"]}
    (tmp_path / LAYERS).write_text("no rows\n")  # of no interest to a sweep that is complete
    assert run_sweep(tiny_model, plan("nf4", corpora=CORPORA[:1]), tmp_path) == rows


def test_paired_difference():
    base = {"nll": 2.0, "window_nll": [20.0, 22.0, 18.0], "window_tokens": [10, 10, 10]}
    worse = {"nll": 2.1, "window_nll": [21.0, 23.0, 19.0], "window_tokens": [10, 10, 10], "window_documents": [0, 1, 2]}
    change = difference(worse, base)
    assert change["nll_delta"] == pytest.approx(0.1)
    assert change["nll_delta_stderr"] == pytest.approx(0.0, abs=1e-12)  # every window is worse by the same amount
    assert change["perplexity_ratio"] == pytest.approx(np.exp(0.1))
    change = difference(worse | {"window_nll": [21.0, 22.0, 20.0]}, base)  # differences 1, 0, 2 of ten tokens each
    assert change["nll_delta_stderr"] == pytest.approx(1 / 10 / 3**0.5)
    assert change["perplexity_ratio_stderr"] == pytest.approx(np.exp(0.1) / 10 / 3**0.5)
    assert change["nll_delta_low"] < 0.1 < change["nll_delta_high"]


def test_method_names():
    names = {"rtn(clip=mse):int3-g128": "rtn", "nf4": "nf4", "fp4": "fp4_e2m1", "bf16": "bf16", "none": "none"}
    assert {text: method_name(parse_recipe(text)) for text in names} == names
    assert digest("a", 1) != digest("a", 2)


def test_kill_loses_at_most_the_cell_in_progress(tiny_model, tmp_path):
    """A real process killed with SIGKILL in the middle; the next run, here, finishes and equals an undisturbed one."""
    script = textwrap.dedent(
        """
        import sys, pathlib, time
        from tests.conftest import byte_tokenizer, random_model, tiny_config
        from tests.test_sweep import FIVE, plan
        from qjax.sweep.runner import Watcher, run_sweep
        class Waiting(Watcher):
            rows = 0
            def row(self, row, is_new):
                self.rows += 1
            def batch(self, done, total):
                time.sleep(600 if self.rows == 3 else 0)  # in the middle of a cell
        model = random_model(tiny_config(), byte_tokenizer())
        run_sweep(model, plan(*FIVE), pathlib.Path(sys.argv[1]), Waiting())
        """
    )
    root = Path(__file__).parents[1]
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(killed)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, cwd=root)
    deadline = time.time() + 300
    while len(read_rows(killed / ROWS)) < 3 and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survivors = read_rows(killed / ROWS)
    assert len(survivors) == 3
    for folder in (killed, tmp_path / "whole"):
        run_sweep(tiny_model, plan(*FIVE), folder)
    rows, expected = read_rows(killed / ROWS), read_rows(tmp_path / "whole" / ROWS)
    assert rows[: len(survivors)] == survivors
    assert measured(rows) == measured(expected)


def test_the_device_is_told_with_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert provenance.provenance()["device"].endswith(" x1")
