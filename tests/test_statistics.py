"""qjax.evaluate.statistics: intervals of 95 % hold the truth in 93 to 97 % of simulated measurements."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.signal import lfilter

from qjax.errors import QjaxError
from qjax.evaluate.statistics import (
    accuracy_difference,
    aggregate_draws,
    autocorrelation,
    count_flips,
    estimate,
    paired_difference,
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


@pytest.mark.parametrize("n", [8, 30, 100])
def test_intervals_cover_paired_losses(n):
    """d_i depends on nothing but unit i, and E[sum d] / E[sum counts] = 0.02 because counts are independent of the rest."""
    generator = np.random.default_rng(n)
    found = []
    for _ in range(TRIALS):
        ours, theirs, counts = windows(generator, n)
        found.append(paired_difference(ours, theirs, counts)[2:4])
    assert NOMINAL[0] <= covered(found, 0.02) <= NOMINAL[1]


def documents_of(generator, sizes, rho=0.5):
    """Changes of windows whose documents differ, and whose neighbours in a document are alike; true mean 0."""
    documents = np.repeat(np.arange(len(sizes)), sizes)
    noise = generator.standard_normal(len(documents))
    for i in range(1, len(noise)):
        if documents[i] == documents[i - 1]:
            noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    return (0.7 * generator.standard_normal(len(sizes)))[documents] + noise, documents


@pytest.mark.parametrize(("documents", "largest"), [(119, 134), (30, 0), (10, 0), (15, 100)])
def test_intervals_cover_windows_of_unequal_documents(documents, largest):
    """The largest holds a seventh of the windows, or most of them. Windows taken as independent cover too little."""
    generator = np.random.default_rng(documents)
    found, naive = [], []
    for _ in range(TRIALS // 2):
        sizes = np.maximum(1, generator.lognormal(1.5, 1.0, documents).astype(int))
        sizes[0] = largest or sizes[0]
        change, of = documents_of(generator, sizes)
        counts = np.full(len(change), 100)
        found.append(estimate(100 * change, counts, of)[2:4])
        naive.append(estimate(100 * change, counts)[2:4])
    assert NOMINAL[0] <= covered(found, 0) <= 0.99  # on the safe side where one document is most of the text
    assert covered(naive, 0) < 0.85


@pytest.mark.parametrize(("n", "rho"), [(64, 0.3), (128, 0.6), (512, 0.6)])
def test_intervals_cover_consecutive_windows_of_one_document(n, rho):
    """Blocks of windows: taken as independent they would hold the truth in 68 % at a correlation of 0.6."""
    generator = np.random.default_rng(n)
    change = lfilter([1], [1, -rho], generator.standard_normal((TRIALS, n + 100)))[:, 100:]
    one = np.zeros(n, int)
    assert NOMINAL[0] <= covered([estimate(each, None, one)[2:4] for each in change], 0) <= NOMINAL[1]
    assert covered([estimate(each)[2:4] for each in change], 0) < 0.9
    less_its_bias = rho - (1 + 3 * rho) / n  # Kendall 1954
    assert np.mean([autocorrelation(each) for each in change]) == pytest.approx(less_its_bias, abs=0.01)


def test_a_document_is_one_unit():
    """However many windows it is cut into; units by hand: R = 20 / 10, without each: 17 / 9, 15 / 7, 10 / 6, 18 / 8."""
    totals, counts = np.array([3.0, 5.0, 10.0, 2.0]), np.array([1, 3, 4, 2])
    left_out = np.array([17 / 9, 15 / 7, 10 / 6, 18 / 8])
    by_hand = math.sqrt(3 / 4 * np.sum((left_out - left_out.mean()) ** 2))
    whole = estimate(totals, counts)
    assert whole.stderr == pytest.approx(by_hand)
    n = 10**2 / (1 + 9 + 16 + 4)
    assert (whole.value, whole.dof) == (2, pytest.approx(n - 1))
    assert whole.high == pytest.approx(2 + stats.t.ppf(0.975, n - 1) * by_hand)
    documents, equal = np.repeat(np.arange(8), 5), np.random.default_rng(0).standard_normal(8)
    cut = estimate(np.repeat(equal, 5) / 5, np.full(40, 0.2), documents)
    np.testing.assert_allclose(cut, estimate(equal), rtol=1e-12)
    np.testing.assert_allclose(estimate(np.repeat(equal, 5) / 5, np.full(40, 0.2), 3 * documents - 7), cut)


def test_p_values_agree_with_intervals():
    changes = np.random.default_rng(3).standard_normal((200, 12)) + 0.5
    found = [estimate(change) for change in changes]
    assert all(each.is_noise == (each.p >= 0.05) for each in found) and 20 < sum(each.is_noise for each in found) < 180
    assert found[0].p == pytest.approx(stats.ttest_1samp(changes[0], 0).pvalue)
    assert estimate(np.zeros(5)).p == 1


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
    """A question added to either way of differing holds the truth more often than said, never less."""
    outcomes = np.random.default_rng(n).choice(3, (TRIALS, n), p=[0.3, 0.2, 0.5])
    found = [accuracy_difference(o == 1, o == 0) for o in outcomes]
    assert covered([(d.low, d.high) for d in found], -0.1) >= NOMINAL[0]


def test_intervals_cover_accuracies_of_questions_that_share_documents():
    """Questions of a document go wrong together."""
    generator, found, naive = np.random.default_rng(5), [], []
    documents = np.repeat(np.arange(40), 10)
    for _ in range(TRIALS // 2):
        lost = generator.random(40)[documents] * 0.4 > generator.random(400)
        together = np.repeat(generator.random(40) < 0.1, 10)
        ours, theirs = ~(lost | together), ~np.repeat(generator.random(40) < 0.1, 10)
        found.append(accuracy_difference(ours, theirs, documents)[2:4])
        naive.append(accuracy_difference(ours, theirs)[2:4])
    truth = 0.9 * 0.8 - 0.9
    assert NOMINAL[0] <= covered(found, truth) <= NOMINAL[1] + 0.01
    assert covered(naive, truth) < 0.7
    few = accuracy_difference(np.ones(30, bool), np.ones(30, bool), np.arange(30) // 10)
    assert few == accuracy_difference(np.ones(30, bool), np.ones(30, bool))  # the error over questions is the larger one


@pytest.mark.parametrize("draws", [3, 5])
@pytest.mark.parametrize(
    ("of_draw", "of_document", "of_both"),
    [(0, 1, 1), (0, 0.2, 1), (0.1, 0.3, 1), (0.3, 0.2, 1), (0.3, 1, 1), (1, 1, 1), (1, 0, 0.3)],
    ids=["both", "interaction", "a-little", "half", "some", "most", "draws"],
)
def test_errors_over_draws_cover_the_mean_of_all_draws_and_documents(draws, of_draw, of_document, of_both):
    """change[s, g] = 0 + draw + document + both, of 119 documents of which one holds an eighth of the windows."""
    generator = np.random.default_rng(draws)
    sizes = np.maximum(1, generator.lognormal(1.5, 1.0, 119).astype(int))
    sizes[0] = 134
    counts, found, trials = 100 * sizes, [], TRIALS // 4
    draw, document = of_draw * generator.standard_normal((trials, draws, 1)), generator.standard_normal((trials, 1, 119))
    change = draw + of_document * document + of_both * generator.standard_normal((trials, draws, 119))
    for each in change * counts:
        found.append(aggregate_draws(each, counts, np.arange(119)).change[2:4])
    assert NOMINAL[0] <= covered(found, 0) <= NOMINAL[1] + 0.015  # on the safe side


def test_errors_over_draws_by_hand():
    """Two draws of three documents of one token: means 2 and 4, every document's 2, 3, 4."""
    found = aggregate_draws(np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]), None, np.arange(3))
    over_documents, over_draws = 1 / math.sqrt(3), math.sqrt(2) / math.sqrt(2)  # deviations over square roots of numbers
    assert (found.change.value, found.draws) == (3, 2) and found.between == pytest.approx(math.sqrt(2))
    assert found.change.stderr == pytest.approx(math.hypot(over_documents, over_draws))
    blocks = estimate(np.array([2.0, 3.0, 4.0]), None, np.arange(3))
    reach = math.hypot(blocks.high - 3, stats.t.ppf(0.975, 1) * over_draws)
    assert (found.change.low, found.change.high) == (pytest.approx(3 - reach), pytest.approx(3 + reach))
    assert stats.t.ppf(0.975, found.change.dof) * found.change.stderr == pytest.approx(reach)  # p-values agree with it
    apart = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])  # what differs between draws is what differs between documents
    assert aggregate_draws(apart).change.stderr == 0
    same = aggregate_draws(np.array([[1.0, 2.0, 6.0]] * 3))
    np.testing.assert_allclose(same.change, estimate(np.array([1.0, 2.0, 6.0])))
    assert same.between == 0


def test_accuracies_over_draws_are_of_each_questions_mean():
    """Of two draws half a question counts half; no flips are little evidence, not none."""
    before, ours = np.array([1, 1, 0, 0, 1]), np.array([[1, 0, 0, 1, 1], [1, 0, 0, 0, 1]])
    found = accuracy_difference(ours.mean(axis=0), before)
    squares = (1 + 0.25 + 2) / 7
    assert found.value == pytest.approx(-0.1)
    assert found.stderr == pytest.approx(math.sqrt((squares - (0.5 / 7) ** 2) / 7))
    assert accuracy_difference(np.array([before, before]).mean(axis=0), before) == accuracy_difference(before, before)


def test_a_model_does_not_differ_from_itself():
    losses = np.arange(1.0, 9.0)
    same = paired_difference(losses, losses, np.full(8, 100))
    assert (same.value, same.stderr, same.low, same.high, same.p, same.is_noise) == (0, 0, 0, 0, 1, False)
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
    assert paired.stderr < 0.15 * math.hypot(estimate(ours, counts).stderr, estimate(theirs, counts).stderr)
    assert paired == estimate(ours - theirs, counts)
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


def test_too_little_to_know():
    assert math.isnan(estimate(np.array([1.0])).stderr) and math.isnan(estimate(np.array([1.0])).low)
    assert estimate(np.array([1.0, math.inf])).value == math.inf
    assert math.isnan(paired_difference([1.0, math.inf], [0.0, 0.0]).low)
    one = aggregate_draws(np.array([0.1, 0.2, 0.3]))
    assert (one.draws, math.isnan(one.between)) == (1, True)
    diverged = aggregate_draws(np.array([[1.0, 2.0], [1.0, math.inf]]))
    assert diverged.change.value == math.inf and math.isnan(diverged.change.stderr)
    for bad in (
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: accuracy_difference([], []),
        lambda: count_flips([1], [1], []),
    ):
        with pytest.raises(QjaxError, match="same"):
            bad()
