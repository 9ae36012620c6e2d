"""The papers' findings on handmade rows: values that follow from the losses, errors that are theorems, verdicts from both."""

import math

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.evaluate.statistics import estimate, jackknife_error
from qjax.recipe import parse_recipe
from qjax.report.paper_shapes import (
    FINDINGS,
    Finding,
    judge,
    paper_shapes_table,
    recipes_of,
    share,
    smallest_step,
)
from qjax.report.rendering import to_markdown
from qjax.report.reports import tables
from tests.report_rows import measured_row

WINDOWS, TOKENS = 6, 100
RTN, GPTQ = "rtn:int4-channel", "gptq(act_order=false,static_groups=false):int4-channel@block"


def row(recipe: str, changes=0.0, **columns):
    """A row whose windows lose `changes` nats a token more than the unquantized model's."""
    losses = TOKENS * (2.0 + np.arange(WINDOWS) + np.broadcast_to(changes, WINDOWS))
    if recipe == "none":
        base = measured_row("none")
    else:
        base = measured_row("rtn:int4-channel") | {"recipe": recipe, "key": f"{recipe} {columns}"}
    columns |= {"baseline": columns["model"]} if "model" in columns else {}
    return (
        base
        | {"window_nll": list(losses), "window_tokens": [TOKENS] * WINDOWS, "window_documents": list(range(WINDOWS))}
        | columns
    )


def finding(**changes) -> Finding:
    return Finding("share", "0.5", "paper", (GPTQ, RTN), **({"measure": share, "high": 0.7} | changes))


def test_share_is_that_of_the_increases_whatever_the_windows():
    found = judge(finding(), [row("none"), row(GPTQ, math.log(1.02)), row(RTN, math.log(1.08))])
    assert found.value == pytest.approx(0.25) and found.error == pytest.approx(0, abs=1e-9) and found.holds == "yes"


def test_verdicts_need_the_whole_interval():
    noise = np.array([1, -1, 2, -2, 1.5, -1.5])
    rows = [row("none"), row(GPTQ, 0.05 + 0.004 * noise), row(RTN, 0.1)]
    value, error, *_ = judge(finding(), rows)
    for high, verdict in (
        (value + 2.6 * error, "yes"),  # t of five degrees of freedom: 2.571
        (value + 2.5 * error, "open"),
        (value - 2.5 * error, "open"),
        (value - 2.6 * error, "no"),
    ):
        assert judge(finding(high=high), rows).holds == verdict


def test_jackknife_error_of_a_mean_is_its_standard_error():
    totals = np.random.default_rng(0).normal(size=9)
    left_out = (totals.sum() - totals) / (len(totals) - 1)
    assert jackknife_error(left_out) == pytest.approx(estimate(totals).stderr)


def test_pairing_cancels_what_the_windows_share():
    hard = np.array([0, 0.3, 0.1, 0.2, 0, 0.4])
    together = judge(finding(), [row("none"), row(GPTQ, 0.5 * hard), row(RTN, hard)])
    apart = judge(finding(), [row("none"), row(GPTQ, 0.5 * hard[::-1]), row(RTN, hard)])
    assert together.error < 0.2 * apart.error


def test_seeds_add_their_error_and_what_draws_nothing_counts_for_each():
    seeds = [row(GPTQ, math.log(1 + 0.08 * part), seed=seed) for seed, part in enumerate((0.4, 0.5, 0.6))]
    found = judge(finding(), [row("none"), *seeds, row(RTN, math.log(1.08), seed=0)])
    mean = np.prod([1 + 0.08 * part for part in (0.4, 0.5, 0.6)]) ** (1 / 3) - 1  # as other tables show it
    assert found.value == pytest.approx(mean / 0.08) and found.error == pytest.approx(0.1 / math.sqrt(3))


def test_smallest_step_sees_the_one_that_falls():
    assert list(smallest_step(np.array([1.0]), np.array([5.0]), np.array([4.0]))) == [-1.0]


def test_accuracy_is_judged_by_its_own_error():
    accuracy = finding(measure=None, low=-1, high=1)
    accuracy = Finding(accuracy.text, "", "", (RTN,), None, -1, 1)
    interval = {"accuracy:a": 0.5, "accuracy_delta_low:a": -0.028, "accuracy_delta_high:a": -0.012}
    rows = [row("none"), row(RTN, accuracy_mean_delta=-0.02, accuracy_mean_delta_stderr=0.004, **interval)]
    assert judge(accuracy, rows)[:3] == (pytest.approx(-2.0), pytest.approx(0.4), False) and judge(accuracy, rows).holds == "no"
    assert judge(accuracy, [row("none"), row(RTN)]) is None  # no tasks were asked


def test_what_was_not_measured_is_missing_and_what_diverged_does_not_hold():
    assert judge(finding(), [row("none"), row(GPTQ)]) is None
    diverged = row(GPTQ, 1.0)
    diverged["window_nll"] = ["inf", None, *diverged["window_nll"][2:]]
    found = judge(finding(), [row("none"), diverged, row(RTN, 0.1)])
    assert (found.value, found.holds) == (math.inf, "no") and math.isnan(found.error)
    found = judge(finding(), [row("none"), row(GPTQ, 0.1), diverged | {"recipe": RTN}])
    assert (found.value, found.holds) == (0, "yes")
    finite = row(GPTQ, math.log(1.02), seed=1)
    assert judge(finding(), [row("none"), diverged, finite, row(RTN, 0.1)]).holds == "no"


@pytest.mark.parametrize("measured", [-0.0001, 0.0001 + 0.001 * np.array([1, -1, 2, -2, 1.5, -1.5])], ids=["negative", "noisy"])
def test_a_share_of_what_is_not_surely_a_cost_is_open(measured):
    assert judge(finding(), [row("none"), row(GPTQ, 0.02), row(RTN, measured)]).holds == "open"
    falls = next(each for each in FINDINGS if len(each.recipes) == 4 and each.measure is not smallest_step)
    costs = dict(zip(falls.recipes, (0.1, 0.5, 0.02, 0.04), strict=True))
    assert judge(falls, [row("none"), *(row(*each) for each in costs.items())]).holds == "yes"
    for recipe in falls.recipes[1:]:
        assert judge(falls, [row("none"), *(row(*each) for each in (costs | {recipe: measured}).items())]).holds == "open"


def test_few_seeds_reach_as_far_as_students_t():
    seeds = [row(GPTQ, math.log(1 + 0.08 * part), seed=seed) for seed, part in enumerate((0.4, 0.5, 0.6))]
    rows, error = [row("none"), *seeds, row(RTN, math.log(1.08))], 0.1 / math.sqrt(3)
    assert judge(finding(high=0.5 + 4.2 * error), rows).holds == "open"  # t of two degrees of freedom: 4.303
    assert judge(finding(high=0.5 + 4.4 * error), rows).holds == "yes"


def test_verdicts_of_a_table_hold_together():
    """Of 20 findings as sure as one in thirty each one is sure by itself, and none with the others (Holm 1979)."""
    noise = np.array([1, -1, 2, -2, 1.5, -1.5])
    rows = [row("none"), row(GPTQ, 0.05 + 0.004 * noise), row(RTN, 0.1)]
    value, error, *_ = judge(finding(), rows)
    close = finding(high=value + 3 * error)
    assert judge(close, rows).holds == "yes" and 0.02 < judge(close, rows).p < 0.04
    for findings, verdict in (([close], "yes"), ([close] * 20, "yes alone")):
        table = paper_shapes_table(rows, findings)
        assert {line[-1] for line in table.cells()} == {verdict}
    assert "hold the 20 verdicts together" in table.notes[0]


def test_table_of_a_folder_has_every_finding_and_model():
    rows = [each for model in ("toy", "other") for each in (row("none", model=model), row(GPTQ, 0.02, model=model))]
    rows += [row(RTN, 0.1, model="toy"), {"kind": "paper_shapes", "key": "paper_shapes"}]
    table = dict(tables(rows))["paper_shapes"]
    assert len(table.rows) == len(FINDINGS)
    line = next(line for line in to_markdown(table).splitlines() if "4 bits, per channel" in line)
    value, *others = [cell.strip() for cell in line.split("|")[5:-1]]
    assert value.startswith("0.192") and others == ["yes", "-", "-"]
    with pytest.raises(QjaxError, match="unquantized"):
        paper_shapes_table([row(RTN)])


def test_a_model_on_two_devices_has_columns_for_each():
    rows = [row(recipe, 0.1 * (recipe != "none"), device=device) for device in ("cpu", "gpu") for recipe in ("none", RTN, GPTQ)]
    table = paper_shapes_table(rows)
    assert len({column.key for column in table.columns}) == len(table.columns) == 4 + 2 * 2


def test_settings_are_the_papers():
    for each in FINDINGS:
        orders = {recipe.partition("@")[2] for recipe in each.recipes if recipe.startswith(("gptq", "awq"))}
        if each.source.startswith("GPTQ, "):
            assert orders == {"block"} and all("act_order=false" in r for r in each.recipes if r.startswith("gptq"))
        elif each.source.startswith("GPTQ's code"):
            assert "sequential" in orders
        elif each.source == "shape check":
            assert each.paper == ""


@pytest.mark.parametrize(
    ("index", "costs"),  # perplexities less the unquantized model's of OPT-350M and BLOOM-7.1B, GPTQ then RTN
    [(1, (2.24, 3.94)), (2, (11.79, 42.57)), (3, (11.79, 42.57, 2.24, 3.94)), (2, (2.10, 6.01)), (3, (2.10, 6.01, 0.36, 0.73))],
)
def test_the_papers_own_models_are_in_the_range(index, costs):
    each = FINDINGS[index]
    assert each.low <= each.measure(*map(np.array, costs)) <= each.high


def test_recipes_are_canonical():
    assert [str(parse_recipe(recipe)) for recipe in recipes_of()] == recipes_of()
