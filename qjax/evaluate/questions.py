"""What a task is: questions, each with candidate texts of which a model must find one likelier than the others."""

import hashlib
import json
from typing import Literal, NamedTuple

from qjax.errors import QjaxError


class Question(NamedTuple):
    """Candidates (context, continuation), of which candidate `gold` is right.

    lengths: characters of each candidate's choice, which the length-normalised score divides by. document: number of the text
    that it is made from, where others are too; -1 where each question is its own.
    """

    candidates: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]
    document: int = -1


class Task(NamedTuple):
    """Named questions. kind: "choices" (the likeliest candidate is the answer) or "last-word" (one candidate, right when each
    of its tokens is the likeliest).
    """

    name: str
    kind: Literal["choices", "last-word"]
    questions: tuple[Question, ...]
    fingerprint: str  # first 16 hex digits of the SHA-256 of all questions


def make_task(name: str, questions: tuple[Question, ...] | list[Question]) -> Task:
    """A task of questions that all have one candidate (last-word) or all have several (choices)."""
    if not questions:
        raise QjaxError(f"task {name}: no questions")
    single = {len(question.candidates) == 1 for question in questions}
    if len(single) > 1:
        raise QjaxError(f"task {name}: some questions have one candidate and some have several; expected one kind")
    text = hashlib.sha256(json.dumps([question[:3] for question in questions]).encode())
    return Task(name, "last-word" if single.pop() else "choices", tuple(questions), text.hexdigest()[:16])


def multiple_choice(query: str, choices: list[str] | tuple[str, ...], gold: int, delimiter: str = " ") -> Question:
    """One question, several continuations."""
    return Question(tuple((query, delimiter + choice) for choice in choices), gold, tuple(map(len, choices)))


def multiple_context(contexts: list[str] | tuple[str, ...], continuation: str, gold: int) -> Question:
    """One continuation behind several contexts, as in Winograd schemas: which context makes it likelier."""
    return Question(tuple((context, " " + continuation) for context in contexts), gold, tuple(map(len, contexts)))


def last_word(context: str, word: str) -> Question:
    """A word that must be the model's own next one."""
    return Question(((context, " " + word),), 0, (len(word),))
