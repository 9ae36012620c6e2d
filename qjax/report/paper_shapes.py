"""Which findings of the GPTQ, AWQ and QLoRA papers hold on other models: finding / paper / ours / holds, from rows alone.

A finding is a function of what recipes cost, cost = 100 (PPL / PPL of the unquantized model - 1), and a range that it should be
in. Costs are those of the other tables: over draws of calibration data PPL's geometric mean (`draws.py`). The error adds
documents and draws (`evaluate/statistics.py`): every document is left out once, which keeps the pairing of recipes, and the
figures of the draws say what they add. A finding holds where its interval is in the range, does not where it is out of it, and
is open in between, or where the interval of a cost that another is divided by holds 0. The intervals of a table are so wide
that one wrong verdict among them all has a probability of 5 % (Holm 1979); what an interval of 95 % would say is told as such.
The papers' numbers are computed from their
tables, of models a hundred and more times larger; the ranges leave room beside what their smallest models and their claims say.
The settings are theirs:
GPTQ's paper has no act-order and sees the quantized blocks before; its code on LLaMA has act-order and sees the layers
before (with act-order our groups are static, its were not); AWQ sees the unquantized model.

GPTQ: Frantar et al. 2022 (arXiv 2210.17323). AWQ: Lin et al. 2023 (2306.00978). QLoRA: Dettmers et al. 2023 (2305.14314).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from qjax.errors import QjaxError
from qjax.evaluate.statistics import (
    LEVEL,
    Difference,
    equal_units,
    holm,
    interval,
    jackknife_error,
    shared_variance,
    units_of,
    with_draws,
)
from qjax.report.accuracy import mean_reach
from qjax.report.draws import draws_of, in_step, merge_draws
from qjax.report.rendering import MISSING, Row, Table, TableColumn, documents_of, loss_change, losses, number, with_error
from qjax.report.tables import describe, is_baseline, over_units, split_tables

KIND = "paper_shapes"
Changes = Float[np.ndarray, "recipes n"]  # of the mean loss of every recipe, nats; of all windows, then without each document


class Judged(NamedTuple):
    """A finding on one model. inside: whether the value is in the range. p: probability of an error as large as the value's
    distance from the nearest end of that.
    """

    value: float
    error: float
    inside: bool
    p: float

    @property
    def holds(self) -> str:
        """The verdict by itself: "yes", "no", or "open" where the error is too large to tell."""
        return ("yes" if self.inside else "no") if self.p <= 1 - LEVEL else "open"


@dataclasses.dataclass(frozen=True)
class Finding:
    """text: what was found, with the unit of its number. paper: its number there; "": none. source: where. recipes: canonical,
    whose rows it needs. low, high: the range its number is in where it holds. measure: of their costs; None: the change of
    accuracy of the only recipe, points.
    """

    text: str
    paper: str
    source: str
    recipes: tuple[str, ...]
    measure: Callable[..., Float[np.ndarray, " n"]] | None
    low: float = -math.inf
    high: float = math.inf

    @property
    def range(self) -> str:
        """The range in words."""
        if math.isinf(self.low) or math.isinf(self.high):
            return f"above {self.low:g}" if math.isinf(self.high) else f"below {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


def share(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """What one recipe costs of what another does."""
    return ours / theirs


def perplexity_ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Perplexity of one recipe over another's."""
    return (100 + ours) / (100 + theirs)


def smallest_step(*costs: np.ndarray) -> np.ndarray:
    """The smallest rise from one recipe to the next; negative where one of them falls."""
    return np.diff(np.stack(costs), axis=0).min(axis=0)


def _falls(ours_few: np.ndarray, theirs_few: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return share(ours_few, theirs_few) / share(ours, theirs)


DIVISORS = {share: (1,), _falls: (1, 2, 3)}  # of a measure: its arguments that must be above 0 for its number to mean anything


def _change(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return 100 * (perplexity_ratio(ours, theirs) - 1)


_INT4 = "rtn:int4-g64-sym-max"
# The paper's tables are without act-order, which its code got later.
_PLAIN, _PLAIN_3 = (f"gptq(act_order=false,static_groups=false):int{bits}-channel@block" for bits in (4, 3))
_PLAIN_2 = tuple(f"gptq(act_order=false,static_groups=false):int2-g{group}@block" for group in (32, 64, 128))
_SMALL, _LLAMA, _AWQ, _QLORA = (
    "GPTQ, OPT-125M, 350M; BLOOM-560M to 7.1B",
    "GPTQ's code, LLaMA-7B",
    "AWQ, Llama-2-7B (all seven)",
    "QLoRA, 125M to 13B",
)
FINDINGS = (
    Finding(
        "RTN, g128: perplexity rises from 8 to 4 to 3 to 2 bits (smallest step, points)", "", "shape check",
        ("rtn:int8-g128", "rtn:int4-g128", "rtn:int3-g128", "rtn:int2-g128"), smallest_step, low=0,
    ),
    Finding(
        "4 bits, per channel: share of RTN's cost that GPTQ leaves", "0.36, 0.57; 0.32 to 0.69", _SMALL,
        (_PLAIN, "rtn:int4-channel"), share, high=0.7,
    ),
    Finding(
        "3 bits, per channel: the same share", "0.02, 0.28; 0.12 to 0.35", _SMALL,
        (_PLAIN_3, "rtn:int3-channel"), share, high=0.4,
    ),
    Finding(
        "Per channel: the share at 3 bits over that at 4 bits", "0.06, 0.49; 0.17 to 0.72", _SMALL,
        (_PLAIN_3, "rtn:int3-channel", _PLAIN, "rtn:int4-channel"), _falls, high=1,
    ),
    Finding(
        "GPTQ with act-order and sequential inputs, 3 bits: cost with g128 over cost per channel", "0.39", _LLAMA,
        ("gptq:int3-g128@sequential", "gptq:int3-channel@sequential"), share, high=1,
    ),
    Finding(
        "GPTQ, 2 bits: cost rises from g32 to g64 to g128 (smallest step, points)", "2.9", "GPTQ, OPT-175B",
        _PLAIN_2, smallest_step, low=0,
    ),
    Finding(
        "GPTQ, 4 bits: cost with act-order and sequential inputs over cost without", "0.28", _LLAMA,
        ("gptq:int4-channel@sequential", _PLAIN), share, high=1,
    ),
    Finding(
        "3 bits, g128: share of RTN's cost that AWQ leaves", "0.65 (0.50 to 0.69)", _AWQ,
        ("awq:int3-g128@parallel", "rtn:int3-g128"), share, high=0.7,
    ),
    Finding(
        "4 bits, g128: the same share", "0.50 (0.36 to 0.90)", _AWQ,
        ("awq:int4-g128@parallel", "rtn:int4-g128"), share, high=0.9,
    ),
    Finding(
        "3 bits, g128: AWQ's cost over that of GPTQ with act-order", "0.81 (0.62 to 0.83)", _AWQ,
        ("awq:int3-g128@parallel", "gptq:int3-g128@block"), share, high=1,
    ),
    Finding(
        "g64: perplexity of FP4-E2M1 over that of INT4", "0.905", _QLORA,
        ("rtn:fp4_e2m1-g64", _INT4), perplexity_ratio, high=1,
    ),
    Finding(
        "g64: perplexity of NF4 with DQ over that of INT4", "0.798", _QLORA,
        ("rtn:nf4-g64-dq", _INT4), perplexity_ratio, high=1,
    ),
    Finding(
        "g64: perplexity of NF4 with DQ over that of FP4-E2M1", "0.882", _QLORA,
        ("rtn:nf4-g64-dq", "rtn:fp4_e2m1-g64"), perplexity_ratio, high=1,
    ),
    Finding(
        "NF4, g64: change of perplexity by DQ (%)", "none measurable", "QLoRA",
        ("rtn:nf4-g64-dq", "rtn:nf4-g64"), _change, low=-0.1, high=0.1,
    ),
    Finding(
        "NF4 with DQ, g64: change of accuracy, mean of tasks (points)", "+0.1 (MMLU)", "QLoRA, 7B to 65B",
        ("rtn:nf4-g64-dq",), None, low=-1, high=1,
    ),
)  # fmt: skip


def recipes_of(findings: Sequence[Finding] = FINDINGS) -> list[str]:
    """Every recipe that the findings need, each once."""
    return list(dict.fromkeys(recipe for finding in findings for recipe in finding.recipes))


def judge(finding: Finding, rows: Sequence[Row]) -> Judged | None:
    """The finding on rows of one model, text and convention; None where they lack a recipe (or accuracies)."""
    baseline = next((row for row in rows if is_baseline(row)), None)
    cells = [[row for row in rows if row["recipe"] == recipe] for recipe in finding.recipes]
    if baseline is None or not all(cells):
        return None
    if finding.measure is None:
        row = merge_draws([baseline, *cells[0]])[-1]
        value, error = (100 * number(row, key) for key in ("accuracy_mean_delta", "accuracy_mean_delta_stderr"))
        if math.isnan(value):
            return None
        reach = 100 * mean_reach(row)
        return _judged(finding, Difference(value, error, value - reach, value + reach))
    draws = [_changes(each, baseline) for each in in_step([draws_of(cell)[-1] for cell in cells])]
    units = equal_units(np.bincount(_units(baseline), np.asarray(baseline["window_tokens"])))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # of costs that are 0 or infinite
        found = _judged(finding, _estimate(finding.measure, draws, units))
        divisors = [_estimate(lambda *costs, i=i: costs[i], draws, units) for i in DIVISORS.get(finding.measure, ())]
    unsure = [0.0 if each.value == math.inf else each.p if each.value > 0 else 1.0 for each in divisors]
    return found._replace(p=float(np.max([found.p, *unsure])))


def _estimate(measure: Callable[..., Float[np.ndarray, " n"]], draws: Sequence[Changes], units: float) -> Difference:
    """The measure of the costs over draws. units: how many of equal size tell as much as the documents."""
    mean, *single = (measure(*(100 * np.expm1(changes))) for changes in (np.mean(draws, axis=0), *draws))
    if not math.isfinite(mean[0]):
        return interval(float(mean[0]), math.nan)
    over_documents = interval(float(mean[0]), jackknife_error(mean[1:]), units - 1)
    both = shared_variance([each[1:] - mean[1:] for each in single]) if len(single) > 1 else 0.0
    values = np.array([each[0] for each in single])
    return with_draws(over_documents, values + (mean[0] - values.mean()), both).change


def _judged(finding: Finding, found: Difference) -> Judged:
    if found.value == math.inf:  # one of the models diverged, and no error is known
        return Judged(found.value, math.nan, False, 0.0 if math.isfinite(finding.high) else 1.0)
    inside = finding.low <= found.value <= finding.high
    nearest = max(found.p_of(end) for end in (finding.low, finding.high) if math.isfinite(end))
    return Judged(found.value, found.stderr, inside, nearest)


def _units(baseline: Row) -> Int[np.ndarray, " windows"]:
    """The independent unit of every window; the window itself in rows of earlier versions."""
    documents, loss = documents_of(baseline), losses(baseline)
    return np.arange(len(loss)) if documents is None else units_of(loss - loss.mean(), documents)


def _changes(rows: Sequence[Row], baseline: Row) -> Changes:
    """Of one draw's row of every recipe."""
    units = _units(baseline)
    tokens = np.bincount(units, baseline["window_tokens"])
    counts, found = tokens.sum() - np.append(0.0, tokens), []
    for row in rows:
        total = np.bincount(units, loss_change(row, baseline))
        with np.errstate(invalid="ignore"):
            left = np.where(np.isposinf(total.sum()), np.inf, total.sum() - np.append(0.0, total))  # diverged: without any too
        found.append(left / counts)
    return np.array(found)


def paper_shapes_table(rows: Sequence[Row], findings: Sequence[Finding] = FINDINGS) -> Table:
    """Every finding with its number on each model. rows: of a whole folder; those that are no cells are passed over.

    Raises QjaxError when there are no cells of an unquantized and a quantized model.
    """
    groups = [group for group in split_tables(rows) if any(is_baseline(row) for row in group)]
    if not groups:
        raise QjaxError(
            "a table of the papers' findings needs rows of an unquantized model; experiments/paper_shapes.py measures"
        )
    names = [str(group[0]["model"]) for group in groups]
    for more in (
        describe,
        lambda row: f"{describe(row)}, {row.get('windows')} windows, {row.get('tasks')}, {row.get('device')}",
    ):
        names = [name if names.count(name) == 1 else more(group[0]) for name, group in zip(names, groups, strict=True)]
    lines = [dict(zip(("finding", "paper", "source", "range"), _told(finding), strict=True)) for finding in findings]
    judged = {
        (at, name): found
        for at, finding in enumerate(findings)
        for name, group in zip(names, groups, strict=True)
        if (found := judge(finding, group)) is not None
    }
    sure = holm([found.p for found in judged.values()])
    for ((at, name), found), each in zip(judged.items(), sure, strict=True):
        lines[at] |= {f"ours:{name}": found.value, f"error:{name}": found.error, f"holds:{name}": _together(found.holds, each)}
    columns = [
        *(
            TableColumn(key, header, text=True)
            for key, header in (("finding", "finding"), ("paper", "paper"), ("source", "where"))
        ),
        TableColumn("range", "holds\nif", text=True),
    ]
    for name in names:
        columns.append(TableColumn(f"ours:{name}", f"{name}", functools.partial(_ours, name), error=f"error:{name}"))
        columns.append(TableColumn(f"holds:{name}", "holds?", lambda row, key: str(row.get(key, MISSING)), text=True))
    notes = (
        f"±: standard error. Measured on {'; '.join(_measured_on(group) for group in groups)}. "
        "Yes: the interval is in the range; no: it is out of it; open: neither, or a divisor's interval holds 0. "
        f"Intervals are those that hold the {len(judged)} verdicts together, one wrong yes or no among them all with a "
        "probability of 5 % (Holm 1979); alone: by a 95 % interval of its own. "
        "A range below 1 tests the direction alone, not the papers' size. "
        "Cost: increase of perplexity over the unquantized model, in percent; its differences are points. "
        "GPTQ: without act-order where a finding does not name it; "
        "RTN: nearest rounding; INT4: symmetric, scale max/7; DQ: double quantization.",
    )
    return Table("Findings of the GPTQ, AWQ and QLoRA papers on small models", tuple(columns), tuple(lines), notes)


def _together(verdict: str, sure: bool) -> str:
    return verdict if sure or verdict == "open" else f"{verdict} alone"


def _told(finding: Finding) -> tuple[str, ...]:
    return finding.text, finding.paper, finding.source, finding.range


def _measured_on(group: Sequence[Row]) -> str:
    return f"{describe(group[0])}, over {over_units(merge_draws(group))}"


def _ours(name: str, row: Row, key: str) -> str:
    return with_error(number(row, key), number(row, f"error:{name}"))
