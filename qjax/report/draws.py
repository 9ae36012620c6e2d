"""Draws of calibration data: rows of one cell that differ in their seed alone, together as one row of the same columns.

Every table and figure shows such rows, so that there is one line a recipe and one error:

    nll_delta   mean over draws of the loss above the baseline's, nats a token; perplexity_ratio = exp of it: the geometric mean
    its error   of documents and draws together: the loss of every window is averaged over draws, documents are left out one by
                one, and what draws differ by is added (`evaluate/statistics.py`: formulas and simulation)
    nll, perplexity, accuracy, accuracy_delta    in the same way, questions in the place of windows
    flips       mean over draws; of one draw too, their error is added here (flips_stderr), as that of accuracy
    kl and other columns with a standard error   mean over draws, the error of one draw taken as that over documents, which is
                too large rather than too small: rows do not keep what each window adds
    sizes, times and other figures               mean over draws

What differs between draws and is no figure (seed, key, answers) is left out. Recipes that read no data have one row, whatever
seeds it was measured with, and its error. Added columns:

    draws                 how many
    nll_delta_draws       of each draw, by seed; draw_seeds: the seeds
    nll_delta_between     their standard deviation
    nll_delta_documents   the part of the standard error that is the documents', the same in every draw: its square and that of
                          nll_delta_between over draws are that of nll_delta_stderr
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qjax.evaluate.statistics import (
    Difference,
    accuracy_difference,
    aggregate_draws,
    estimate,
    interval,
    twice_counted,
    with_draws,
)
from qjax.report.rendering import Row, documents_of, losses, number
from qjax.sweep.columns import column_of
from qjax.sweep.rows import cell_columns, is_baseline

DRAWS = "draws"
GEOMETRIC = ("perplexity", "perplexity_ratio", "word_perplexity")  # figures whose mean over draws is that of their logarithms
LARGEST_EXPONENT = 700  # of a float


def merge_draws(rows: Sequence[Row]) -> list[Row]:
    """A row for every cell, in order of first appearance. rows: of one table (`split_tables`), merged already or not.

    Without the baseline's row, or the losses of windows, rows stay as they are.
    """
    baseline = next((row for row in rows if is_baseline(row) and "window_nll" in row), None)
    return list(rows) if baseline is None else [_merged(group, baseline) for group in draws_of(rows)]


def draws_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by cell, each with its draws by seed; of rows that drew nothing, or the same, the first alone."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(cell_columns(row, any_draw="window_nll" in row), []).append(row)
    return [sorted(group, key=_seed) if drew(group) else group[:1] for group in groups.values()]


def in_step(cells: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Cells draw by draw: for every seed that all cells of several draws have, a row of each; a cell of one row has that for
    every seed. Where they have no seed in common, draws are as they come.
    """
    by_seed = [{_seed(row): row for row in cell} for cell in cells]
    several = [set(found) for found in by_seed if len(found) > 1]
    common = sorted(set.intersection(*several)) if several else []
    if not common:
        count = min(map(len, several), default=1)
        return [[cell[min(draw, len(cell) - 1)] for cell in cells] for draw in range(count)]
    return [[found.get(seed, next(iter(found.values()))) for found in by_seed] for seed in common]


def _seed(row: Row) -> float:
    return number(row, "seed")


def drew(group: Sequence[Row]) -> bool:
    """Whether rows that differ in their seed are draws: what they drew differs, or what came of it."""
    return any(group[0].get(name) != row.get(name) for row in group for name in ("calibration_fingerprint", "window_nll"))


def _merged(group: Sequence[Row], baseline: Row) -> Row:
    flips = {} if group[0] is baseline else _errors_of_flips(group, baseline)
    if len(group) == 1:
        return group[0] | flips if flips else group[0]
    found = {name: value for name, value in group[0].items() if all(name in row and row[name] == value for row in group)}
    found |= {name: mean for name in group[0] if (mean := mean_of(group, name)) is not None}
    found |= _typical_errors(group, found)
    found |= _losses(group, baseline)
    return found | flips | _accuracies(group, baseline) | {DRAWS: len(group), "draw_seeds": [row.get("seed") for row in group]}


def mean_of(group: Sequence[Row], name: str) -> float | None:
    """The mean of a figure over draws, itself where all are equal; None of what is no figure, or what a draw lacks."""
    declared, values = column_of(name), [row.get(name) for row in group]
    known = declared is None or declared.role in ("found", "spent")
    if not known or not all(map(_is_number, values)):
        return None
    if all(value == values[0] for value in values):
        return values[0]
    numbers = np.array(values, float)
    return float(np.exp(np.mean(np.log(numbers))) if name.partition(":")[0] in GEOMETRIC else np.mean(numbers))


def _is_number(value: object) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value == "inf"


def _typical_errors(group: Sequence[Row], found: Row) -> dict[str, float]:
    """Errors of figures of which rows keep no parts: of one draw over documents, and between draws."""
    columns = {}
    for name in (name for name in found if "_stderr" in name):
        values = [number(row, name.replace("_stderr", "")) for row in group]
        errors = np.array([number(row, name) for row in group])
        over_documents = interval(float(np.mean(values)), math.sqrt(float(np.mean(errors**2))))
        columns[name] = with_draws(over_documents, values).change.stderr
    return columns


def _losses(group: Sequence[Row], baseline: Row) -> dict[str, object]:
    """Perplexity and its change."""
    counts, documents = np.array(baseline["window_tokens"]), documents_of(baseline)
    ours = np.array([losses(row) for row in group])
    with np.errstate(invalid="ignore"):  # of draws that diverged
        own, change = (aggregate_draws(each, counts, documents) for each in (ours, ours - losses(baseline)))
    nll, delta = (float(np.mean([number(row, name) for row in group])) for name in ("nll", "nll_delta"))  # not rounded
    perplexity, ratio = (math.exp(each) if each < LARGEST_EXPONENT else math.inf for each in (nll, delta))
    shift = delta - change.change.value if math.isfinite(delta) else 0.0
    return {
        "nll": nll,
        "nll_stderr": own.change.stderr,
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * own.change.stderr,
        "window_nll": ours.mean(axis=0).tolist(),
        "nll_delta": delta,
        "nll_delta_stderr": change.change.stderr,
        "nll_delta_low": change.change.low + shift,
        "nll_delta_high": change.change.high + shift,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * change.change.stderr,
        "nll_delta_documents": change.units,
        "nll_delta_between": change.between,
        "nll_delta_draws": [number(row, "nll_delta") for row in group],
    }


# --- accuracy -------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A figure before its draws are put together: what `with_draws` takes."""

    over_units: Difference
    values: Float[np.ndarray, " draws"]
    both: float


def right_answers(rows: Sequence[Row], task: str, suffix: str = "") -> Float[np.ndarray, "draws questions"]:
    """1 for every right answer. suffix: "", or "_norm" of answers by log-likelihood per character."""
    return np.array([np.equal(row[f"answers{suffix}:{task}"], row[f"gold:{task}"]) for row in rows], float)


def accuracy_change(
    ours: Float[np.ndarray, "draws n"], theirs: Float[np.ndarray, "draws n"], documents: Sequence[int] | None
) -> Part:
    """Difference of the accuracies of right answers to the same questions; theirs: of as many draws, or of one for all."""
    found = accuracy_difference(ours.mean(axis=0), theirs.mean(axis=0), documents)
    return Part(found, (ours - theirs).mean(axis=1), twice_counted(ours - theirs, None, documents))


def _share(ours: Float[np.ndarray, "draws n"], documents: Sequence[int] | None) -> Part:
    """The share of questions with the larger of its errors over questions and over documents, as rows of one draw have it."""
    over = max((estimate(ours.mean(axis=0), None, each) for each in (None, documents)), key=lambda found: found.stderr)
    return Part(over, ours.mean(axis=1), twice_counted(ours, None, documents))


def _over_tasks(parts: Sequence[Part]) -> Part:
    """The mean over tasks, whose questions are independent and whose draws are the same."""
    value, many = float(np.mean([part.over_units.value for part in parts])), len(parts)
    stderr = math.hypot(*(part.over_units.stderr for part in parts)) / many
    reach = math.hypot(*((part.over_units.high - part.over_units.low) / 2 for part in parts)) / many
    values, both = np.mean([part.values for part in parts], axis=0), sum(part.both for part in parts) / many**2
    return Part(Difference(value, stderr, value - reach, value + reach), values, both)


class _Answered(NamedTuple):
    """Which answers of a task are right, of several draws and of the baseline. suffix: of the columns' names."""

    task: str
    suffix: str
    ours: Float[np.ndarray, "draws n"]
    before: Float[np.ndarray, "1 n"]
    documents: Sequence[int] | None

    def column(self, name: str, end: str = "") -> str:
        """accuracy_norm_delta:piqa, of a name such as "accuracy", the suffix "_norm" and an end such as "_delta"."""
        return f"{name}{self.suffix}{end}:{self.task}"


def _answered(group: Sequence[Row], baseline: Row) -> Iterator[_Answered]:
    """What all rows and the baseline were asked, by both kinds of answers."""
    tasks = [name.partition(":")[2] for name in baseline if name.startswith("answers:")]
    for task, suffix in ((task, suffix) for task in tasks for suffix in ("", "_norm")):
        if all(row.get(f"answers{suffix}:{task}") for row in (baseline, *group)):
            right = (right_answers(rows, task, suffix) for rows in (group, [baseline]))
            yield _Answered(task, suffix, *right, baseline.get(f"documents:{task}") or None)


def _errors_of_flips(group: Sequence[Row], baseline: Row) -> dict[str, float]:
    """Of the share of questions whose answer is right in one of two models alone."""
    shares = {
        each.column("flips", "_stderr"): (abs(each.ours - each.before), each.documents) for each in _answered(group, baseline)
    }
    return {name: with_draws(*_share(*found)).change.stderr for name, found in shares.items()}


def _accuracies(group: Sequence[Row], baseline: Row) -> dict[str, float]:
    """Accuracies of every task with their changes, and the means over tasks."""
    parts: dict[str, Part] = {}
    for each in _answered(group, baseline):
        parts[each.column("accuracy")] = _share(each.ours, each.documents)
        parts[each.column("accuracy", "_delta")] = accuracy_change(each.ours, each.before, each.documents)
    for name in ("accuracy", "accuracy_delta"):
        if every := [part for column, part in parts.items() if column.startswith(f"{name}:")]:
            parts[name.replace("accuracy", "accuracy_mean")] = _over_tasks(every)
    columns = {}
    for column, part in parts.items():
        name, colon, task = column.partition(":")
        found = with_draws(*part).change
        ends = {"stderr": found.stderr} | ({"low": found.low, "high": found.high} if name.endswith("_delta") else {})
        columns |= {column: found.value} | {f"{name}_{end}{colon}{task}": value for end, value in ends.items()}
    return columns
