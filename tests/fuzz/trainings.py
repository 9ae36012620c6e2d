"""Adapters of PEFT's layout, and what a training that was stopped left."""

import json
import random
from pathlib import Path

from qjax.errors import QjaxError
from qjax.report.training import loss_figure
from qjax.train.log import ROWS, step_log, step_rows
from qjax.train.loop import IDENTITY, Told, checkpoints, claim, restore_latest
from qjax.train.merge import load_merge
from tests.fuzz import mutations, seeds, weights
from tests.fuzz.reader import Reader, write


def _adapter(rng: random.Random, folder: Path) -> None:
    files = dict(seeds.adapter(rng.choice(list(seeds.ADAPTED))))
    if rng.random() < 0.4:
        files["adapter_model.safetensors"] = weights.changed(rng, files["adapter_model.safetensors"])
    else:
        name = rng.choice(("adapter_config.json", "adapter_config.json", "adapter_base.json"))
        files[name] = mutations.json_bytes(rng, json.loads(files[name]))
    write(rng, folder, files)


def _read_adapter(folder: Path) -> None:
    """For the model that it is of, and for others."""
    said = None
    for family in seeds.ADAPTED:
        try:
            load_merge(seeds.adapted(family), folder)
        except QjaxError as error:
            said = error
        else:
            return
    raise said


def _training(rng: random.Random, folder: Path) -> None:
    files = dict(seeds.training())
    name = rng.choice((IDENTITY, ROWS, *files))
    content = files[name]
    match name:
        case _ if rng.random() < 0.3:
            files[name] = mutations.binary(rng, content)
        case "training.jsonl":
            lines = content.split(b"\n")
            lines[rng.randrange(len(lines))] = mutations.json_bytes(rng, json.loads(lines[0])).replace(b"\n", b" ")
            files[name] = b"\n".join(lines)
        case _ if content.startswith(b"{"):
            files[name] = mutations.json_bytes(rng, json.loads(content))
        case _:
            files[name] = mutations.binary(rng, content)
    if rng.random() < 0.1:
        del files[rng.choice(list(files))]
    for path, content in files.items():  # what stands in steps/ orbax opens, which waits for pipes
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    write(rng, folder, {name: files[name] for name in (IDENTITY, ROWS) if name in files})


def _read_training(folder: Path) -> None:
    claim(folder, seeds.RUN)
    with checkpoints(folder / "steps") as manager:
        state = restore_latest(manager, seeds.state())
    step_log(folder / ROWS)(Told(int(state.step) + 1, 1.0, 1.0, 1.0, 1.0, 1.0))
    loss_figure(step_rows(folder / ROWS))


READERS = {"adapter": Reader(_adapter, _read_adapter), "training": Reader(_training, _read_training)}
