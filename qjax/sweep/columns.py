"""Measurements and their columns: what a row holds, declared once for everything that reads or makes rows.

A measurement says what is asked for (columns of the row's key), what is found (further columns), and how. Those of the house
stand in `measurements/`, a file each; `register_measurement` adds one from outside. From the declarations follow what a sweep
may be asked for, the key of a row, which rows measured the same thing, the types that reading demands, what `rerun` asks again
and compares, tables, CSV and the data dictionary.

Roles of columns, and what they are part of:

    role      key   same cell   rows match   equal when measured again
    asked     yes   yes         yes          yes    what tells measurements apart
    named     yes   yes                      yes    the same by its name, or what only some figures depend on (`given`)
    told      yes                            yes    what follows from the others, or limits that need not bind
    machine   yes   yes                             where it was measured
    made      yes                                   by what code and when
    found                                    yes    a figure
    spent                                           a figure that clocks and memory change
"""

import functools
import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qjax.errors import QjaxError
from qjax.formats import UNQUANTIZED
from qjax.registry import forget, forgotten_in_scope, forgotten_on_change

if TYPE_CHECKING:
    from qjax.driver.report import Report
    from qjax.evaluate.corpora import Corpus
    from qjax.evaluate.states import States
    from qjax.evaluate.windows import Convention, Windows
    from qjax.models.model import Model
    from qjax.sweep.runner import Sweep, Treatment

Row = Mapping[str, object]
ROLES = ("asked", "named", "told", "machine", "made", "found", "spent")
SAME_CELL, VARYING = ("asked", "named", "machine"), ("machine", "made", "spent")
BASELINE = "baseline_fingerprint"  # what differences are `given`
HOUSE = ("cell", "calibration", "perplexity", "sizes", "tasks", "divergence", "speed", "provenance")  # of measurements/


class Column(NamedTuple):
    """One column of rows. name: NAME, or NAME:PART for one column of every task, or whatever else stands behind the colon.

    type: str, int, float, list[...] of them, or one of these | None; a float may be "inf". needed: reading rows demands it.
    given: the asked column, of those that need not match, that it depends on. header: of the measurement's table, with a line
    break where a terminal may have one; percent: shown times 100; rank: as of a table's column.
    """

    name: str
    type: object
    unit: str
    meaning: str
    role: str = "found"
    needed: bool = False
    given: str = ""
    header: str = ""
    percent: bool = False
    rank: int = 0


class Cell(NamedTuple):
    """What a measurement may look at. From `model` on: only when it measures, not when it says what is asked."""

    sweep: "Sweep"
    subject: "Model"  # the swept model as it was loaded
    fingerprint: str
    treatment: "Treatment"
    order: object  # of calibration; None where none is read
    corpus: "Corpus"
    windows: "Windows"
    convention: "Convention"
    baseline: "Model"  # what differences are from
    baseline_fingerprint: str
    model: "Model | None" = None  # quantized, its kernels decoded
    quantized: "Model | None" = None  # as it is stored
    report: "Report | None" = None
    row: Row = types.MappingProxyType({})  # the columns found so far
    before: Row | None = None  # the baseline's row; None in that row
    on_batch: Callable[[int, int], None] = lambda done, total: None
    states: "States | None" = None  # hidden states that measurements leave for each other

    @property
    def of_states(self) -> tuple:
        """The name of this cell's states."""
        return self.fingerprint, str(self.treatment), self.corpus.fingerprint

    @property
    def of_baseline(self) -> tuple:
        """The name of those of what differences are from."""
        return self.baseline_fingerprint, UNQUANTIZED, self.corpus.fingerprint

    @property
    def place(self) -> tuple:
        """What its quantized model depends on, which cells of one place share."""
        return self.fingerprint, self.treatment, self.sweep.seed


class Measurement(NamedTuple):
    """A measurement. asks(cell) -> columns of what is asked; measure(cell) -> columns found.

    when(sweep): whether it is asked for; None: by its name, in Sweep(measures=...) and --measure. on_every_text: False where a
    model has one answer whatever the text, found once. title, notes: of its table; {baseline} is what differences are from.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    asks: Callable[[Cell], dict[str, object]] | None = None
    measure: Callable[[Cell], dict[str, object]] | None = None
    when: Callable[["Sweep"], object] | None = None
    on_every_text: bool = True
    notes: tuple[str, ...] = ()


_added: dict[str, Measurement] = forgotten_in_scope({})


@forgotten_on_change
@functools.cache
def measurements() -> Mapping[str, Measurement]:
    """Every measurement by its name, the house's first."""
    house = [importlib.import_module(f"qjax.sweep.measurements.{name}").MEASUREMENT for name in HOUSE]
    return types.MappingProxyType({each.name: each for each in (*house, *_added.values())})


def register_measurement(measurement: Measurement) -> Measurement:
    """Adds a measurement, or replaces one of one's own; returns it. Sweeps measure it where they are asked for its name.

    Raises QjaxError for names of the house, column names in use, and columns without type, role or meaning.
    """
    name, others = measurement.name, {each.name: each for each in measurements().values() if each.name != measurement.name}
    used = {column.name.partition(":")[0] for each in others.values() for column in each.columns}
    wrong = [
        column.name
        for column in measurement.columns
        if column.name.partition(":")[0] in used or column.role not in ROLES or not column.meaning or not _in_words(column.type)
    ]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or (name in measurements() and name not in _added):
        raise QjaxError(f"register_measurement: {name!r} is the house's, or no name of a-z, 0-9 and _; give it another")
    if wrong or not measurement.columns or measurement.measure is None:
        raise QjaxError(
            f"register_measurement: {name} needs measure= and columns of names that are not in use, each with a meaning, a "
            f"type (str, int, float, a list, or None beside) and a role ({', '.join(ROLES)}); got {', '.join(wrong) or 'none'}"
        )
    _added[name] = measurement
    forget()
    return measurement


def require_measurements(names: Iterable[str]) -> tuple[str, ...]:
    """The names; raises QjaxError where one is of no measurement that is asked for by name."""
    named = [each.name for each in measurements().values() if each.when is None]
    if unknown := [name for name in names if name not in named]:
        raise QjaxError(f"measurement {', '.join(unknown)}: allowed are {', '.join(named)}; `register_measurement` adds one")
    return tuple(names)


def asked_measurements(sweep: "Sweep") -> list[Measurement]:
    """What a sweep measures; raises QjaxError for names of no measurement."""
    names = require_measurements(sweep.measures)
    return [each for each in measurements().values() if (each.when(sweep) if each.when else each.name in names)]


def measurement_sources(names: Iterable[str]) -> dict[str, str]:
    """Source of the measurements from outside the package. Raises QjaxError where there is none to read."""
    added = {name: _added[name].measure for name in names if name in _added}
    try:
        return {f"measurement {name}": inspect.getsource(measure) for name, measure in added.items()}
    except (OSError, TypeError):
        raise QjaxError(
            f"the source of {', '.join(added)} cannot be read, and rows are told apart by it; define it in a file"
        ) from None


@forgotten_on_change
@functools.cache
def columns() -> Mapping[str, Column]:
    """Every declared column, by its name, of NAME:PART by "NAME:"."""
    found = (column for each in measurements().values() for column in each.columns)
    return types.MappingProxyType({spelled(column.name): column for column in found})


def column_of(name: str) -> Column | None:
    """The declaration of a row's column; None where there is none."""
    return columns().get(spelled(name))


def spelled(name: str) -> str:
    """NAME, or "NAME:" of NAME:PART."""
    stem, colon, _ = name.partition(":")
    return stem + colon


def with_roles(*roles: str) -> list[str]:
    """Names of the declared columns of these roles."""
    return [column.name for column in columns().values() if column.role in roles]


def data_dictionary() -> list[dict[str, str]]:
    """A record for every column of rows: measurement, name, type, unit, meaning."""
    return [
        {"measurement": each.name, "column": column.name, "type": _in_words(column.type), "unit": column.unit}
        | {"meaning": column.meaning}
        for each in measurements().values()
        for column in each.columns
    ]


# --- types ----------------------------------------------------------------------------------------------------------------

LARGEST = 2**63 - 1  # of integers: what tables and CSV files can hold
_NULL = types.NoneType
_JSON = {str: ("text", {str}), int: ("integer", {int}), float: ("number", {int, float}), _NULL: ("null", {_NULL})}


@functools.cache
def _alternatives(kind: object) -> list[tuple[bool, type]]:
    """(whether it is a list, of what) for each alternative of a type."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return [(typing.get_origin(part) is list, (typing.get_args(part) or (part,))[0]) for part in parts]


def _in_words(kind: object) -> str:
    """A type in words; empty for one that no column has."""
    names = [("list of " * many + _JSON[part][0]) if part in _JSON else "" for many, part in _alternatives(kind)]
    return " or ".join(names) if all(names) else ""


def _fits(value: object, kind: object) -> bool:
    """Whether a value, as JSON gives it, is of a column's type; of losses in a list some are null in old rows."""
    many = isinstance(value, list)
    for _, part in (each for each in _alternatives(kind) if each[0] == many):
        items = [item for item in (value if many else [value]) if not (part is float and item == "inf")]
        found = {type(item) for item in items}
        if any(type(item) is int and abs(item) > LARGEST for item in items):
            return False
        if any(isinstance(item, float) and not math.isfinite(item) for item in items):
            return False  # what Python's JSON reads as NaN, and no row has
        if found <= _JSON[part][1] | ({_NULL} if many and part is float else set()):
            return True
    return False


def undefined(row: Row) -> list[str]:
    """Names of a row's figures that are NaN or infinite; a standard error or interval of a single unit may be NaN."""
    return [name for name, value in row.items() if _is_broken(value, may_be_nan=bool(re.search("stderr|_low|_high", name)))]


def _is_broken(value: object, *, may_be_nan: bool) -> bool:
    if isinstance(value, str | bytes | bool | None):
        return False
    found = np.asarray(value)
    return found.dtype.kind == "f" and not bool(np.all(np.isfinite(found) | (may_be_nan & np.isnan(found))))


def misfits(row: Row, *, whole: bool = True) -> list[str]:
    """The declared columns of a row that have another type, and of a whole one those that are needed and missing."""
    missing = [name for name, column in columns().items() if whole and column.needed and row.get(name) is None]
    known = ((name, column_of(name)) for name in row if name not in missing)
    return missing + [name for name, column in known if column and not _fits(row[name], column.type)]
