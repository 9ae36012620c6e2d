"""What the rows of results/ say, for the expressions in documents (`documents.py`).

Changes are in percent of the unquantized model's perplexity, accuracies and flips in percent and points.
"""

import functools

import numpy as np

from qjax.report.estimates import Estimate, cell_estimates
from qjax.report.rendering import decimals, with_error
from qjax.report.tables import change_of_perplexity
from qjax.sweep.store import ROWS, read_rows
from tests.paths import REPOSITORY

RESULTS = REPOSITORY / "results"
BUNDLED, BASELINE = "bundled", "none"


@functools.cache
def cells(folder: str, model: str = BUNDLED, text: str = "") -> dict[str, Estimate]:
    """What rows of a model and a text say, by recipe and what else tells them apart. model: its name, or how names begin, if
    none is the very one; text: a part of its name.
    """
    found = cell_estimates(read_rows(RESULTS / folder / ROWS))
    same = str.__eq__ if model in {key[0] for key in found} else str.startswith
    return {" ".join(key[2:]): cell for key, cell in found.items() if same(key[0], model) and text in key[1]}


def cell(folder: str, recipe: str, **where: str) -> Estimate:
    """One of them."""
    return cells(folder, **where)[recipe]


def change(folder: str, recipe: str, **where: str) -> float:
    """Change of perplexity, %."""
    return cell(folder, recipe, **where).change


def error(folder: str, recipe: str, **where: str) -> float:
    """Its standard error."""
    return cell(folder, recipe, **where).change_stderr


def both(folder: str, recipe: str, **where: str) -> tuple[float, float]:
    """Change of perplexity and its standard error, %."""
    return change(folder, recipe, **where), error(folder, recipe, **where)


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


# --- activations ----------------------------------------------------------------------------------------------------------

OUTLIERS = "bundled-outliers"
W8A8, W4A4 = "rtn:int8-channel-sym-max/int8-token", "rtn:int4-channel/int4-token"


def acts(recipe: str, model: str = BUNDLED, text: str = "") -> tuple[float, float]:
    """Change of perplexity and its standard error, %."""
    return both("activations", recipe, model=model, text=text)


def times_less(recipe: str, than: str = W8A8, model: str = OUTLIERS) -> float:
    """How many times a recipe's cost is in another's."""
    return acts(than, model)[0] / acts(recipe, model)[0]


def taken_back(recipe: str, of: str = W4A4, model: str = BUNDLED) -> float:
    """What a recipe takes back of what another costs, %."""
    return 100 * (1 - acts(recipe, model)[0] / acts(of, model)[0])


# --- tables of the README -------------------------------------------------------------------------------------------------

METHODS = {  # of the README's table, in words
    "rtn": "nearest rounding, `rtn`",
    "awq": "AWQ, `awq`",
    "gptq": "GPTQ, `gptq`",
    "awq+gptq(clip=mse)": "both, with range search, `awq+gptq(clip=mse)`",
    "gptq(clip=mse)+descend": "GPTQ, searched and refined, `gptq(clip=mse)+descend`",
}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1"
ACCURACY = tuple(f"{method}:int{bits}-g128" for bits in (4, 3, 2) for method in ("rtn", "gptq(clip=mse)"))


def cost_table() -> str:
    """Changes of perplexity by method and width, on the bundled model and on SmolLM2."""
    places = [("quickstart", {}, bits, "g128", "") for bits in (4, 3, 2)]
    places += [("real_models", {"model": SMOLLM2}, bits, "g64", "@parallel") for bits in (4, 3)]
    headers = ("", *(f"{'SmolLM2' if order else 'bundled'}, `int{bits}-{group}`" for _, _, bits, group, order in places))
    sizes = [cell(folder, f"rtn:int{bits}-{group}", **where).row for folder, where, bits, group, _ in places]
    lines = [("bits per weight", *(decimals(2)(row, "bits_per_weight") for row in sizes))]
    for method, words in METHODS.items():
        recipes = (f"{method}:int{bits}-{group}{order if method != 'rtn' else ''}" for _, _, bits, group, order in places)
        rows = [cell(folder, recipe, **where).row for (folder, where, *_), recipe in zip(places, recipes, strict=True)]
        lines.append((words, *(change_of_perplexity(row, "perplexity_ratio") for row in rows)))
    return _markdown(headers, lines)


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


def trained(treatment: str, bits: int | None = None, corpus: str = "python-docs", model: str = BUNDLED) -> dict:
    """A row of a model that was rounded to so many bits, or not, and trained."""
    found = [
        row
        for row in read_rows(RESULTS / "training" / ROWS)
        if (row["treatment"], row["corpus"], row["model"]) == (treatment, corpus, model)
        and (bits is None or f":int{bits}-" in row["model_recipe"])
    ]
    assert len(found) == 1, f"{len(found)} rows of {treatment}, {bits} bits, {corpus}, {model}"
    return found[0]


def tuned(treatment: str, model: str = BUNDLED) -> float:
    """Perplexity of a model on Shakespeare."""
    return trained(treatment, corpus="tinyshakespeare", model=model)["perplexity"]


def recovered(treatment: str, bits: int) -> float:
    """What training took back of what rounding added to the perplexity, %."""
    before, rounded, after = (trained(*which)["perplexity"] for which in (("none",), ("rounded", bits), (treatment, bits)))
    return 100 * (rounded - after) / (rounded - before)
