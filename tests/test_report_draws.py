"""Draws of calibration data come together as one row: values by hand, what is no draw, tables of draws."""

import math

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.evaluate.statistics import accuracy_difference, estimate, with_draws
from qjax.report.accuracy import accuracy_table
from qjax.report.comparison import baseline_table, comparison_tables
from qjax.report.draws import accuracy_change, draws_of, in_step, merge_draws
from qjax.report.estimates import cell_estimates
from qjax.report.rendering import to_markdown
from qjax.report.reports import tables
from qjax.report.seeds import seeds_table
from qjax.report.series import has_widths, widths_table
from qjax.report.tables import perplexity_table
from tests.report_rows import BASELINE, measured_row

WINDOWS, TOKENS = 8, 100
GOLD = [0, 1, 1, 1]
RIGHT = [0, 1, 0, 1]


def row(recipe, changes=0.0, *, seed=0, answers=RIGHT, **columns):
    """A row whose windows lose `changes` nats a token more than the unquantized model's."""
    changes = np.broadcast_to(changes, WINDOWS)
    losses = TOKENS * (math.log(BASELINE) + changes) + np.arange(WINDOWS)
    right = float(np.mean(np.equal(answers, GOLD)))
    task = {"accuracy": right, "accuracy_stderr": 0.1, "flips": 0.25 * seed, "answers": list(answers), "gold": GOLD}
    task |= {
        "accuracy_delta": right - 0.75,
        "accuracy_delta_stderr": 0.1,
        "accuracy_delta_low": -0.5,
        "accuracy_delta_high": 0.5,
    }
    task |= {"questions": 4, "truncated": 0}
    kept = {"window_nll": losses.tolist(), "window_tokens": [TOKENS] * WINDOWS, "seed": seed, "key": f"{recipe}{seed}"}
    return measured_row(
        recipe, float(changes.mean()), **kept, **{f"{name}:piqa": each for name, each in task.items()}, **columns
    )


NONE = row("none")
NOISE = 0.01 * np.array([1, -1, 2, -2, 3, -3, 1, -1])
DRAWS = [row("gptq:int3-g128", 0.1 * (1 + seed) + NOISE, seed=seed, kl=0.1 * (1 + seed), kl_stderr=0.03) for seed in (2, 0, 1)]


def test_draws_are_one_row_of_the_same_columns():
    before, merged = merge_draws([NONE, *DRAWS])
    assert before is NONE and (merged["draws"], merged["draw_seeds"]) == (3, [0, 1, 2])
    assert merged["nll_delta_draws"] == pytest.approx([0.1, 0.2, 0.3]) and merged["nll_delta_between"] == pytest.approx(0.1)
    assert merged["nll_delta"] == pytest.approx(0.2)
    assert merged["perplexity"] == pytest.approx(BASELINE * math.exp(0.2))  # the geometric mean
    assert merged["perplexity_ratio"] == pytest.approx(math.exp(0.2))
    of_documents = estimate(NOISE).stderr  # that every draw has: nothing of it is the draws'
    assert merged["nll_delta_documents"] == pytest.approx(of_documents)
    assert merged["nll_delta_stderr"] == pytest.approx(math.hypot(of_documents, 0.1 / math.sqrt(3)))
    assert merged["perplexity_ratio_stderr"] == pytest.approx(math.exp(0.2) * merged["nll_delta_stderr"])
    low, high = merged["nll_delta_low"], merged["nll_delta_high"]
    assert (low + high) / 2 == pytest.approx(0.2) and (high - low) / 2 > 4.3 * 0.1 / math.sqrt(3)  # t of two degrees of freedom
    assert merged["kl"] == pytest.approx(0.2) and merged["kl_stderr"] == pytest.approx(math.hypot(0.03, 0.1 / math.sqrt(3)))
    assert merged["flips:piqa"] == pytest.approx(0.25) and merged["size_bytes"] == DRAWS[0]["size_bytes"]
    assert not {"seed", "key"} & set(merged) and merged["recipe"] == "gptq:int3-g128"
    assert merge_draws([before, merged]) == [before, merged]
    assert merge_draws(DRAWS) == DRAWS  # without the baseline nothing is known of the change


def test_what_draws_disagree_on_is_counted_once():
    """Draws that differ in the windows they lose, not in what they lose in all: what they have in common is left."""
    found = merge_draws([NONE, row("gptq:int3-g128", 0.1 + NOISE, seed=0), row("gptq:int3-g128", 0.1 - NOISE, seed=1)])[1]
    assert found["nll_delta_between"] == pytest.approx(0, abs=1e-9) and found["nll_delta_stderr"] == pytest.approx(0, abs=1e-9)
    one_way = [row("gptq:int3-g128", 0.1 + (seed + 1) * NOISE, seed=seed) for seed in (0, 1)]
    assert merge_draws([NONE, *one_way])[1]["nll_delta_stderr"] == pytest.approx(math.sqrt(1 * 2) * estimate(NOISE).stderr)


def test_accuracies_are_of_each_questions_mean():
    wrong = [1, 0, 0, 1]
    found = merge_draws([NONE, row("gptq:int3-g128", 0.1), row("gptq:int3-g128", 0.2, seed=1, answers=wrong)])[1]
    assert found["accuracy:piqa"] == pytest.approx(0.5) and found["accuracy_delta:piqa"] == pytest.approx(-0.25)
    assert found["accuracy_delta_low:piqa"] < -0.25 < found["accuracy_delta_high:piqa"]
    assert found["accuracy_mean_delta"] == found["accuracy_delta:piqa"]
    assert found["accuracy_mean_delta_stderr"] == pytest.approx(found["accuracy_delta_stderr:piqa"])
    assert "answers:piqa" not in found
    same = merge_draws([NONE, row("gptq:int3-g128", 0.1), row("gptq:int3-g128", 0.2, seed=1)])[1]
    sure = accuracy_difference(np.equal(RIGHT, GOLD), np.equal(RIGHT, GOLD))
    assert same["accuracy_delta_stderr:piqa"] == pytest.approx(sure.stderr)  # no flip of four is little evidence, not certainty
    line = {cells[0]: cells for cells in accuracy_table([NONE, *DRAWS]).cells()}["gptq:int3-g128"]
    assert line[1] == "3" and line[3].startswith("≈ +22.1 ± ") and line[-1] == "25.00"


def test_flips_have_errors_over_questions_or_their_texts_and_draws():
    """Right to wrong and back both count; flips of one text come together."""
    gold, texts = [0] * 40, np.arange(40) // 4
    before = NONE | {"answers:piqa": gold, "gold:piqa": gold, "documents:piqa": texts.tolist()}
    flipped = [texts < count for count in (1, 2)]
    first, second = (
        row("gptq:int3-g128", 0.1 * (1 + seed), seed=seed) | {"answers:piqa": each.astype(int).tolist(), "gold:piqa": gold}
        for seed, each in enumerate(flipped)
    )
    (alone,) = merge_draws([before, first])[1:]
    assert alone["flips_stderr:piqa"] == pytest.approx(estimate(flipped[0].astype(float), None, texts).stderr)
    assert alone["flips_stderr:piqa"] > 1.5 * estimate(flipped[0].astype(float)).stderr
    (both,) = merge_draws([before, first, second])[1:]
    of_texts = estimate(np.mean(flipped, axis=0), None, texts).stderr
    assert math.hypot(of_texts / 2, 0.05) < both["flips_stderr:piqa"] <= math.hypot(of_texts, 0.05) * 1.001
    back = merge_draws([before | {"answers:piqa": first["answers:piqa"]}, first | {"answers:piqa": gold}])[1]
    assert back["flips_stderr:piqa"] == pytest.approx(alone["flips_stderr:piqa"])


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05])
def test_errors_of_accuracies_cover_the_change_over_all_questions_and_draws(spread):
    """A draw loses each right answer with a probability of its own, on average 0.2: the change is -0.2 x 0.6."""
    generator, hits, trials = np.random.default_rng(7), 0, 600
    for _ in range(trials):
        right = generator.random(300) < 0.6
        lost = generator.random((3, 300)) < np.clip(0.2 + spread * generator.standard_normal((3, 1)), 0, 1)
        found = with_draws(*accuracy_change((right & ~lost).astype(float), right[None].astype(float), None)).change
        hits += found.low <= -0.12 <= found.high
    assert 0.93 <= hits / trials <= 0.99


def test_what_no_seed_changed_is_no_draw():
    same = [row("rtn:int3-g128", 0.1, seed=seed) for seed in (0, 1)]
    assert merge_draws([NONE, *same]) == [NONE, same[0] | {"flips_stderr:piqa": 0.0}]
    first, second = ({"calibration_source": "aa", "calibration_fingerprint": draw} for draw in "12")
    drawn = [row("awq:int8-g128", 0.1, **first), row("awq:int8-g128", 0.1, seed=1, **second)]  # both found that nothing helps
    assert merge_draws([NONE, *drawn])[1]["draws"] == 2
    given = [each | {"calibration_source": ""} for each in drawn]  # tokens somebody gave, drawn by no seed of ours
    assert [len(cell) for cell in draws_of(given)] == [1, 1]
    assert [len(cell) for cell in draws_of([drawn[0], drawn[1] | {"calibration_source": "bb"}])] == [1, 1]


def test_tables_have_one_line_a_recipe():
    rows = [NONE, *DRAWS, row("rtn:int3-g128", 0.3, order=None)]
    table = perplexity_table(rows)
    assert [line[:2] for line in table.cells()] == [["none", "-"], ["gptq:int3-g128", "3"], ["rtn:int3-g128", "-"]]
    assert table.notes[1].endswith("Of 3 draws it reaches up to 4.3 standard errors.")  # Student's t of two degrees of freedom
    assert "8 documents (the largest has 12 % of the tokens) and 3 draws of calibration data" in " ".join(table.notes)
    (line,) = seeds_table(rows).cells()
    assert (line[0], line[1], line[-1]) == ("gptq:int3-g128", "3", "+10.5, +22.1, +35.0")
    with pytest.raises(QjaxError, match="--seeds 3"):
        seeds_table([NONE, DRAWS[0]])
    found = dict(tables(rows))
    assert len(found["toy-python-docs-windows-512"].rows) == 3 and "toy-python-docs-windows-512-seeds" in found
    wide = [*rows, *(row(f"{method}:{fmt}", 0.1) for method in ("rtn", "gptq") for fmt in ("int4-g128", "int3-g32"))]
    assert has_widths(wide)
    assert "+22.1 ± 7.1" in to_markdown(widths_table(wide))


def test_cells_side_by_side_have_the_seeds_in_common():
    other = [row("awq:int3-g128", 0.1, seed=seed) for seed in (0, 2, 7)]
    found = in_step([DRAWS, other, [NONE]])
    assert [[each["key"] for each in step] for step in found] == [
        ["gptq:int3-g1280", "awq:int3-g1280", "none0"],
        ["gptq:int3-g1282", "awq:int3-g1282", "none0"],
    ]
    apart = in_step([DRAWS, [each | {"seed": each["seed"] + 10} for each in other[:2]]])
    assert len(apart) == 2
    assert in_step([[NONE], DRAWS[:1]]) == [[NONE, DRAWS[0]]]


def test_comparisons_pair_draws_of_one_seed():
    """Both recipes lose more with the same draws: their difference does not."""
    better = [row("awq:int3-g128", 0.1 * (1 + seed), seed=seed) for seed in (0, 1, 2)]
    worse = [row("gptq:int3-g128", 0.1 * (1 + seed) + 0.05 + NOISE, seed=seed) for seed in (0, 1, 2)]
    table = baseline_table([NONE, *better, *worse], better[1], "nll")
    assert [(line["recipe"], line["draws"]) for line in table.rows] == [("none", 3), ("gptq:int3-g128", 3)]
    assert table.rows[1]["difference"] == pytest.approx(0.05)
    assert table.rows[1]["difference_stderr"] == pytest.approx(estimate(NOISE).stderr)
    assert table.rows[0]["difference_stderr"] == pytest.approx(0.1 / math.sqrt(3))
    shifted = [
        each | {"window_nll": [nll + TOKENS * 0.01 for nll in each["window_nll"]], "nll": each["nll"] + 0.01} for each in worse
    ]
    (table,) = comparison_tables([NONE, *worse], [NONE, *shifted], ("a", "b"), "nll")
    assert [(line["recipe"], line.get("draws")) for line in table.rows] == [("none", None), ("gptq:int3-g128", 3)]
    assert table.rows[1]["difference"] == pytest.approx(0.01) and "each of 2 by itself" in " ".join(table.notes)
    (table, only) = comparison_tables(worse, shifted[:2], ("a", "b"), "accuracy:piqa")
    assert table.cells()[0][-1] == "0" and [line["seed"] for line in only.rows] == [2]


def test_estimates_by_model_text_and_recipe():
    found = cell_estimates([NONE, *DRAWS, row("rtn:int3-g128", 0.3)])
    assert list(found) == [("toy", "python-docs", recipe) for recipe in ("none", "gptq:int3-g128", "rtn:int3-g128")]
    gptq = found["toy", "python-docs", "gptq:int3-g128"]
    assert gptq.draws == 3 and gptq.change == pytest.approx(100 * math.expm1(0.2))
    assert gptq.change_low < 0 < gptq.change < gptq.change_high
    assert (gptq.accuracy, gptq.accuracy_change, gptq.flips) == ({"piqa": 75.0}, {"piqa": 0.0}, {"piqa": pytest.approx(25)})
    assert gptq.kl == pytest.approx(0.2) and gptq.row["draw_seeds"] == [0, 1, 2]
    assert found["toy", "python-docs", "none"].change == 0
    texts = [each | {"calibration": text} for text in ("c4", "ptb") for each in DRAWS]
    assert ("toy", "python-docs", "gptq:int3-g128", "c4") in cell_estimates([NONE, *texts])
