"""How sure a difference is: paired standard errors and intervals over windows or questions.

Two models measured on the same units differ by d_i on unit i; what a text or question is like cancels in d_i. Of the ratio
R = sum(d) / sum(counts) (a mean over tokens; counts of 1 give a mean over questions):

    stderr(R)^2 = n / (n - 1) sum((d_i - R counts_i)^2) / sum(counts)^2                  ratio estimator, Cochran 1977, 6.3
    bootstrap   quantiles of R over resampled units, taken a little farther out so that few units are not overconfident
                (Hesterberg 2015, arXiv 1411.5279: expanded percentile interval)
    accuracy    Wald interval of the difference of paired proportions with half a question added to each of the four outcomes
                (Bonett and Price 2012, doi 10.3102/1076998611411915): valid where few or no answers differ
    seeds       the variance over units of the mean over seeds, and the variance between seeds over their number, added
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from qjax.errors import QjaxError

LEVEL = 0.95
RESAMPLES = 2000


class Difference(NamedTuple):
    """A difference, its paired standard error, and the interval that holds the true one with probability LEVEL."""

    value: float
    stderr: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether no difference at all is within the interval."""
        return self.low <= 0 <= self.high


def paired_difference(
    ours: Float[np.ndarray, " n"],
    theirs: Float[np.ndarray, " n"],
    counts: Int[np.ndarray, " n"] | None = None,
    *,
    seed: int = 0,
) -> Difference:
    """(sum(ours) - sum(theirs)) / sum(counts) with a bootstrap interval. counts: tokens of each unit; 1 if None."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    counts = np.ones(len(ours)) if counts is None else np.asarray(counts, float)
    if not ours.shape == theirs.shape == counts.shape or ours.ndim != 1 or not len(ours):
        raise QjaxError(f"paired difference of {ours.shape} and {theirs.shape}, counts {counts.shape}: expected the same units")
    change = ours - theirs
    low, high = bootstrap_interval(change, counts, seed=seed)
    return Difference(float(change.sum() / counts.sum()), ratio_stderr(change, counts), low, high)


def ratio_stderr(totals: Float[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> float:
    """Standard error of sum(totals) / sum(counts) over independent units; nan for a single unit or infinite totals."""
    if len(totals) < 2:
        return math.nan
    mean = float(np.sum(totals) / np.sum(counts))
    if not math.isfinite(mean):
        return math.nan
    residual = totals - mean * counts
    return float(math.sqrt(len(totals) / (len(totals) - 1) * np.sum(residual**2)) / np.sum(counts))


def bootstrap_interval(
    totals: Float[np.ndarray, " n"],
    counts: Int[np.ndarray, " n"] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of sum(totals) / sum(counts) from resampled units; (nan, nan) for a single unit or infinite totals."""
    from scipy.special import ndtr, stdtrit

    totals = np.asarray(totals, float)
    counts = np.ones(len(totals)) if counts is None else np.asarray(counts, float)
    n = len(totals)
    if n < 2 or not np.all(np.isfinite(totals)):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    step = max(1, 2**22 // n)  # resampled units held at a time
    for start in range(0, resamples, step):
        chosen = generator.integers(0, n, (min(step, resamples - start), n))
        ratios[start : start + step] = totals[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def accuracy_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Difference:
    """Difference of two accuracies on the same questions; True is a right answer."""
    from scipy.special import ndtri

    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise QjaxError(f"accuracies over {ours.shape} and {theirs.shape} answers: expected the same questions")
    n, gained, lost = len(ours), int(np.sum(ours & ~theirs)), int(np.sum(~ours & theirs))
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle, spread = more - less, math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    reach = float(ndtri((1 + LEVEL) / 2)) * spread
    value = (gained - lost) / n
    return Difference(value, spread, min(middle - reach, value), max(middle + reach, value))


class Flips(NamedTuple):
    """How many answers changed between two models (Dutta et al. 2024, "Accuracy is not all you need", arXiv 2407.09141)."""

    to_wrong: int  # right before, wrong now
    to_right: int
    changed: int  # any other answer than before, two wrong ones included
    questions: int

    @property
    def fraction(self) -> float:
        """Answers that went from right to wrong or back, of all questions: the paper's flips."""
        return (self.to_wrong + self.to_right) / self.questions


def count_flips(answers: Sequence[int], baseline: Sequence[int], gold: Sequence[int]) -> Flips:
    """Flips of a model's answers against a baseline's."""
    now, before, gold = np.asarray(answers), np.asarray(baseline), np.asarray(gold)
    if not now.shape == before.shape == gold.shape:
        raise QjaxError(f"flips of {now.shape} answers against {before.shape}, gold {gold.shape}: expected the same questions")
    right, was_right = now == gold, before == gold
    return Flips(int(np.sum(was_right & ~right)), int(np.sum(~was_right & right)), int(np.sum(now != before)), len(gold))


class Aggregate(NamedTuple):
    """A figure over several seeds."""

    value: float  # mean over seeds
    stderr: float  # of units and seeds together
    between: float  # standard deviation between seeds; nan for a single seed
    seeds: int


def aggregate_seeds(changes: Float[np.ndarray, "seeds n"], counts: Int[np.ndarray, " n"] | None = None) -> Aggregate:
    """Mean difference over seeds of changes on the same units.

    The error takes units and seeds as two samples; what they do together is in both terms, which errs on the safe side.
    """
    changes = np.atleast_2d(np.asarray(changes, float))
    counts = np.ones(changes.shape[1]) if counts is None else np.asarray(counts, float)
    values = changes.sum(axis=1) / counts.sum()
    seeds = len(values)
    between = float(np.std(values, ddof=1)) if seeds > 1 else math.nan
    over_units = ratio_stderr(changes.mean(axis=0), counts)
    stderr = over_units if seeds == 1 else math.hypot(over_units, between / math.sqrt(seeds))
    return Aggregate(float(values.mean()), stderr, between, seeds)
