"""qjax.report.accuracy and divergence: what handmade rows say."""

import functools

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.report.accuracy import accuracy_table
from qjax.report.measured import measured_table
from qjax.report.rendering import to_markdown
from qjax.report.seeds import seeds_table
from qjax.report.tables import split_tables
from qjax.report.tradeoff import tradeoff_table
from qjax.sweep.columns import measurements

from .report_rows import measured_row

WINDOWS = 8
DIVERGENCE = functools.partial(measured_table, measurements()["divergence"])


def row(recipe, value=0.5, delta=0.0, *, stderr=0.01, seed=0, kl=0.1, answers=(0, 1, 0, 1)):
    nll = np.full(WINDOWS, 100.0) + np.arange(WINDOWS) + 1000 * delta
    task = {
        "accuracy": value, "accuracy_stderr": 0.02, "accuracy_delta": delta, "accuracy_delta_stderr": stderr,
        "accuracy_delta_low": delta - 2 * stderr, "accuracy_delta_high": delta + 2 * stderr, "flips": abs(delta),
        "questions": 4, "truncated": 1, "answers": list(answers), "gold": [0, 1, 1, 1],
    }  # fmt: skip
    return measured_row(
        recipe, seed=seed, kl=kl, kl_stderr=kl / 10, kl_median=kl, kl_p99=kl, top1_agreement=0.9, top1_agreement_stderr=0.01,
        rms_dp=0.05, rms_dp_stderr=0.001, accuracy_mean=value, accuracy_mean_delta=delta, accuracy_mean_delta_stderr=stderr,
        window_nll=nll.tolist(), window_tokens=[100] * WINDOWS, **{f"{name}:piqa": each for name, each in task.items()},
    )  # fmt: skip


ROWS = [row("none", 0.55), row("rtn:int8-g128", 0.545, -0.005), row("rtn:int2-g128", 0.4, -0.15, kl=2.0)]


def test_changes_within_noise_are_marked():
    text = to_markdown(accuracy_table(ROWS))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "≈ -0.5 ± 1.0" in lines["rtn:int8-g128"]
    assert "≈ " not in lines["rtn:int2-g128"].split("|")[5] and "-15.0 ± 1.0" in lines["rtn:int2-g128"]
    assert (
        "Longer than the model's context, cut at the left: 1 of piqa." in text and "±: standard error over questions;" in text
    )
    made = [each | {"documents:piqa": [0, 0, 1, 1]} for each in ROWS]
    assert (
        "over questions, or over the texts they are made from (2 of piqa) where that is larger" in accuracy_table(made).notes[0]
    )
    assert "-" in lines["none"]


def test_divergence_leaves_the_baseline_out():
    text = to_markdown(DIVERGENCE(ROWS))
    assert "| none" not in text and "2.00 ± 0.20" in text
    for table in (accuracy_table, DIVERGENCE, tradeoff_table, seeds_table):
        with pytest.raises(QjaxError, match="qjax sweep"):
            table([measured_row("none"), measured_row("rtn:int4-g128", 0.1)] if table is not seeds_table else ROWS)


def test_rows_of_other_questions_are_apart():
    others = [each | {"tasks": "piqa(4,aa)"} for each in ROWS]
    assert [len(group) for group in split_tables([*ROWS, *others])] == [3, 3]
