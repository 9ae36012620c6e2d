"""Draws one by one: what the recipes that read data cost with each draw of calibration data, and how much of the error of their
mean (`draws.py`) is the draws'.
"""

import math
from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.draws import DRAWS, merge_draws
from qjax.report.rendering import Row, Table, TableColumn, columns_of, number, significant
from qjax.report.tables import change_of_perplexity, describe, distinctions, in_order, over_units, require_one_group


def seeds_of(rows: Sequence[Row]) -> list[Row]:
    """The rows of several draws, merged."""
    return [row for row in merge_draws(rows) if DRAWS in row]


def seeds_table(rows: Sequence[Row]) -> Table:
    """One line for every recipe of several draws; raises QjaxError where there is none."""
    require_one_group(rows)
    found = in_order(seeds_of(rows))
    if not found:
        raise QjaxError("no recipe was measured with more than one draw; `qjax sweep --seeds 3` measures three")
    columns = [
        TableColumn("recipe", "recipe", text=True),
        *distinctions(found),
        TableColumn("perplexity_ratio", "perplexity\nchange (%)", change_of_perplexity, error="perplexity_ratio_stderr"),
        TableColumn("nll_delta_documents", "± of\ndocuments", _percent),
        TableColumn("nll_delta_between", "between\ndraws", _percent),
        TableColumn("nll_delta_draws", "of each draw (%)", _each),
    ]
    notes = (
        f"±: standard error of the mean over {over_units(found)}. ± of documents: its part that is the same in every draw. "
        "Between draws: standard deviation. Of each draw: by seed.",
    )
    return Table(f"Draws of calibration data one by one, {describe(found[0])}", columns_of(found, columns), tuple(found), notes)


def _percent(row: Row, key: str) -> str:
    """What a small difference of loss is of the perplexity ratio, percent."""
    return significant(100 * number(row, "perplexity_ratio") * number(row, key), 2)


def _each(row: Row, key: str) -> str:
    return ", ".join(significant(100 * math.expm1(min(delta, 700.0)), 3, sign="+") for delta in row[key])
