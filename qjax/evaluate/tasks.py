"""Accuracy tasks by name.

`load_task(spec)` turns a spec into questions. What a spec may be:

    cloze        built in, no files, no network (`cloze.py`)
    NAME:PATH    a task file (`task_files.py`) asked as the task NAME is
    NAME         the same task from the Hugging Face hub, through the datasets package

The names and how each asks, which is what lm-evaluation-harness's task of that name does, are in `TASKS`; "choices" is any file
of multiple choice, asked as it stands.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from qjax.errors import QjaxError
from qjax.evaluate.cloze import cloze_questions
from qjax.evaluate.corpora import fetch
from qjax.evaluate.questions import Question, Task, last_word, make_task, multiple_choice, multiple_context
from qjax.evaluate.task_files import read_task_file
from qjax.files import expand
from qjax.untrusted import status

CLOZE = "cloze"
Row = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a task is asked. suffix: behind the query of a task file; hub: arguments of datasets.load_dataset; convert: a row of
    that data set as a question.
    """

    suffix: str = ""
    hub: tuple[str, ...] = ()
    split: str = "test"
    convert: Callable[[Row], Question] | None = None


def _arc(row: Row) -> Question:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return multiple_choice(f"Question: {row['question']}\nAnswer:", texts, labels.index(row["answerKey"]))


def _piqa(row: Row) -> Question:
    return multiple_choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _openbook(row: Row) -> Question:
    return multiple_choice(
        row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"].strip())
    )


def _boolq(row: Row) -> Question:
    return multiple_choice(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(row["answer"]))


def _copa(row: Row) -> Question:
    joint = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2")]
    return multiple_choice(f"{row['premise'].strip()[:-1]} {joint}", choices, row["label"])


def _winogrande(row: Row) -> Question:
    before, _, after = row["sentence"].partition("_")
    return multiple_context([before + row["option1"], before + row["option2"]], after.strip(), int(row["answer"]) - 1)


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return multiple_choice(_plain(context), [_plain(ending) for ending in row["endings"]], int(row["label"]))


def _plain(text: str) -> str:
    """WikiHow's marks taken out, as the harness does."""
    import re

    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _lambada(row: Row) -> Question:
    context, _, word = row["text"].rpartition(" ")
    return last_word(context, word)


TASKS = {
    "arc_easy": Asked("\nAnswer:", ("allenai/ai2_arc", "ARC-Easy"), convert=_arc),
    "arc_challenge": Asked("\nAnswer:", ("allenai/ai2_arc", "ARC-Challenge"), convert=_arc),
    "piqa": Asked("Answer:", ("baber/piqa",), "validation", _piqa),
    "openbookqa": Asked("", ("allenai/openbookqa", "main"), convert=_openbook),
    "boolq": Asked("\nAnswer:", ("aps/super_glue", "boolq"), "validation", _boolq),
    "copa": Asked("", ("aps/super_glue", "copa"), "validation", _copa),
    "winogrande": Asked("", ("allenai/winogrande", "winogrande_xl"), "validation", _winogrande),
    "wsc273": Asked(),
    "hellaswag": Asked("", ("Rowan/hellaswag",), "validation", _hellaswag),
    "lambada": Asked("", ("EleutherAI/lambada_openai", "default"), convert=_lambada),
    "mmlu": Asked(),
    "choices": Asked(),
}


def load_task(spec: str, max_questions: int | None = None) -> Task:
    """The task that `spec` names, its first `max_questions` questions.

    Raises QjaxError for an unknown name (with the nearest), a missing or malformed file, and data that cannot be fetched.
    """
    require_tasks([spec])
    name, colon, path = spec.partition(":")
    if max_questions is not None and max_questions < 1:
        raise QjaxError(f"max_questions {max_questions}: expected at least 1, or None for all")
    if name == CLOZE:
        questions = cloze_questions()
    elif colon:
        questions = read_task_file(path, TASKS[name].suffix)
    else:
        questions = _fetch(name)
    return make_task(_name(spec), questions[:max_questions])


def require_tasks(specs: Iterable[str]) -> None:
    """Raises QjaxError for what names no task, a file that does not exist, and two tasks of one name; nothing is read."""
    names = []
    for spec in specs:
        name, colon, path = spec.partition(":")
        if (name not in TASKS and name != CLOZE) or (name == CLOZE and colon):
            raise QjaxError(_unknown(spec))
        if colon and not path:
            raise QjaxError(f"task {spec!r} names no file; expected {name}:PATH")
        if colon and not status(expand(path)):
            raise QjaxError(f"task {spec!r}: {path} does not exist; expected a task file, or a folder of them")
        if not colon and name != CLOZE and TASKS[name].convert is None:
            raise QjaxError(f"task {name!r} is read from a file: give {name}:PATH")
        names.append(_name(spec))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise QjaxError(f"tasks {', '.join(twice)} given more than once; a row has one column a task")


def _name(spec: str) -> str:
    """A task's name in rows."""
    name, _, path = spec.partition(":")
    return f"{name}:{Path(path).name}" if name == "choices" else name


def load_tasks(specs: Iterable[str], max_questions: int | None = None) -> tuple[Task, ...]:
    """Every task named; raises what `load_task` raises, and QjaxError for two tasks of one name."""
    specs = list(specs)
    require_tasks(specs)
    return tuple(load_task(spec, max_questions) for spec in specs)


def task_names() -> tuple[str, ...]:
    """What a task spec may be, for help texts and messages."""
    hub = [f"{name}[:PATH]" if asked.hub else f"{name}:PATH" for name, asked in TASKS.items()]
    return (CLOZE, *hub)


def _unknown(spec: str) -> str:
    name = spec.partition(":")[0]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), (CLOZE, *TASKS), n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"unknown task {spec!r}{hint}: expected one of {', '.join(task_names())}"


def _fetch(name: str) -> list[Question]:
    asked = TASKS[name]
    read = lambda rows: [asked.convert(row) for row in rows]  # noqa: E731
    return fetch(f"task {name!r}", f"give {name}:PATH", read, *asked.hub, split=asked.split)
