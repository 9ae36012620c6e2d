"""Accuracy of a model on a task, by log-likelihood.

    answer       = argmax over choices of ln p(choice | question)                                      acc
    answer_norm  = argmax over choices of ln p(choice | question) / characters of the choice           acc_norm

and for last-word prediction (LAMBADA, Paperno et al. 2016, arXiv 1606.06031) a question counts as right when every token of the
word is the model's likeliest; perplexity is exp(-mean ln p(word)). All as in lm-evaluation-harness, ties to the first choice.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.likelihood import likelihoods, make_pair
from qjax.evaluate.questions import Task
from qjax.evaluate.statistics import estimate
from qjax.evaluate.tasks import load_task
from qjax.models.model import Model, require_model
from qjax.numbers import NotFiniteError


class Accuracy(NamedTuple):
    """What a model answered and how often it was right; standard errors over questions, or over the texts they are made from.

    For last-word tasks `answers` are 0 (the gold word is the model's own) or 1 (it is not), and there is no normalised figure.
    """

    task: str
    kind: str
    fingerprint: str
    value: float
    stderr: float
    normalised: float  # nan for last-word tasks
    normalised_stderr: float
    perplexity: float  # of the last word; nan for choices
    answers: tuple[int, ...]
    answers_normalised: tuple[int, ...]  # empty for last-word tasks
    gold: tuple[int, ...]
    documents: tuple[int, ...]  # text of each question; empty where each is its own
    loglikelihoods: tuple[tuple[float, ...], ...]  # a question's choices, nats
    truncated: int  # questions that lost tokens from the left because they are longer than the model's context
    seconds: float


def accuracy(
    model: Model,
    task: str | Task,
    *,
    max_questions: int | None = None,
    packed: bool = False,
    compute: str | None = None,
    batch_tokens: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Accuracy of a model on a task (a `Task` or a spec such as "cloze", "piqa:PATH"), its first `max_questions` questions.

    Raises QjaxError for an unknown task, a malformed file, a model without tokenizer, a continuation that has no tokens, and
    likelihoods that are not finite.
    """
    require_model("accuracy", model)
    if isinstance(task, str):
        task = load_task(task, max_questions)
    elif max_questions is not None:
        task = task._replace(questions=task.questions[:max_questions])
    started = time.perf_counter()
    pairs = []
    for number, question in enumerate(task.questions, start=1):
        try:
            pairs.append([make_pair(model, *candidate) for candidate in question.candidates])
        except QjaxError as error:
            raise QjaxError(f"task {task.name}, question {number}: {error}") from None
    try:
        found = likelihoods(model, pairs, packed=packed, compute=compute, batch_tokens=batch_tokens, on_batch=on_batch)
    except NotFiniteError as error:
        raise NotFiniteError(f"task {task.name}: {error}") from None
    ends = np.cumsum([len(group) for group in pairs])[:-1]
    scores = np.split(found.value, ends)
    gold = np.array([question.gold for question in task.questions])
    truncated = sum(any(pair.truncated for pair in group) for group in pairs)
    if task.kind == "last-word":
        answers, normalised = np.where(found.greedy, 0, 1), None
    else:
        answers = np.array([np.argmax(score) for score in scores])
        lengths = [np.array(question.lengths) for question in task.questions]
        normalised = np.array([np.argmax(score / length) for score, length in zip(scores, lengths, strict=True)])
    documents = tuple(question.document for question in task.questions if question.document >= 0)
    value, stderr = _mean(answers == gold, documents)
    value_norm, stderr_norm = (math.nan, math.nan) if normalised is None else _mean(normalised == gold, documents)
    return Accuracy(
        task=task.name,
        kind=task.kind,
        fingerprint=task.fingerprint,
        value=value,
        stderr=stderr,
        normalised=value_norm,
        normalised_stderr=stderr_norm,
        perplexity=math.exp(min(700.0, -float(np.mean(found.value)))) if task.kind == "last-word" else math.nan,
        answers=tuple(answers.tolist()),
        answers_normalised=() if normalised is None else tuple(normalised.tolist()),
        gold=tuple(gold.tolist()),
        documents=documents,
        loglikelihoods=tuple(tuple(score.tolist()) for score in scores),
        truncated=truncated,
        seconds=time.perf_counter() - started,
    )


def _mean(correct: np.ndarray, documents: tuple[int, ...]) -> tuple[float, float]:
    """Fraction of right answers and its standard error, with n - 1; nan for a single question. Of questions made from documents
    the larger of the errors over questions and over documents.
    """
    count, value = len(correct), float(np.mean(correct))
    if count < 2:
        return value, math.nan
    over_questions = math.sqrt(value * (1 - value) / (count - 1))
    over_documents = estimate(correct, None, np.array(documents)).stderr if documents else 0.0
    return value, max(over_questions, over_documents)
