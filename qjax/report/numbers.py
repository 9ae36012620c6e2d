"""Figures as a reader wants them: as many digits as their standard error leaves meaning.

The standard error is shown with two significant digits and the value to the same decimal place: 12.345 ± 0.067. Where no
standard error is known (None or nan) the value gets four significant digits and no ±.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from qjax.errors import QjaxError

INFINITY, MISSING = "∞", "-"
BYTE_UNITS = (("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12))  # decimal, as disks and papers count
SCIENTIFIC_ABOVE = 1e6
MOST_DECIMALS = 8
ERRORS = 2  # to either side, of many units


def number(row: Mapping[str, object], key: str) -> float:
    """A row's figure; nan where the row has none. Raises QjaxError for what is no number."""
    value = row.get(key)
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise QjaxError(f"row {row.get('key')}: {key} is {value!r}, expected a number; mend or remove the row") from None


def losses(row: Mapping[str, object]) -> Float[np.ndarray, " windows"]:
    """A row's loss of every window, nats; infinite where the model diverged, which a row holds as "inf" or null."""
    return np.array([math.inf if loss is None else float(loss) for loss in row["window_nll"]])


def loss_change(row: Mapping[str, object], other: Mapping[str, object]) -> Float[np.ndarray, " windows"]:
    """By how much the row's losses are above the other's; nan where both diverged."""
    with np.errstate(invalid="ignore"):
        return losses(row) - losses(other)


def reach_of(over_units: float, over_seeds: float, seeds: int) -> float:
    """Half the width of an interval that holds a mean over seeds about 19 times of 20, from the two parts of its error.

    ERRORS errors of windows or questions, and of the seeds' part as many as Student's t of seeds - 1 degrees of freedom says
    (4.3 for three seeds, of which two errors would hold 82 %), in quadrature.
    """
    if seeds < 2:
        return ERRORS * over_units
    from scipy.special import stdtrit

    return math.hypot(ERRORS * over_units, float(stdtrit(seeds - 1, 0.975)) * over_seeds)


def with_error(value: float, error: float, *, sign: str = "") -> str:
    """value ± error, rounded to two significant digits of the error. sign: "+" shows the sign of positive values too."""
    if not math.isfinite(value) or not math.isfinite(error):
        return significant(value, 4, sign=sign)
    if error == 0:
        return significant(value, 4, sign=sign)
    place = _exponent(error, 2) - 1  # of the last digit that is shown
    if abs(value) >= SCIENTIFIC_ABOVE:
        digits = min(max(2, _exponent(value, 4) - place + 1), 6)
        return f"{significant(value, digits, sign=sign)} ± {significant(error, 2)}"
    decimals = min(max(0, -place), MOST_DECIMALS)
    return f"{round(value, -place):{sign}.{decimals}f} ± {round(error, -place):.{decimals}f}"


def significant(value: float, digits: int = 3, *, sign: str = "") -> str:
    """`digits` significant digits: 0.0301, 12.35, 3.01e-5, 1.24e6; ∞ for infinity and - for nan."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return INFINITY if value > 0 else f"-{INFINITY}"
    if value == 0:
        return "0"
    exponent = _exponent(value, digits)
    if exponent < -3 or abs(value) >= SCIENTIFIC_ABOVE:
        mantissa, _, power = f"{value:{sign}.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    last = exponent - digits + 1
    return f"{round(value, -last):{sign}.{max(0, -last)}f}"


def fixed(value: float, decimals: int) -> str:
    """`decimals` decimal places; ∞ for infinity and - for nan."""
    return f"{value:.{decimals}f}" if math.isfinite(value) else significant(value)


def byte_unit(sizes: Sequence[float]) -> tuple[str, int]:
    """The unit (name, bytes) in which the largest size is at least 1: one unit for a whole column."""
    largest = max((size for size in sizes if math.isfinite(size)), default=0)
    return next((unit for unit in reversed(BYTE_UNITS) if largest >= unit[1]), BYTE_UNITS[0])


def _exponent(value: float, digits: int) -> int:
    """Decimal exponent after rounding to `digits` significant digits (0.0996 to two is 0.10, so -1)."""
    return int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
