"""What a person sees of the command line: progress, tables, one line a result. Only the commands import it.

Rich and whatever else is heavy is imported when something is shown.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from qjax.printable import printable

if TYPE_CHECKING:
    from qjax.evaluate.perplexity import PerplexityResult
    from qjax.models.model import Model


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
def live_sweep() -> Iterator[object]:
    """A live display of the cells of a sweep."""
    from qjax.sweep.runner import Watcher

    with progress_bars() as progress:
        cells = progress.add_task("cells")
        work = progress.add_task("")

        class Live(Watcher):
            def cell(self, number, total, recipe, corpus):
                progress.update(cells, completed=number - 1, total=total)
                progress.update(work, description=f"{recipe}: quantizing", completed=0, total=None)
                self.label = printable(f"{recipe} on {corpus}")

            def layer(self, record):
                progress.advance(work)

            def batch(self, done, total):
                progress.update(work, description=self.label, completed=done, total=total)

            def row(self, row, is_new):
                note = "" if is_new else " (measured before)"
                progress.console.print(
                    f"{row['recipe']:<28} {row['bits_per_weight']:7.3f} bits  {printable(row['corpus']):<14} "
                    f"perplexity {row['perplexity']:.4f}{note}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

        yield Live()


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
