"""Where a row's calibration data is from; all null for recipes that read none."""

from qjax.models.compute import compute_name
from qjax.sweep.columns import Cell, Column, Measurement

COLUMNS = (
    Column("order", str | None, "", "order of calibration: whose inputs statistics are from", "asked"),
    Column("calibration", str | None, "", "name of the text", "named"),
    Column("calibration_source", str | None, "", "hash of the text; empty for tokens that were given", "asked"),
    Column("calibration_fingerprint", str | None, "", "hash of the tokens drawn", "named"),
    Column("calibration_windows", int | None, "", "how many windows were drawn", "asked"),
    Column("calibration_window_tokens", int | None, "", "of how many tokens", "asked"),
    Column("calibration_compute", str | None, "", "type the model ran in to be calibrated, if not the device's own", "asked"),
)


def asks(cell: Cell) -> dict[str, object]:
    """The columns of the calibration that a cell's recipe reads."""
    used = cell.sweep.calibration if cell.order is not None else None
    windows, window = used.tokens.shape if used else (None, None)
    found = (used and used.name, used and used.source, used and used.fingerprint, windows, window)
    found += (used and (None if compute_name(used.compute) == compute_name(None) else used.compute),)
    return dict(zip((column.name for column in COLUMNS), (cell.order and str(cell.order), *found), strict=True))


MEASUREMENT = Measurement("calibration", "Calibration", COLUMNS, asks, when=lambda sweep: True)
