"""Two folders of results side by side: what was asked alike, old and new, and the difference with its paired error; or all rows
against one of them.

Rows match where model (fingerprint), recipe, text, convention, windows, seed and calibration are the same, and what else a
figure depends on: of tasks their questions, of differences the baseline. The difference of losses is paired window by window,
and of accuracies question by question, where both rows keep these; otherwise the two errors are added as if independent, or no
error is given. Rows that differ in their seed alone are draws of one line, whose mean difference has the error of documents and
draws together (`draws.py`).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.statistics import LEVEL, Difference, aggregate_draws, holm, interval, with_draws
from qjax.formats import UNQUANTIZED
from qjax.report.draws import DRAWS, accuracy_change, draws_of, drew, in_step, mean_of, right_answers
from qjax.report.rendering import (
    MISSING,
    Row,
    Table,
    TableColumn,
    columns_of,
    documents_of,
    loss_change,
    number,
    significant,
    with_error,
)
from qjax.report.tables import cells_of, distinctions, over_units
from qjax.sweep.columns import column_of, with_roles
from qjax.sweep.rows import cell_columns, named_model

DEFAULT_METRIC = "perplexity"
Pair = tuple[Row, Row]  # old, new; of the same seed where they are draws


def match_rows(
    old: Sequence[Row], new: Sequence[Row], asked: Sequence[str] = ()
) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    """(pairs, rows in old only, rows in new only); of rows that were asked the same the last one of a folder counts.

    asked: the columns in which rows match; none: those of the role asked.
    """
    asked = asked or with_roles("asked")
    before, after = ({_asked(row, asked): row for row in cells_of(rows)} for rows in (old, new))
    pairs = [(row, after[key]) for key, row in before.items() if key in after]
    return (
        pairs,
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
    )


def _asked(row: Row, asked: Sequence[str]) -> tuple[str, ...]:
    seedless = row["recipe"] == UNQUANTIZED or row.get("order", "") is None  # no seed changes it
    return tuple("" if key == "seed" and seedless else str(row.get(key)) for key in asked)


def _given(rows: Sequence[Row], metric: str) -> list[str]:
    """The further asked column that the metric depends on. Raises QjaxError for one that no row has, listing what they have."""
    metrics = dict.fromkeys(key for row in cells_of(rows) for key, value in row.items() if _is_metric(key, value))
    if metric not in metrics:
        raise QjaxError(f"no row has the metric {metric!r}; the rows have {', '.join(metrics)}")
    declared = column_of(metric)
    return [declared.given] if declared and declared.given else []


def comparison_tables(
    old: Sequence[Row], new: Sequence[Row], names: tuple[str, str], metric: str = DEFAULT_METRIC, *, family: bool = False
) -> list[Table]:
    """A table of the matched rows for each model and text, and one of the rows that only one folder has.

    names: of the two folders. metric: a column of numbers of the rows. family: differences of a table are marked so that one
    wrong mark among all of them has a probability of 5 % (Holm 1979), not each. Raises QjaxError where a folder has no rows,
    and for a metric that no row has, listing what they have.
    """
    for name, rows in zip(names, (old, new), strict=True):
        if not cells_of(rows):
            raise QjaxError(f"{name} holds no rows of a sweep to compare; `qjax sweep --out {name}` writes some")
    given = _given([*old, *new], metric)
    asked = [*with_roles("asked"), *given]
    pairs, gone, come = match_rows(old, new, asked)
    groups: dict[tuple, dict[tuple, list[Pair]]] = {}
    for pair in pairs:
        keys = ("model", "corpus", "convention", "windows", "fingerprint", "corpus_fingerprint", *given)
        lines = groups.setdefault(tuple(str(pair[1].get(key)) for key in keys), {})
        lines.setdefault(_asked(pair[1], [key for key in asked if key != "seed"]), []).append(pair)
    tables = []
    for key, lines in groups.items():
        model = named_model(next(iter(lines.values()))[0][1])
        title = f"{names[1]} against {names[0]}: {model} on {key[1]} ({key[2]}), {key[3]} windows"
        drawn = [pairs if any(map(drew, zip(*pairs, strict=True))) else pairs[:1] for pairs in lines.values()]
        tables.append(_pairs_table(title, drawn, {"old": names[0], "new": names[1]}, metric, family))
    notes = () if pairs else (_nearest(gone, come, names, asked),)
    return tables + ([_single_table(gone, come, names, notes)] if gone or come else [])


def baseline_table(rows: Sequence[Row], baseline: Row, metric: str = DEFAULT_METRIC, *, family: bool = False) -> Table:
    """Every other cell of the baseline's text, convention and windows against that of the row, of whatever model and recipe;
    where the metric depends on more, those that agree in that. family: as in `comparison_tables`.

    Raises QjaxError where there is none, and for a metric that no row has.
    """
    keys = ["corpus_fingerprint", "convention", "windows", *_given(rows, metric)]
    last = {cell_columns(row): row for row in (baseline, *cells_of(rows), baseline)}.values()
    own, *others = draws_of(row for row in last if all(row.get(key) == baseline.get(key) for key in keys))
    if not others:
        raise QjaxError(f"no other row has the {', '.join(keys)} of row {baseline['key']}; measure some with `qjax sweep`")
    title = f"Against {baseline['recipe']} of {named_model(baseline)}, {baseline['corpus']} ({baseline['convention']})"
    return _pairs_table(title, [in_step([own, cell]) for cell in others], {"new": ""}, metric, family)


def _nearest(gone: Sequence[Row], come: Sequence[Row], names: tuple[str, str], asked: Sequence[str]) -> str:
    """What differs between the two rows that are most alike, where none were asked the same."""
    olds, news = ({_asked(row, asked): row for row in rows} for rows in (gone, come))
    pairs = ((one, other) for one in olds for other in news)
    one, other = min(pairs, key=lambda pair: sum(a != b for a, b in zip(*pair, strict=True)))
    differ = [f"{key} ({a}; {b})" for key, a, b in zip(asked, one, other, strict=True) if a != b]
    recipes = dict.fromkeys((str(olds[one]["recipe"]), str(news[other]["recipe"])))
    nearest = f"the nearest, {' and '.join(recipes)}, differ in {', '.join(differ)}"
    return f"No rows were asked the same in {names[0]} and {names[1]}; {nearest}."


def _is_metric(key: str, value: object) -> bool:
    declared = column_of(key)
    figure = isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in key
    return figure and (declared is None or declared.role in ("found", "spent"))


def _pairs_table(title: str, lines: Sequence[Sequence[Pair]], shown: Mapping[str, str], metric: str, family: bool) -> Table:
    """lines: the pairs of every line, draw by draw. shown: which of "old" and "new" has a column, with its name."""
    found = [_difference_of(*zip(*pairs, strict=True), metric) for pairs in lines]
    marked = holm([each.p for each in found]) if family else [each.p < 1 - LEVEL for each in found]
    rows = []
    for pairs, each, mark in zip(lines, found, marked, strict=True):
        old, new = (_value(side, metric) for side in zip(*pairs, strict=True))
        drawn = {DRAWS: len(pairs), "seed": None} if len(pairs) > 1 else {}
        figures = {"old": old, "new": new, "difference": new - old, "difference_stderr": each.stderr, "marked": mark}
        rows.append({**pairs[-1][1], **drawn, **figures})
    columns = [
        TableColumn("recipe", "recipe", text=True),
        *distinctions(rows),
        *(TableColumn(key, f"{metric}\n{name}".strip(), _figure) for key, name in shown.items()),
        TableColumn("difference", "difference", _difference, error="difference_stderr"),
    ]
    together = f", all {len(rows)} together (Holm 1979)" if family else f", each of {len(rows)} by itself"
    units = "questions" if metric.startswith("accuracy") else over_units(rows)
    notes = [
        f"±: standard error of the difference over {units}, paired where both rows keep what it takes.",
        f"*: the {LEVEL:.0%} interval of the difference does not hold zero{together}.",
    ]
    return Table(title, columns_of(rows, columns), tuple(rows), tuple(notes))


def _value(rows: Sequence[Row], metric: str) -> float:
    """The figure of rows that are draws; a count stays an integer."""
    value = mean_of(rows, metric)
    return value if isinstance(value, int) else math.nan if value is None else float(value)


def _single_table(gone: Sequence[Row], come: Sequence[Row], names: tuple[str, str], notes: tuple[str, ...]) -> Table:
    rows = [{**row, "only": name} for name, part in zip(names, (gone, come), strict=True) for row in part]
    columns = [
        TableColumn("only", "only in", text=True),
        TableColumn("recipe", "recipe", text=True),
        TableColumn("corpus", "corpus", text=True, rank=1),
        TableColumn("model", "model", lambda row, key: named_model(row), text=True, rank=2),
        TableColumn("convention", "convention", text=True, rank=3),
        TableColumn("windows", "windows", rank=4),
        TableColumn("seed", "seed", rank=4),
        TableColumn("key", "key"),
    ]
    return Table("Rows that only one folder has", columns_of(rows, columns), tuple(rows), notes)


def _difference_of(old: Sequence[Row], new: Sequence[Row], metric: str) -> Difference:
    """new - old, draw by draw; its errors are nan where they are not known."""
    if metric in ("perplexity", "nll", "nll_delta", "perplexity_ratio", "bits_per_byte"):
        return _loss_difference(old, new, metric)
    column, colon, task = metric.partition(":")
    gold, suffix = f"gold:{task}", "_norm" if column == "accuracy_norm" else ""
    kept = all(row.get(f"answers{suffix}:{task}") and row[gold] == old[0][gold] for row in (*old, *new))
    if column in ("accuracy", "accuracy_norm") and kept:
        ours, theirs = (right_answers(rows, task, suffix) for rows in (new, old))
        if np.array_equal(ours, theirs):
            return interval(0.0, 0.0)
        return with_draws(*accuracy_change(ours, theirs, new[0].get(f"documents:{task}") or None)).change
    changes = [number(after, metric) - number(before, metric) for before, after in zip(old, new, strict=True)]
    errors = [number(row, f"{column}_stderr{colon}{task}") for row in (*old, *new)]
    return with_draws(interval(float(np.mean(changes)), math.hypot(*errors) / math.sqrt(len(changes))), changes).change


def _loss_difference(old: Sequence[Row], new: Sequence[Row], metric: str) -> Difference:
    """Paired, over documents, carried from nll to the metric at the mean of both (the delta method)."""
    before, after = _value(old, metric), _value(new, metric)
    if not all("window_nll" in row and row["window_tokens"] == old[0]["window_tokens"] for row in (*old, *new)):
        return interval(after - before, math.nan)
    with np.errstate(invalid="ignore"):  # of models that diverged
        changes = np.array([loss_change(*pair) for pair in zip(new, old, strict=True)])
        found = aggregate_draws(changes, np.array(new[0]["window_tokens"]), documents_of(new[0])).change
    if metric in ("nll", "nll_delta"):
        slope = 1.0
    elif metric == "bits_per_byte":
        slope = after / _value(new, "nll")
    else:
        slope = (before + after) / 2
    return interval(after - before, slope * found.stderr, found.dof)


def _figure(row: Row, key: str) -> str:
    return str(row[key]) if isinstance(row[key], int) else significant(row[key], 5)


def _difference(row: Row, key: str) -> str:
    if row[key] == 0:
        return "0"
    if not math.isfinite(row[key]):
        return MISSING
    if isinstance(row[key], int):
        return f"{row[key]:+d}"
    mark = " *" if row["marked"] else ""
    return with_error(row[key], row["difference_stderr"], sign="+") + mark
