"""The table of speeds: medians and extremes over rounds, of the last code alone."""

import pytest

from qjax.errors import QjaxError
from qjax.report.reports import tables
from qjax.report.speeds import NEEDED, speeds_table


def row(number: int, ratio: float, code: str = "a", peer: str = "theirs") -> dict[str, object]:
    made = dict.fromkeys(NEEDED, "x") | {"key": f"{number}", "kind": "speed", "library": "theirs 1, torch 2", "device": "cpu"}
    return made | {"round": number, "ratio": ratio, "seconds": 2.0, "peer_seconds": 2 * ratio, "code": code, "peer": peer}


def test_median_and_extremes():
    rows = [row(0, 9.0, "old"), row(0, 1.0), row(1, 3.0), row(2, 2.5), row(0, 4.0, peer="others")]
    first, second = speeds_table(rows).rows
    assert [first[name] for name in ("ratio", "low", "high", "rounds", "peer_seconds")] == [2.5, 1.0, 3.0, 3, 5.0]
    assert (second["peer"], second["ratio"], second["rounds"]) == ("others", 4.0, 1)
    ((name, table),) = tables(rows)
    assert name == "speed" and "Against theirs 1, torch 2 on cpu." in table.notes


def test_a_row_that_lacks_a_column():
    broken = row(0, 1.0)
    del broken["ratio"]
    with pytest.raises(QjaxError, match="lacks ratio"):
        speeds_table([broken])
