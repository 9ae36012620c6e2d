"""The models of a sweep's cells, one after the other: those of the order `parallel` together, so that they share what
calibration gives.
"""

import math
from collections.abc import Callable, Sequence

from qjax.driver.decoder import quantize_together
from qjax.driver.layer import LayerRecord
from qjax.driver.report import Report
from qjax.models.model import Model, runnable
from qjax.numbers import NotFiniteError
from qjax.recipe import Stage
from qjax.sweep.columns import Cell

PARALLEL = Stage("parallel")
MOST_TOGETHER = 8  # models that wait for their measurement, packed, while another is measured


class Quantizer:
    """Makes models and keeps the last one for the cells of its other texts."""

    def __init__(self, on_layer: Callable[[LayerRecord], None]):
        self._on_layer = on_layer
        self._made: dict[tuple, tuple[Model, Report]] = {}
        self._last: tuple = (None, {})

    def prepare(self, cell: Cell, later: Sequence[Cell] = ()) -> Cell:
        """The cell with its model, decoded once for all texts, the model as it is stored and its report. later: cells that
        will be asked for.
        """
        place = cell.place
        if self._last[0] != place:
            self._last = (None, {})  # no longer held while others are made
            if place not in self._made:
                self._made |= self._make(cell, later)
            quantized, report = self._made.pop(place)
            decoded = runnable(quantized, compute=cell.sweep.compute)
            self._last = place, {"model": decoded, "quantized": quantized, "report": report}
        return cell._replace(**self._last[1])

    def _make(self, cell: Cell, later: Sequence[Cell]) -> dict[tuple, tuple[Model, Report]]:
        others = {other.place: other for other in (cell, *later) if _together(cell, other)}
        together = {cell.place: cell} | {place: other for place, other in others.items() if place not in self._made}
        together = dict(list(together.items())[:MOST_TOGETHER])
        requests = [(each.treatment.recipe, each.treatment.rules) for each in together.values()]
        try:
            made = quantize_together(cell.subject, requests, calibration=cell.sweep.calibration, on_layer=self._on_layer)
        except NotFiniteError:
            if len(requests) == 1:
                raise
            return self._make(cell, ())  # another one's weights may be what is broken
        return dict(zip(together, made, strict=True))


def made_together(cells: Sequence[Cell], most: int) -> list[int]:
    """The cells that share work with the first: those of its model on other texts, and in the order `parallel` those of other
    models in it. most: how many models.
    """
    first = dict.fromkeys(cell.place for cell in cells if _together(cells[0], cell))
    places = list(first)[: min(most, MOST_TOGETHER)]
    return [at for at, cell in enumerate(cells) if cell.place in places]


def part_of(cells: Sequence[Cell], workers: int) -> int:
    """How many models one of several workers makes together: no more than its part, so that each has some."""
    return max(1, math.ceil(len({cell.place for cell in cells if cell.order == PARALLEL}) / workers))


def _together(cell: Cell, other: Cell) -> bool:
    """Whether two cells share a model, or what calibration gives: the order `parallel` and one draw."""
    return cell.place == other.place or (cell.order == other.order == PARALLEL and cell.sweep.seed == other.sweep.seed)
