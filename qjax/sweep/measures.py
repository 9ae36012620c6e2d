"""What a row says beside perplexity: accuracy on tasks, divergence from the unquantized model, speed. Flat columns.

A column of a task is named COLUMN:TASK, as accuracy:piqa. A row keeps every answer, so that differences between any two rows
can be paired question by question later.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qjax.evaluate.choices import Accuracy
from qjax.evaluate.divergence import Divergence
from qjax.evaluate.questions import Task
from qjax.evaluate.speed import Speed
from qjax.evaluate.statistics import accuracy_difference, count_flips

Row = Mapping[str, object]


def tasks_identity(tasks: Sequence[Task]) -> str:
    """Names, numbers of questions and fingerprints: rows of other questions are other measurements."""
    return " ".join(f"{task.name}({len(task.questions)},{task.fingerprint[:8]})" for task in tasks)


def accuracy_columns(found: Accuracy, baseline: Row | None) -> dict[str, object]:
    """Columns of one task. baseline: the unquantized model's row with the same task, or None for that row itself."""
    columns = {
        "accuracy": found.value,
        "accuracy_stderr": found.stderr,
        "accuracy_norm": found.normalised,
        "accuracy_norm_stderr": found.normalised_stderr,
        "word_perplexity": found.perplexity,
        "questions": len(found.gold),
        "truncated": found.truncated,
        "seconds_task": found.seconds,
        "gold": list(found.gold),
        "answers": list(found.answers),
        "answers_norm": list(found.answers_normalised),
    }
    for suffix, answers in (("", found.answers), ("_norm", found.answers_normalised)):
        if not answers:
            continue
        before = answers if baseline is None else baseline[f"answers{suffix}:{found.task}"]
        gold = np.array(found.gold)
        change = accuracy_difference(np.array(answers) == gold, np.array(before) == gold)
        flips = count_flips(answers, before, found.gold)
        columns |= {
            f"accuracy{suffix}_delta": change.value,
            f"accuracy{suffix}_delta_stderr": 0.0 if baseline is None else change.stderr,
            f"accuracy{suffix}_delta_low": 0.0 if baseline is None else change.low,
            f"accuracy{suffix}_delta_high": 0.0 if baseline is None else change.high,
            f"flips{suffix}": flips.fraction,
            f"flips_to_wrong{suffix}": flips.to_wrong,
            f"flips_to_right{suffix}": flips.to_right,
        }
    return {f"{name}:{found.task}": value for name, value in columns.items()}


def speed_columns(dense: Speed, packed: Speed) -> dict[str, object]:
    """Columns named COLUMN:dense and COLUMN:packed."""
    columns = {"speed_prompt_tokens": dense.prompt_tokens, "speed_new_tokens": dense.new_tokens, "speed_batch": dense.batch}
    for held, found in (("dense", dense), ("packed", packed)):
        for name in (
            "prefill_tokens_per_second",
            "decode_tokens_per_second",
            "first_token_seconds",
            "running_bytes",
            "peak_bytes",
        ):
            columns[f"{name}:{held}"] = getattr(found, name)
    return columns


def mean_columns(columns: Row, tasks: Sequence[Task]) -> dict[str, float]:
    """Means over the tasks, which are independent."""
    if not tasks:
        return {}
    mean = {
        f"accuracy_mean{suffix}": float(np.mean([columns[f"accuracy{suffix}:{task.name}"] for task in tasks]))
        for suffix in ("", "_delta")
    }
    errors = {
        f"accuracy_mean{suffix}_stderr": math.hypot(*(columns[f"accuracy{suffix}_stderr:{task.name}"] for task in tasks))
        / len(tasks)
        for suffix in ("", "_delta")
    }
    return mean | errors


def divergence_columns(found: Divergence) -> dict[str, object]:
    """Columns of the divergence from the unquantized model."""
    return {
        "kl": found.kl,
        "kl_stderr": found.kl_stderr,
        "kl_median": found.kl_median,
        "kl_p99": found.kl_p99,
        "top1_agreement": found.top1,
        "top1_agreement_stderr": found.top1_stderr,
        "rms_dp": found.rms_dp,
        "rms_dp_stderr": found.rms_dp_stderr,
    }
