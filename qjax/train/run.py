"""Whole trainings into folders: what the commands do. A folder appears when it is whole; until then checkpoints and rows are in
.NAME.training beside it, from where the same call goes on bit for bit after a kill.

    training.jsonl, loss.png   a row of every step, and their figure
    qlora                      an adapter in PEFT's layout, what it was trained on, and in base/ the base that a recipe or
                               pissa made
    qat                        a packed folder
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from qjax.calibrate.tokens import as_calibration
from qjax.checkpoints import packed, peft
from qjax.checkpoints.companions import read_companions
from qjax.checkpoints.load import load
from qjax.driver.decoder import quantize
from qjax.driver.placement import abridge, placement
from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus
from qjax.files import write_atomically
from qjax.folders import new_folder, prepare_output_folder, require_place
from qjax.lazy import is_lazy, materialised
from qjax.models.compute import compute_name
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import Model
from qjax.models.parameters import flatten
from qjax.report.reports import save_figure
from qjax.report.training import loss_figure
from qjax.train.log import ROWS, step_log, step_rows
from qjax.train.loop import Told, TrainConfig, batch_at, mesh_of, packed_tokens
from qjax.train.lora import LoraConfig, start, train_adapters
from qjax.train.merge import write_base
from qjax.train.qat import QatConfig, train_quantized

FIGURE = "loss"
WRITTEN = (*peft.REPLACED, *packed.REPLACED, "base", ROWS, f"{FIGURE}.*")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training into `folder`. devices: that share a batch. save_every: steps between checkpoints. beside: a folder whose
    tokenizer's and generation's files are copied beside weights that are written.
    """

    folder: Path
    config: TrainConfig
    devices: int = 1
    save_every: int = 100
    overwrite: bool = False
    on_step: Callable[[Told], None] = lambda told: None
    beside: Path | None = None


def training_tokens(model: Model, corpora: Sequence[Corpus]) -> Int[np.ndarray, " length"]:
    """The tokens of the corpora's documents, packed. Raises QjaxError for a model without tokenizer."""
    return packed_tokens(model.tokenizer, [text for corpus in corpora for text in corpus.documents], model.name)


def in_context(config: TrainConfig, model: Model) -> TrainConfig:
    """The configuration with windows that fit the model's context."""
    return dataclasses.replace(config, window=min(config.window, model.config.context))


def qlora(
    run: Run,
    model: Model,
    tokens: Int[np.ndarray, " length"],
    config: LoraConfig,
    *,
    recipe: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Model:
    """Trains adapters on the model, quantized with the recipe first where there is one, and writes them; returns the base.

    options: of `quantize`. Raises what `start`, `train` and the writers raise.
    """
    place, loaded = _place(run, model, tokens), _loaded(model)
    base, adapters = start(loaded, config, jax.random.key(run.config.seed), recipe=recipe, **(options or {}))
    identity = {"base": model_fingerprint(base), "adapters": dataclasses.asdict(config)}
    if config.start == "qera":
        given = as_calibration(base, options["calibration"])
        identity["calibration"] = given.fingerprint, compute_name(given.compute or base.compute)
    trained = train_adapters(base, adapters, tokens, in_context(run.config, base), **_told(run, place, identity))
    made = recipe is not None or config.start == "pissa"  # a base that stands nowhere else
    with _whole(run, place) as new:
        name = str(Path(run.folder) / "base") if made else model.name
        peft.save_adapter(new, base.config, trained, base=name)
        write_base(new, base, config.start)
        if made:
            packed.save(new / "base", base, beside=run.beside)
    return base


def qat(
    run: Run,
    model: Model,
    tokens: Int[np.ndarray, " length"],
    config: QatConfig,
    *,
    recipe: str | None = None,
    original: Model | None = None,
    options: Mapping[str, object] | None = None,
) -> Model:
    """Trains the weights of the model, quantized with the recipe first where there is one, and writes it; returns that.

    original: of a model that is quantized, the one before; options: of `quantize`. Raises what `train_quantized` and the
    writers raise.
    """
    if (recipe is None) == (original is None and model.recipe == "none"):
        raise QjaxError(
            f"{model.name} is {model.recipe}: a model that is not quantized needs a recipe, another one has its own"
        )
    if config.loss == "kl" and recipe is None and original is None:
        raise QjaxError(f"{model.name}: the loss kl is from the model before it was quantized; give that (--float)")
    place, loaded = _place(run, model, tokens), _loaded(model)
    if recipe is not None:
        _refuse_experts(model, recipe, (options or {}).get("rules", ()))
        original, loaded = loaded, quantize(loaded, recipe, **(options or {}))[0]
    before = None if original is None else model_fingerprint(original)
    identity = {"base": model_fingerprint(loaded), "float": before, "learning": dataclasses.asdict(config)}
    if before == identity["base"]:
        raise QjaxError(f"{model.name}: the float model is this one itself; give the one before it was quantized (--float)")
    told = _told(run, place, identity)
    trained = train_quantized(loaded, tokens, in_context(run.config, loaded), config, original=original, **told)
    with _whole(run, place) as new:
        packed.save(new, trained, beside=run.beside)
    return load(run.folder, lazy=True)


def _refuse_experts(model: Model, recipe: str, rules: Iterable[object]) -> None:
    """What `train_quantized` would say of experts, before anything is quantized."""
    leaves, placed = flatten(model.params), placement(model, recipe, rules)
    if experts := [path for path, chosen in placed.items() if chosen is not None and len(leaves[path].shape) > 2]:
        raise QjaxError(
            f"{abridge(experts)} hold experts, which are not trained; leave them as they are, with the rule "
            "'mlp/(gate|up|down)=none'"
        )


def _loaded(model: Model) -> Model:
    return model._replace(params=materialised(model.params)) if is_lazy(model.params) else model


def _place(run: Run, model: Model, tokens: Int[np.ndarray, " length"]) -> Path:
    """Where checkpoints and rows are until the folder is whole; not made yet. Raises, before anything is quantized, what
    training would raise of text and devices.
    """
    config = in_context(run.config, model)
    batch_at(tokens, config, 0)
    mesh_of(run.devices, config.batch, config.micro_batch)
    read_companions(run.beside)
    target = require_place(run.folder, overwrite=run.overwrite)
    return target.with_name(f".{target.name}.training")


def _told(run: Run, place: Path, identity: Mapping[str, object]) -> dict[str, object]:
    log = step_log(prepare_output_folder(place) / ROWS)

    def on_step(told: Told) -> None:
        log(told)
        run.on_step(told)

    return {
        "folder": place,
        "identity": identity,
        "devices": run.devices,
        "save_every": run.save_every,
        "on_step": on_step,
    }


@contextmanager
def _whole(run: Run, place: Path):
    """The folder to write into; with rows and figure it takes its name, and what stood beside it goes."""
    with new_folder(run.folder, overwrite=run.overwrite, replaces=WRITTEN) as new:
        yield new
        rows = step_rows(place / ROWS)
        write_atomically(new / ROWS, (place / ROWS).read_bytes())
        save_figure(loss_figure(rows), new, FIGURE)
    shutil.rmtree(place)
