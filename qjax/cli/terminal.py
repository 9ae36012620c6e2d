"""What a person sees of the command line: progress, tables, one line a result. Only the commands import it.

Rich and whatever else is heavy is imported when something is shown.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qjax.files import listing
from qjax.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from qjax.evaluate.perplexity import PerplexityResult
    from qjax.models.model import Model
    from qjax.train.loop import Told


def console():
    """Where tables go."""
    from rich.console import Console

    return Console()


def progress_bars():
    """Bars on stderr, gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def live_sweep(*, of_others: bool = True) -> Iterator[object]:
    """A live display of the cells of a sweep. of_others: rows that this process did not measure are shown too."""
    from qjax.sweep.runner import Watcher

    with progress_bars() as progress:
        cells = progress.add_task("cells")
        work = progress.add_task("")

        class Live(Watcher):
            done, total = 0, 0

            def cell(self, number, total, recipe, corpus):
                self.done, self.total = number - 1, total
                progress.update(cells, completed=number - 1, total=total)
                progress.update(work, description=f"{recipe}: quantizing", completed=0, total=None)
                self.label = printable(f"{recipe} on {corpus}")

            def layer(self, record):
                progress.advance(work)

            def batch(self, done, total):
                progress.update(work, description=self.label, completed=done, total=total)

            def waiting(self, cells):
                progress.update(work, description=f"waiting for {_waited_for(cells)}", completed=0, total=None)

            def row(self, row, is_new):
                self.done += 1
                if is_new or of_others:
                    _print_row(progress, row, "" if is_new else " (measured before)")

        yield Live()


@contextlib.contextmanager
def live_training(steps: int) -> Iterator[Callable[["Told"], None]]:
    """A live display of a training: steps done, loss, tokens a second, time left; the function is told of each step."""
    with progress_bars() as progress:
        bar = progress.add_task("training", total=steps)

        def show(told: "Told") -> None:
            left = f"{told.seconds_left / 60:.1f} min left"
            text = f"loss {told.loss:.4f}, {told.tokens_per_second:,.0f} tokens/s, {left}"
            progress.update(bar, completed=told.step, description=text)

        yield show


def _waited_for(cells: Mapping[str, str]) -> str:
    """Who is at which cell, by worker."""
    by_worker: dict[str, list[str]] = {}
    for cell, worker in cells.items():
        by_worker.setdefault(worker, []).append(cell)
    return printable(listing((f"{worker} ({listing(at, 2)})" for worker, at in by_worker.items()), 3))


def _print_row(progress: "Progress", row: Mapping[str, object], note: str = "") -> None:
    seed = f", seed {row['seed']}" if row.get("seed") and row.get("order") is not None else ""
    progress.console.print(
        f"{row['recipe']:<28} {row['bits_per_weight']:7.3f} bits  {printable(row['corpus']):<14} "
        f"perplexity {float(row['perplexity']):.4f}{seed}{note}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@contextlib.contextmanager
def live_workers(folder: Path) -> Iterator[Callable[[], None]]:
    """A live display of the workers in a folder, which the function that it gives brings up to date: rows as they come, and
    what each worker is at.
    """
    from qjax.sweep.claims import holders
    from qjax.sweep.store import ROWS, read_rows

    path = folder / ROWS
    shown, size, tasks = len(read_rows(path)), 0, {}
    with progress_bars() as progress:
        cells = progress.add_task("rows", total=None)

        def show() -> None:
            nonlocal shown, size
            if path.exists() and path.stat().st_size != size:
                size, rows = path.stat().st_size, read_rows(path)
                for row in (row for row in rows[shown:] if "kind" not in row):
                    _print_row(progress, row)
                shown = len(rows)
            progress.update(cells, completed=shown)
            at_work = {each.path: printable(f"{each}: {listing(each.cells.values(), 2)}") for each in holders(folder)}
            for name in [name for name in tasks if name not in at_work]:
                progress.remove_task(tasks.pop(name))
            for name, text in at_work.items():
                if name not in tasks:
                    tasks[name] = progress.add_task(text, total=None)
                progress.update(tasks[name], description=text)

        yield show


def print_states(states: list[dict[str, object]]) -> None:
    """The cells of a sweep and how far they are."""
    from qjax.report.rendering import Table, TableColumn, to_rich

    columns = (
        TableColumn("recipe", "recipe", text=True),
        TableColumn("corpus", "text", text=True),
        TableColumn("format", "format", text=True, rank=1),
        *([TableColumn("seed", "seed", rank=1)] if len({row["seed"] for row in states}) > 1 else []),
        TableColumn("key", "key", text=True),
        TableColumn("state", "state", text=True),
    )
    counts = {"done": 0, "claimed": 0, "open": 0}
    for row in states:
        counts[row["state"] if row["state"] in counts else "claimed"] += 1
    note = f"{len(states)} cells: " + ", ".join(f"{count} {state}" for state, count in counts.items())
    console().print(to_rich(Table("Cells", columns, tuple(states), (note,))))


def print_tables(rows: list[dict[str, object]]) -> None:
    """Every table that the rows fill."""
    from qjax.report.rendering import to_rich
    from qjax.report.reports import tables

    for _, table in tables(rows):
        console().print(to_rich(table))


def print_accuracies(model: "Model", tasks: tuple, *, packed: bool) -> None:
    """Measures every task and prints a line for each."""
    from qjax.evaluate.choices import accuracy

    for task in tasks:
        with progress_bars() as progress:
            bar = progress.add_task(printable(task.name), total=None)
            show = lambda done, total, bar=bar, progress=progress: progress.update(bar, completed=done, total=total)  # noqa: E731
            found = accuracy(model, task, packed=packed, on_batch=show)
        kind = "accuracy" if found.kind == "choices" else "last words"
        more = f", by length {found.normalised:.2%}" if found.answers_normalised else f", perplexity {found.perplexity:.4g}"
        error = f" ± {found.stderr:.2%}" if math.isfinite(found.stderr) else ""
        cut = f", {found.truncated} cut to the context" if found.truncated else ""
        typer.echo(
            f"{printable(f'{model.name} ({model.recipe}) on {task.name}')}: {kind} {found.value:.2%}{error}{more} "
            f"[{len(found.gold):,} questions{cut}, {found.seconds:.1f} s]"
        )


def print_perplexity(model: "Model", result: "PerplexityResult") -> None:
    """The line of `qjax eval`."""
    error = f" ± {result.stderr:.4f}" if math.isfinite(result.stderr) else ""
    typer.echo(
        f"{printable(f'{model.name} ({model.recipe}) on {result.corpus}')}: perplexity {result.value:.4f}{error}, "
        f"{result.nll:.5f} nats a token, {result.bits_per_byte:.4f} bits a byte "
        f"[{result.convention}, {result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s]"
    )
