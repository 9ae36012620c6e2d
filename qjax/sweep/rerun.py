"""Measures the cell of a row once again, from its request alone; nothing is kept on disk."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from qjax.calibrate.tokens import Calibration, load_calibration
from qjax.checkpoints.load import load
from qjax.errors import QjaxError
from qjax.evaluate.corpora import load_corpus
from qjax.evaluate.perplexity import parse_convention
from qjax.evaluate.questions import Task
from qjax.evaluate.tasks import load_task
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import Model
from qjax.sweep.request import Request, Row, request_of
from qjax.sweep.runner import Sweep, Watcher, run_sweep

T = TypeVar("T")


def rerun(
    row: Row,
    *,
    model: str | None = None,
    data: str | None = None,
    calibration: str | None = None,
    tasks: Sequence[str] = (),
    baseline: str | None = None,
    watcher: Watcher | None = None,
) -> dict[str, object]:
    """The row of the same cell, measured now (the baseline is measured first, as in any sweep).

    model, data, calibration, tasks, baseline: where the row's models and texts are now, where their names do not say; tasks as
    NAME:PATH. Raises QjaxError where one is missing or is not what the row was measured with, by fingerprint.
    """
    asked = request_of(row)
    loaded = _model("model", asked.model, model, asked.fingerprint)
    other = asked.baseline_fingerprint != asked.fingerprint
    before = _model("baseline", asked.baseline, baseline, asked.baseline_fingerprint) if other else None
    sweep = sweep_of(asked, loaded, data=data, calibration=calibration, tasks=tasks)
    with tempfile.TemporaryDirectory() as folder:
        return run_sweep(loaded, dataclasses.replace(sweep, baseline=before), Path(folder), watcher)[-1]


def _model(option: str, name: str, named: str | None, fingerprint: str) -> Model:
    """A row's model under the row's name for it."""
    loaded = _find(option, name, named, load)
    _require(option, name, named, fingerprint, model_fingerprint(loaded))
    return loaded._replace(name=name)


def sweep_of(
    asked: Request, model: Model, *, data: str | None = None, calibration: str | None = None, tasks: Sequence[str] = ()
) -> Sweep:
    """The sweep of one cell; its texts are loaded and checked."""
    corpus = _find("data", asked.corpus, data, load_corpus)
    _require("data", asked.corpus, data, asked.corpus_fingerprint, corpus.fingerprint)
    return Sweep(
        (asked.recipe,),
        (corpus._replace(name=asked.corpus),),
        parse_convention(asked.convention),
        max_windows=asked.max_windows,
        rules=asked.rules,
        seed=asked.seed,
        tasks=_tasks(asked, tasks),
        calibration=_calibration(asked, model, calibration),
        one_block=asked.block is not None,
        blocks=() if asked.block is None else (asked.block,),
        measures=asked.measures,
    )


def _calibration(asked: Request, model: Model, named: str | None) -> Calibration | None:
    wanted = asked.calibration
    if wanted is None:
        return None

    def draw(name: str) -> Calibration:
        size = {"windows": wanted.calibration_windows, "window": wanted.calibration_window_tokens}
        return load_calibration(model, name, seed=asked.seed, **size)

    found = _find("calibration", wanted.calibration, named, draw)
    _require("calibration", wanted.calibration, named, wanted.calibration_fingerprint, found.fingerprint)
    return found._replace(name=wanted.calibration)


def _tasks(asked: Request, named: Sequence[str]) -> tuple[Task, ...]:
    specs = {spec.partition(":")[0]: spec for spec in named}
    found = []
    for task in asked.tasks:
        spec = specs.get(task.name.partition(":")[0])
        found.append(_find("tasks", task.name, spec, lambda name, count=task.questions: load_task(name, count)))
        _require("tasks", task.name, spec, task.fingerprint, found[-1].fingerprint[: len(task.fingerprint)])
    return tuple(found)


def _find(option: str, name: str, named: str | None, find: Callable[[str], T]) -> T:
    """What the option names, or else the row; an error says that the option may."""
    try:
        return find(name if named is None else named)
    except QjaxError as error:
        hint = "" if named is not None else f" (the row's {option} {name!r}; say with --{option} where it is)"
        raise QjaxError(f"{error}{hint}") from error


def _require(option: str, name: str, named: str | None, wanted: str, found: str) -> None:
    if wanted != found:
        given = repr(name) if named is None else f"{named!r}, named for the row's {name!r},"
        raise QjaxError(
            f"{option} {given} is not what the row was measured with: fingerprint {found}, the row has {wanted}; "
            f"name the right one with --{option}"
        )
