"""What the experiments share: the models and their texts, arguments, and the sweep over recipes and seeds.

A script holds a frozen `Experiment`, its tiny twin, and `run(out, *, tiny, subjects)`; `main` gives it these options:

    --out X          where rows, tables and figures go; results/<name>, or runs/tiny/<name>, by default. Running again finishes
                     what is missing
    --tiny           a few windows and cells, on the bundled model, for tests
    --model NAME     of `SUBJECTS` or anything `qjax.load` takes (once or more); by default the script's own choice
    --data-folder F  small models, texts and tasks (models/, text/, tasks/); by default $QJAX_TEST_DATA, or ../shared/data. What
                     is not there is left out, and a line says so
    --model-folder F the large models, GGUF files; by default $QJAX_TEST_MODELS, or ../models
    --task SPEC      a further task of every subject, NAME:PATH (once or more), where the experiment asks questions

A mistake is one line and exit code 2, as is a run of which no subject is left.
"""

import argparse
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import qjax
from qjax.cache import enable_compilation_cache
from qjax.checkpoints.huggingface import save_huggingface
from qjax.cli.terminal import live_sweep
from qjax.driver.placement import placement
from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus, load_corpus
from qjax.evaluate.questions import Task
from qjax.evaluate.tasks import load_tasks
from qjax.models.fingerprint import model_fingerprint
from qjax.recipe import parse_recipe
from qjax.report.inputs import input_rows
from qjax.report.reports import write_reports
from qjax.sweep.store import ROWS, append_row, read_rows

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("QJAX_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
MODELS = Path(os.environ.get("QJAX_TEST_MODELS") or REPOSITORY.parent / "models")
HALVES = REPOSITORY / "runs" / "texts"  # of texts that have no parts of their own; not committed
PLAIN = REPOSITORY / "runs" / "models"  # what GGUF files stand for, as folders in float32; not committed
HALF = "half:"  # a text of the data folder, measured on its first half and calibrated on its second


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, the texts it is measured on, the text it is calibrated on, and its tasks; "{data}" is the data folder, and
    "{models}" that of large models.
    """

    model: str
    corpora: tuple[str, ...] = ("wikitext2",)
    calibration: str = "c4"
    tasks: tuple[str, ...] = ()
    groups: tuple[str, ...] = ("32", "128", "channel")  # of the bitwidth sweep; the second is the usual one of real models
    window: int = 2048  # tokens, of texts and of calibration; cut to the model's context
    bos: bool = False  # the beginning of text stands before each window that is measured
    large: bool = False  # 10^8 parameters or more
    data: Path = DATA


WIKITEXT = "text:{data}/text/wikitext2/wiki.test.raw"
C4 = "text:{data}/text/calib/c4.utf8.gz"
TASKS = (
    "arc_easy:{data}/tasks/arc_easy.jsonl",
    "piqa:{data}/tasks/piqa.jsonl",
    "hellaswag:{data}/tasks/hellaswag_val_full.txt.bz2",
)
REAL_TEXTS = ((WIKITEXT,), C4, TASKS)
STORIES = HALF + "{data}/text/tinystories_val.txt"
SUBJECTS = {
    "bundled": Subject("bundled", ("python-docs",), "python-docs", ("cloze",)),
    "stories260K": Subject(
        "{data}/models/stories260K-hf", (STORIES, WIKITEXT), STORIES, groups=("32", "64", "channel"), window=256
    ),
    # Its tokenizer knows the 105 characters of its stories and no others: WikiText-2 would be mostly unknown tokens.
    "babyllama": Subject("{data}/models/babyllama-hf", (STORIES,), STORIES),
    # 576 wide: groups of 64 divide it, those of 128 would leave a half group at the end of every column.
    "smollm2": Subject(
        "{models}/SmolLM2-135M-Instruct.Q4_1.gguf", *REAL_TEXTS, groups=("32", "64", "channel"), window=512, large=True
    ),
    "gemma3-270m": Subject("{models}/gemma-3-270m.Q4_K_M.gguf", *REAL_TEXTS, window=512, bos=True, large=True),
    "gpt2": Subject("openai-community/gpt2"),
    "pythia-160m": Subject("EleutherAI/pythia-160m"),
    "llama-2-7b": Subject("meta-llama/Llama-2-7b-hf"),
    "mistral-7b-v0.2": Subject("mistral-community/Mistral-7B-v0.2"),
}
LOCAL = ("bundled", "stories260K", "babyllama")  # models that need no network
REAL = ("smollm2", "gemma3-270m")  # of 10^8 parameters, in the folder of large models
BUNDLED = (SUBJECTS["bundled"],)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every cell of an experiment is measured."""

    max_windows: int | None = 128
    questions: int | None = 400  # of each task
    tasks: bool = False
    divergence: bool = False
    speed: bool = False
    seeds: tuple[int, ...] = (0,)
    calibration_windows: int = 32  # what more than 8,192 tokens of calibration change is less than other draws do
    calibration_window: int | None = None  # the subject's
    calibration_compute: str | None = None  # the device's
    compute: str | None = None  # the device's


TINY = Settings(max_windows=2, questions=4, calibration_windows=4)


def measure(
    out: Path,
    subject: Subject,
    recipes: Sequence[str],
    settings: Settings,
    *,
    calibration: str | None = None,
    rules: tuple[str, ...] = (),
    one_block: bool = False,
) -> None:
    """Adds what out/rows.jsonl lacks: the recipes on the subject's texts, those that read data once for every seed.

    calibration: a text instead of the subject's. rules, one_block: as in `qjax.Sweep`.
    """
    enable_compilation_cache()
    model = load_model(subject.model)
    source, windows, window = calibration or subject.calibration, settings.calibration_windows, settings.calibration_window
    draw = functools.partial(_calibration, subject.model, source, windows, window or subject.window)
    drawn = (draw(seed)._replace(compute=settings.calibration_compute) for seed in settings.seeds)
    sweep = qjax.Sweep(
        tuple(recipes),
        tuple(map(_corpus, subject.corpora)),
        qjax.parse_convention(f"windows-{subject.window}{'-bos' if subject.bos else ''}"),
        settings.max_windows,
        rules=rules,
        seeds=settings.seeds,
        tasks=_tasks(subject.tasks, settings.questions) if settings.tasks else (),
        divergence=settings.divergence,
        speed=settings.speed,
        calibration=tuple(drawn) if any(_reads_data(recipe, rules) for recipe in recipes) else None,
        one_block=one_block,
        compute=settings.compute,
    )
    with live_sweep() as watcher:
        qjax.run_sweep(model, sweep, out, watcher)


def report(out: Path) -> list[dict[str, object]]:
    """Writes the tables and figures of all rows, and returns them."""
    rows = read_rows(out / ROWS)
    for path in write_reports(out, rows):
        print(path)
    return rows


def add_row(out: Path, row: dict[str, object]) -> None:
    """Adds a row that is no cell of a sweep, unless it is there."""
    if row["key"] not in {each["key"] for each in read_rows(out / ROWS)}:
        append_row(out / ROWS, row)


def kernels(subject: Subject) -> list[str]:
    """The paths of the subject's linear kernels."""
    return list(placement(load_model(subject.model), None))


def look_at_inputs(out: Path, subject: Subject, windows: int) -> None:
    """Adds a row for every input of the model's layers, over so many windows of what it is calibrated on."""
    model = load_model(subject.model)
    found = qjax.input_outliers(model, _calibration(subject.model, subject.calibration, windows, subject.window, 0))
    for row in input_rows(model.name, model_fingerprint(model), found):
        add_row(out, row)


def with_outliers(subject: Subject, factor: float, channels: int, folder: Path) -> Subject:
    """The subject with injected outliers, its model in a folder of `folder`, written once."""
    model = load_model(subject.model)
    path = folder / f"{model.name}-outliers"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_huggingface(path, qjax.inject_outliers(model, factor, channels), dtype="float32")
    return dataclasses.replace(subject, model=str(path))


def _reads_data(recipe: str, rules: tuple[str, ...]) -> bool:
    parsed = [parse_recipe(recipe), *(qjax.parse_rule(rule).recipe for rule in rules)]
    return any(each is not None and each.statistics for each in parsed)


@functools.lru_cache(maxsize=1)
def load_model(name: str) -> qjax.Model:
    """A subject's model; what a GGUF file stands for is written as a folder first."""
    if not name.endswith(".gguf"):
        return qjax.load(name)
    folder = PLAIN / Path(name).stem  # that of `qjax dequantize NAME --dtype fp32`
    if not folder.exists():
        save_huggingface(folder, qjax.load(name, lazy=True), dtype="float32")
    return qjax.load(folder)


@functools.cache
def _corpus(spec: str, split: str = "test") -> Corpus:
    return load_corpus(spec, split)


@functools.cache
def _tasks(specs: tuple[str, ...], questions: int | None) -> tuple[Task, ...]:
    return load_tasks(specs, questions)


@functools.lru_cache(maxsize=8)
def _calibration(model: str, source: str, windows: int, window: int, seed: int) -> qjax.Calibration:
    corpus = _corpus(source, "calibration")
    return qjax.load_calibration(load_model(model), corpus, windows=windows, window=window, seed=seed)


# --- where models and texts are -------------------------------------------------------------------------------------------


def locate(names: Iterable[str], data: Path, models: Path = MODELS) -> list[Subject]:
    """The subjects called so, or made of a model that has no entry, with their files in `data` and `models`; those that lack
    the model or every text are left out, as are texts that are missing, and a line says so.
    """
    found, folders = [], {"data": data, "models": models}
    for name in names:
        subject = SUBJECTS.get(name, Subject(name))
        specs = (subject.model, subject.calibration, *subject.corpora, *subject.tasks)
        missing = [spec for spec in specs if not _there(spec, folders)]
        for spec in missing[:1] if subject.model in missing else dict.fromkeys(missing):
            print(f"{name}: {_left_out(spec, folders)}")
        corpora = tuple(_place(spec, folders, first=True) for spec in subject.corpora if spec not in missing)
        if subject.model not in missing and subject.calibration not in missing and corpora:
            model, calibration = subject.model.format(**folders), _place(subject.calibration, folders, first=False)
            tasks = tuple(spec.format(**folders) for spec in subject.tasks if spec not in missing)
            found.append(
                dataclasses.replace(subject, model=model, corpora=corpora, calibration=calibration, tasks=tasks, data=data)
            )
    return found


def texts(specs: Iterable[str], data: Path) -> list[str]:
    """Those of the specs that are there; a line for the others."""
    folders = {"data": data}
    for spec in specs:
        if not _there(spec, folders):
            print(_left_out(spec, folders))
    return [spec.format(**folders) for spec in specs if _there(spec, folders)]


def _there(spec: str, folders: Mapping[str, Path]) -> bool:
    found = re.search(r"\{(data|models)\}.*", spec)
    return found is None or Path(found[0].format(**folders)).exists()


def _left_out(spec: str, folders: Mapping[str, Path]) -> str:
    option = "--model-folder" if "{models}" in spec else "--data-folder"
    return f"left out {spec.format(**folders)}, which is not there; {option} names a folder that has it"


def _place(spec: str, folders: Mapping[str, Path], *, first: bool) -> str:
    """The spec of a text in the data folder; halves are written as files, cut at the paragraph nearest the middle."""
    if not spec.startswith(HALF):
        return spec.format(**folders)
    source = Path(spec.removeprefix(HALF).format(**folders))
    path = HALVES / f"{source.stem}-{'first' if first else 'second'}-half{source.suffix}"
    text = source.read_text("utf-8")
    cut = text.index("\n\n", len(text) // 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text[:cut] if first else text[cut:].lstrip("\n"), "utf-8")
    return f"text:{path}"


# --- arguments ------------------------------------------------------------------------------------------------------------


def main(doc: str, name: str, run: Callable[..., object], models: tuple[str, ...] | None = None) -> None:
    """Runs a script. models: names its subjects are of by default; None: the bundled model on its own text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", action="append", metavar="NAME", help=f"{', '.join(SUBJECTS)}, a folder or a hub name")
    parser.add_argument("--data-folder", type=Path, default=DATA)
    parser.add_argument("--model-folder", type=Path, default=MODELS)
    parser.add_argument("--task", action="append", default=[], metavar="SPEC", help="a further task, NAME:PATH")
    options = parser.parse_args()
    try:
        out = options.out or Path("runs/tiny" if options.tiny else "results") / name
        out.mkdir(parents=True, exist_ok=True)
        run(out, tiny=options.tiny, subjects=_subjects(options, models))
    except (QjaxError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


def _subjects(options: argparse.Namespace, models: tuple[str, ...] | None) -> tuple[Subject, ...]:
    """Those asked for, with further tasks; raises QjaxError when none is left."""
    found = BUNDLED
    if not options.tiny and (options.model or models):
        found = locate(options.model or models, options.data_folder, options.model_folder)
    if not found:
        folders = "--data-folder or --model-folder"
        raise QjaxError(f"no model to measure is there; name one with --model, or a folder that has it with {folders}")
    return tuple(dataclasses.replace(each, tasks=(*each.tasks, *options.task), data=options.data_folder) for each in found)
