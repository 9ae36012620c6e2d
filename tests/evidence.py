"""What the rows of results/ say, for the expressions in documents (`documents.py`).

Changes are in percent of the unquantized model's perplexity, accuracies and flips in percent and points.
"""

import functools

from qjax.report.draws import merge_draws
from qjax.report.rendering import Row, decimals, with_error
from qjax.report.tables import change_of_perplexity, perplexity_text, split_tables
from qjax.sweep.rows import is_baseline
from qjax.sweep.store import ROWS, read_rows
from tests.paths import REPOSITORY

RESULTS = REPOSITORY / "results"
BUNDLED = "bundled"


@functools.cache
def cells(folder: str, model: str = BUNDLED, corpus: str = "") -> dict[str, Row]:
    """Rows of a model and a text by recipe, draws together. corpus: a part of its name; the first one's by default."""
    rows = [row for row in read_rows(RESULTS / folder / ROWS) if row.get("model", "").startswith(model) and "window_nll" in row]
    groups = [group for group in split_tables(rows) if corpus in group[0]["corpus"]]
    return {row["recipe"]: row for row in merge_draws(groups[0])}


def cell(folder: str, recipe: str, **where: str) -> Row:
    """One of them."""
    return cells(folder, **where)[recipe]


def baseline(folder: str, **where: str) -> Row:
    """The unquantized model's."""
    return next(row for row in cells(folder, **where).values() if is_baseline(row))


def change(folder: str, recipe: str, **where: str) -> float:
    """Change of perplexity, %."""
    return 100 * (cell(folder, recipe, **where)["perplexity_ratio"] - 1)


def error(folder: str, recipe: str, **where: str) -> float:
    """Its standard error."""
    return 100 * cell(folder, recipe, **where)["perplexity_ratio_stderr"]


def noise(folder: str, recipe: str, **where: str) -> bool:
    """Whether its 95 % interval holds zero."""
    row = cell(folder, recipe, **where)
    return row["nll_delta_low"] <= 0 <= row["nll_delta_high"]


def share(folder: str, recipe: str, of: str, **where: str) -> float:
    """A recipe's change as a share of another's."""
    return change(folder, recipe, **where) / change(folder, of, **where)


def accuracy(folder: str, recipe: str, task: str = "cloze") -> float:
    """Accuracy, %."""
    return 100 * cell(folder, recipe)[f"accuracy:{task}"]


def accuracy_change(folder: str, recipe: str, task: str = "cloze") -> float:
    """Its change, points."""
    return 100 * cell(folder, recipe)[f"accuracy_delta:{task}"]


def accuracy_noise(folder: str, recipe: str, task: str = "cloze") -> bool:
    """Whether the change's 95 % interval holds zero."""
    row = cell(folder, recipe)
    return row[f"accuracy_delta_low:{task}"] <= 0 <= row[f"accuracy_delta_high:{task}"]


def flips(folder: str, recipe: str, task: str = "cloze") -> float:
    """Answers that went from right to wrong or back, %."""
    return 100 * cell(folder, recipe)[f"flips:{task}"]


# --- tables of the README -------------------------------------------------------------------------------------------------

QUICKSTART = (
    *("rtn:int8-g128", "gptq:int8-g128", "rtn:nf4-g64", "rtn:int4-g128", "awq:int4-g128", "gptq:int4-g128"),
    *("gptq(clip=mse)+descend:int4-g128", "awq+gptq(clip=mse)+descend:int4-g128", "rtn:int3-g128", "awq:int3-g128"),
    *("gptq(clip=mse):int3-g128", "gptq(clip=mse)+descend:int3-g128", "rtn:int2-g128", "awq:int2-g128"),
    "gptq(clip=mse)+descend:int2-g128",
)
ACCURACY = tuple(f"{method}:int{bits}-g128" for bits in (8, 4, 3, 2) for method in ("rtn", "awq", "gptq(clip=mse)"))


def quickstart_table() -> str:
    """Bits, perplexity and its change."""
    base = baseline("quickstart")
    lines = [("none (bfloat16)", decimals(3)(base, "bits_per_weight"), perplexity_text(base, "perplexity"), "")]
    for recipe in QUICKSTART:
        row = cell("quickstart", recipe)
        figures = perplexity_text(row, "perplexity"), change_of_perplexity(row, "perplexity_ratio")
        lines.append((f"`{recipe}`", decimals(3)(row, "bits_per_weight"), *figures))
    return _markdown(("recipe", "bits per weight", "perplexity", "change (%)"), lines)


def accuracy_table() -> str:
    """Accuracy of `cloze`, its change, flips, and KL divergence."""
    base = baseline("accuracy")
    lines = [("none (bfloat16)", with_error(accuracy("accuracy", base["recipe"]), _stderr(base)), "", "", "")]
    for recipe in (each for each in ACCURACY if each in cells("accuracy")):
        row = cell("accuracy", recipe)
        change = with_error(accuracy_change("accuracy", recipe), 100 * row["accuracy_delta_stderr:cloze"], sign="+")
        lines.append(
            (
                *(f"`{recipe}`", with_error(accuracy("accuracy", recipe), _stderr(row))),
                f"{'≈ ' * accuracy_noise('accuracy', recipe)}{change}",
                *(f"{flips('accuracy', recipe):.1f}", with_error(row["kl"], row["kl_stderr"])),
            )
        )
    return _markdown(("recipe", "accuracy (%)", "change (points)", "flips (%)", "KL (nats a token)"), lines)


def _stderr(row: Row) -> float:
    return 100 * row["accuracy_stderr:cloze"]


def _markdown(headers: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [headers, ("---", *["---:"] * (len(headers) - 1)), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace("|  |", "| |")


# --- kernels --------------------------------------------------------------------------------------------------------------


def kernel(fmt: str, implementation: str, rows: int) -> list[float]:
    """Times of a product of so many rows over the dense product's, one for every shape."""
    asked = {"format": fmt, "implementation": implementation, "rows": rows}
    return [1 / row["speedup"] for row in read_rows(RESULTS / "kernels" / ROWS) if asked.items() <= row.items()]
