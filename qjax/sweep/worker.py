"""One worker of a sweep: claims cells, measures them and keeps their rows, until every cell has a row.

What is claimed at once is what shares work: the texts of one recipe, which share its quantized model; of recipes in the order
`parallel` several, which share what calibration gives, as many as are made together but no more than one worker's part of them.
The baseline's rows, which all others need, are measured by one worker; the others quantize meanwhile and wait for them.

A row is kept under the store's lock, where the claim is still the worker's own and no other row has its key. A cell that has no
figures is told to the others, so that it is tried once.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qjax.driver.report import rows_of
from qjax.files import listing
from qjax.numbers import NotFiniteError
from qjax.sweep.claims import Claims, Holder
from qjax.sweep.columns import Cell, Row
from qjax.sweep.quantizer import Quantizer, made_together, part_of
from qjax.sweep.store import LAYERS, ROWS, Reader, locked, write_rows

if TYPE_CHECKING:
    from qjax.sweep.runner import Watcher

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between two looks at what others do


class Job(NamedTuple):
    """A cell with what is asked in it, under its key."""

    cell: Cell
    head: Row

    @property
    def key(self) -> str:
        return str(self.head["key"])

    @property
    def recipe(self) -> str:
        """With its seed, where a sweep has several."""
        drawn = self.cell.order is not None and len(self.cell.sweep.seeds) > 1
        return f"{self.head['recipe']}{f', seed {self.cell.sweep.seed}' if drawn else ''}"

    def __str__(self) -> str:
        return f"{self.recipe} on {self.cell.corpus.name}"


class Worker:
    """A worker of a sweep in a folder. measure(cell, head) -> its row; workers: how many share the sweep.
    quantizer: what makes the cells' models; None: of decoders.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Sequence[Job],
        measure: Callable[[Cell, Row], dict[str, object]],
        watcher: "Watcher",
        claims: Claims,
        workers: int = 1,
        quantizer: Quantizer | None = None,
    ):
        self._folder, self._jobs, self._measure_cell, self._watcher, self._claims = folder, jobs, measure, watcher, claims
        self._quantizer = quantizer or Quantizer(watcher.layer)
        self._part = part_of([job.cell for job in jobs], workers)
        self._baselines: dict[str, Job] = {}
        for job in jobs:
            self._baselines.setdefault(job.cell.corpus.fingerprint, job)
        self._rows: dict[str, dict[str, object]] = {}  # of this sweep, as they are on disk
        self._untold: list[str] = []  # keys of those that others wrote
        self._rows_read, self._layers_read = Reader(folder / ROWS), Reader(folder / LAYERS)
        self._layers: set[tuple[str, str]] = set()  # (key, path) of those on disk
        self._others: dict[str, Holder] = {}  # who is at which cell
        self._pause = FIRST_PAUSE
        self._broken: dict[str, str] = {}  # cells that have no figures, and why

    def run(self) -> list[dict[str, object]]:
        """The rows of all cells, in their order. Raises NotFiniteError, in the end, for cells whose figures are not finite."""
        if self._missing():
            self._look_at_layers()  # a damaged file is an error before anything is computed
            with locked(self._folder):
                self._claims.join()
        while not self._stopped and (missing := self._missing()):
            if taken := self._take(missing):
                self._measure(taken)
            else:
                self._wait(missing)
        if self._broken:
            raise NotFiniteError(f"{listing(self._broken.values())}; every other row is in {self._folder / ROWS}")
        return [self._rows[job.key] for job in self._jobs]

    @property
    def _stopped(self) -> bool:
        """Whether a baseline has no figures, without which nothing goes on."""
        return any(baseline.key in self._broken for baseline in self._baselines.values())

    def _missing(self) -> list[Job]:
        """The cells without a row that may have one."""
        self._look()
        for key in self._untold:
            row = self._rows[key]
            self._watcher.cell(len(self._rows), len(self._jobs), str(row["recipe"]), str(row["corpus"]))
            self._watcher.row(row, is_new=False)
        self._untold.clear()
        return [job for job in self._jobs if job.key not in self._rows and job.key not in self._broken]

    def _look(self) -> None:
        """Takes notice of rows on disk."""
        found = {str(row["key"]): row for row in self._rows_read.rows()}
        new = [job.key for job in self._jobs if job.key in found and job.key not in self._rows]
        self._rows |= {key: found[key] for key in new}
        self._untold += new

    def _look_at_layers(self) -> None:
        """Takes notice of layers on disk: one who is killed before it writes a cell's row has left the cell's."""
        self._layers |= {(str(row.get("key")), str(row.get("path"))) for _, row in self._layers_read.objects()}

    def _take(self, jobs: Sequence[Job]) -> list[Job]:
        """Claims what is measured next of these cells; nothing where others are at all of them."""
        with locked(self._folder):
            self._look()
            self._others, own = self._claims.others(), self._claims.cells()
            told = self._claims.broken()
            self._broken |= {job.key: told[job.key] for job in self._jobs if job.key in told}
            free = [job for job in jobs if not any(job.key in each for each in (self._rows, self._others, self._broken))]
            taken = [free[at] for at in made_together([job.cell for job in free], self._part)]
            if taken:
                kept = {key: label for key, label in own.items() if key not in self._rows}
                self._claims.hold(kept | {job.key: str(job) for job in taken})
        return taken

    def _measure(self, jobs: Sequence[Job]) -> None:
        """Measures cells that are claimed, as long as they are."""
        for at, (cell, head) in enumerate(jobs):
            self._watcher.cell(len(self._rows) + 1, len(self._jobs), jobs[at].recipe, cell.corpus.name)
            try:
                made = self._quantizer.prepare(cell, [later.cell for later in jobs[at + 1 :]])
                made = made._replace(before=self._before(jobs[at]), on_batch=self._watcher.batch)
                row = self._measure_cell(made, head)
            except NotFiniteError as error:
                if self._stopped:
                    return
                self._broken[jobs[at].key] = f"{jobs[at]} has no row: {error}"
                with locked(self._folder):
                    self._claims.tell_broken(jobs[at].key, self._broken[jobs[at].key])
                continue
            if not self._keep(jobs[at].key, row, [{"key": jobs[at].key} | layer for layer in rows_of(made.report.layers)]):
                return

    def _before(self, job: Job) -> Row | None:
        """The baseline's row of the same text; None in that row itself. Measured here only where nobody is at it."""
        baseline = self._baselines[job.cell.corpus.fingerprint]
        if baseline is job:
            return None
        while baseline.key not in self._rows:
            if taken := self._take([baseline]):
                self._measure(taken)
            if baseline.key in self._broken:
                raise NotFiniteError(f"{baseline} has no row")
            if not taken:
                self._wait([baseline])
            self._look()
        return self._rows[baseline.key]

    def _keep(self, key: str, row: dict[str, object], layers: Sequence[Row]) -> bool:
        """Writes a cell's layers and row, unless it has a row; False, and nothing, where its claim is lost."""
        with locked(self._folder):
            self._look()
            if key not in self._claims.cells():
                return False
            if key in self._rows:
                return True
            self._look_at_layers()
            write_rows(self._folder / LAYERS, [layer for layer in layers if (key, layer["path"]) not in self._layers])
            write_rows(self._folder / ROWS, [row])
            self._rows[key], self._pause = row, FIRST_PAUSE
        self._watcher.row(row, is_new=True)
        return True

    def _wait(self, jobs: Sequence[Job]) -> None:
        """Until something may have changed; says for whom."""
        self._watcher.waiting({str(job): str(self._others[job.key]) for job in jobs if job.key in self._others})
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.5, LONGEST_PAUSE)
