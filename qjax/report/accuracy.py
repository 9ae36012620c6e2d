"""The table of accuracy beside perplexity, from rows alone.

Columns of a row are named COLUMN:TASK (`sweep/measurements/tasks.py`). A change is marked ≈ where its 95 % interval,
paired question by question, holds zero. Points are percentage points.
"""

import math
from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.evaluate.statistics import is_noise
from qjax.report.measured import heading, stderr_key
from qjax.report.rendering import MISSING, Row, Table, TableColumn, columns_of, number, with_error
from qjax.report.tables import DRAWS, baseline_name, is_baseline, lines_of, model_of, noise_note

PREFIX = "accuracy:"


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Names of the tasks that any of the rows was asked, in order of appearance."""
    return list(dict.fromkeys(key.removeprefix(PREFIX) for row in rows for key in row if key.startswith(PREFIX)))


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Accuracy of every recipe on every task, its change and flips, beside the change of perplexity.

    Raises QjaxError for rows without tasks, and for rows of more than one model, text or set of questions.
    """
    rows = lines_of(rows)
    tasks = tasks_of(rows)
    if not tasks:
        raise QjaxError("these rows hold no accuracies; `qjax sweep --tasks cloze,...` measures them")
    columns = heading(rows)
    for rank, task in enumerate(tasks, start=1):
        columns += [
            TableColumn(f"accuracy:{task}", f"{task}\n(%)", _percent, error=f"accuracy_stderr:{task}", rank=2 * rank),
            TableColumn(f"accuracy_delta:{task}", f"{task} change\n(points)", _change, error=f"accuracy_delta_stderr:{task}"),
            TableColumn(f"flips:{task}", f"{task} flips\n(%)", _flips, error=f"flips_stderr:{task}", rank=2 * rank + 1),
        ]
        if any(isinstance(row.get(f"accuracy_norm:{task}"), (int, float)) for row in rows):
            error = f"accuracy_norm_stderr:{task}"
            columns.append(
                TableColumn(f"accuracy_norm:{task}", f"{task} by length\n(%)", _percent, error=error, rank=50 + rank)
            )
    if len(tasks) > 1:
        columns.append(
            TableColumn("accuracy_mean_delta", "mean change\n(points)", mean_change, error="accuracy_mean_delta_stderr", rank=1)
        )
    counts = ", ".join(f"{number(rows[0], f'questions:{task}'):,.0f} of {task}" for task in tasks)
    cut = [f"{number(rows[0], f'truncated:{task}'):,.0f} of {task}" for task in tasks if number(rows[0], f"truncated:{task}")]
    baseline, drawn = baseline_name(rows[0]), " and draws" if any(DRAWS in row for row in rows) else ""
    notes = [
        f"±: standard error over questions{drawn}{_texts(rows[0], tasks)}; of the change, of the difference from {baseline} "
        "question by question.",
        "Flips: answers that went from right to wrong or back. By length: log-likelihood divided by the choice's characters.",
    ]
    if any(_within_noise(row, task) for row in rows for task in tasks):
        notes.append(noise_note(rows))
    notes += [f"Longer than the model's context, cut at the left: {', '.join(cut)}."] if cut else []
    title = f"Accuracy of {model_of(rows[0])} ({counts} questions), perplexity on {rows[0]['corpus']} ({rows[0]['convention']})"
    return Table(title, columns_of(rows, columns), tuple(rows), tuple(notes))


def _texts(row: Row, tasks: Sequence[str]) -> str:
    """How many texts questions are made from, where they share some."""
    counts = {task: len(set(row.get(f"documents:{task}") or ())) for task in tasks}
    told = ", ".join(f"{count:,} of {task}" for task, count in counts.items() if count)
    return f", or over the texts they are made from ({told}) where that is larger" if told else ""


def _percent(row: Row, key: str) -> str:
    return with_error(100 * number(row, key), 100 * number(row, stderr_key(key)))


def _within_noise(row: Row, task: str) -> bool:
    return not is_baseline(row) and is_noise(*(number(row, f"accuracy_delta_{end}:{task}") for end in ("low", "high")))


def _change(row: Row, key: str) -> str:
    if is_baseline(row):
        return MISSING
    mark = "≈ " if _within_noise(row, key.partition(":")[2]) else ""
    return mark + with_error(100 * number(row, key), 100 * number(row, stderr_key(key)), sign="+")


def mean_change(row: Row, key: str) -> str:
    """A column's format: change of the mean accuracy, points, with its standard error; ≈ within noise."""
    if is_baseline(row):
        return MISSING
    change, error, reach = number(row, key), number(row, stderr_key(key)), mean_reach(row)
    return ("≈ " if is_noise(change - reach, change + reach) else "") + with_error(100 * change, 100 * error, sign="+")


def mean_reach(row: Row) -> float:
    """Half the 95 % interval of the mean change over tasks, which are independent; nan where a task's is not known."""
    if DRAWS in row:  # which tasks have in common
        return (number(row, "accuracy_mean_delta_high") - number(row, "accuracy_mean_delta_low")) / 2
    tasks = tasks_of([row])
    ends = ([number(row, f"accuracy_delta_{end}:{task}") for end in ("low", "high")] for task in tasks)
    return math.hypot(*((high - low) / 2 for low, high in ends)) / len(tasks)


def _flips(row: Row, key: str) -> str:
    return MISSING if is_baseline(row) else _percent(row, key)
