"""Figures of lines: what quantization costs against exact bits per weight, bytes and speed.

Bars are 95 % intervals of the difference from the baseline, paired window by window, because that difference is what a figure
shows; over documents and draws of calibration windows together (`draws.py`).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.report.accuracy import mean_reach
from qjax.report.drawing import look
from qjax.report.draws import merge_draws
from qjax.report.panels import Line, Panel, panels_figure
from qjax.report.rendering import Row, byte_unit, number
from qjax.report.series import Series, group_series, increase, line_panels, percent
from qjax.report.tables import is_baseline, require_one_group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS = "bits per weight, scales included"
BIT_TICKS = (2, 3, 4, 6, 8, 16, 32)
VALUES = {
    "increase": "increase of perplexity (%)",
    "share": "share of nearest rounding's increase",
    "divergence": "KL divergence (nats)",
    "accuracy": "change of accuracy (points)",
}
RESOLVED = 10  # standard errors of a cost that others are shares of: it is the denominator


def lines_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """The figure of one model, text and convention: the increase of perplexity against bits in the panels of `line_panels`;
    where that is one, beside it a panel for each of `further_values`. width: "single" | "double" column.

    Raises QjaxError for no rows, for rows of more than one model, text or convention, and for rows that make no lines.
    """
    require_one_group(rows)
    rows = with_share(merge_draws(rows))
    found = line_panels(rows)
    if not found:
        raise QjaxError(
            "a figure of lines needs methods at three widths, or groupings; `qjax sweep --bits 8,4,3` measures some"
        )
    if len(found) > 1:
        panels = [Panel(lines_of(part), BITS, VALUES["increase"], title) for title, part in found]
        return panels_figure(panels, width)
    lines = {value: lines_of(found[0][1], value) for value in ("increase", *further_values(rows))}
    across = {"accuracy": 0.0}
    panels = [
        Panel(each, BITS, VALUES[value], "", across.get(value, math.nan), ticks=BIT_TICKS) for value, each in lines.items()
    ]
    return panels_figure(panels, width)


def further_values(rows: Sequence[Row]) -> list[str]:
    """What is shown beside the increase: divergence and accuracy where they were measured, else shares. rows: `with_share`."""
    measured = [value for value in ("divergence", "accuracy") if any(map(math.isfinite, _values(rows, value)[:, 0]))]
    return measured or ["share"] * (sum("share_of" in row for row in rows) > 1)


def has_tradeoff(rows: Sequence[Row]) -> bool:
    """Whether recipes were timed with packed weights."""
    return any("decode_tokens_per_second:packed" in row and not is_baseline(row) for row in rows)


def tradeoff_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """The increase of perplexity against the bytes of the stored model, and against the speed of decoding with packed weights;
    a dashed line is the speed of the model as it is. Raises as `lines_figure` does.
    """
    require_one_group(rows)
    rows = merge_draws(rows)
    unit, unit_bytes = byte_unit([number(row, "size_bytes") for row in rows])
    own = [number(row, "decode_tokens_per_second:dense") for row in rows if is_baseline(row)]
    axes = {  # name of the axis -> column, its unit
        f"size of the model ({unit})": ("size_bytes", unit_bytes),
        "decoding speed (tokens/s)": ("decode_tokens_per_second:packed", 1),
    }
    panels = [
        Panel(lines_of(group_series(rows), "increase", column, scale), name, VALUES["increase"])
        for name, (column, scale) in axes.items()
    ]
    panels[-1] = panels[-1]._replace(upright=own[0] if own else math.nan, joined=False)
    return panels_figure(panels, width, shared=True)


def lines_of(series: Sequence[Series], value: str = "increase", column: str = "bits_per_weight", unit: float = 1) -> list[Line]:
    """What is drawn of a panel's lines. What was not measured has no point."""
    lines = []
    for each in series:
        x, y = np.array([number(row, column) for row in each.rows]) / unit, _values(each.rows, value)
        known = np.isfinite(x) & ~np.isnan(y[:, 0])
        if known.any():
            lines.append(Line(each.label, look(each.method, each.variant), x[known], y[known]))
    return lines


def _values(rows: Sequence[Row], value: str) -> np.ndarray:
    """(rows, 3): the value and the ends of its 95 % interval, nan where not known."""
    return np.array([interval_of(row, value) for row in rows]).reshape(-1, 3)


def interval_of(row: Row, value: str = "increase") -> tuple[float, float, float]:
    """A value of VALUES and the ends of its 95 % interval, nan where not known."""
    if value == "accuracy":
        known = "accuracy_mean_delta" in row and not is_baseline(row)
        mean, reach = (100 * number(row, "accuracy_mean_delta"), 100 * mean_reach(row)) if known else (math.nan, math.nan)
        return mean, mean - reach, mean + reach
    low, high = number(row, "nll_delta_low"), number(row, "nll_delta_high")
    if value == "divergence":  # the same units and draws as the loss, so the same quantile
        reach = number(row, "kl_stderr") * (high - low) / (2 * number(row, "nll_delta_stderr") or math.nan)
        return number(row, "kl"), number(row, "kl") - reach, number(row, "kl") + reach
    whole = number(row, "share_of") if value == "share" else 1.0
    return increase(row) / whole, percent(low) / whole, percent(high) / whole


def with_share(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of formats that nearest rounding was measured in too (of the same model, with the same formats of inputs
    and cache and the same rules) with `share_of`, its increase there, percent. Not where that is less than RESOLVED standard
    errors.
    """
    nearest = {
        _place(row): increase(row) for row in rows if row.get("method") == row.get("options") == "rtn" and _resolved(row)
    }
    return [{**row, "share_of": nearest[_place(row)]} if _place(row) in nearest else row for row in rows]


def _place(row: Row) -> tuple[str, ...]:
    """What a recipe that is a share of another has in common with it."""
    return tuple(str(row.get(column)) for column in ("fingerprint", "format", "activation", "cache", "rules"))


def _resolved(row: Row) -> bool:
    return number(row, "nll_delta") > RESOLVED * number(row, "nll_delta_stderr")
