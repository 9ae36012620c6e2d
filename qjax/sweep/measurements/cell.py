"""Which model, recipe and baseline a row is of, and what was measured of it."""

from qjax.sweep.columns import Cell, Column, Measurement, asked_measurements
from qjax.sweep.rows import recipe_columns

COLUMNS = (
    Column("key", str, "", "hash of all that was asked, of versions, machine kind, compute type and source code", "made", True),
    Column("model", str, "", "name of the model", "named", True),
    Column("fingerprint", str, "", "hash of its configuration, tokenizer and every parameter", "asked", True),
    Column("model_recipe", str, "", "what it had been quantized with when it was loaded", "told"),
    Column("baseline", str, "", "name of the model that differences are from: the model as it is, or another", "named"),
    Column("baseline_fingerprint", str, "", "its fingerprint; rows of other baselines are other tables", "named"),
    Column("recipe", str, "", "canonical recipe, `none` for the model as it is; rules follow after `;`", "asked", True),
    Column("recipe_alone", str, "", "the recipe without its order and rules", "told"),
    Column("method", str, "", "what a figure draws a line for: stages without options", "told", True),
    Column("options", str, "", "all stages with their options", "told"),
    Column("transforms", list[str], "", "its transforms, with options", "told"),
    Column("rounding", str, "", "its rounding, with options; empty for `none`", "told"),
    Column("refining", list[str], "", "what refines afterwards, with options", "told"),
    Column("format", str, "", "format of the weights", "told", True),
    Column("activation", str, "", "format of the layers' inputs; empty where they are not rounded", "told"),
    Column("cache", str, "", "format of the cache of keys and values, where the recipe names one", "told"),
    Column("bits", int | None, "bits", "bits of a code", "told"),
    Column("rules", list[str], "", "PATTERN=RECIPE of kernels that get another recipe", "told"),
    Column("block", int | None, "", "the block that alone is quantized, in a sensitivity table", "told"),
    Column("place", str, "", "what alone is quantized, in a sensitivity table: a block, or the only rule's pattern", "told"),
    Column("place_recipe", str, "", "the recipe there", "told"),
    Column("seed", int, "", "of everything random", "asked"),
    Column("measures", list[str], "", "further measurements, asked for by name", "told"),
)  # fmt: skip


def asks(cell: Cell) -> dict[str, object]:
    """The columns of a cell."""
    return {
        "model": cell.subject.name,
        "fingerprint": cell.fingerprint,
        "model_recipe": cell.subject.recipe,
        "baseline": cell.baseline.name,
        "baseline_fingerprint": cell.baseline_fingerprint,
        "recipe": str(cell.treatment),
        **recipe_columns(*cell.treatment),
        "seed": cell.sweep.seed,
        "measures": sorted(each.name for each in asked_measurements(cell.sweep) if each.when is None),
    }


MEASUREMENT = Measurement("cell", "What was measured", COLUMNS, asks, when=lambda sweep: True)
