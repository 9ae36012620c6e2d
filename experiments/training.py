"""What training recovers: models rounded to 4, 3 and 2 bits, then trained as they are quantized, or with adapters beside them.

    python experiments/training.py                 writes results/training/, an hour and a half on 2 cores
    python experiments/training.py --tiny --out X  a few steps, for tests

Questions: how much of the perplexity that refined GPTQ leaves does quantization-aware training recover, how much do adapters on
the frozen codes? Is QLoRA on NF4, fine-tuned on Shakespeare, as good as LoRA on the float base (within 1 %)? Large models are
asked the last question alone, and once more with adapters of a larger rank and more text, on a base whose NF4 codes are GPTQ's
and adapters that begin by QERA, both calibrated on what is trained on. Trained is on the text's calibration part (of
Shakespeare its first nine tenths), measured on what was held out. Models are kept in runs/training; trainings go on where they
were stopped.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import common

import qjax
from qjax.checkpoints.peft import load_adapter
from qjax.driver.decoder import quantize_to
from qjax.driver.report import stored_size
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.models.adapters import attach
from qjax.numbers import as_json
from qjax.sweep.measurements.perplexity import figures
from qjax.sweep.measurements.provenance import provenance
from qjax.train.log import ROWS, step_rows
from qjax.train.loop import TrainConfig
from qjax.train.lora import LoraConfig
from qjax.train.qat import QatConfig
from qjax.train.run import Run, qat, qlora, training_tokens

SHAKESPEARE = "{data}/text/tinyshakespeare.txt"
QAT = TrainConfig(steps=1000, batch=8, micro_batch=8, window=256, learning_rate=5e-4)
LEARNING = QatConfig(loss="kl", rate=0.1)
LORA = TrainConfig(steps=250, batch=8, micro_batch=8, window=256, learning_rate=4e-3)
LARGE = TrainConfig(steps=200, batch=1, micro_batch=1, window=256, learning_rate=5e-4)
MOST = 512  # tokens of a window that is measured
MODELS = ("bundled", "smollm2")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained. Windows are cut to the model's context."""

    bits: tuple[tuple[int, int], ...] = ((2, 1000), (3, 400), (4, 100))  # and steps of training as quantized
    rounding: str = "gptq(clip=mse)+descend"
    group: int = 128
    qat: TrainConfig = QAT
    learning: QatConfig = LEARNING
    lora: TrainConfig = LORA
    rank: int = 16
    base: str = "nf4-b64-dq"
    shakespeare: TrainConfig = LORA
    large: TrainConfig = LARGE  # on Shakespeare
    calibration_windows: int = 128
    max_windows: int | None = 256


LONGER = TrainConfig(steps=200, batch=2, micro_batch=2, window=256, learning_rate=5e-4)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """How large models are fine-tuned once more."""

    base: str = "gptq(clip=mse)+descend:nf4-g64-dq@parallel"
    start: str = "qera"
    rank: int = 64
    train: TrainConfig = LONGER
    windows: int = 32  # of MOST tokens that it is calibrated on
    max_windows: int | None = 256  # that are measured


FEW = TrainConfig(steps=2, batch=2, window=32)
TINY = Experiment(((2, 2),), "rtn", 128, FEW, QatConfig(), FEW, 2, "nf4", FEW, FEW, 4, 2)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Trains and measures what is missing in out/rows.jsonl, and writes the table."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        models = (out if tiny else common.REPOSITORY / "runs") / "training" / _digest(dataclasses.asdict(experiment))
        if not subject.large:
            _recovery(out, models, subject, experiment)
        for path in common.texts([SHAKESPEARE], subject.data):
            _fine_tuning(out, models, subject, experiment, Path(path))
    return common.report(out)


def _recovery(out: Path, models: Path, subject: common.Subject, experiment: Experiment) -> None:
    """Rounded, trained as quantized and with adapters, in each number of bits."""
    model, measured = qjax.load(subject.model), load_corpus(subject.corpora[0])
    text = load_corpus(subject.calibration, "calibration")
    tokens = training_tokens(model, [text])
    _add(out, experiment, "none", model, measured)
    options = {"calibration": qjax.load_calibration(model, text, windows=experiment.calibration_windows, window=subject.window)}
    for bits, steps in experiment.bits:
        place = models / f"{model.name}-rounded-{bits}"
        if not place.exists():
            quantize_to(place, model, f"{experiment.rounding}:int{bits}-g{experiment.group}", **options)
        rounded = qjax.load(place)
        _add(out, experiment, "rounded", rounded, measured)
        place, config = models / f"{model.name}-qat-{bits}", dataclasses.replace(experiment.qat, steps=steps)
        if not place.exists():
            qat(Run(place, config, save_every=50), rounded, tokens, experiment.learning, original=model)
        _add(out, experiment, "trained as quantized", qjax.load(place), measured, place, config)
        place, adapters = models / f"{model.name}-qlora-{bits}", LoraConfig(experiment.rank, experiment.rank)
        if not place.exists():
            qlora(Run(place, experiment.lora, save_every=50), rounded, tokens, adapters)
        adapted = attach(rounded, load_adapter(place, rounded.config))
        _add(out, experiment, "trained adapters", adapted, measured, place, experiment.lora)


def _fine_tuning(out: Path, models: Path, subject: common.Subject, experiment: Experiment, path: Path) -> None:
    """LoRA on the float base and on a quantized one, on a text that the model does not know."""
    model, text = common.load_model(subject.model), path.read_text("utf-8")
    config = experiment.large if subject.large else experiment.shakespeare
    cut = text.index("\n\n", 9 * len(text) // 10)
    tokens, measured = training_tokens(model, [Corpus(path.stem, [text[:cut]])]), Corpus(path.stem, [text[cut:]])
    _add(out, experiment, "none", model, measured)
    rank = experiment.rank
    lora = LoraConfig(rank, rank)
    runs = [(experiment, "LoRA", None, config, lora, {}), (experiment, "QLoRA", experiment.base, config, lora, {})]
    if subject.large:
        more, text = Calibrated(), Corpus(path.stem, [text[:cut]])
        rank, given = more.rank, qjax.load_calibration(model, text, windows=more.windows, window=MOST)
        runs += [
            (more, f"LoRA, rank {rank}", None, more.train, LoraConfig(rank, rank), {}),
            (
                more,
                f"QLoRA, rank {rank}",
                more.base,
                more.train,
                LoraConfig(rank, rank, start=more.start),
                {"calibration": given},
            ),
        ]
    for settings, name, recipe, config, adapters, options in runs:
        made = str(qjax.parse_recipe(recipe)) if recipe else "none"
        if _is_there(out, _asked(settings, name, model, made, measured, config)["key"]):
            continue
        place = models / f"{model.name}-{name.replace(', ', '-').replace(' ', '-')}-{path.stem}"
        if not place.exists():
            qlora(Run(place, config, save_every=50), model, tokens, adapters, recipe=recipe, options=options)
        base = qjax.load(place / "base") if recipe else model
        adapted = attach(base, load_adapter(place, base.config))
        _add(out, settings, name, adapted, measured, place, config)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _asked(settings: Experiment | Calibrated, treatment: str, model: qjax.Model, recipe: str, corpus: Corpus, config) -> dict:
    """What a row says before it is measured, with its key. recipe: of the model, or of the base that it is to have."""
    asked = {
        "kind": "training",
        "model": model.name,
        "model_recipe": recipe,
        "treatment": treatment,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "steps": config.steps if config else 0,
        "training_tokens": config.steps * config.batch * min(config.window, model.config.context) if config else 0,
    }
    return {"key": _digest([asked, dataclasses.asdict(settings)]), **asked}


def _is_there(out: Path, key: str) -> bool:
    return key in {row["key"] for row in common.read_rows(out / common.ROWS)}


def _add(
    out: Path,
    settings: Experiment | Calibrated,
    treatment: str,
    model: qjax.Model,
    corpus: Corpus,
    place: Path | None = None,
    config: TrainConfig | None = None,
) -> None:
    """Measures a model, unless its row is there."""
    asked = _asked(settings, treatment, model, model.recipe, corpus, config)
    if _is_there(out, asked["key"]):
        return
    as_it_is = ("none", model.name, corpus.fingerprint)
    rows = {(row["treatment"], row["model"], row["corpus_fingerprint"]): row for row in common.read_rows(out / common.ROWS)}
    found = qjax.perplexity(model, corpus, f"windows-{min(model.config.context, MOST)}", max_windows=settings.max_windows)
    rate = step_rows(place / ROWS)[-1]["tokens_per_second"] if place else 1.0
    bits, size = stored_size(model.params) if model.recipe != "none" else (None, qjax.nbytes(model.params))
    added = {
        "convention": found.convention,
        "bits_per_weight": bits,
        "size_bytes": size,
        "training_seconds": asked["training_tokens"] / rate,
    }
    common.add_row(out, as_json({**asked, **figures(found, rows.get(as_it_is)), **added, **provenance()}))


if __name__ == "__main__":
    common.main(__doc__, "training", run, MODELS)
