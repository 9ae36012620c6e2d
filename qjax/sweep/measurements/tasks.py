"""Accuracy on tasks, and what changed of the baseline's answers.

A row keeps every answer, so that differences between any two rows can be paired question by question later.
"""

import math

import numpy as np

from qjax.evaluate.statistics import accuracy_difference, count_flips
from qjax.sweep.columns import BASELINE, Cell, Column, Measurement, Row

PER, ASKED, DIFFERENCE = "fraction", {"given": "tasks"}, {"given": BASELINE}


def _figures(suffix: str, how: str) -> list[Column]:
    """Of the answers by log-likelihood, or by log-likelihood per character."""
    name, kind = f"accuracy{suffix}", float | None
    return [
        Column(f"{name}:TASK", kind, PER, f"answers right {how}", **ASKED),
        Column(f"{name}_stderr:TASK", kind, PER, "its standard error over questions or their texts", **ASKED),
        Column(f"{name}_delta:TASK", kind, PER, "difference from the baseline", **DIFFERENCE),
        Column(f"{name}_delta_stderr:TASK", kind, PER, "its standard error, paired question by question", **DIFFERENCE),
        Column(f"{name}_delta_low:TASK", kind, PER, "lower end of its 95 % interval", **DIFFERENCE),
        Column(f"{name}_delta_high:TASK", kind, PER, "upper end", **DIFFERENCE),
        Column(f"flips{suffix}:TASK", kind, PER, "answers that went from right to wrong or back", **DIFFERENCE),
        Column(f"flips_to_wrong{suffix}:TASK", int | None, "", "from right to wrong", **DIFFERENCE),
        Column(f"flips_to_right{suffix}:TASK", int | None, "", "from wrong to right", **DIFFERENCE),
        Column(f"answers{suffix}:TASK", list[int], "", f"the choice of every question {how}", **ASKED),
    ]


COLUMNS = (
    Column("tasks", str, "", "tasks with their number of questions and fingerprint; other questions are other tables", "named"),
    *_figures("", "by log-likelihood"),
    *_figures("_norm", "by log-likelihood per character"),
    Column("accuracy_mean", float, PER, "mean of accuracy over the tasks", **ASKED),
    Column("accuracy_mean_stderr", float | None, PER, "its standard error", **ASKED),
    Column("accuracy_mean_delta", float, PER, "its difference from the baseline", **DIFFERENCE),
    Column("accuracy_mean_delta_stderr", float | None, PER, "standard error of that", **DIFFERENCE),
    Column("word_perplexity:TASK", float | None, "", "exp of the mean loss of the last word (LAMBADA)", **ASKED),
    Column("questions:TASK", int, "", "number of questions", **ASKED),
    Column("truncated:TASK", int, "", "of those cut to the model's context", **ASKED),
    Column("seconds_task:TASK", float, "s", "wall-clock time", "spent"),
    Column("gold:TASK", list[int], "", "the right choice of every question", **ASKED),
    Column("documents:TASK", list[int], "", "text that each question is made from; empty where each is its own", **ASKED),
)


def asks(cell: Cell) -> dict[str, object]:
    """Names, numbers of questions and fingerprints: rows of other questions are other measurements."""
    named = (f"{task.name}({len(task.questions)},{task.fingerprint[:8]})" for task in cell.sweep.tasks)
    return {"tasks": " ".join(named)}


def measure(cell: Cell) -> dict[str, object]:
    """Columns of every task, and means over them."""
    from qjax.evaluate.choices import accuracy

    answered = [accuracy(cell.model, task, on_batch=cell.on_batch) for task in cell.sweep.tasks]
    columns = {name: value for found in answered for name, value in _task_columns(found, cell.before).items()}
    return columns | _means(columns, [task.name for task in cell.sweep.tasks])


def _task_columns(found, before: Row | None) -> dict[str, object]:
    choices = found.kind != "last-word"
    columns = {
        "accuracy": found.value,
        "accuracy_stderr": found.stderr,
        "accuracy_norm": found.normalised if choices else None,
        "accuracy_norm_stderr": found.normalised_stderr,
        "word_perplexity": None if choices else found.perplexity,
        "questions": len(found.gold),
        "truncated": found.truncated,
        "seconds_task": found.seconds,
        "gold": list(found.gold),
        "documents": list(found.documents),
        "answers": list(found.answers),
        "answers_norm": list(found.answers_normalised),
    }
    for suffix, answers in (("", found.answers), ("_norm", found.answers_normalised)):
        if not answers:
            continue
        earlier = answers if before is None else before[f"answers{suffix}:{found.task}"]
        gold = np.array(found.gold)
        change = accuracy_difference(np.array(answers) == gold, np.array(earlier) == gold, found.documents or None)
        flips = count_flips(answers, earlier, found.gold)
        columns |= {
            f"accuracy{suffix}_delta": change.value,
            f"accuracy{suffix}_delta_stderr": 0.0 if before is None else change.stderr,
            f"accuracy{suffix}_delta_low": 0.0 if before is None else change.low,
            f"accuracy{suffix}_delta_high": 0.0 if before is None else change.high,
            f"flips{suffix}": flips.fraction,
            f"flips_to_wrong{suffix}": flips.to_wrong,
            f"flips_to_right{suffix}": flips.to_right,
        }
    return {f"{name}:{found.task}": value for name, value in columns.items()}


def _means(columns: Row, names: list[str]) -> dict[str, float]:
    """Over the tasks, which are independent."""
    found = {}
    for suffix in ("", "_delta"):
        found[f"accuracy_mean{suffix}"] = float(np.mean([columns[f"accuracy{suffix}:{name}"] for name in names]))
        errors = (columns[f"accuracy{suffix}_stderr:{name}"] for name in names)
        found[f"accuracy_mean{suffix}_stderr"] = math.hypot(*errors) / len(names)
    return found


MEASUREMENT = Measurement("tasks", "Accuracy", COLUMNS, asks, measure, when=lambda sweep: sweep.tasks, on_every_text=False)
