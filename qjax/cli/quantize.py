"""The command that writes a quantized model."""

from typing import Annotated

import typer

from qjax.cli.early import check_names
from qjax.cli.export import folder_of
from qjax.cli.loading import Draw, calibration_for, load_model, own_text
from qjax.cli.options import (
    CalibrationAlone,
    CalibrationCompute,
    CalibrationWindow,
    CalibrationWindows,
    ModelName,
    OrderName,
    Out,
    Overwrite,
    RecipeName,
    Rules,
    Seed,
)
from qjax.cli.terminal import console, progress_bars


def quantize(
    model: ModelName,
    recipe: RecipeName,
    out: Out,
    rule: Rules = None,
    calibration: CalibrationAlone = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    order: OrderName = None,
    seed: Seed = 0,
    report: Annotated[bool, typer.Option("--report", help="Print a line for every layer.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Quantize a model and save it packed; `qjax eval` and qjax.load read the folder back bit-equal.

    layers.jsonl beside the weights has a row of all that is quantized; files of the tokenizer and of generation are copied.
    Blocks are written as they are done: the same command goes on where it was stopped.
    """
    check_names(recipes=recipe, order=order, rules=rule, texts=(calibration,), models=(model,))
    from qjax.driver.decoder import quantize_to
    from qjax.driver.placement import placement
    from qjax.folders import refuse_inputs, require_place
    from qjax.report.rendering import to_rich
    from qjax.report.tables import layers_table
    from qjax.sweep.cells import canonical
    from qjax.sweep.runner import rules_in_order

    (recipe,), rules = canonical([recipe], order), rules_in_order(rule or (), order)
    refuse_inputs(out, [model])
    out = require_place(out, overwrite=overwrite)
    loaded = load_model(model, lazy=True)
    total = len(placement(loaded, recipe, rules))
    asked_of = ([recipe], rules)
    draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
    tokens = calibration_for(loaded, asked_of, draw, own_text(model), seed)
    with progress_bars() as progress:
        task = progress.add_task("quantizing", total=total)
        quantized, done = quantize_to(
            out,
            loaded,
            recipe,
            calibration=tokens,
            rules=rules,
            overwrite=overwrite,
            beside=folder_of(model),
            on_layer=lambda _: progress.advance(task),
        )
    if report:
        console().print(to_rich(layers_table(done.layers)))
    typer.echo(
        f"{out}: {quantized.recipe}, {done.bits_per_weight:.3f} bits per quantized weight, "
        f"{done.model_bits_per_weight:.3f} over the whole model, {done.size_bytes:,} bytes"
    )
