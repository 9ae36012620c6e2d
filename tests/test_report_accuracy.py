"""qjax.report.accuracy and seeds: what handmade rows say."""

import functools
import math

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.evaluate.statistics import accuracy_difference
from qjax.report.accuracy import accuracy_table
from qjax.report.figures import perplexity_figure
from qjax.report.measured import measured_table
from qjax.report.rendering import to_markdown
from qjax.report.seeds import merge_seeds, seeds_of, seeds_table
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
    assert "Longer than the model's context, cut at the left: 1 of piqa." in text
    assert "-" in lines["none"]


def test_divergence_leaves_the_baseline_out():
    text = to_markdown(DIVERGENCE(ROWS))
    assert "| none" not in text and "2.00 ± 0.20" in text
    for table in (accuracy_table, DIVERGENCE, tradeoff_table, seeds_table):
        with pytest.raises(QjaxError, match="qjax sweep"):
            table([measured_row("none"), measured_row("rtn:int4-g128", 0.1)] if table is not seeds_table else ROWS)


@pytest.mark.parametrize("value", ["accuracy", "divergence"])
def test_figures_draw_both(value):
    figure = perplexity_figure(ROWS, value=value)
    axes = figure.axes[0]
    assert ("accuracy on piqa (%)" if value == "accuracy" else "KL divergence (nats a token)") == axes.get_ylabel()
    assert axes.get_yscale() == ("log" if value == "divergence" else "linear")


def test_rows_of_other_questions_are_apart():
    others = [each | {"tasks": "piqa(4,aa)"} for each in ROWS]
    assert [len(group) for group in split_tables([*ROWS, *others])] == [3, 3]


def test_seeds_come_together():
    rows = [ROWS[0], row("rtn:int2-g128", delta=0.01, seed=0), row("rtn:int2-g128", delta=0.03, seed=1, answers=(1, 0, 0, 1))]
    assert [len(group) for group in seeds_of(rows)] == [2]
    (merged,) = merge_seeds(rows)
    assert merged["seeds"] == 2
    # 1000 delta nats a window of 100 tokens: changes of 0.1 and 0.3 nats a token, the same in every window.
    assert merged["nll_delta"] == pytest.approx(0.2)
    assert merged["nll_delta_stderr"] == pytest.approx(0.1)  # deviation sqrt(2) 0.1 over sqrt(2) seeds
    assert merged["perplexity_ratio_between"] == pytest.approx(math.exp(0.2) * 0.1 * math.sqrt(2))
    assert merged["accuracy_delta:piqa"] == pytest.approx(-0.25)  # none and two of four answers lost
    assert "| rtn:int2-g128 |     2 |" in to_markdown(seeds_table(rows))
    with pytest.raises(QjaxError, match="row is missing"):
        merge_seeds(rows[1:])


def test_unchanged_answers_keep_an_error():
    """No answer of four changed in either seed: that is little evidence, not certainty."""
    rows = [ROWS[0], *(row("gptq:int4-g128", delta=0.01 * (seed + 1), seed=seed) for seed in (0, 1))]
    (merged,) = merge_seeds(rows)
    assert merged["accuracy_delta:piqa"] == 0
    assert merged["accuracy_delta_stderr:piqa"] == pytest.approx(accuracy_difference([True] * 4, [True] * 4).stderr)


def test_what_no_seed_changed_is_no_two_samples():
    assert seeds_of([ROWS[0], row("rtn:int2-g128", delta=0.01, seed=0), row("rtn:int2-g128", delta=0.01, seed=1)]) == []


def test_calibration_on_another_text_is_another_measurement():
    first = row("gptq:int4-g128", delta=0.01, seed=0) | {"calibration_source": "aa", "calibration_fingerprint": "1"}
    second = row("gptq:int4-g128", delta=0.02, seed=1) | {"calibration_source": "aa", "calibration_fingerprint": "2"}
    assert [len(group) for group in seeds_of([ROWS[0], first, second])] == [2]
    assert seeds_of([ROWS[0], first, second | {"calibration_source": "bb"}]) == []
    given = [each | {"calibration_source": ""} for each in (first, second)]  # tokens somebody gave, drawn by no seed of ours
    assert seeds_of([ROWS[0], *given]) == []
