"""A sweep: every recipe on every corpus, one row as soon as one is measured (`worker.py`).

All cells share the loaded weights, the tokenized windows and one compiled forward pass. A cell whose key is already in
the rows file is skipped, so running the same sweep again finishes what an interruption left.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from qjax.calibrate.tokens import Calibration, as_calibration
from qjax.driver.layer import LayerRecord, problem_of
from qjax.driver.placement import calibration_order, in_our_words, parse_rule, placement
from qjax.errors import QjaxError, QjaxWarning
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.evaluate.questions import Task
from qjax.evaluate.states import States
from qjax.evaluate.windows import Convention, corpus_windows
from qjax.files import expand
from qjax.folders import prepare_results_folder
from qjax.models.compute import require_compute
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import Model
from qjax.models.walk import block_name, matrix_shape
from qjax.numbers import NotFiniteError, as_json
from qjax.recipe import UNQUANTIZED, parse_recipe
from qjax.sweep.cells import canonical, name_in_order
from qjax.sweep.claims import STALE_SECONDS, Claims, holders
from qjax.sweep.columns import Cell, Measurement, asked_measurements, column_of, misfits, undefined
from qjax.sweep.record import digest
from qjax.sweep.store import ROWS, read_rows
from qjax.sweep.worker import Job, Worker


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is measured: recipes, each with the rules, x corpora, in one convention. The model as it is comes first.

    Several seeds are draws of calibration data: recipes that read data have a row for each, under the key that a sweep of that
    seed alone would give it, others one.
    """

    recipes: tuple[str, ...]
    corpora: tuple[Corpus | str, ...]  # names are loaded
    convention: Convention
    max_windows: int | None = None
    rules: tuple[str, ...] = ()
    seed: int = 0
    tasks: tuple[Task, ...] = ()
    divergence: bool = False  # short for its name among measures, as is speed
    speed: bool = False
    calibration: Calibration | Sequence[Calibration] | None = None  # for recipes that read data; with seeds, one for each
    order: str | None = None  # of calibration, for recipes that name none
    one_block: bool = False  # each recipe in one block at a time, the others as they are: a sensitivity table
    blocks: tuple[int, ...] = ()  # with one_block, these only; none: all
    measures: tuple[str, ...] = ()  # further measurements, by name (`columns.py`)
    baseline: Model | None = None  # that differences are from, of the same vocabulary and context; None: the model as it is
    seeds: tuple[int, ...] = ()  # several, instead of seed; a number N: 0 to N - 1
    compute: str | None = None  # what models run in, float32 or bfloat16; None: the device's own. No rounding depends on it

    def __post_init__(self):
        for name in ("recipes", "corpora", "rules", "tasks", "measures"):
            if isinstance(text := getattr(self, name), str):
                raise QjaxError(f"Sweep: {name} is {text!r}, expected several in a tuple; give ({text!r},)")
        require_compute(self.compute)
        short = [name for name in ("divergence", "speed") if getattr(self, name)]
        texts = tuple(load_corpus(each) if isinstance(each, str) else each for each in self.corpora)
        object.__setattr__(self, "corpora", texts)
        object.__setattr__(self, "measures", tuple(dict.fromkeys([*self.measures, *short])))
        seeds = tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)
        if len(set(seeds)) < len(seeds):
            raise QjaxError(f"Sweep: seeds {', '.join(map(str, seeds))}: expected each once")
        object.__setattr__(self, "seeds", seeds)


class Treatment(NamedTuple):
    """What is done to a model: a recipe with rules. block: the one that the last rule names, where it alone is quantized."""

    recipe: str
    rules: tuple[str, ...] = ()
    block: int | None = None

    def __str__(self) -> str:
        return "; ".join([self.recipe, *self.rules])

    def sources(self) -> dict[str, str]:
        """Sources of what it uses from outside the package."""
        recipes = (parse_recipe(self.recipe), *(parse_rule(rule).recipe for rule in self.rules))
        return {name: source for each in recipes if each for name, source in each.sources().items()}


AS_IT_IS = Treatment(UNQUANTIZED)


class Watcher:
    """Told what a sweep is doing; override what is of interest."""

    def cell(self, number: int, total: int, recipe: str, corpus: str) -> None:
        """A cell begins."""

    def layer(self, record: LayerRecord) -> None:
        """A kernel was quantized."""

    def batch(self, done: int, total: int) -> None:
        """Windows evaluated so far in this cell."""

    def waiting(self, cells: Mapping[str, str]) -> None:
        """Others are at all cells that are left: the cell -> who."""

    def row(self, row: dict[str, object], is_new: bool) -> None:
        """A row is on disk; is_new is False when it was there before."""


def run_sweep(
    model: Model,
    sweep: Sweep,
    folder: str | Path,
    watcher: Watcher | None = None,
    *,
    workers: int = 1,
    stale_seconds: float = STALE_SECONDS,
) -> list[dict[str, object]]:
    """Measures every cell that folder/rows.jsonl does not hold yet; returns this sweep's rows, baseline first.

    The same sweep may run any number of times at once, on all machines that see the folder: they share the cells (`claims.py`),
    and each returns all rows. workers: how many do, so that what is made together can be dealt out; a worker that gives no sign
    of life for stale_seconds loses its cells to the others. The folder is made where it is missing.

    Everything that can be wrong with the request (recipes, rules, measurements, texts shorter than a window) is an error before
    anything is computed. A cell whose figures are not finite gets no row; the others go on, and a NotFiniteError in the end
    names it. Without the baseline's figures nothing goes on.
    """
    watcher, asked = watcher or Watcher(), asked_measurements(sweep)
    if workers < 1:
        raise QjaxError(f"workers {workers}: expected at least 1")
    jobs = [Job(cell, _head(cell, asked)) for cell in _cells(model, sweep)]
    folder = prepare_results_folder(folder)
    measure = functools.partial(_with_states, asked=asked, shared={}, states=States())
    claims = Claims(folder, stale_seconds=stale_seconds)
    try:
        return Worker(folder, jobs, measure, watcher, claims, workers).run()
    finally:
        claims.release()


def cell_states(model: Model, sweep: Sweep, folder: str | Path) -> list[dict[str, object]]:
    """What is asked in every cell of a sweep, and as "state" how far it is: "done", "open", or who is at it.

    Nothing is measured or written; the model's weights are read for its fingerprint, which is part of every key.
    """
    folder, asked = expand(folder), asked_measurements(sweep)
    heads = [_head(cell, asked) for cell in _cells(model, sweep)]
    claimed = {key: str(holder) for holder in holders(folder) if not holder.is_gone for key in holder.cells}
    states = claimed | {str(row["key"]): "done" for row in read_rows(folder / ROWS)}
    return [{**head, "state": states.get(head["key"], "open")} for head in heads]


def _head(cell: Cell, asked: Sequence[Measurement]) -> dict[str, object]:
    """What is asked in a cell, under its key, which is of the windows too: one text may be divided into other documents."""
    columns = {name: value for each in asked if each.asks for name, value in each.asks(cell).items()}
    windows = hashlib.sha256(b"".join(field.tobytes() for field in (cell.windows.tokens, cell.windows.documents)))
    return {"key": digest(columns, windows.hexdigest())} | columns


def _with_states(cell: Cell, head: dict[str, object], states: States, **how: object) -> dict[str, object]:
    """The row of a cell, after which the baseline's states alone are kept."""
    try:
        return _measured(cell._replace(states=states), head, **how)
    finally:
        if cell.of_states != cell.of_baseline:
            states.drop(cell.of_states)


def _measured(cell: Cell, head: dict[str, object], asked: Sequence[Measurement], shared: dict) -> dict[str, object]:
    """The row of a cell. shared: what earlier cells found that no text changes, added to.

    Raises QjaxError for a measurement that gives what it has not declared, NotFiniteError for a figure that is none.
    """
    row = dict(head)
    for each in (each for each in asked if each.measure):
        place = (*cell.place, each.name)
        found = shared.get(place) or each.measure(cell._replace(row=row))
        if not isinstance(found, Mapping):
            raise QjaxError(f"measurement {each.name} gives {type(found).__name__}, expected a dict of its columns; return one")
        if not each.on_every_text:
            shared[place] = found
        wrong = [name for name in found if column_of(name) not in each.columns] or misfits(as_json(found), whole=False)
        if wrong:
            raise QjaxError(f"measurement {each.name} gives {', '.join(wrong)}, undeclared or of another type; see its columns")
        row |= found
    if broken := [name for name in undefined(row) if getattr(column_of(name), "role", "") != "spent"]:
        raise NotFiniteError(f"{', '.join(broken)}: not finite")
    return as_json(row)


def _cells(model: Model, sweep: Sweep) -> list[Cell]:
    """Every cell of a sweep, the baseline's first, not measured yet. Raises what can be wrong with the request."""
    sweep = dataclasses.replace(sweep, rules=_known_rules(model, sweep.rules))
    first, *others = _by_seed(model, sweep)
    treatments = treatments_of(sweep, model.config.layers)
    orders = {treatment: calibration_order(model, treatment.recipe, treatment.rules) for treatment in treatments}
    drawing = [treatment for treatment in treatments if orders[treatment]]
    for each in (first, *others):
        _check_calibration(model, each, drawing)
    _check_recipes(model, treatments)
    convention = sweep.convention.clipped(model.config.context)
    corpora = _each_text_once(sweep.corpora)
    windows = [corpus_windows(model, corpus, convention, sweep.max_windows) for corpus in corpora]
    fingerprint, baseline, theirs = model_fingerprint(model), model, None
    if sweep.baseline is not None:
        theirs = model_fingerprint(sweep.baseline)
        baseline = model if theirs == fingerprint else sweep.baseline
    asked = [(first, treatments), *((each, drawing) for each in others)]
    todo = [(each, model, fingerprint, treatment) for each, treated in asked for treatment in treated]
    if baseline is not model:
        for corpus, cut in zip(corpora, windows, strict=True):
            _check_baseline(
                model, baseline, cut.tokens, lambda c=corpus: corpus_windows(baseline, c, convention, sweep.max_windows)
            )
        todo = [(first, baseline, theirs, AS_IT_IS), *todo]
    own = theirs or fingerprint
    return [
        Cell(each, subject, mark, treatment, orders[treatment], corpus, cut, convention, baseline, own)
        for each, subject, mark, treatment in todo
        for corpus, cut in zip(corpora, windows, strict=True)
    ]


def _by_seed(model: Model, sweep: Sweep) -> list[Sweep]:
    """The sweep of every seed, with what that drew."""
    seeds, drawn = sweep.seeds or (sweep.seed,), sweep.calibration
    drawn = list(drawn) if sweep.seeds and isinstance(drawn, (list, tuple)) and not isinstance(drawn, Calibration) else [drawn]
    if len(drawn) != len(seeds) and drawn != [None]:
        raise QjaxError(
            f"Sweep: {len(drawn)} calibration for {len(seeds)} seeds; give one that each drew: "
            "tuple(load_calibration(model, text, seed=seed) for seed in seeds)"
        )
    tokens = [None if each is None else as_calibration(model, each) for each in drawn]
    return [dataclasses.replace(sweep, seed=seed, calibration=tokens[at % len(tokens)]) for at, seed in enumerate(seeds)]


def _each_text_once(corpora: Iterable[Corpus]) -> list[Corpus]:
    """Warns (QjaxWarning) of texts that are there already, by another name or in other documents."""
    found: dict[str, Corpus] = {}
    for corpus in corpora:
        if (first := found.setdefault(corpus.fingerprint, corpus)) is not corpus:
            text = f"{corpus.name} is left out: it is the text of {first.name}, however that is divided, which is measured once"
            warnings.warn(QjaxWarning(text), stacklevel=2)
    return list(found.values())


def _check_baseline(model: Model, baseline: Model, tokens: np.ndarray, cut) -> None:
    ours, others = ((each.config.vocabulary_size, each.config.context) for each in (model, baseline))
    if ours != others or not np.array_equal(tokens, cut().tokens):
        raise QjaxError(
            f"baseline {baseline.name}: expected the vocabulary, tokenizer and context of {model.name}, (vocabulary, context) "
            f"{ours}, got {others}{'' if ours != others else ' and other tokens of the same text'}; choose another baseline"
        )


def treatments_of(sweep: Sweep, layers: int) -> list[Treatment]:
    """Everything a sweep measures, the model as it is first."""
    rules, recipes = rules_in_order(sweep.rules, sweep.order), canonical(sweep.recipes, sweep.order)
    rules, recipes = rules_in_order(rules, None), canonical(recipes)  # one name for a cell, whatever order it was asked in
    if sweep.one_block:
        blocks = sweep.blocks or range(layers)
        found = [Treatment(UNQUANTIZED, (*rules, f"^{block_name(i)}/={recipe}"), i) for recipe in recipes for i in blocks]
    else:
        found = [Treatment(recipe, rules) for recipe in recipes]
    return list(dict.fromkeys([AS_IT_IS, *found]))


def _known_rules(model: Model, rules: Iterable[str]) -> tuple[str, ...]:
    """Rules by the names that their kernels have here, so that equal cells have equal keys."""
    texts = [(rule.partition("=")[2], parse_rule(rule)) for rule in rules]
    known = in_our_words(model, [rule for _, rule in texts])
    return tuple(f"{rule.pattern}={recipe}" for rule, (recipe, _) in zip(known, texts, strict=True))


def rules_in_order(rules: Iterable[str], order: str | None) -> tuple[str, ...]:
    """Canonical rules whose recipes are in the given order where they read data and name none."""
    return tuple(f"{rule.pattern}={name_in_order(rule.recipe, order)}" for rule in map(parse_rule, rules))


def _check_calibration(model: Model, sweep: Sweep, needing: Sequence[Treatment]) -> None:
    """Raises QjaxError when treatments need calibration data and there is none, or none that may be used."""
    if needing and sweep.calibration is None:
        names = ", ".join(map(str, needing[:4]))
        raise QjaxError(f"{names} need calibration data; name a text with --calibration, for example --calibration python-docs")
    if needing:
        same = [corpus.name for corpus in sweep.corpora if corpus.fingerprint == sweep.calibration.source]
        if same:
            raise QjaxError(
                f"{same[0]} is both measured and calibrated on, which makes calibrated methods look better than they are; "
                "give another text to --calibration or --data"
            )


def _check_recipes(model: Model, treatments: Sequence[Treatment]) -> None:
    """Raises QjaxError for a recipe that a kernel of its treatment cannot have."""
    kernels, find_problem = flatten_dict(model.params, sep="/"), functools.cache(problem_of)
    for treatment in treatments:
        for path, recipe in placement(model, treatment.recipe, treatment.rules).items():
            problem = recipe and not recipe.is_cast and find_problem(recipe, matrix_shape(path, kernels[path].shape))
            if problem:
                raise QjaxError(f"{path}: {problem}")
