"""What `qjax tune` tried: a line a recipe, in order."""

import math
from collections.abc import Sequence

from qjax.report.rendering import Row, Table, TableColumn


def tuning_table(trials: Sequence[Row], *, model: str, of: str, bound: str) -> Table:
    """trials: rows with recipe, bits_per_weight, loss, low, high, accepted. bound: as it was asked for, with % of a share."""
    share = bound.endswith("%")

    def value(row: Row, key: str) -> str:
        number = float(row[key])
        if not math.isfinite(number):
            return "unknown" if math.isnan(number) else "∞"
        return f"{100 * number:.3f} %" if share else f"{number:.5f}"

    columns = (
        TableColumn("recipe", "recipe", text=True),
        TableColumn("bits_per_weight", "bits per\nweight", lambda row, key: f"{float(row[key]):.3f}"),
        TableColumn("loss", "loss", value),
        TableColumn("low", "from", value, rank=1),
        TableColumn("high", "to", value),
        TableColumn("accepted", "within", lambda row, key: "yes" if row[key] else "no", text=True),
    )
    note = f"Loss: of {of}, against the model as it is; from, to: its 95 % interval, the whole of which must be within {bound}."
    return Table(f"Recipes for {model} within {bound} of {of}", columns, tuple(trials), (note,))
