"""Models and calibration as the commands name them. Only the commands import it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import typer

from qjax.errors import QjaxError

if TYPE_CHECKING:
    from qjax.calibrate.tokens import Calibration
    from qjax.models.model import Model

DEFAULT_WINDOWS = 128  # of the bundled text: paired differences to 0.2 % at 4 bits, 0.01 % at 8


def load_model(name: str, *, lazy: bool = False, weights_alone: bool = False) -> "Model":
    """The named model, with compiled programs kept between runs; see `qjax.load`."""
    from qjax.cache import enable_compilation_cache
    from qjax.checkpoints.load import load

    enable_compilation_cache()
    return load(name, lazy=lazy, weights_alone=weights_alone)


class Draw(NamedTuple):
    """What is calibrated on as the options say it: a text, how many windows of how many tokens, and in which type."""

    text: str | None
    windows: int
    window: int
    compute: str | None = None


def calibration_for(
    model: "Model", asked: tuple, draw: Draw, data: list[str], seed: int, needing: str | None = None
) -> "Calibration | None":
    """`calibrations_for` of one seed."""
    found = calibrations_for(model, asked, draw, data, (seed,), needing)
    return found and found[0]


def calibrations_for(
    model: "Model", asked: tuple, draw: Draw, data: list[str], seeds: Sequence[int], needing: str | None = None
) -> "tuple[Calibration, ...] | None":
    """Calibration tokens of each seed where a recipe or rule of `asked` reads any, or what is named `needing` does; the text
    defaults to the first named one of `data`.
    """
    from qjax.calibrate.tokens import load_calibration
    from qjax.driver.placement import parse_rule
    from qjax.evaluate.corpora import load_corpus
    from qjax.recipe import parse_recipe

    recipes = [*map(parse_recipe, asked[0]), *(parse_rule(rule).recipe for rule in asked[1])]
    reading = next((str(recipe) for recipe in recipes if recipe and recipe.reads_data), needing)
    if reading is None:
        return None
    named = [spec for spec in data if ":" not in spec]
    if draw.text is None and not named:
        raise QjaxError(f"{reading} reads calibration data; name a text with --calibration, for example text:PATH or c4")
    corpus = load_corpus(draw.text or named[0], "calibration")
    how = {"windows": draw.windows, "window": draw.window, "compute": draw.compute}
    return tuple(load_calibration(model, corpus, **how, seed=seed) for seed in seeds)


def default_windows(model: str, data: list[str], asked: int | None) -> int | None:
    """How many windows are measured: of the bundled model's own text not all, unless asked for."""
    if asked is not None or model != "bundled" or data != ["python-docs"]:
        return asked
    typer.echo(f"measuring {DEFAULT_WINDOWS} windows, spread over the text; --max-windows 0 measures all", err=True)
    return DEFAULT_WINDOWS


def own_text(model: str) -> list[str]:
    """The text that a model of that name is calibrated on where none is named."""
    return ["python-docs"] if model == "bundled" else []
