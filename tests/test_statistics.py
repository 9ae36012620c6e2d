"""qjax.evaluate.statistics: intervals of 95 % hold the truth in 93 to 97 % of simulated measurements."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qjax.errors import QjaxError
from qjax.evaluate.statistics import (
    accuracy_difference,
    aggregate_seeds,
    bootstrap_interval,
    count_flips,
    paired_difference,
    ratio_stderr,
)

TRIALS = 2000  # a true coverage of 95 % is measured as 95 ± 0.5 %
NOMINAL = (0.93, 0.97)


def covered(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


def windows(generator, n):
    """Losses of n windows under two models, nats: texts differ much, models little, and more on the harder texts."""
    hardness = generator.gamma(20, 0.1, n)
    counts = generator.integers(80, 128, n)
    baseline = hardness * counts
    change = (0.02 + 0.03 * generator.standard_normal(n) + 0.02 * (hardness - 2)) * counts
    return baseline + change, baseline, counts


@pytest.mark.parametrize("n", [30, 100])
def test_bootstrap_intervals_cover_paired_losses(n):
    """d_i depends on nothing but unit i, and E[sum d] / E[sum counts] = 0.02 because counts are independent of the rest."""
    generator = np.random.default_rng(n)
    found = []
    for _ in range(TRIALS):
        ours, theirs, counts = windows(generator, n)
        found.append(bootstrap_interval(ours - theirs, counts, resamples=400, seed=int(generator.integers(2**31))))
    assert NOMINAL[0] <= covered(found, 0.02) <= NOMINAL[1]


@pytest.mark.parametrize(("n", "least"), [(5, 0.9), (8, NOMINAL[0])])
def test_bootstrap_intervals_cover_few_units(n, least):
    """Plain percentiles would hold the truth in 83 % (n = 5) and 89 % (n = 8)."""
    changes = 0.02 + np.random.default_rng(n).standard_normal((TRIALS, n))
    found = [bootstrap_interval(change, resamples=600, seed=i) for i, change in enumerate(changes)]
    assert least <= covered(found, 0.02) <= NOMINAL[1]


def test_the_tails_of_few_units_are_expanded():
    """Quantiles Phi(sqrt(n / (n - 1)) t) of every resample of five units there is, by their definition."""
    units, counts = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([3, 1, 4, 1, 5])
    chosen = np.array(list(itertools.product(range(5), repeat=5)))
    ratios = units[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    tail = stats.norm.cdf(math.sqrt(5 / 4) * stats.t.ppf(0.05, 4))
    expected = np.quantile(ratios, [tail, 1 - tail])
    np.testing.assert_allclose(bootstrap_interval(units, counts, level=0.9, resamples=200_000), expected, rtol=0.02)


@pytest.mark.parametrize("n", [30, 100])
def test_standard_errors_cover_paired_losses(n):
    generator = np.random.default_rng(n + 1)
    found = []
    for _ in range(TRIALS):
        ours, theirs, counts = windows(generator, n)
        value, error = (ours - theirs).sum() / counts.sum(), ratio_stderr(ours - theirs, counts)
        found.append((value - 1.96 * error, value + 1.96 * error))
    assert NOMINAL[0] - 0.01 * (n < 50) <= covered(found, 0.02) <= NOMINAL[1]  # a normal quantile is 0.6 % short at n = 30


@pytest.mark.parametrize("n", [100, 200, 1000])
@pytest.mark.parametrize(("lost", "gained"), [(0.12, 0.08), (0.3, 0.1), (0.06, 0.06)])
def test_intervals_cover_accuracy_differences(n, lost, gained):
    generator = np.random.default_rng(n)
    outcomes = generator.choice(4, (TRIALS, n), p=[lost, gained, 0.4, 0.6 - lost - gained])
    found = [accuracy_difference((o == 1) | (o == 2), (o == 0) | (o == 2)) for o in outcomes]
    assert NOMINAL[0] <= covered([(d.low, d.high) for d in found], gained - lost) <= NOMINAL[1]
    assert np.mean([d.stderr for d in found]) == pytest.approx(np.std([d.value for d in found]), rel=0.1)


@pytest.mark.parametrize("n", [5, 8])
def test_intervals_of_few_answers_are_not_overconfident(n):
    """Half a question added to each outcome holds the truth more often than said, never less."""
    outcomes = np.random.default_rng(n).choice(3, (TRIALS, n), p=[0.3, 0.2, 0.5])
    found = [accuracy_difference(o == 1, o == 0) for o in outcomes]
    assert covered([(d.low, d.high) for d in found], -0.1) >= NOMINAL[0]


def test_bootstrap_intervals_cover_accuracy_differences():
    generator = np.random.default_rng(5)
    change = generator.choice([-1, 1, 0], (TRIALS, 200), p=[0.12, 0.08, 0.8])
    found = [bootstrap_interval(row, resamples=400, seed=i) for i, row in enumerate(change)]
    assert NOMINAL[0] <= covered(found, -0.04) <= NOMINAL[1]


@pytest.mark.parametrize("seeds", [3, 8])
def test_errors_over_seeds_cover_the_mean_difference(seeds):
    """change[s, i] = 0.02 + seed effect + unit effect + both: the error must hold the mean over all seeds and units."""
    generator = np.random.default_rng(seeds)
    hits = 0
    for _ in range(TRIALS):
        effect = 0.002 * generator.standard_normal((seeds, 1)) + 0.03 * generator.standard_normal(60)
        found = aggregate_seeds(0.02 + effect + 0.01 * generator.standard_normal((seeds, 60)))
        hits += abs(found.value - 0.02) <= 1.96 * found.stderr
    assert NOMINAL[0] <= hits / TRIALS <= NOMINAL[1]


def test_a_model_does_not_differ_from_itself():
    losses = np.arange(1.0, 9.0)
    same = paired_difference(losses, losses, np.full(8, 100))
    assert (same.value, same.stderr, same.low, same.high, same.is_noise) == (0, 0, 0, 0, True)
    right = np.arange(100) % 3 == 0
    same = accuracy_difference(right, right)
    assert same.value == 0 and same.is_noise
    assert 0.01 < same.high < 0.05  # no flip in 100 questions does not prove that there are none
    assert count_flips([0, 1], [0, 1], [0, 0]) == (0, 0, 0, 2)


def test_pairing_cancels_what_texts_are_like():
    generator = np.random.default_rng(0)
    ours, theirs, counts = windows(generator, 200)
    paired = paired_difference(ours, theirs, counts)
    assert paired.low < paired.value < paired.high and not paired.is_noise
    assert paired.stderr < 0.15 * math.hypot(ratio_stderr(ours, counts), ratio_stderr(theirs, counts))
    assert paired.stderr == ratio_stderr(ours - theirs, counts)
    assert (paired.high - paired.low) / (2 * 1.96 * paired.stderr) == pytest.approx(1, abs=0.1)


def test_flips_count_both_ways():
    gold, before, now = [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1], [0, 1, 0, 2, 0, 0]
    flips = count_flips(now, before, gold)
    assert flips == (2, 1, 4, 6)
    assert flips.fraction == 0.5


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_flips_explain_the_accuracy_difference(answers):
    now, before, gold = (np.array(column) for column in zip(*answers, strict=True))
    flips = count_flips(now, before, gold)
    difference = accuracy_difference(now == gold, before == gold)
    assert difference.value == pytest.approx((flips.to_right - flips.to_wrong) / len(gold))
    assert flips.to_right + flips.to_wrong <= flips.changed
    assert difference.low <= difference.value <= difference.high


def test_standard_errors_by_hand():
    """Of units of equal counts that of a mean, n - 1 in it; of ratios the linear one: sum((d - R c)^2) n / (n - 1)."""
    totals = np.array([3.0, 5.0, 10.0, 2.0])
    assert ratio_stderr(totals, np.full(4, 7)) == pytest.approx(np.std(totals, ddof=1) / 2 / 7)
    # R = 20 / 10; residuals 1, -1, 2, -2
    assert ratio_stderr(totals, np.array([1, 3, 4, 2])) == pytest.approx(math.sqrt(4 / 3 * 10) / 10)


def test_too_little_to_know():
    assert math.isnan(bootstrap_interval([1.0])[0])
    assert math.isnan(ratio_stderr(np.array([1.0]), np.array([1])))
    assert math.isnan(paired_difference([1.0, math.inf], [0.0, 0.0]).low)
    one = aggregate_seeds(np.array([0.1, 0.2, 0.3]))
    assert (one.seeds, math.isnan(one.between)) == (1, True)
    for bad in (
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: accuracy_difference([], []),
        lambda: count_flips([1], [1], []),
    ):
        with pytest.raises(QjaxError, match="same"):
            bad()
