"""The columns that are described, for tests that find undescribed ones: of cells where the measurements declare them, of other
rows in results/columns.md.
"""

import re
from collections.abc import Iterable, Mapping

from qjax.sweep.columns import column_of
from tests.paths import REPOSITORY

COLUMNS = REPOSITORY / "results" / "columns.md"
CELLS, LAYERS, OTHERS = "Columns of `rows.jsonl`", "Columns of `layers.jsonl`", "Columns of other rows"


def section(heading: str) -> str:
    """What stands under a heading of results/columns.md."""
    return COLUMNS.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]


def described(heading: str) -> set[str]:
    """Names in backticks in the first cells of the table under a heading."""
    cells = [line.split(" | ")[0] for line in section(heading).splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def undescribed(rows: Iterable[Mapping[str, object]], heading: str) -> list[str]:
    """Columns of the rows that are not described; rows of other kinds have a table of their own."""
    known = described(OTHERS) if heading == CELLS else described(heading)
    columns = {column for row in rows for column in row}
    return sorted(column for column in columns if column not in known and not (heading == CELLS and column_of(column)))
