"""Does the type that a model runs in change what quantization is found to cost? Recipes in float32 and in bfloat16, paired.

    python experiments/compute_types.py                  writes results/compute_types/, some twenty minutes on 2 cores
    python experiments/compute_types.py --tiny --out X   a few windows and recipes, for tests

Differences of mean losses, each with its standard error over documents, of one recipe on the same windows in both types: what
bfloat16 costs the recipe, how far it moves the recipe's change from the model as it is, which is what papers report, and what
it costs to run the model in bfloat16 to be calibrated, where it is measured in float32.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import common
import numpy as np

from qjax.evaluate.statistics import Difference, paired_difference
from qjax.formats import UNQUANTIZED
from qjax.models.compute import NAMES

MODELS = ("bundled", "stories260K", "smollm2")
SETTINGS = common.Settings(max_windows=32, calibration_windows=8)
TABLE = "compute_types.md"
DOC = """# In which type should a model run?

Mean loss in nats a token, ± a standard error over documents; *cost*: loss in bfloat16 less loss in float32 of one recipe;
*moved*: the recipe's change from the model as it is in bfloat16, less that in float32. `python
experiments/compute_types.py` writes this.

| model | text | recipe | perplexity in float32 | change | cost of bfloat16 | moved |
|---|---|---|---|---|---|---|
"""
CALIBRATED_DOC = """
*calibrated*: loss in float32 of the recipe calibrated in bfloat16, less that of the recipe calibrated in float32.

| model | text | recipe | perplexity | change | calibrated |
|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured, and what is calibrated in both types; GROUP is the subject's usual group."""

    recipes: tuple[str, ...] = (
        *("rtn:int8-channel", "rtn:int4-gGROUP", "rtn:int3-gGROUP", "nf4-g64"),
        *("rtn:int8-channel-sym/int8-token", "gptq(clip=mse):int4-gGROUP@parallel"),
    )
    calibrated: tuple[str, ...] = (
        *("gptq(clip=mse):int4-gGROUP@parallel", "gptq(clip=mse):int3-gGROUP@parallel", "awq:int4-gGROUP@parallel"),
        *("gptq(clip=mse):int4-gGROUP@qep", "gptq(clip=mse):int3-gGROUP@qep"),
    )
    settings: common.Settings = SETTINGS


TINY = Experiment(("rtn:int4-gGROUP",), ("gptq:int4-gGROUP@parallel",), common.TINY)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables, figures and out/compute_types.md."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        recipes, calibrated = (
            [recipe.replace("GROUP", subject.groups[1]) for recipe in each]
            for each in (experiment.recipes, experiment.calibrated)
        )
        for name in NAMES:
            settings = dataclasses.replace(experiment.settings, compute=name, calibration_compute="float32")
            common.measure(out, subject, recipes, settings)
            settings = dataclasses.replace(experiment.settings, compute="float32", calibration_compute=name)
            common.measure(out, subject, calibrated, settings)
    rows = common.report(out)
    (out / TABLE).write_text(table(rows), "utf-8")
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The tables of what both types give."""
    calibrated = "".join(map(calibrated_line, calibrated_pairs(rows)))
    return DOC + "".join(map(line, pairs(rows))) + (calibrated and CALIBRATED_DOC + calibrated)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A recipe's row in float32, its change from the model as it is there, what bfloat16 costs it and moves of the change."""

    row: Mapping[str, object]
    change: Difference
    cost: Difference
    moved: Difference


def pairs(rows: Sequence[Mapping[str, object]]) -> list[Pair]:
    """Of every recipe that was measured in both types, calibrated in the device's own."""
    rows = [row for row in rows if row.get("calibration_compute") is None]
    cells = {(*_text(row), row["compute_dtype"], row["recipe"]): row for row in rows}
    found = []
    for (*text, name, recipe), row in cells.items():
        if name != "float32" or (*text, "bfloat16", recipe) not in cells:
            continue
        four = [cells[(*text, each, of)] for of in (recipe, UNQUANTIZED) for each in ("bfloat16", "float32")]
        low, exact, low_before, before = (np.asarray(each["window_nll"]) for each in four)
        units = np.asarray(row["window_tokens"]), np.asarray(row["window_documents"])
        changes = exact - before, low - low_before
        differences = (exact, before), (low, exact), changes[::-1]
        found.append(Pair(row, *(paired_difference(*each, *units) for each in differences)))
    return found


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A recipe's row calibrated in float32, its change from the model as it is, and what calibrating in bfloat16 costs it."""

    row: Mapping[str, object]
    change: Difference
    cost: Difference


def calibrated_pairs(rows: Sequence[Mapping[str, object]]) -> list[Calibrated]:
    """Of every recipe that was calibrated in both types and measured in float32."""
    rows = [row for row in rows if row["compute_dtype"] == "float32"]
    cells = {(*_text(row), row.get("calibration_compute"), row["recipe"]): row for row in rows}
    found = []
    for (*text, name, recipe), row in cells.items():
        if name is not None or (*text, "bfloat16", recipe) not in cells:
            continue
        three = cells[*text, "bfloat16", recipe], row, cells[*text, None, UNQUANTIZED]
        low, exact, before = (np.asarray(each["window_nll"]) for each in three)
        units = np.asarray(row["window_tokens"]), np.asarray(row["window_documents"])
        found.append(Calibrated(row, paired_difference(exact, before, *units), paired_difference(low, exact, *units)))
    return found


def _text(row: Mapping[str, object]) -> tuple[str, str]:
    return str(row["fingerprint"]), str(row["corpus_fingerprint"])


def line(pair: Pair) -> str:
    """The table's line."""
    return _line(pair.row, pair.change, pair.cost, pair.moved)


def calibrated_line(pair: Calibrated) -> str:
    """The second table's line."""
    return _line(pair.row, pair.change, pair.cost)


def _line(row: Mapping[str, object], *differences: Difference) -> str:
    shown = (f"{each.value:+.5f} ± {each.stderr:.5f}" for each in differences)
    cells = (row["model"], row["corpus"], f"`{row['recipe']}`", f"{row['perplexity']:.4f}", *shown)
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    common.main(__doc__, "compute_types", run, MODELS)
