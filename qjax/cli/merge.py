"""The command that makes a plain model of a base and an adapter."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli.early import check_names
from qjax.cli.export import TYPES, ShardSize, folder_of
from qjax.cli.loading import Draw, calibration_for, load_model, own_text
from qjax.cli.options import (
    CalibrationAlone,
    CalibrationCompute,
    CalibrationWindow,
    CalibrationWindows,
    ConventionName,
    MaxWindows,
    Out,
    Overwrite,
    Seed,
)
from qjax.errors import QjaxError
from qjax.files import expand
from qjax.folders import refuse_inputs, require_place, standing
from qjax.printable import printable
from qjax.untrusted import is_folder

if TYPE_CHECKING:
    from qjax.models.model import Model


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the adapter was trained on, as for eval.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of PEFT's layout.", parser=expand)],
    out: Out,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    into: Annotated[
        str | None,
        typer.Option("--base", metavar="FLOAT", help="Merge into this model instead of what the codes of BASE stand for."),
    ] = None,
    requantize: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Quantize the merged model with this, and write it packed.")
    ] = None,
    data: Annotated[list[str], typer.Option("--data", help="Text to tell the losses on; may be repeated.")] = [],  # noqa: B006
    convention: ConventionName = "windows-2048",
    max_windows: MaxWindows = None,
    calibration: CalibrationAlone = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    seed: Seed = 0,
    shard_size: ShardSize = 5.0,
    overwrite: Overwrite = False,
) -> None:
    """Add an adapter to its base and write a plain Hugging Face folder: dequantized, added in float32, cast.

    The result is not quantized again unless --requantize says so, which may take away what the adapter learned.
    """
    check_names(recipes=requantize, convention=convention, texts=(*data, calibration), models=(base, into))
    if dtype not in TYPES:
        raise QjaxError(f"--dtype {dtype!r}: expected {', '.join(TYPES)}")
    if not is_folder(standing(adapter)):
        raise QjaxError(f"{adapter}: no such folder; give the one that PEFT, or qjax train qlora, wrote")
    refuse_inputs(out, [base, adapter, *([] if into is None else [into])])
    out = require_place(out, overwrite=overwrite)
    from qjax.evaluate.corpora import load_corpora
    from qjax.sweep.cells import canonical
    from qjax.train.merge import load_merge, save_merged

    recipes = [] if requantize is None else canonical([requantize])
    corpora = load_corpora(data) if data else ()
    model, target = load_model(base, lazy=True), None if into is None else load_model(into, lazy=True)
    adapted, merged = load_merge(model, adapter, target)
    draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
    read = calibration_for(merged, (recipes, ()), draw, own_text(base), seed)
    done = save_merged(
        out,
        merged,
        dtype=TYPES[dtype],
        recipe=recipes[0] if recipes else None,
        calibration=read,
        overwrite=overwrite,
        shard_bytes=int(shard_size * 1e9),
        beside=folder_of(base if into is None else into),
    )
    typer.echo(printable(f"{out}: {merged.name} with {adapter.name} in {done.recipe if recipes else dtype}"))
    for corpus in corpora:
        measured = {f"{adapted.name} ({adapted.recipe}) with its adapter": adapted}
        if target is not None:
            measured[f"{merged.name} ({merged.recipe}) with the adapter"] = merged
        measured["requantized" if recipes else "merged"] = done
        for name, each in measured.items():
            typer.echo(printable(f"{name} on {corpus.name}: {_loss(each, corpus, convention, max_windows):.5f} nats a token"))


def _loss(model: "Model", corpus, convention: str, max_windows: int | None) -> float:
    from qjax.evaluate.perplexity import perplexity
    from qjax.evaluate.windows import parse_convention

    return perplexity(model, corpus, parse_convention(convention), max_windows=max_windows or None).nll
