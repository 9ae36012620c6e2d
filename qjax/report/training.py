"""Trainings: the figure of a loss by steps, and the table of rows of the kind "training"."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.report.drawing import ALONE, GREY, WIDTHS, lay_out, look, new_page
from qjax.report.rendering import Row, Table, TableColumn, decimals, digits, number

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
    places = [(row["corpus"], row["corpus_fingerprint"], row["convention"]) for row in rows]
    before = {place: row for place, row in zip(places, rows, strict=True) if row["treatment"] == "none"}
    lines = []
    for place, row in zip(places, rows, strict=True):
        line = {**row, "tokens": number(row, "training_tokens") / 1e3}
        if place in before and row["treatment"] != "none":
            line["change"] = 100 * (number(row, "perplexity") / number(before[place], "perplexity") - 1)
        lines.append(line)
    columns = (
        TableColumn("corpus", "text", text=True),
        TableColumn("model_recipe", "recipe", text=True),
        TableColumn("treatment", "treatment", text=True),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("perplexity", "perplexity", decimals(2)),
        TableColumn("change", "change\n(%)", digits(3)),
        TableColumn("tokens", "trained\n(1000 tokens)", decimals(0)),
        TableColumn("training_seconds", "seconds", decimals(0), rank=1),
    )
    notes = ("Change: from the model as it is, on the same text. Seconds are those of the steps, compilation aside.",)
    return Table("Rounded, and trained", columns, tuple(lines), notes)
