"""The commands that write a quantized model for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from qjax.cli.early import check_names
from qjax.cli.loading import load_model
from qjax.cli.options import ModelName, Out, Overwrite
from qjax.errors import QjaxError
from qjax.files import expand
from qjax.folders import refuse_inputs, require_file, require_place, standing

ShardSize = Annotated[float, typer.Option(min=1e-6, max=1e6, help="GB of a file at most; more are written with an index.")]
GGUF = "gguf"
TARGETS = ("gptq", "gptq_v2", "compressed-tensors", "awq", "bitsandbytes", GGUF)  # what `checkpoints/export.py` knows
Target = Annotated[str, typer.Option(metavar="FORMAT", help=f"{', '.join(TARGETS[:-1])}, or {GGUF}: a file.")]
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dequantize(
    model: ModelName,
    out: Out,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    shard_size: ShardSize = 5.0,
    overwrite: Overwrite = False,
) -> None:
    """Write any quantized model as a plain Hugging Face folder: the values that its codes stand for.

    Files of the tokenizer and of generation are copied. What layers do to their inputs (an activation format) no such folder
    can say, nor how a cache is rounded: it is left out, with a word on it.
    """
    check_names(models=(model,))
    if dtype not in TYPES:
        raise QjaxError(f"--dtype {dtype!r}: expected {', '.join(TYPES)}")
    refuse_inputs(out, [model])
    out = require_place(out, overwrite=overwrite)
    from qjax.checkpoints.huggingface import save_huggingface
    from qjax.files import listing
    from qjax.linear import without_activations
    from qjax.models.parameters import flatten

    loaded = load_model(model, lazy=True, weights_alone=True)
    formats = dict.fromkeys(
        str(each.activation) for each in flatten(loaded.params).values() if getattr(each, "activation", None)
    )
    if formats:
        typer.echo(f"left out: layers round their inputs ({listing(formats)}), which a plain folder cannot say", err=True)
        loaded = loaded._replace(params=without_activations(loaded.params))
    limit = int(shard_size * 1e9)
    save_huggingface(out, loaded, overwrite=overwrite, dtype=TYPES[dtype], shard_bytes=limit, beside=folder_of(model))
    typer.echo(f"{out}: {loaded.name} ({loaded.recipe}) in {dtype}")


def export(model: ModelName, out: Out, to: Target, shard_size: ShardSize = 5.0, overwrite: Overwrite = False) -> None:
    """Write a quantized model, its codes as they are, as another library's folder, or as a GGUF file.

    What that library's files cannot hold is refused, with the nearest recipe that fits.
    """
    _write(model, out, to, shard_size, overwrite)


def convert(model: ModelName, out: Out, to: Target, shard_size: ShardSize = 5.0, overwrite: Overwrite = False) -> None:
    """Write what another library quantized (a folder, a GGUF file) in the files of a third one, its codes as they are.

    What the target cannot hold is refused: nothing is rounded a second time without a word. `qjax dequantize` and
    `qjax quantize` do that.
    """
    plain = f"; to round it anew: qjax dequantize {model} --out PLAIN, then qjax quantize PLAIN with a recipe that fits"
    _write(model, out, to, shard_size, overwrite, refused=plain)


def _write(model: str, out: Path, to: str, shard_size: float, overwrite: bool, refused: str = "") -> None:
    """refused: what is added to the message where the target cannot hold the model."""
    check_names(models=(model,))
    if to not in TARGETS:
        raise QjaxError(f"--to {to!r}: expected {', '.join(TARGETS)}")
    refuse_inputs(out, [model])
    out = require_file(out, ".gguf", overwrite=overwrite) if to == GGUF else require_place(out, overwrite=overwrite)
    from qjax.checkpoints.export import export as export_model
    from qjax.checkpoints.target import RefusedError

    loaded = load_model(model, lazy=True)
    limit = int(shard_size * 1e9)
    try:
        export_model(out, loaded, to, overwrite=overwrite, shard_bytes=limit, beside=folder_of(model))
    except RefusedError as error:
        raise QjaxError(f"{error}{refused}") from error
    typer.echo(f"{out}: {loaded.name} ({loaded.recipe}) for {to}")


def folder_of(model: str) -> Path | None:
    """The folder that a model is read from, where it is one here."""
    from qjax.untrusted import is_folder

    folder = standing(expand(model))
    return folder if is_folder(folder) else None
