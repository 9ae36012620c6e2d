"""The resumable loop: every recipe on every corpus, one row as soon as one is measured.

All cells share the loaded weights, the tokenized windows and one compiled forward pass. A cell whose key is already in
the rows file is skipped, so running the same sweep again finishes what an interruption left.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from qjax.driver import LayerRecord, placement, quantize
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.evaluate.perplexity import Convention, corpus_windows, measure
from qjax.models.model import Model
from qjax.recipe import UNQUANTIZED, parse_recipe
from qjax.sweep.grid import canonical
from qjax.sweep.record import digest, make_row, model_fingerprint, provenance
from qjax.sweep.store import ROWS, append_row, read_rows


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is measured: recipes (the unquantized model is added first if missing) x corpora, in one convention."""

    recipes: tuple[str, ...]
    corpora: tuple[Corpus, ...]
    convention: Convention
    max_windows: int | None = None
    rules: tuple[str, ...] = ()
    seed: int = 0


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
    anything is computed.
    """
    watcher = watcher or Watcher()
    recipes = canonical([UNQUANTIZED, *sweep.recipes])  # the baseline comes first
    for recipe in recipes[1:]:
        placement(model, recipe, sweep.rules)
    convention = sweep.convention.clipped(model.config.context)
    windows = {corpus.name: corpus_windows(model, corpus, convention, sweep.max_windows) for corpus in sweep.corpora}
    path = folder / ROWS
    known = {row["key"]: row for row in read_rows(path)}
    fingerprint = model_fingerprint(model)
    rows: dict[tuple[str, str], dict[str, object]] = {}
    total = len(recipes) * len(sweep.corpora)
    for recipe in recipes:
        quantized = None
        rules = sweep.rules if recipe != UNQUANTIZED else ()
        for corpus in sweep.corpora:
            identity = {
                "model": model.name,
                "recipe": "; ".join([recipe, *rules]),
                "corpus": corpus.name,
                "seed": sweep.seed,
                "fingerprint": fingerprint,
                "corpus_fingerprint": corpus.fingerprint,
                "max_windows": sweep.max_windows,
            }
            key = digest(identity, str(convention), provenance()["code"])
            watcher.cell(len(rows) + 1, total, recipe, corpus.name)
            if key in known:
                rows[recipe, corpus.name] = known[key]
                watcher.row(known[key], is_new=False)
                continue
            if quantized is None:
                quantized = quantize(model, recipe, rules=rules, on_layer=watcher.layer)
            result = measure(quantized[0], windows[corpus.name], convention, corpus, on_batch=watcher.batch)
            baseline = rows.get((UNQUANTIZED, corpus.name))
            row = make_row({"key": key} | identity, parse_recipe(recipe), quantized[1], result, baseline)
            append_row(path, row)
            rows[recipe, corpus.name] = row
            watcher.row(row, is_new=True)
    return list(rows.values())


def load_corpora(names: Sequence[str]) -> tuple[Corpus, ...]:
    """Held-out parts of the named corpora."""
    return tuple(load_corpus(name, split="test") for name in names)
