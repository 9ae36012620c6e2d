"""The columns that results/README.md describes, for tests that find undescribed ones."""

import re
from collections.abc import Iterable, Mapping

from tests.paths import REPOSITORY

README = REPOSITORY / "results" / "README.md"


def described(heading: str) -> set[str]:
    """Names in backticks in the first cells of the table under a heading; a column of a task is NAME:T, of a speed NAME:H."""
    section = README.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def undescribed(rows: Iterable[Mapping[str, object]], heading: str) -> list[str]:
    """Columns of the rows that the table under a heading does not have."""
    known = described(heading)
    columns = {column for row in rows for column in row}
    named = {column: {column.partition(":")[0] + suffix for suffix in (":T", ":H")} for column in columns if ":" in column}
    return sorted(column for column in columns if not named.get(column, {column}) & known)
