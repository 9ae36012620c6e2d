"""Several seeds of one recipe as one line: mean change from the baseline, and how much of its error is the seeds'.

The change is averaged over seeds window by window and question by question; its error adds what windows (or questions) and what
seeds contribute (`evaluate/statistics.py`).
"""

import math
from collections.abc import Sequence

import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.statistics import accuracy_difference, aggregate_draws, with_draws
from qjax.report.accuracy import tasks_of
from qjax.report.rendering import (
    Row,
    Table,
    TableColumn,
    columns_of,
    decimals,
    documents_of,
    loss_change,
    number,
    significant,
    with_error,
)
from qjax.report.tables import NOISE, describe, distinctions, in_order, is_baseline, over_units, require_one_group
from qjax.sweep.rows import cell_columns

KEPT = (
    *("recipe", "method", "format", "model", "fingerprint", "baseline", "baseline_fingerprint", "corpus", "convention"),
    *("bits_per_weight", "size_bytes"),
    *("calibration", "calibration_windows", "calibration_window_tokens", "place", "place_recipe"),
)


def seeds_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed and what it drew alone, of other models than the baseline with more than one seed.

    Recipes that draw nothing give the same figures under every seed: these are no samples and are left out.
    """
    return [group for group in _by_recipe(rows) if _varies(group)]


def _varies(group: Sequence[Row]) -> bool:
    return any(row["window_nll"] != group[0]["window_nll"] for row in group)


def _by_recipe(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        drawn = {"seed", *(["calibration_fingerprint"] if row.get("calibration_source") else [])}
        if not is_baseline(row) and "window_nll" in row:
            groups.setdefault(cell_columns(row, without=drawn), []).append(row)
    return list(groups.values())


def merge_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row for every recipe with several seeds: mean change of perplexity and accuracy, errors, deviation between seeds.

    Raises QjaxError where the baseline's row is missing.
    """
    baseline = _baseline(rows)
    return [_merge(group, baseline) for group in seeds_of(rows)]


def _baseline(rows: Sequence[Row]) -> Row:
    baseline = next((row for row in rows if is_baseline(row) and "window_nll" in row), None)
    if baseline is None:
        raise QjaxError("seeds are compared with the baseline, whose row is missing; `qjax sweep` measures it")
    return baseline


def _merge(group: Sequence[Row], baseline: Row) -> Row:
    first, counts = group[0], np.array(baseline["window_tokens"])
    with np.errstate(invalid="ignore"):  # of seeds that diverged the mean is infinite and its error unknown
        found = aggregate_draws([loss_change(row, baseline) for row in group], counts, documents_of(baseline))
    change = found.change
    ratio = math.exp(change.value) if change.value < 700 else math.inf
    merged = {key: first[key] for key in KEPT if key in first} | {
        "seeds": found.draws,
        "nll_delta": change.value,
        "nll_delta_stderr": change.stderr,
        "nll_delta_low": change.low,
        "nll_delta_high": change.high,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * change.stderr,
        "perplexity_ratio_between": ratio * found.between,
    }
    for task in (task for task in tasks_of(group) if f"answers:{task}" in baseline):
        gold, documents = np.array(baseline[f"gold:{task}"]), baseline.get(f"documents:{task}") or None
        before, *right = (np.equal(row[f"answers:{task}"], gold) for row in (baseline, *group))
        # The error over questions is that of a single seed's difference, which few changed answers do not make 0.
        single = [accuracy_difference(each, before, documents) for each in right]
        typical = single[0]._replace(stderr=float(np.mean([each.stderr for each in single])))
        found = with_draws(typical, np.array([each.value for each in single]))
        change = found.change
        merged |= {f"accuracy_delta:{task}": change.value, f"accuracy_delta_stderr:{task}": change.stderr}
        merged |= {f"accuracy_delta_low:{task}": change.low, f"accuracy_delta_high:{task}": change.high}
        merged[f"accuracy_delta_between:{task}"] = found.between
    return merged


def seeds_table(rows: Sequence[Row]) -> Table:
    """One line for every recipe, its seeds together; raises QjaxError where none has several."""
    require_one_group(rows)
    if not seeds_of(rows):
        raise QjaxError("no recipe was measured with more than one seed; `qjax sweep --seed N` measures another")
    baseline = _baseline(rows)
    merged = in_order(_merge(group if _varies(group) else group[:1], baseline) for group in _by_recipe(rows))
    columns = [
        TableColumn("recipe", "recipe", text=True),
        *distinctions(merged, seed=False),
        TableColumn("seeds", "seeds"),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("perplexity_ratio", "perplexity\nchange (%)", _change, error="perplexity_ratio_stderr"),
        TableColumn("perplexity_ratio_between", "between\nseeds", _between, rank=1),
    ]
    for task in tasks_of(rows):
        error = f"accuracy_delta_stderr:{task}"
        columns.append(TableColumn(f"accuracy_delta:{task}", f"{task} change\n(points)", _points, error=error))
        columns.append(TableColumn(f"accuracy_delta_between:{task}", "between\nseeds", _between, rank=1))
    units = over_units(rows, "documents (questions)")
    notes = (
        f"±: standard error of the mean over seeds, over {units} and seeds together; of one seed, over the former.",
        "Between seeds: standard deviation.",
        NOISE,
    )
    return Table(f"Seeds together, {describe(rows[0])}", columns_of(merged, columns), tuple(merged), notes)


def _change(row: Row, key: str) -> str:
    noise = number(row, "nll_delta_low") <= 0 <= number(row, "nll_delta_high")
    return _marked(noise, 100 * (number(row, key) - 1), 100 * number(row, f"{key}_stderr"))


def _points(row: Row, key: str) -> str:
    stderr, low, high = (100 * number(row, key.replace("_delta:", f"_delta_{part}:")) for part in ("stderr", "low", "high"))
    return _marked(low <= 0 <= high, 100 * number(row, key), stderr)


def _marked(noise: bool, value: float, error: float) -> str:
    return ("≈ " if noise else "") + with_error(value, error, sign="+")


def _between(row: Row, key: str) -> str:
    return significant(100 * number(row, key), 2)
