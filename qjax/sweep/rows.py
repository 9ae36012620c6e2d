"""What a row says of itself: its baseline, whether two measured the same, the parts of its recipe.

The only place that takes the name of a recipe with rules apart, for rows of versions that wrote the name alone.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.formats import UNQUANTIZED
from qjax.sweep.columns import BASELINE, SAME_CELL, Row, measurements, spelled, with_roles


def with_baseline(row: Row) -> dict[str, object]:
    """The row with what its differences are from: the model itself, where it says nothing else."""
    return {"baseline": row.get("model"), BASELINE: row.get("fingerprint"), "model_recipe": UNQUANTIZED, **row}


def named_model(row: Row) -> str:
    """The row's model, with the recipe that it had been quantized with when it was loaded."""
    recipe = with_baseline(row)["model_recipe"]
    return str(row["model"]) if recipe == UNQUANTIZED else f"{row['model']} ({recipe})"


def is_baseline(row: Row) -> bool:
    """Whether the row is that of the model which differences are from."""
    return row["recipe"] == UNQUANTIZED and row.get(BASELINE, row.get("fingerprint")) == row.get("fingerprint")


def cell_columns(row: Row, *, any_draw: bool = False) -> str:
    """What the row measured and on what device, as text; rows of equal text measured the same thing. any_draw: whatever seed,
    and whatever it drew from a text.
    """
    drawn = ("seed", "calibration_fingerprint") if row.get("calibration_source") else ("seed",)
    left_out = drawn if any_draw else ("seed",) if row["recipe"] == UNQUANTIZED else ()  # no seed changes a model as it is
    names = (name for name in with_roles(*SAME_CELL) if name in row and name not in left_out)
    return json.dumps({name: row[name] for name in names}, sort_keys=True)


def recipe_columns(recipe: str, rules: Sequence[str] = (), block: int | None = None) -> dict[str, object]:
    """The parts of a recipe and its rules. block: the only one that the last rule quantizes, in a sensitivity table."""
    from qjax.driver.placement import parse_rule
    from qjax.recipe import method_name, parse_recipe

    parsed, placed = parse_recipe(recipe), [parse_rule(rule) for rule in rules]
    cache, weights = parsed and parsed.cache, parsed and parsed.of_weights
    stages = () if weights is None else weights.stages
    found = {
        "recipe_alone": UNQUANTIZED if parsed is None else str(dataclasses.replace(parsed, order=None)),
        "method": method_name(parsed),
        "options": ",".join(map(str, stages)),
        "transforms": [str(stage) for stage in weights.transforms] if weights else [],
        "rounding": str(weights.rounding) if weights else "",
        "refining": [str(stage) for stage in (*weights.refiners, *weights.block_refiners)] if weights else [],
        "activation": str(weights.activation or "") if weights else "",
        **({"cache": str(cache)} if cache else {}),
        "format": str(weights.format) if weights else UNQUANTIZED,
        "bits": weights.format.bits if weights else None,
        "rules": list(rules),
        "block": block,
    }
    if block is not None or (parsed is None and len(rules) == 1):
        place = f"block {block}" if block is not None else placed[-1].pattern.strip("/")
        found |= {"place": place, "place_recipe": str(placed[-1].recipe or UNQUANTIZED)}
    return found


def recipe_without_rules(row: Row) -> str:
    """The recipe of a row with its order, without its rules."""
    return str(row["recipe"]).removesuffix("".join(f"; {rule}" for rule in row["rules"]))


def restated(row: Row) -> dict[str, object]:
    """A complete row with its recipe as it is spelled now: gptq(refine=4) of earlier versions is gptq+descend."""
    from qjax.driver.placement import parse_rule
    from qjax.recipe import parse_recipe

    rules = [str(parse_rule(rule)) for rule in row["rules"]]
    recipe = str(parse_recipe(recipe_without_rules(row)) or UNQUANTIZED)
    return {**row, "recipe": "; ".join([recipe, *rules]), **recipe_columns(recipe, rules, row["block"])}


def complete(row: Row) -> dict[str, object]:
    """A cell's row with the columns that rows of earlier versions lack; nothing else reads their names apart.

    Parts of recipes whose methods are not registered here stay unknown.
    """
    held = set(map(spelled, row))
    named = [each for each in measurements().values() if each.when is None]
    measures = [each.name for each in named if not held.isdisjoint(spelled(column.name) for column in each.columns)]
    added = with_baseline(row) | {"measures": measures, "calibration_compute": None}
    if "recipe_alone" not in row or "rules" not in row:
        recipe, *rules = str(row["recipe"]).split("; ")
        added["rules"] = rules
        alone = re.match(r"\^block_(\d+)/=", rules[0]) if recipe == UNQUANTIZED and len(rules) == 1 else None
        with contextlib.suppress(QjaxError):
            added |= recipe_columns(recipe, rules, int(alone.group(1)) if alone else None)
    return {**row, **{name: value for name, value in added.items() if name not in row}}
