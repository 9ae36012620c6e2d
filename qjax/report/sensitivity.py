"""What each place of a model costs when it alone is quantized: rows with a column `place`.

A place is a block, a kind of linear layer, or whatever else the pattern of the only rule names.
"""

from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.rendering import Row, Table, TableColumn, columns_of, digits, number
from qjax.report.tables import (
    baseline_name,
    change_of_perplexity,
    describe,
    distinctions,
    is_baseline,
    lines_of,
    noise_note,
    over_units,
    perplexity_text,
    within_noise,
)

WHOLE = "whole model"


def placed_alone(rows: Sequence[Row]) -> list[Row]:
    """The rows of one place quantized alone (those with columns `place` and `place_recipe`), recipe by recipe.

    Beside them stands what their recipe costs in the whole model, where that was measured.
    """
    found = [row for row in rows if "place" in row]
    recipes = {row["place_recipe"] for row in found}
    found += [{**row, "place": WHOLE, "place_recipe": row["recipe"]} for row in rows if row["recipe"] in recipes]
    return sorted(found, key=lambda row: row["place_recipe"])


def ordinary(rows: Sequence[Row]) -> list[Row]:
    """The other rows; none where the baseline alone is left."""
    left = [row for row in rows if "place" not in row]
    return left if len(left) == len(rows) or not all(map(is_baseline, left)) else []


def sensitivity_table(rows: Sequence[Row]) -> Table:
    """The cost of each place, the costliest first.

    Raises QjaxError when there are no such rows, or rows of more than one model, text or convention.
    """
    found = placed_alone(lines_of(rows))
    if not found:
        raise QjaxError("no row has one place quantized alone; `qjax sensitivity` measures every block so")
    found.sort(key=lambda row: (row["place_recipe"], -number(row, "nll_delta")))
    columns = [
        TableColumn("place_recipe", "recipe", text=True),
        TableColumn("place", "where", text=True),
        *distinctions(found),
        TableColumn("perplexity", "perplexity", perplexity_text, error="perplexity_stderr"),
        TableColumn("perplexity_ratio", "change\n(%)", change_of_perplexity, error="perplexity_ratio_stderr"),
        TableColumn("output_error", "output\nerror", digits(2), rank=1),
    ]
    baseline = baseline_name(found[0])
    notes = [
        f"One place is quantized at a time. ±: standard error of the difference from {baseline}, over {over_units(found)}."
    ]
    if any(within_noise(row) for row in found):
        notes.append(noise_note(found))
    return Table(f"Sensitivity of {describe(found[0])}", columns_of(found, columns), tuple(found), tuple(notes))
