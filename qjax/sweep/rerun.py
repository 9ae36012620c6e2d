"""Measures the cell of a row once again, from its request alone; nothing is kept on disk."""

import functools
import operator
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from qjax.calibrate.tokens import Calibration, load_calibration
from qjax.checkpoints.load import BUNDLED, load
from qjax.errors import QjaxError
from qjax.evaluate.corpora import load_corpus
from qjax.evaluate.questions import Task
from qjax.evaluate.tasks import load_task
from qjax.evaluate.windows import parse_convention
from qjax.files import expand
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import Model
from qjax.sweep.columns import BASELINE, Row
from qjax.sweep.request import request_of
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
    loaded = _model("model", asked["model"], model, asked["fingerprint"])
    before = None
    if asked[BASELINE] != asked["fingerprint"]:
        before = _model("baseline", asked["baseline"], baseline, asked[BASELINE])
    corpus = _find("data", asked["corpus"], data, asked["corpus_fingerprint"], load_corpus)
    block = asked.get("block")
    sweep = Sweep(
        (asked["recipe"],),
        (corpus._replace(name=asked["corpus"]),),
        parse_convention(asked["convention"]),
        max_windows=asked.get("max_windows"),
        rules=tuple(asked["rules"]),
        seed=asked["seed"],
        tasks=_tasks(asked, tasks),
        calibration=_calibration(asked, loaded, calibration) if asked.get("order") is not None else None,
        one_block=block is not None,
        blocks=() if block is None else (block,),
        measures=tuple(asked["measures"]),
        baseline=before,
        compute=asked.get("compute_dtype"),
    )
    with tempfile.TemporaryDirectory() as folder:
        return run_sweep(loaded, sweep, Path(folder), watcher)[-1]


def _model(option: str, name: str, named: str | None, fingerprint: str) -> Model:
    """A row's model under the row's name for it. Rows hold the names of folders, so that a name is no reason to ask the hub."""
    if named is None and name != BUNDLED and "/" not in name and not expand(name).is_dir():
        raise QjaxError(
            f"the row's {option} {name!r} is no folder here; say with --{option} where it is (--{option} {name} looks for that "
            "name on the Hugging Face hub)"
        )
    return _find(option, name, named, fingerprint, load, model_fingerprint)._replace(name=name)


def _calibration(asked: Row, model: Model, named: str | None) -> Calibration:
    size = {"windows": asked["calibration_windows"], "window": asked["calibration_window_tokens"]}
    size["compute"] = asked["calibration_compute"]
    name, draw = asked["calibration"], functools.partial(load_calibration, model, seed=asked["seed"], **size)
    return _find("calibration", name, named, asked["calibration_fingerprint"], draw)._replace(name=name)


def _tasks(asked: Row, named: Sequence[str]) -> tuple[Task, ...]:
    specs = {spec.partition(":")[0]: spec for spec in named}
    return tuple(
        _find(
            "tasks",
            task.name,
            specs.get(task.name.partition(":")[0]),
            task.fingerprint,
            lambda name, count=task.questions: load_task(name, count),
        )
        for task in asked["tasks"]
    )


def _find(
    option: str,
    name: str,
    named: str | None,
    wanted: str,
    find: Callable[[str], T],
    fingerprint: Callable[[T], str] = operator.attrgetter("fingerprint"),
) -> T:
    """What the option names, or else the row, where it is what the row was measured with; an error says that the option may."""
    try:
        found = find(name if named is None else named)
    except QjaxError as error:
        hint = "" if named is not None else f" (the row's {option} {name!r}; say with --{option} where it is)"
        raise QjaxError(f"{error}{hint}") from error
    if fingerprint(found)[: len(wanted)] != wanted:  # of a task the row has the start
        given = repr(name) if named is None else f"{named!r}, named for the row's {name!r},"
        raise QjaxError(
            f"{option} {given} is not what the row was measured with: fingerprint {fingerprint(found)}, the row has {wanted}; "
            f"name the right one with --{option}"
        )
    return found
