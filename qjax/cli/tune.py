"""The command that looks for the cheapest recipe within a bound."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli.early import check_names
from qjax.cli.export import folder_of
from qjax.cli.loading import Draw, calibration_for, default_windows, load_model
from qjax.cli.options import (
    CalibrationCompute,
    CalibrationName,
    CalibrationWindow,
    CalibrationWindows,
    ConventionName,
    MaxQuestions,
    MaxWindows,
    ModelName,
    Out,
    Rules,
    Seed,
    split_names,
)
from qjax.cli.terminal import console, live_sweep, progress_bars
from qjax.errors import QjaxError
from qjax.files import write_atomically
from qjax.folders import prepare_results_folder, refuse_inputs
from qjax.untrusted import read_json, status

if TYPE_CHECKING:
    from qjax.sweep.tune import Tuned

SAVED = "model"  # in the folder of --out
NONE_HOLDS = 3  # exit code


def tune(
    model: ModelName,
    within: Annotated[str, typer.Option(help="The largest loss: a share as 1%, or a number.")] = "1%",
    of: Annotated[
        str, typer.Option(help="perplexity, kl (in nats, against the model as it is), or a task, as `qjax sweep --tasks`.")
    ] = "perplexity",
    recipes: Annotated[str, typer.Option(help="Comma-separated recipes, or ready-made lists of them: int8, int4.")] = "int8",
    data: Annotated[str, typer.Option(help="python-docs, wikitext2, ptb, c4, text:PATH or jsonl:PATH.")] = "python-docs",
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    max_questions: MaxQuestions = None,
    rule: Rules = None,
    calibration: CalibrationName = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    seed: Seed = 0,
    out: Out = Path("qjax-tune"),
) -> None:
    """Try recipes from the fewest bits on; stop at the first that loses no more than --within, and save the model.

    The whole 95 % interval of the loss must be within it. Rows, a table of what was tried, the folder `model` and what it
    was made of go to --out; the same command goes on where it was stopped. Exit code 3 where no recipe is within the bound: the
    nearest is named.
    """
    from qjax.sweep.tune import named_recipes, parse_bound

    bound, names = parse_bound(within, of), named_recipes(split_names(recipes, "--recipes"))
    if len(split_names(of, "--of")) > 1:
        raise QjaxError(f"--of {of!r}: expected one measure: perplexity, kl or a task")
    task = None if of in ("perplexity", "kl") else of
    for recipe in names:
        check_names(recipes=recipe)
    check_names(rules=rule, convention=convention, tasks=task, texts=(data, calibration), models=(model,))
    refuse_inputs(out, [model])
    prepare_results_folder(out)
    from qjax.driver.placement import in_our_words, parse_rule
    from qjax.evaluate.corpora import load_corpora
    from qjax.evaluate.tasks import load_tasks
    from qjax.evaluate.windows import parse_convention
    from qjax.sweep.cells import canonical
    from qjax.sweep.runner import Sweep, cell_states, rules_in_order
    from qjax.sweep.tune import by_cost
    from qjax.sweep.tune import tune as tune_recipes

    measured, loaded = parse_convention(convention), load_model(model)
    rules = rules_in_order(map(str, in_our_words(loaded, map(parse_rule, rule or ()))), None)  # as the saved folder has them
    ordered = by_cost(loaded, canonical(names), rules)
    draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
    asked = calibration_for(loaded, (ordered, rules), draw, [data], seed)
    max_windows = default_windows(model, [data], max_windows)
    request = Sweep(
        (),
        load_corpora([data]),
        measured,
        max_windows or None,
        rules,
        seed,
        tasks=load_tasks([task] if task else (), max_questions or None),
        divergence=of == "kl",
        calibration=asked,
    )
    cell_states(loaded, dataclasses.replace(request, recipes=tuple(ordered)), out)  # what is wrong with any is told before work
    rows: dict[str, dict] = {}
    done = tune_recipes(ordered, _measure(loaded, request, out, of.partition(":")[0], bound, rows), bound)
    _tell(done, rows, out, loaded.name, of, bound)
    if done.accepted is None:
        raise typer.Exit(NONE_HOLDS)
    _save(out / SAVED, model, done.accepted, rules, asked, rows[done.accepted]["key"])


def _measure(model, request, out, of, bound, rows):
    """recipe -> its loss, from rows in the folder where they are there; rows: filled with them."""
    import math

    from qjax.numbers import NotFiniteError
    from qjax.recipe import UNQUANTIZED
    from qjax.sweep.runner import run_sweep
    from qjax.sweep.tune import Loss, loss_of

    def row_of(recipe: str, **changes) -> dict:
        with live_sweep(of_others=False) as watcher:
            return run_sweep(model, dataclasses.replace(request, recipes=(recipe,), **changes), out, watcher)[-1]

    before = row_of(UNQUANTIZED, rules=())  # without its figures there is nothing to compare with

    def measure(recipe: str) -> "Loss":
        try:
            row = row_of(recipe)
        except NotFiniteError:
            return Loss(math.inf, math.inf, math.inf)
        rows[recipe] = row
        return loss_of(row, before, of, bound)

    return measure


def _tell(done: "Tuned", rows: dict[str, dict], out: Path, model: str, of: str, bound: object) -> None:
    from qjax.report.rendering import to_rich
    from qjax.report.reports import write_reports, write_table
    from qjax.report.tuning import tuning_table
    from qjax.sweep.store import ROWS, read_rows

    told = [
        {
            "recipe": trial.recipe,
            "bits_per_weight": rows.get(trial.recipe, {}).get("bits_per_weight", float("nan")),
            "loss": trial.loss.value,
            "low": trial.loss.low,
            "high": trial.loss.high,
            "accepted": trial.accepted,
        }
        for trial in done.trials
    ]
    table = tuning_table(told, model=model, of=of, bound=str(bound))
    console().print(to_rich(table))
    for path in [*write_table(out, "tune", table), *write_reports(out, read_rows(out / ROWS))]:
        typer.echo(path)
    if done.accepted is None:
        typer.echo(f"no recipe is within {bound} of {of} with its whole interval; {done.nearest} comes nearest", err=True)


def _save(folder: Path, model: str, recipe: str, rules, calibration, key: str) -> None:
    """Unless the model is there; what it was made of, the key of its row, stands beside it."""
    from qjax.checkpoints.load import load
    from qjax.driver.decoder import quantize_to

    beside = folder.with_name(f"{folder.name}.json")
    if folder.exists():
        found = load(str(folder), lazy=True).recipe
        if found != "; ".join([recipe, *rules]):
            raise QjaxError(f"{folder}: holds {found}, not {recipe}; give another --out, or remove it")
        if not status(beside) or read_json(beside) != {"key": key}:
            raise QjaxError(
                f"{folder}: holds {recipe} of another model, text of calibration or version; give another --out, or remove it"
            )
    else:
        write_atomically(beside, json.dumps({"key": key}))
        with progress_bars() as progress:
            bar = progress.add_task("quantizing", total=None)
            source = load(model, lazy=True)
            options = {"calibration": calibration, "rules": rules, "beside": folder_of(model)}
            quantize_to(folder, source, recipe, **options, on_layer=lambda _: progress.advance(bar))
    typer.echo(f"{folder}: {recipe}")
