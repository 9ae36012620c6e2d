"""The resumable loop: every recipe on every corpus, one row as soon as one is measured.

All cells share the loaded weights, the tokenized windows and one compiled forward pass. A cell whose key is already in
the rows file is skipped, so running the same sweep again finishes what an interruption left.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

from flax.traverse_util import flatten_dict

from qjax.calibrate.tokens import Calibration, as_calibration
from qjax.driver.decoder import quantize_together
from qjax.driver.layer import LayerRecord, problem_of
from qjax.driver.placement import calibration_order, parse_rule, placement
from qjax.driver.report import Report
from qjax.errors import QjaxError
from qjax.evaluate.choices import accuracy
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.divergence import measure_divergence
from qjax.evaluate.perplexity import Convention, corpus_windows, measure, require_finite
from qjax.evaluate.questions import Task
from qjax.evaluate.speed import measure_speed
from qjax.files import require_writable
from qjax.models.model import Model, runnable
from qjax.recipe import UNQUANTIZED, Stage, parse_recipe
from qjax.sweep.cells import canonical, name_in_order
from qjax.sweep.measures import accuracy_columns, divergence_columns, mean_columns, speed_columns, tasks_identity
from qjax.sweep.record import calibration_columns, digest, layer_rows, make_row, model_fingerprint, provenance
from qjax.sweep.store import LAYERS, ROWS, append_row, append_rows, layers_held, read_rows

PARALLEL = Stage("parallel")
MOST_TOGETHER = 8  # models that wait for their measurement, packed, while another is measured


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is measured: recipes, each with the rules, x corpora, in one convention. The unquantized model comes first."""

    recipes: tuple[str, ...]
    corpora: tuple[Corpus, ...]
    convention: Convention
    max_windows: int | None = None
    rules: tuple[str, ...] = ()
    seed: int = 0
    tasks: tuple[Task, ...] = ()
    divergence: bool = False  # from the unquantized model
    speed: bool = False  # with dense and with packed weights
    calibration: Calibration | None = None  # for recipes that read data
    order: str | None = None  # of calibration, for recipes that name none
    one_block: bool = False  # each recipe in one block at a time, the others unquantized: a sensitivity table


class Watcher:
    """Told what a sweep is doing; override what is of interest."""

    def cell(self, number: int, total: int, recipe: str, corpus: str) -> None:
        """A cell begins."""

    def layer(self, record: LayerRecord) -> None:
        """A kernel was quantized."""

    def batch(self, done: int, total: int) -> None:
        """Windows evaluated so far in this cell."""

    def row(self, row: dict[str, object], is_new: bool) -> None:
        """A row is on disk; is_new is False when it was there before."""


def run_sweep(model: Model, sweep: Sweep, folder: str | Path, watcher: Watcher | None = None) -> list[dict[str, object]]:
    """Measures every cell that folder/rows.jsonl does not hold yet; returns this sweep's rows, baseline first.

    The folder is made where it is missing. Everything that can be wrong with the request (recipes, rules, texts shorter than
    a window) is an error before anything is computed. A recipe that makes the model diverge gets a row with infinite
    perplexity.
    """
    watcher, folder = watcher or Watcher(), Path(folder)
    plans = plans_of(sweep, model.config.layers)
    orders = {plan: calibration_order(model, *plan) for plan in plans}
    _check_calibration(model, sweep, [plan for plan in plans if orders[plan]])
    convention = sweep.convention.clipped(model.config.context)
    corpora = list({corpus.fingerprint: corpus for corpus in sweep.corpora}.values())  # the same text counts once
    windows = [corpus_windows(model, corpus, convention, sweep.max_windows) for corpus in corpora]
    require_writable(folder)
    known = {row["key"]: row for row in read_rows(folder / ROWS)}
    fingerprint = model_fingerprint(model)
    rows, baselines = [], {}
    quantizer = Quantizer(model, sweep.calibration, orders, watcher)

    def identify(plan, corpus):
        """What is measured in a cell and where, and the cell's key."""
        identity = {
            "model": model.name,
            "recipe": "; ".join([plan[0], *plan[1]]),
            "corpus": corpus.name,
            "seed": sweep.seed,
            "fingerprint": fingerprint,
            "corpus_fingerprint": corpus.fingerprint,
            "max_windows": sweep.max_windows,
            **calibration_columns(sweep.calibration, orders[plan]),
            **({"tasks": tasks_identity(sweep.tasks)} if sweep.tasks else {}),
            **provenance(added_sources(*plan)),
        }
        return identity, digest(identity, str(convention), *(name for name in ("divergence", "speed") if getattr(sweep, name)))

    pending = [plan for plan in plans if any(identify(plan, corpus)[1] not in known for corpus in corpora)]
    held = layers_held(folder / LAYERS) if pending else set()
    for recipe, placed in plans:
        prepared, answered, timed = None, None, {}
        for corpus, cut in zip(corpora, windows, strict=True):
            identity, key = identify((recipe, placed), corpus)
            watcher.cell(len(rows) + 1, len(plans) * len(corpora), identity["recipe"], corpus.name)
            if key in known:
                row = known[key]
            else:
                prepared = prepared or quantizer.prepare(recipe, placed, later=pending)
                result = measure(prepared[0], cut, convention, corpus, on_batch=watcher.batch)
                if not baselines.get(corpus.fingerprint):
                    require_finite(model, result)
                baseline = baselines.get(corpus.fingerprint)
                answered = answered or [accuracy(prepared[0], task, on_batch=watcher.batch) for task in sweep.tasks]
                more = [accuracy_columns(each, baseline) for each in answered]
                if sweep.divergence:
                    more.append(divergence_columns(measure_divergence(prepared[0], model, cut, on_batch=watcher.batch)))
                if sweep.speed and not timed:
                    timed = speed_columns(measure_speed(prepared[0]), measure_speed(prepared[2], packed=True))
                more = {name: value for columns in [*more, timed] for name, value in columns.items()}
                more |= mean_columns(more, sweep.tasks)
                row = make_row({"key": key} | identity, parse_recipe(recipe), prepared[1], result, baseline, more=more)
                layers = [layer for layer in layer_rows(key, prepared[1]) if (key, layer["path"]) not in held]
                append_rows(folder / LAYERS, layers)
                append_row(folder / ROWS, row)
            baselines.setdefault(corpus.fingerprint, row)
            rows.append(row)
            watcher.row(row, is_new=key not in known)
        pending = [plan for plan in pending if plan != (recipe, placed)]
    return rows


def plans_of(sweep: Sweep, layers: int) -> list[tuple[str, tuple[str, ...]]]:
    """(recipe, rules) of everything a sweep measures, the unquantized model first."""
    rules, recipes = rules_in_order(sweep.rules, sweep.order), canonical(sweep.recipes, sweep.order)
    rules, recipes = rules_in_order(rules, None), canonical(recipes)  # one name for a cell, whatever order it was asked in
    if sweep.one_block:
        found = [(UNQUANTIZED, (*rules, f"^block_{i}/={recipe}")) for recipe in recipes for i in range(layers)]
    else:
        found = [(recipe, rules) for recipe in recipes]
    return list(dict.fromkeys([(UNQUANTIZED, ()), *found]))


def rules_in_order(rules: Iterable[str], order: str | None) -> tuple[str, ...]:
    """Canonical rules whose recipes are in the given order where they read data and name none."""
    return tuple(f"{rule.pattern}={name_in_order(rule.recipe, order)}" for rule in map(parse_rule, rules))


def _check_calibration(model: Model, sweep: Sweep, needing: list[tuple[str, tuple[str, ...]]]) -> None:
    """Raises QjaxError when plans need calibration data and there is none, or none that may be used."""
    if needing and sweep.calibration is None:
        names = ", ".join("; ".join([recipe, *rules]) for recipe, rules in needing[:4])
        raise QjaxError(f"{names} need calibration data; name a text with --calibration, for example --calibration python-docs")
    kernels, find_problem = flatten_dict(model.params, sep="/"), functools.cache(problem_of)
    for plan in needing:
        for path, recipe in placement(model, *plan).items():
            problem = recipe and recipe.reads_data and find_problem(recipe, kernels[path].shape)
            if problem:
                raise QjaxError(f"{path}: {problem}")
    if needing:
        as_calibration(model, sweep.calibration)
        same = [corpus.name for corpus in sweep.corpora if corpus.fingerprint == sweep.calibration.source]
        if same:
            raise QjaxError(
                f"{same[0]} is both measured and calibrated on, which makes calibrated methods look better than they are; "
                "give another text to --calibration or --data"
            )


def added_sources(recipe: str, rules: tuple[str, ...]) -> dict[str, str]:
    """Sources of the methods from outside the package that a recipe and rules use."""
    recipes = (parse_recipe(recipe), *(parse_rule(rule).recipe for rule in rules))
    return {name: source for each in recipes if each for name, source in each.sources().items()}


class Quantizer:
    """Makes the models of a sweep's plans; those of the order `parallel` together, so that they share what calibration
    gives.
    """

    def __init__(self, model: Model, calibration: Calibration | None, orders: dict, watcher: Watcher):
        self._model, self._calibration, self._orders, self._watcher = model, calibration, orders, watcher
        self._made: dict[tuple, tuple[Model, Report]] = {}

    def prepare(self, recipe: str, rules: tuple[str, ...], later: list[tuple] = ()) -> tuple[Model, Report, Model]:
        """The quantized model, decoded once for all corpora, its report, and the model as it is. later: plans that will be
        asked for.
        """
        plan = (recipe, rules)
        if plan not in self._made:
            together = [plan]
            if self._orders[plan] == PARALLEL:
                together += [other for other in later if other != plan and self._orders[other] == PARALLEL][: MOST_TOGETHER - 1]
            made = quantize_together(self._model, together, calibration=self._calibration, on_layer=self._watcher.layer)
            self._made |= dict(zip(together, made, strict=True))
        quantized, report = self._made.pop(plan)
        return runnable(quantized), report, quantized
