"""Options that several commands of the command line share, as annotated types; only the commands import them."""

from pathlib import Path
from typing import Annotated

import typer

from qjax.errors import QjaxError
from qjax.files import expand

LARGEST_SEED = 2**32 - 1
MOST_SEEDS = 10_000
MODEL_HELP = "Hugging Face folder or hub name, GGUF file, folder qjax saved, or 'bundled'."
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
RecipeName = Annotated[str, typer.Option("--recipe", help="For example gptq:int4-g128; see `qjax recipes`.")]
Packed = Annotated[bool, typer.Option("--packed", help="Multiply with packed weights.")]


def _compute(option: str, use: str) -> object:
    """The type of an option that names a compute type."""

    def known(name: str | None) -> str | None:
        from qjax.models.compute import require_compute

        try:
            return require_compute(name)
        except QjaxError as error:
            raise QjaxError(f"{option}: {error}") from None

    help = f"Type that the model runs in{use}: float32 or bfloat16; rounding is in float32."
    default = "float32 on a CPU, else bfloat16"
    return Annotated[str | None, typer.Option(option, help=help, metavar="TYPE", show_default=default, callback=known)]


ComputeName = _compute("--compute", "")
CalibrationCompute = _compute("--calibration-compute", " to be calibrated")
Data = Annotated[
    list[str], typer.Option("--data", help="python-docs, wikitext2, ptb, c4, text:PATH or jsonl:PATH; may be repeated.")
]
ConventionName = Annotated[
    str, typer.Option("--convention", help="windows-N[-bos], sliding-N-STRIDE or llama.cpp-N.", metavar="NAME")
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="PATTERN=RECIPE (or =none): recipe of the kernels whose path matches, or of the embeddings; may be repeated.",
    ),
]
MaxWindows = Annotated[int | None, typer.Option("--max-windows", min=0, help="Measure N windows, spread out; 0: all.")]
Tasks = Annotated[
    str | None,
    typer.Option(help="Comma-separated accuracy tasks: cloze, piqa:PATH, ...; a name alone is fetched from the hub."),
]
MaxQuestions = Annotated[
    int | None, typer.Option("--max-questions", min=0, help="Ask the first N questions of a task; 0: all.")
]


def _calibration(texts: str, default: str) -> object:
    """The type of --calibration."""
    option = typer.Option("--calibration", help=f"Text that gptq, awq and so on calibrate on, {texts}.", show_default=default)
    return Annotated[str | None, option]


CalibrationName = _calibration("as --data", "the calibration part of --data")
CalibrationAlone = _calibration("for example c4 or text:PATH", "python-docs of the bundled model, else none")
CalibrationWindows = Annotated[int, typer.Option(min=1, help="Windows of the calibration text, drawn by --seed.")]
CalibrationWindow = Annotated[int, typer.Option(min=1, help="Tokens of a calibration window, cut to the model's context.")]
OrderName = Annotated[
    str | None,
    typer.Option("--order", help="parallel, block, sequential or qep: for recipes without @ORDER.", show_default="qep"),
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything random.")]
Seeds = Annotated[
    str | None,
    typer.Option(
        help="Recipes that read data are measured on N draws of it, of seeds 0 to N - 1, or of several as 0,5,7; their mean is "
        "one line of tables.",
        metavar="N",
        show_default="one, of --seed",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", parser=expand, metavar="PATH")]
Folder = Annotated[Path, typer.Argument(help="A folder with rows.jsonl.", parser=expand)]


def split_names(text: str | None, option: str) -> list[str]:
    """Names between commas; commas within parentheses belong to a name. None where the option was not given."""
    if text is None:
        return []
    parts, depth, current = [], 0, ""
    for letter in text + ",":
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        depth += {"(": 1, ")": -1}.get(letter, 0)
        current += letter
    if depth or not all(parts):
        raise QjaxError(f"{option} {text!r}: expected names separated by commas, with every parenthesis closed")
    return parts


def split_numbers(text: str, option: str = "--bits", example: str = "8,4,3,2") -> list[int]:
    """Whole numbers between commas."""
    try:
        return [int(part) for part in split_names(text, option)]
    except ValueError:
        raise QjaxError(f"{option} {text!r}: expected whole numbers separated by commas, for example {example}") from None


def split_seeds(text: str | None, seed: int) -> tuple[int, ...]:
    """The seeds of --seeds, N or several; that of --seed, which it excludes, where it is not given."""
    if text is None:
        return (seed,)
    first, *others = numbers = split_numbers(text, "--seeds", "0,5,7")
    if seed or (not others and first < 1):
        raise QjaxError(f"--seeds {text}, --seed {seed}: expected at least one seed, by one of the two; leave the other out")
    if len(set(numbers)) < len(numbers) or min(numbers) < 0 or max(numbers) > (LARGEST_SEED if others else MOST_SEEDS):
        raise QjaxError(
            f"--seeds {text}: expected a number of seeds, {MOST_SEEDS} at most, or different ones of 0 to {LARGEST_SEED}"
        )
    return tuple(numbers) if others else tuple(range(first))
