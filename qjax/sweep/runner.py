"""The resumable loop: every recipe on every corpus, one row as soon as one is measured.

All cells share the loaded weights, the tokenized windows and one compiled forward pass. A cell whose key is already in
the rows file is skipped, so running the same sweep again finishes what an interruption left.
"""

import dataclasses
from pathlib import Path

from qjax.driver import LayerRecord, Report, placement, quantize
from qjax.evaluate.choices import accuracy
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.divergence import measure_divergence
from qjax.evaluate.perplexity import Convention, corpus_windows, measure, require_finite
from qjax.evaluate.questions import Task
from qjax.evaluate.speed import measure_speed
from qjax.models.model import Model, compute_dtype
from qjax.qtensor import dequantize_tree
from qjax.recipe import UNQUANTIZED, parse_recipe
from qjax.rules import parse_rule
from qjax.sweep.cells import canonical
from qjax.sweep.measures import accuracy_columns, divergence_columns, mean_columns, speed_columns, tasks_identity
from qjax.sweep.record import digest, make_row, model_fingerprint, provenance
from qjax.sweep.store import ROWS, append_row, read_rows


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


def run_sweep(model: Model, sweep: Sweep, folder: Path, watcher: Watcher | None = None) -> list[dict[str, object]]:
    """Measures every cell that folder/rows.jsonl does not hold yet; returns this sweep's rows, baseline first.

    Everything that can be wrong with the request (recipes, rules, texts shorter than a window) is an error before
    anything is computed. A recipe that makes the model diverge gets a row with infinite perplexity.
    """
    watcher = watcher or Watcher()
    rules = tuple(str(parse_rule(rule)) for rule in sweep.rules)
    plans = list(dict.fromkeys([(UNQUANTIZED, ()), *((recipe, rules) for recipe in canonical(sweep.recipes))]))
    for recipe, placed in plans:
        placement(model, recipe, placed)
    convention = sweep.convention.clipped(model.config.context)
    corpora = list({corpus.fingerprint: corpus for corpus in sweep.corpora}.values())  # the same text counts once
    windows = [corpus_windows(model, corpus, convention, sweep.max_windows) for corpus in corpora]
    known = {row["key"]: row for row in read_rows(folder / ROWS)}
    fingerprint = model_fingerprint(model)
    rows, baselines = [], {}
    for recipe, placed in plans:
        prepared, answered, timed = None, None, {}
        for corpus, cut in zip(corpora, windows, strict=True):
            identity = {
                "model": model.name,
                "recipe": "; ".join([recipe, *placed]),
                "corpus": corpus.name,
                "seed": sweep.seed,
                "fingerprint": fingerprint,
                "corpus_fingerprint": corpus.fingerprint,
                "max_windows": sweep.max_windows,
                **({"tasks": tasks_identity(sweep.tasks)} if sweep.tasks else {}),
                **provenance(),
            }
            key = digest(identity, str(convention), *(name for name in ("divergence", "speed") if getattr(sweep, name)))
            watcher.cell(len(rows) + 1, len(plans) * len(corpora), identity["recipe"], corpus.name)
            if key in known:
                row = known[key]
            else:
                prepared = prepared or _prepare(model, recipe, placed, watcher)
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
                append_row(folder / ROWS, row)
            baselines.setdefault(corpus.fingerprint, row)
            rows.append(row)
            watcher.row(row, is_new=key not in known)
    return rows


def _prepare(model: Model, recipe: str, rules: tuple[str, ...], watcher: Watcher) -> tuple[Model, Report, Model]:
    """The quantized model, decoded once for all corpora, its report, and the model as it is."""
    quantized, report = quantize(model, recipe, rules=rules, on_layer=watcher.layer)
    return quantized._replace(params=dequantize_tree(quantized.params, compute_dtype())), report, quantized
