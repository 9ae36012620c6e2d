"""What training recovers: models rounded to 4, 3 and 2 bits, then trained as they are quantized, or with adapters beside them.

    python experiments/training.py                 writes results/training/, an hour on 2 cores
    python experiments/training.py --tiny --out X  a few steps, for tests

Questions: how much of the perplexity that refined GPTQ leaves does quantization-aware training recover, how much do adapters on
the frozen codes? Is QLoRA on NF4, fine-tuned on Shakespeare, as good as LoRA on the float base (within 1 %)? Trained is on the
text's calibration part (of Shakespeare its first nine tenths), measured on what was held out. Models are kept in runs/training.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import common

import qjax
from qjax.checkpoints.peft import load_adapter
from qjax.driver.report import stored_size
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.models.adapters import attach
from qjax.train.log import ROWS, step_rows
from qjax.train.loop import TrainConfig
from qjax.train.lora import LoraConfig
from qjax.train.qat import QatConfig
from qjax.train.run import Run, qat, qlora, training_tokens

SHAKESPEARE = "{data}/text/tinyshakespeare.txt"
QAT = TrainConfig(steps=400, batch=8, micro_batch=4, window=256, learning_rate=2e-4)
LORA = TrainConfig(steps=400, batch=8, micro_batch=4, window=256, learning_rate=2e-3)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained. Windows are cut to the model's context."""

    bits: tuple[int, ...] = (4, 3, 2)
    rounding: str = "gptq(clip=mse)+descend"
    group: int = 128
    qat: TrainConfig = QAT
    loss: str = "kl"
    lora: TrainConfig = LORA
    rank: int = 16
    base: str = "nf4-b64-dq"
    shakespeare: TrainConfig = LORA
    calibration_windows: int = 128
    max_windows: int | None = 256


FEW = TrainConfig(steps=2, batch=2, window=32)
TINY = Experiment((2,), "rtn", 128, FEW, "next-token", FEW, 2, "nf4", FEW, 4, 2)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Trains and measures what is missing in out/rows.jsonl, and writes the table."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        models = out / "models" if tiny else common.REPOSITORY / "runs" / "training"
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
    for bits in experiment.bits:
        recipe = f"{experiment.rounding}:int{bits}-g{experiment.group}"
        _add(out, experiment, "rounded", qjax.quantize(model, recipe, **options)[0], measured)
        place = models / f"{model.name}-qat-{bits}"
        if not place.exists():
            learning = QatConfig(loss=experiment.loss, rate=0.5)
            qat(Run(place, experiment.qat, save_every=50), model, tokens, learning, recipe=recipe, options=options)
        _add(out, experiment, "trained as quantized", qjax.load(place), measured, place, experiment.qat)
        place = models / f"{model.name}-qlora-{bits}"
        if not place.exists():
            adapters = LoraConfig(experiment.rank, experiment.rank)
            qlora(Run(place, experiment.lora, save_every=50), model, tokens, adapters, recipe=recipe, options=options)
        _add(out, experiment, "trained adapters", _adapted(place), measured, place, experiment.lora)


def _fine_tuning(out: Path, models: Path, subject: common.Subject, experiment: Experiment, path: Path) -> None:
    """LoRA on the float base and on a quantized one, on a text that the model does not know."""
    model, text = qjax.load(subject.model), path.read_text("utf-8")
    cut = text.index("\n\n", 9 * len(text) // 10)
    tokens, measured = training_tokens(model, [Corpus(path.stem, [text[:cut]])]), Corpus(path.stem, [text[cut:]])
    _add(out, experiment, "none", model, measured)
    for name, recipe in (("LoRA", None), ("QLoRA", experiment.base)):
        place = models / f"{model.name}-{name}-{path.stem}"
        if not place.exists():
            adapters = LoraConfig(experiment.rank, experiment.rank)
            qlora(Run(place, experiment.shakespeare, save_every=50), model, tokens, adapters, recipe=recipe)
        adapted = _adapted(place) if recipe else attach(model, load_adapter(place, model.config))
        _add(out, experiment, name, adapted, measured, place, experiment.shakespeare)


def _adapted(place: Path) -> qjax.Model:
    base = qjax.load(place / "base")
    return attach(base, load_adapter(place, base.config))


def _add(
    out: Path,
    experiment: Experiment,
    treatment: str,
    model: qjax.Model,
    corpus: Corpus,
    place: Path | None = None,
    config: TrainConfig | None = None,
) -> None:
    """Measures a model, unless its row is there."""
    asked = {
        "kind": "training",
        "model": model.name,
        "model_recipe": model.recipe,
        "treatment": treatment,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "steps": config.steps if config else 0,
        "training_tokens": config.steps * config.batch * min(config.window, model.config.context) if config else 0,
    }
    key = hashlib.sha256(json.dumps([asked, dataclasses.asdict(experiment)]).encode()).hexdigest()[:16]
    if key in {row["key"] for row in common.read_rows(out / common.ROWS)}:
        return
    found = qjax.perplexity(model, corpus, f"windows-{model.config.context}", max_windows=experiment.max_windows)
    rate = step_rows(place / ROWS)[-1]["tokens_per_second"] if place else 1.0
    bits, size = stored_size(model.params) if model.recipe != "none" else (None, qjax.nbytes(model.params))
    figures = {
        "convention": found.convention,
        "perplexity": found.value,
        "nll": found.nll,
        "bits_per_weight": bits,
        "size_bytes": size,
        "training_seconds": asked["training_tokens"] / rate,
    }
    common.add_row(out, {"key": key, **asked, **figures})


if __name__ == "__main__":
    common.main(__doc__, "training", run)
