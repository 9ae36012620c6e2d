"""What rows say of every cell, by name: for tests that compute the numbers of a text again."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qjax.report.accuracy import tasks_of
from qjax.report.draws import DRAWS, merge_draws
from qjax.report.rendering import Row, number
from qjax.report.sensitivity import placed_alone
from qjax.report.tables import distinctions, name_orders, split_tables
from qjax.sweep.rows import named_model


class Estimate(NamedTuple):
    """A cell as tables show it, its draws together: changes and flips in percent, accuracies by task in percent and their
    changes in points, KL divergence in nats; nan is not known. row: with every other column.
    """

    perplexity: float
    perplexity_stderr: float
    change: float
    change_stderr: float
    change_low: float  # of its 95 % interval
    change_high: float
    bits_per_weight: float
    draws: int
    accuracy: dict[str, float]
    accuracy_change: dict[str, float]
    flips: dict[str, float]
    flips_stderr: dict[str, float]
    kl: float
    row: Row


def shown_rows(group: Sequence[Row]) -> list[Row]:
    """The rows of a group (`split_tables`) as tables and figures show them: one for a cell, its order named beside others."""
    return merge_draws(group if placed_alone(group) else name_orders(group))


def cell_estimates(rows: Iterable[Row]) -> dict[tuple[str, ...], Estimate]:
    """(model, text, recipe) -> its figures. Where calibration tells rows apart its text, number of windows, their tokens and
    its type follow, as far as they differ: (model, text, recipe, calibration text, ...).
    """
    found = {}
    for group in map(shown_rows, split_tables(rows)):
        told = [column.key for column in distinctions(group, seed=False) if column.key.startswith("calibration")]
        for row in group:
            apart = (str(row[key]) for key in told if row.get(key) is not None)
            found[named_model(row), str(row["corpus"]), str(row["recipe"]), *apart] = _estimate(row)
    return found


def _estimate(row: Row) -> Estimate:
    low, high = (100 * math.expm1(min(number(row, f"nll_delta_{end}"), 700.0)) for end in ("low", "high"))
    tasks = tasks_of([row])
    names = ("accuracy", "accuracy_delta", "flips", "flips_stderr")
    percent = {name: {task: 100 * number(row, f"{name}:{task}") for task in tasks} for name in names}
    return Estimate(
        number(row, "perplexity"),
        number(row, "perplexity_stderr"),
        100 * (number(row, "perplexity_ratio") - 1),
        100 * number(row, "perplexity_ratio_stderr"),
        low,
        high,
        number(row, "bits_per_weight"),
        int(row.get(DRAWS, 1)),
        *percent.values(),
        number(row, "kl"),
        row,
    )
