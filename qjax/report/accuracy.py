"""Tables of accuracy and of divergence beside perplexity, from rows alone.

Columns of a row are named COLUMN:TASK (`sweep/measures.py`). A change is marked ≈ where its 95 % interval, paired question by
question, holds zero. Points are percentage points.
"""

from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.rendering import MISSING, Column, Row, Table, columns_of, decimals, digits, number, with_error
from qjax.report.tables import NOISE, change_of_perplexity, describe, distinctions, in_order, is_baseline, require_one_group

PREFIX = "accuracy:"


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Names of the tasks that any of the rows was asked, in order of appearance."""
    return list(dict.fromkeys(key.removeprefix(PREFIX) for row in rows for key in row if key.startswith(PREFIX)))


def has_divergence(rows: Sequence[Row]) -> bool:
    """Whether the rows of quantized models were compared with the unquantized one token by token."""
    return any("kl" in row and not is_baseline(row) for row in rows)


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Accuracy of every recipe on every task, its change and flips, beside the change of perplexity.

    Raises QjaxError for rows without tasks, and for rows of more than one model, text or set of questions.
    """
    require_one_group(rows)
    tasks = tasks_of(rows)
    if not tasks:
        raise QjaxError("these rows hold no accuracies; `qjax sweep --tasks cloze,...` measures them")
    rows = in_order(rows)
    columns = [*_heading(rows)]
    for rank, task in enumerate(tasks, start=1):
        columns += [
            Column(f"accuracy:{task}", f"{task}\n(%)", _percent, error=f"accuracy_stderr:{task}", rank=2 * rank),
            Column(f"accuracy_delta:{task}", f"{task} change\n(points)", _change, error=f"accuracy_delta_stderr:{task}"),
            Column(f"flips:{task}", f"{task} flips\n(%)", _flips, rank=2 * rank + 1),
        ]
        if any(isinstance(row.get(f"accuracy_norm:{task}"), (int, float)) for row in rows):
            error = f"accuracy_norm_stderr:{task}"
            columns.append(Column(f"accuracy_norm:{task}", f"{task} by length\n(%)", _percent, error=error, rank=50 + rank))
    if len(tasks) > 1:
        columns.append(
            Column("accuracy_mean_delta", "mean change\n(points)", mean_change, error="accuracy_mean_delta_stderr", rank=1)
        )
    counts = ", ".join(f"{int(number(rows[0], f'questions:{task}')):,} of {task}" for task in tasks)
    cut = [f"{int(number(rows[0], f'truncated:{task}')):,} of {task}" for task in tasks if number(rows[0], f"truncated:{task}")]
    notes = [
        "±: standard error over questions; of the change, of the difference from the unquantized model question by question.",
        "Flips: answers that went from right to wrong or back. By length: log-likelihood divided by the choice's characters.",
    ]
    if any(_within_noise(row, task) for row in rows for task in tasks):
        notes.append("≈: the 95 % interval of the change holds zero.")
    notes += [f"Longer than the model's context, cut at the left: {', '.join(cut)}."] if cut else []
    title = f"Accuracy of {rows[0]['model']} ({counts} questions), perplexity on {rows[0]['corpus']} ({rows[0]['convention']})"
    return Table(title, columns_of(rows, columns), tuple(rows), tuple(notes))


def divergence_table(rows: Sequence[Row]) -> Table:
    """Divergence of every recipe from the unquantized model, beside the change of perplexity."""
    require_one_group(rows)
    if not has_divergence(rows):
        raise QjaxError("these rows hold no divergence; `qjax sweep --divergence` measures it")
    rows = [row for row in in_order(rows) if not is_baseline(row)]
    columns = [
        *_heading(rows, rank=3),
        Column("kl", "KL mean\n(nats)", _with_stderr, error="kl_stderr"),
        Column("kl_median", "KL median\n(nats)", digits(3), rank=2),
        Column("kl_p99", "KL 99 %\n(nats)", digits(3), rank=1),
        Column("top1_agreement", "same top\ntoken (%)", _percent, error="top1_agreement_stderr"),
        Column("rms_dp", "RMS Δp\n(points)", _percent, error="rms_dp_stderr"),
    ]
    notes = (
        "KL: divergence of the next token's distribution from the unquantized model's, per scored token.",
        "RMS Δp: root mean square change of the true token's probability. ±: standard error over windows.",
    )
    return Table(f"Divergence from the unquantized model, {describe(rows[0])}", columns_of(rows, columns), tuple(rows), notes)


def _heading(rows: Sequence[Row], rank: int = 0) -> list[Column]:
    return [
        Column("recipe", "recipe", text=True),
        *distinctions(rows),
        Column("bits_per_weight", "bits per\nweight", decimals(3)),
        Column("perplexity_ratio", "perplexity\nchange (%)", change_of_perplexity, error="perplexity_ratio_stderr", rank=rank),
    ]


def _stderr_key(key: str) -> str:
    column, colon, task = key.partition(":")
    return f"{column}_stderr{colon}{task}"


def _with_stderr(row: Row, key: str) -> str:
    return with_error(number(row, key), number(row, _stderr_key(key)))


def _percent(row: Row, key: str) -> str:
    return with_error(100 * number(row, key), 100 * number(row, _stderr_key(key)))


def _within_noise(row: Row, task: str) -> bool:
    return not is_baseline(row) and number(row, f"accuracy_delta_low:{task}") <= 0 <= number(row, f"accuracy_delta_high:{task}")


def _change(row: Row, key: str) -> str:
    if is_baseline(row):
        return MISSING
    mark = "≈ " if _within_noise(row, key.partition(":")[2]) else ""
    return mark + with_error(100 * number(row, key), 100 * number(row, _stderr_key(key)), sign="+")


def mean_change(row: Row, key: str) -> str:
    """A column's format: change of the mean accuracy, points, with its standard error; ≈ within noise."""
    if is_baseline(row):
        return MISSING
    change, error = number(row, key), number(row, _stderr_key(key))
    return ("≈ " if abs(change) < NOISE * error else "") + with_error(100 * change, 100 * error, sign="+")


def _flips(row: Row, key: str) -> str:
    return MISSING if is_baseline(row) else f"{100 * number(row, key):.1f}"
