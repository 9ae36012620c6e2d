"""The commands that train: `qjax train qlora` and `qjax train qat`."""

from typing import TYPE_CHECKING, Annotated

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
    Out,
    Overwrite,
    Rules,
    Seed,
    split_names,
)
from qjax.cli.terminal import live_training
from qjax.errors import QjaxError
from qjax.folders import refuse_inputs, require_place
from qjax.printable import printable
from qjax.train.settings import LoraConfig, QatConfig, TrainConfig

if TYPE_CHECKING:
    from qjax.models.model import Model

train = typer.Typer(name="train", help="Train adapters on a quantized model, or the quantized weights.", no_args_is_help=True)

Text = Annotated[
    list[str], typer.Option("--data", help="Text: text:PATH, jsonl:PATH (texts or chats), c4, ...; may be repeated.")
]
StartRecipe = Annotated[
    str | None, typer.Option("--recipe", help="Quantize the model with this first, as nf4-b64-dq or gptq:int2-g128.")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows a step.")]
MicroBatch = Annotated[int, typer.Option("--micro-batch", min=1, help="Windows in memory at a time; gradients add up.")]
Window = Annotated[int, typer.Option(min=1, help="Tokens of a window, cut to the model's context.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="Of AdamW, after the warm-up.")]
Schedule = Annotated[str, typer.Option(help="linear, cosine or constant.")]
Clip = Annotated[float, typer.Option("--clip", help="Largest norm of a gradient.")]
Devices = Annotated[int, typer.Option(min=1, help="Devices that share a batch.")]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")]


@train.command("qlora")
def qlora(
    model: ModelName,
    data: Text,
    out: Out,
    recipe: StartRecipe = None,
    rule: Rules = None,
    steps: Steps = 200,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="An adapter is scaled by alpha / rank.")] = 16.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) instead.")] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="Kernels with an adapter, as q_proj; may be repeated; all by default.")
    ] = None,
    start: Annotated[str, typer.Option(help="gaussian, loftq, qera or pissa: how adapters begin.")] = "gaussian",
    batch: Batch = 8,
    micro_batch: MicroBatch = 1,
    window: Window = 512,
    learning_rate: Rate = 2e-4,
    schedule: Schedule = "linear",
    clip: Clip = 1.0,
    devices: Devices = 1,
    save_every: SaveEvery = 100,
    calibration: CalibrationAlone = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train LoRA adapters on a frozen, quantized base, and write them in PEFT's layout.

    With --recipe the base that they belong to is written beside them: `qjax merge OUT/base OUT` makes a plain model of both.
    The same command goes on where it was stopped.
    """
    check_names(recipes=recipe, rules=rule, texts=(*data, calibration), models=(model,))
    wanted = LoraConfig(rank, alpha, tuple(target or ()), rslora, start)
    config = TrainConfig(steps, batch, micro_batch, window, learning_rate, schedule, clip_norm=clip, seed=seed)
    refuse_inputs(out, [model], inside=True)
    require_place(out, overwrite=overwrite)
    from qjax.train.run import Run
    from qjax.train.run import qlora as run_qlora

    loaded, tokens = _inputs(model, data)
    draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
    needing = "--start qera" if start == "qera" else None
    recipe, options = _quantizing(loaded, model, recipe, rule, draw, seed, needing)
    with live_training(steps) as show:
        run = Run(out, config, devices, save_every, overwrite, show, folder_of(model))
        base = run_qlora(run, loaded, tokens, wanted, recipe=recipe, options=options)
    typer.echo(printable(f"{out}: adapters of rank {rank} for {base.name} ({base.recipe})"))


@train.command("qat")
def qat(
    model: ModelName,
    data: Text,
    out: Out,
    recipe: StartRecipe = None,
    rule: Rules = None,
    steps: Steps = 200,
    original: Annotated[
        str | None, typer.Option("--float", metavar="MODEL", help="Of a quantized MODEL, the one before it was quantized.")
    ] = None,
    loss: Annotated[str, typer.Option(help="next-token, or kl: the divergence from the float model.")] = "next-token",
    learn: Annotated[str, typer.Option(help="Some of weights,scales,zeros.")] = "weights,scales,zeros",
    scale_rate: Annotated[
        float, typer.Option("--scale-rate", help="Learning rate of scales and zeros, as a share of the weights'.")
    ] = 1.0,
    batch: Batch = 8,
    micro_batch: MicroBatch = 1,
    window: Window = 512,
    learning_rate: Rate = 1e-4,
    schedule: Schedule = "linear",
    clip: Clip = 1.0,
    devices: Devices = 1,
    save_every: SaveEvery = 100,
    calibration: CalibrationAlone = None,
    calibration_windows: CalibrationWindows = 128,
    calibration_window: CalibrationWindow = 2048,
    calibration_compute: CalibrationCompute = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train the quantized weights of a model, with their scales and zero points, and write it packed.

    With --recipe the model is quantized first; block_ap in it trains block after block. The same command goes on where it was
    stopped.
    """
    check_names(recipes=recipe, rules=rule, texts=(*data, calibration), models=(model, original))
    wanted = QatConfig(tuple(split_names(learn, "--learn")), loss, scale_rate)
    config = TrainConfig(steps, batch, micro_batch, window, learning_rate, schedule, clip_norm=clip, seed=seed)
    refuse_inputs(out, [model, *([original] if original else [])], inside=True)
    require_place(out, overwrite=overwrite)
    from qjax.train.run import Run
    from qjax.train.run import qat as run_qat

    loaded, tokens = _inputs(model, data)
    before = None if original is None else load_model(original)
    draw = Draw(calibration, calibration_windows, calibration_window, calibration_compute)
    recipe, options = _quantizing(loaded, model, recipe, rule, draw, seed)
    with live_training(steps) as show:
        run = Run(out, config, devices, save_every, overwrite, show, folder_of(model))
        trained = run_qat(run, loaded, tokens, wanted, recipe=recipe, original=before, options=options)
    typer.echo(printable(f"{out}: {trained.name} ({trained.recipe})"))


def _inputs(model: str, data: list[str]) -> "tuple[Model, object]":
    """The model, and the tokens to train on, of the calibration part of texts that have one."""
    from qjax.evaluate.corpora import load_corpus
    from qjax.train.chat import chat_renderer
    from qjax.train.run import training_tokens

    loaded = load_model(model)
    corpora = [load_corpus(spec, "calibration", render=chat_renderer(loaded)) for spec in data]
    return loaded, training_tokens(loaded, corpora)


def _quantizing(
    loaded: "Model",
    model: str,
    recipe: str | None,
    rule: list[str] | None,
    draw: Draw,
    seed: int,
    needing: str | None = None,
) -> tuple[str | None, dict[str, object]]:
    """The recipe in canonical form, and the options of `quantize`. needing: what reads calibration data besides the recipe."""
    from qjax.sweep.cells import canonical
    from qjax.sweep.runner import rules_in_order

    if recipe is None:
        if rule:
            raise QjaxError("--rule says what --recipe leaves to it; give a recipe")
        return None, {}
    (name,), rules = canonical([recipe]), rules_in_order(rule or (), None)
    read = calibration_for(loaded, ([name], rules), draw, own_text(model), seed, needing)
    return name, {"calibration": read, "rules": rules}
