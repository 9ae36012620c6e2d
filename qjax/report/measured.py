"""The table of a measurement that declares headers for its columns, whether it is of the house or not.

A figure whose standard error is declared too (NAME_stderr) is shown with it, another with three digits.
"""

from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.rendering import Row, Table, TableColumn, columns_of, decimals, number, significant, with_error
from qjax.report.tables import DRAWS, baseline_name, change_of_perplexity, describe, distinctions, lines_of
from qjax.sweep.columns import BASELINE, Column, Measurement, column_of, measurements
from qjax.sweep.rows import is_baseline


def heading(rows: Sequence[Row], rank: int = 0) -> list[TableColumn]:
    """The columns that every such table begins with."""
    return [
        TableColumn("recipe", "recipe", text=True),
        *distinctions(rows),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn(
            "perplexity_ratio", "perplexity\nchange (%)", change_of_perplexity, error="perplexity_ratio_stderr", rank=rank
        ),
    ]


def shown_measurements() -> list[Measurement]:
    """The measurements that have a table by their declaration."""
    return [each for each in measurements().values() if any(column.header for column in each.columns)]


def has_measured(measurement: Measurement, rows: Sequence[Row]) -> bool:
    """Whether the table would have lines."""
    return any(key in row for row in _lines(measurement, rows) for key, _ in _shown(measurement, rows))


def measured_table(measurement: Measurement, rows: Sequence[Row]) -> Table:
    """What a measurement says of every recipe, beside the change of perplexity; of differences the baseline's are left out.

    Raises QjaxError for rows without its figures, and for rows of more than one baseline, text or convention.
    """
    rows = lines_of(rows)
    if not has_measured(measurement, rows):
        raise QjaxError(f"these rows hold no {measurement.name}; `qjax sweep --measure {measurement.name}` measures it")
    rows = _lines(measurement, rows)
    columns = heading(rows, rank=3)
    for key, column in _shown(measurement, rows):
        error = stderr_key(key)
        header = column.header if ":" not in key else f"{column.header} {key.partition(':')[2]}"
        columns.append(TableColumn(key, header, _figure, error=error if column_of(error) else "", rank=column.rank))
    baseline = baseline_name(rows[0])
    notes = tuple(note.format(baseline=baseline) for note in measurement.notes)
    notes += ("Of several draws the mean; ± is theirs too.",) if any(DRAWS in row for row in rows) else ()
    title = f"{measurement.title.format(baseline=baseline)}, {describe(rows[0])}"
    return Table(title, columns_of(rows, columns), tuple(rows), notes)


def _lines(measurement: Measurement, rows: Sequence[Row]) -> list[Row]:
    differences = all(column.given == BASELINE for column in measurement.columns if column.header)
    return [row for row in rows if not (differences and is_baseline(row))]


def _shown(measurement: Measurement, rows: Sequence[Row]) -> list[tuple[str, Column]]:
    """(key in rows, declaration), in the order declared; NAME:PART is a key for every part."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [(key, each) for each in measurement.columns if each.header for key in keys if column_of(key) == each]


def stderr_key(key: str) -> str:
    """Where the standard error of a row's figure stands."""
    name, colon, part = key.partition(":")
    return f"{name}_stderr{colon}{part}"


def _figure(row: Row, key: str) -> str:
    scale, error = 100 if column_of(key).percent else 1, stderr_key(key)
    value = scale * number(row, key)
    return with_error(value, scale * number(row, error)) if column_of(error) else significant(value, 3)
