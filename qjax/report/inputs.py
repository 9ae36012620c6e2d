"""What goes into the linear layers of models: rows of the kind "inputs" (`evaluate/inputs.py`), as a table and a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.report.drawing import METHOD_STYLES, look
from qjax.report.panels import Line, Panel, panels_figure
from qjax.report.rendering import Row, Table, TableColumn, digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUTS = "inputs"
NEEDED = ("model", "block", "layers", "inputs", "largest", "kurtosis", "outlier_channels", "times_median")


def input_rows(model: str, fingerprint: str, found: Sequence[Row]) -> list[dict[str, object]]:
    """What `input_outliers` finds of a model as rows of a folder; the key is of the model and the place."""
    return [
        {"key": f"inputs: {fingerprint} {row['block']} {row['layers']}", "kind": INPUTS, "model": model, **row} for row in found
    ]


def inputs_table(rows: Sequence[Row]) -> Table:
    """A line for every distinct input, model by model."""
    found = _found(rows)
    columns = (
        TableColumn("model", "model", text=True),
        TableColumn("block", "block"),
        TableColumn("layers", "read by", text=True),
        TableColumn("inputs", "channels", rank=1),
        TableColumn("largest", "largest\n|x|", digits(3)),
        TableColumn("times_median", "over the median\nchannel's", digits(3)),
        TableColumn("kurtosis", "kurtosis", digits(3)),
        TableColumn("outlier_channels", "outlier\nchannels"),
    )
    notes = (
        "Kurtosis: mean x^4 over the squared mean x^2, 3 for normal numbers. Outlier channels: with a value of 6 or more.",
    )
    return Table("Inputs of linear layers", columns, tuple(found), notes)


def inputs_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """A panel for each model: the largest |x| by block, a line for each set of layers that share an input."""
    found = _found(rows)
    kinds, styles = list(dict.fromkeys(str(row["layers"]) for row in found)), list(METHOD_STYLES)
    panels = []
    for model in dict.fromkeys(row["model"] for row in found):
        lines = []
        for number, kind in enumerate(kinds):
            own = sorted((row["block"], row["largest"]) for row in found if (row["model"], row["layers"]) == (model, kind))
            if own:
                x, y = np.array(own, float).T
                name = ", ".join(part.rpartition("/")[2] for part in kind.split(","))
                lines.append(Line(name, look(styles[number % len(styles)]), x, np.repeat(y[:, None], 3, axis=1)))
        panels.append(Panel(lines, "block", "largest |x|", str(model), counted=True))
    return panels_figure(panels, width, shared=True)


def inputs_caption(rows: Sequence[Row]) -> str:
    """Of `inputs_figure`."""
    models = ", ".join(dict.fromkeys(str(row["model"]) for row in _found(rows)))
    return f"Largest magnitude of what goes into the linear layers, by block, over calibration tokens: {models}.\n"


def has_inputs(rows: Sequence[Row]) -> bool:
    """Whether there are rows of several blocks of a model."""
    found = [row for row in rows if row.get("kind") == INPUTS]
    return len({(row.get("model"), row.get("block")) for row in found}) > len({row.get("model") for row in found})


def _found(rows: Sequence[Row]) -> list[Row]:
    found = [row for row in rows if row.get("kind") == INPUTS]
    for row in found:
        if missing := [name for name in NEEDED if name not in row]:
            raise QjaxError(f"row {row['key']} of the kind {INPUTS!r} lacks {', '.join(missing)}; mend or remove it")
    return found
