"""Trainings: the figure of a loss by steps, and the table of rows of the kind "training"."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.report.drawing import ALONE, GREY, WIDTHS, lay_out, look, new_page
from qjax.report.rendering import MISSING, Row, Table, TableColumn, decimals, number
from qjax.report.tables import NOISE, over_units, perplexity_text, ratio_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHED = 0.05  # share of the steps that a point of the smooth line is the mean of


def loss_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """The loss of the rows of a run (`train/log.py`). Raises QjaxError for no rows."""
    if not rows:
        raise QjaxError("a figure of a training needs steps; there is none")
    steps, losses = (np.array([number(row, key) for row in rows]) for key in ("step", "loss"))
    window = max(1, round(SMOOTHED * len(rows)))
    with new_page(width) as figure:
        figure.set_size_inches(WIDTHS[width], ALONE)
        axes = figure.subplots()
        axes.plot(steps, losses, color=GREY, alpha=0.4, linewidth=0.6)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], smooth, color=look("rtn").colour)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (nats a token)")
        lay_out(figure)
    return figure


def training_table(rows: Sequence[Row]) -> Table:
    """What models cost that were rounded and trained, beside the model as it is on the same text."""
    rows = [row for row in rows if row.get("kind") == "training"]
    before = {_place(row): number(row, "perplexity") for row in rows if row["treatment"] == "none"}
    rounded = {(_place(row), _rounded_by(row)): number(row, "perplexity") for row in rows if row["treatment"] == "rounded"}
    lines = []
    for row in rows:
        line = {**row, "tokens": number(row, "training_tokens") / 1e3}
        place, lost = _place(row), rounded.get((_place(row), _rounded_by(row)))
        if lost is not None and place in before and row["treatment"] != "rounded":
            line["recovered"] = 100 * (lost - number(row, "perplexity")) / (lost - before[place])
        lines.append(line)
    several = len({row["model"] for row in rows}) > 1
    columns = (
        *([TableColumn("model", "model", text=True)] if several else []),
        TableColumn("corpus", "text", text=True),
        TableColumn("model_recipe", "recipe", text=True),
        TableColumn("treatment", "treatment", text=True),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("perplexity", "perplexity", perplexity_text, error="perplexity_stderr"),
        TableColumn("perplexity_ratio", "change\n(%)", _change, error="perplexity_ratio_stderr"),
        TableColumn("recovered", "recovered\n(%)", decimals(0)),
        TableColumn("tokens", "trained\n(1000 tokens)", decimals(0)),
        TableColumn("training_seconds", "seconds", decimals(0), rank=1),
    )
    notes = (
        f"Change: from the model as it is, window by window. ±: standard error over {over_units(rows)}. {NOISE}",
        "Recovered: of what rounding added to the perplexity. Seconds are those of the steps, compilation aside.",
    )
    return Table("Rounded, and trained", columns, tuple(lines), notes)


def _place(row: Row) -> tuple[object, ...]:
    """What was measured: rows of one place are compared."""
    return row["model"], row["corpus"], row["corpus_fingerprint"], row["convention"]


def _rounded_by(row: Row) -> str:
    """The recipe that a model had before it was trained."""
    return str(row["model_recipe"]).split(", ")[0]


def _change(row: Row, key: str) -> str:
    """A column's format: change of perplexity, percent."""
    return MISSING if row["treatment"] == "none" else ratio_text(row, key)
