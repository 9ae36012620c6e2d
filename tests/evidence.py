"""What the rows of results/ say, for the expressions in documents (`documents.py`).

Changes are in percent of the unquantized model's perplexity, accuracies and flips in percent and points.
"""

import functools

import numpy as np

from qjax.report.estimates import Estimate, cell_estimates
from qjax.report.rendering import decimals, with_error
from qjax.report.tables import change_of_perplexity, perplexity_text
from qjax.sweep.store import ROWS, read_rows
from tests.paths import REPOSITORY

RESULTS = REPOSITORY / "results"
BUNDLED, BASELINE = "bundled", "none"


@functools.cache
def cells(folder: str, model: str = BUNDLED, text: str = "") -> dict[str, Estimate]:
    """What rows of a model and a text say, by recipe and what else tells them apart. text: a part of its name."""
    found = cell_estimates(read_rows(RESULTS / folder / ROWS))
    return {" ".join(key[2:]): cell for key, cell in found.items() if key[0].startswith(model) and text in key[1]}


def cell(folder: str, recipe: str, **where: str) -> Estimate:
    """One of them."""
    return cells(folder, **where)[recipe]


def change(folder: str, recipe: str, **where: str) -> float:
    """Change of perplexity, %."""
    return cell(folder, recipe, **where).change


def error(folder: str, recipe: str, **where: str) -> float:
    """Its standard error."""
    return cell(folder, recipe, **where).change_stderr


def bits(folder: str, recipe: str, **where: str) -> float:
    """Exact bits per weight."""
    return cell(folder, recipe, **where).bits_per_weight


def calibration_tokens(folder: str, recipe: str) -> int:
    """Tokens of calibration text of a draw."""
    row = cell(folder, recipe).row
    return row["calibration_windows"] * row["calibration_window_tokens"]


def drawn(folder: str, recipe: str, **where: str) -> float:
    """The part of a change's standard error that draws of calibration text are."""
    row = cell(folder, recipe, **where).row
    return 100 * row["perplexity_ratio"] * row["nll_delta_between"] / np.sqrt(row["draws"])


def is_noise(found: Estimate) -> bool:
    """Whether the 95 % interval of its change holds zero."""
    return found.change_low <= 0 <= found.change_high


def resolved(folder: str, bits: int, **where: str) -> list[bool]:
    """Of every recipe of so many bits whether its change is told from zero."""
    return [not is_noise(found) for found in cells(folder, **where).values() if found.row["bits"] == bits]


def share(folder: str, recipe: str, of: str, **where: str) -> float:
    """A recipe's change as a share of another's."""
    return change(folder, recipe, **where) / change(folder, of, **where)


def accuracy_noise(folder: str, recipe: str, task: str = "cloze") -> bool:
    """Whether the 95 % interval of a change of accuracy holds zero."""
    row = cell(folder, recipe).row
    return row[f"accuracy_delta_low:{task}"] <= 0 <= row[f"accuracy_delta_high:{task}"]


# --- tables of the README -------------------------------------------------------------------------------------------------

QUICKSTART = (
    *("rtn:int8-g128", "gptq:int8-g128", "rtn:nf4-g64", "rtn:int4-g128", "awq:int4-g128", "gptq:int4-g128"),
    *("gptq(clip=mse)+descend:int4-g128", "rtn:int3-g128", "awq:int3-g128", "gptq(clip=mse)+descend:int3-g128"),
    *("rtn:int2-g128", "awq:int2-g128", "gptq(clip=mse)+descend:int2-g128"),
)
ACCURACY = tuple(f"{method}:int{bits}-g128" for bits in (4, 3, 2) for method in ("rtn", "gptq(clip=mse)"))


def quickstart_table() -> str:
    """Bits, perplexity and its change."""
    base = cell("quickstart", BASELINE).row
    lines = [("none (bfloat16)", decimals(3)(base, "bits_per_weight"), perplexity_text(base, "perplexity"), "")]
    for recipe in QUICKSTART:
        row = cell("quickstart", recipe).row
        figures = perplexity_text(row, "perplexity"), change_of_perplexity(row, "perplexity_ratio")
        lines.append((f"`{recipe}`", decimals(3)(row, "bits_per_weight"), *figures))
    return _markdown(("recipe", "bits per weight", "perplexity", "change (%)"), lines)


def accuracy_table() -> str:
    """Accuracy of `cloze`, its change, flips, and KL divergence."""
    base = cell("accuracy", BASELINE)
    lines = [("none (bfloat16)", with_error(base.accuracy["cloze"], _stderr(base.row)), "", "", "")]
    for recipe in ACCURACY:
        found = cell("accuracy", recipe)
        change = with_error(found.accuracy_change["cloze"], 100 * found.row["accuracy_delta_stderr:cloze"], sign="+")
        lines.append(
            (
                *(f"`{recipe}`", with_error(found.accuracy["cloze"], _stderr(found.row))),
                f"{'≈ ' * accuracy_noise('accuracy', recipe)}{change}",
                *(f"{found.flips['cloze']:.1f}", with_error(found.kl, found.row["kl_stderr"])),
            )
        )
    return _markdown(("recipe", "accuracy (%)", "change (points)", "flips (%)", "KL (nats a token)"), lines)


def _stderr(row: dict) -> float:
    return 100 * row["accuracy_stderr:cloze"]


def _markdown(headers: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [headers, ("---", *["---:"] * (len(headers) - 1)), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace("  ", " ")


# --- kernels --------------------------------------------------------------------------------------------------------------


def kernel(fmt: str, implementation: str, rows: int) -> list[float]:
    """Times of a product of so many rows over the dense product's, one for every shape."""
    asked = {"format": fmt, "implementation": implementation, "rows": rows}
    return [1 / row["speedup"] for row in read_rows(RESULTS / "kernels" / ROWS) if asked.items() <= row.items()]


# --- trainings ------------------------------------------------------------------------------------------------------------


def trained(treatment: str, bits: int | None = None, corpus: str = "python-docs") -> dict:
    """A row of a model that was rounded to so many bits, or not, and trained."""
    found = [
        row
        for row in read_rows(RESULTS / "training" / ROWS)
        if (row["treatment"], row["corpus"]) == (treatment, corpus) and (bits is None or f":int{bits}-" in row["model_recipe"])
    ]
    assert len(found) == 1, f"{len(found)} rows of {treatment}, {bits} bits, {corpus}"
    return found[0]


def recovered(treatment: str, bits: int) -> float:
    """What training took back of what rounding added to the perplexity, %."""
    before, rounded, after = (trained(*which)["perplexity"] for which in (("none",), ("rounded", bits), (treatment, bits)))
    return 100 * (rounded - after) / (rounded - before)
