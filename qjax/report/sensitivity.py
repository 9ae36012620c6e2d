"""What each place of a model costs when it alone is quantized: rows of the recipe `none` with one rule.

A place is a block, a kind of linear layer, or whatever else the rule's pattern names.
"""

import re
from collections.abc import Sequence

from qjax.driver.placement import parse_rule
from qjax.errors import QjaxError
from qjax.recipe import UNQUANTIZED
from qjax.report.rendering import Column, Row, Table, columns_of, digits, number
from qjax.report.tables import (
    NOISE,
    change_of_perplexity,
    describe,
    distinctions,
    is_baseline,
    perplexity_text,
    require_one_group,
    within_noise,
)

WHOLE = "whole model"


def place_of(row: Row) -> tuple[str, str] | None:
    """("block 3", "rtn:int3-g128") of "none; ^block_3/=rtn:int3-g128"; None for rows of another recipe."""
    recipe, *rules = str(row["recipe"]).split("; ")
    if recipe != UNQUANTIZED or len(rules) != 1:
        return None
    pattern, placed = parse_rule(rules[0])[:2]
    block = re.fullmatch(r"\^block_(\d+)/", pattern)
    return f"block {block.group(1)}" if block else pattern.strip("/"), str(placed)


def placed_alone(rows: Sequence[Row]) -> list[Row]:
    """The rows of one place quantized alone, recipe by recipe, with columns `place` and `place_recipe`.

    Beside them stands what their recipe costs in the whole model, where that was measured.
    """
    places = [(row, place_of(row)) for row in rows]
    found = [{**row, "place": place[0], "place_recipe": place[1]} for row, place in places if place]
    recipes = {row["place_recipe"] for row in found}
    found += [{**row, "place": WHOLE, "place_recipe": row["recipe"]} for row in rows if row["recipe"] in recipes]
    return sorted(found, key=lambda row: row["place_recipe"])


def ordinary(rows: Sequence[Row]) -> list[Row]:
    """The other rows; none where the unquantized model alone is left."""
    left = [row for row in rows if not place_of(row)]
    return left if len(left) == len(rows) or not all(map(is_baseline, left)) else []


def sensitivity_table(rows: Sequence[Row]) -> Table:
    """The cost of each place, the costliest first.

    Raises QjaxError when there are no such rows, or rows of more than one model, text or convention.
    """
    require_one_group(rows)
    found = placed_alone(rows)
    if not found:
        raise QjaxError("no row has one place quantized alone; `qjax sensitivity` measures every block so")
    found.sort(key=lambda row: (row["place_recipe"], -number(row, "nll_delta")))
    columns = [
        Column("place_recipe", "recipe", text=True),
        Column("place", "where", text=True),
        *distinctions(found),
        Column("perplexity", "perplexity", perplexity_text, error="perplexity_stderr"),
        Column("perplexity_ratio", "change\n(%)", change_of_perplexity, error="perplexity_ratio_stderr"),
        Column("output_error", "output\nerror", digits(2), rank=1),
    ]
    notes = ["One place is quantized at a time. ±: standard error of the paired difference from the unquantized model."]
    if any(within_noise(row) for row in found):
        notes.append(f"≈: within {NOISE} such standard errors of the unquantized model.")
    return Table(f"Sensitivity of {describe(found[0])}", columns_of(found, columns), tuple(found), tuple(notes))
