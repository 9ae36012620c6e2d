"""Workers of one sweep that are killed and frozen at random: every cell is measured once, to the bits of a single worker.

    python -m tests.sweep_torture ROUNDS [SEED]

A round starts four workers on one folder, kills two with SIGKILL and freezes a third (SIGSTOP, and SIGCONT before or after its
claims are void), each at a random moment of the work.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from qjax.cache import enable_compilation_cache
from qjax.calibrate.tokens import Calibration
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.perplexity import parse_convention
from qjax.sweep.claims import CLAIMS, Claims
from qjax.sweep.columns import column_of
from qjax.sweep.runner import Sweep, Watcher, run_sweep
from qjax.sweep.store import LAYERS, ROWS

from .conftest import byte_tokenizer, random_model, tiny_config

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
RECIPES = ("rtn:int8-channel", "rtn:int4-channel", "rtn:int3-channel", "nf4", "rtn:int2-channel")
SHARING = ("gptq:int4-channel@parallel", "gptq:int2-channel@parallel")
SEEDS = (0, 1)
CELLS = 2 * (1 + len(RECIPES) + len(SEEDS) * len(SHARING))
STALE_SECONDS = 2.0
PATIENCE = 3600.0  # seconds after which a worker hangs, on a machine that is busy with other things too


def sweep() -> Sweep:
    """Cells of nearest rounding, and of GPTQ in an order that shares work, with two seeds, on two texts."""
    corpora = (Corpus("dickens", (TEXT,), "f1"), Corpus("reversed", (TEXT[::-1],), "f2"))
    tokens = tuple(Calibration(np.random.default_rng(seed).integers(0, 256, (4, 32)).astype(np.int32)) for seed in SEEDS)
    asked = {"max_windows": 4, "calibration": tokens, "seeds": SEEDS}
    return Sweep((*RECIPES, *SHARING), corpora, parse_convention("windows-32"), **asked)


class Slow(Watcher):
    """Gives a cell some time, so that there is a moment to be killed in."""

    def cell(self, number, total, recipe, corpus):
        time.sleep(0.05)


def work(pipe) -> None:
    """A worker's process: warms itself, says how long a sweep lasts then, and runs it in every folder that it is told."""
    enable_compilation_cache()
    model = random_model(tiny_config(), byte_tokenizer())
    options = {"workers": 4, "stale_seconds": STALE_SECONDS}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("cold", "warm"):
            started = time.monotonic()
            run_sweep(model, sweep(), Path(scratch) / name, Slow(), **options)
    pipe.send(time.monotonic() - started)
    while folder := pipe.recv():
        pipe.send(len(run_sweep(model, sweep(), folder, Slow(), **options)))


class Process:
    """A worker and the way to it."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # what it says ends when it is killed

    def signal(self, what: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, what)

    def said(self, seconds: float) -> object:
        """What it says next."""
        assert self.pipe.poll(seconds), "a worker hangs"
        return self.pipe.recv()


def figures(folder: Path) -> tuple[dict, dict]:
    """Rows by key and layers by (key, path), less times and memory; raises where one is there twice."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    layers = [json.loads(line) for line in (folder / LAYERS).read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows), "a cell was measured twice"
    kept = [{name: row[name] for name in row if column_of(name).role != "spent" and name != "time"} for row in rows]
    places = {(layer["key"], layer["path"]): {**layer, "seconds": None} for layer in layers}
    assert len(places) == len(layers), "a layer is there twice"
    return {row["key"]: row for row in kept}, places


def rounds(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Tortures so often; returns counts of what happened."""
    draw = random.Random(seed)
    counts = dict.fromkeys(("killed before the end", "killed after", "frozen before the end", "frozen past its claims"), 0)
    processes = [Process() for _ in range(4)]
    lasts = processes[0].said(PATIENCE)
    processes[0].pipe.send(str(folder / "once"))
    assert processes[0].said(PATIENCE) == CELLS
    expected = figures(folder / "once")
    for process in processes[1:]:
        process.said(PATIENCE)
    for number in range(count):
        processes = one_round(folder / str(number), expected, processes, draw, lasts, counts)
        print(f"round {number + 1}: every cell once, bit-equal; {counts}", flush=True)
    for process in processes:
        process.pipe.send(None)
    return counts


def one_round(
    folder: Path, expected: tuple, processes: list[Process], draw: random.Random, lasts: float, counts: dict[str, int]
) -> list[Process]:
    """Four workers, three of which suffer; returns four for the next round."""
    frozen, *killed = draw.sample(processes, 3)
    asleep = draw.choice([0.3, 2 * STALE_SECONDS])
    begin, span = draw.uniform(0, lasts / 2), lasts / 2
    events = [(begin, frozen, signal.SIGSTOP), (begin + asleep, frozen, signal.SIGCONT)]
    events += [(draw.uniform(0, span), process, signal.SIGKILL) for process in killed]
    for process in processes:
        process.pipe.send(str(folder))
    started = time.monotonic()
    for moment, process, what in sorted(events, key=lambda event: event[0]):
        time.sleep(max(0.0, started + moment - time.monotonic()))
        process.signal(what)
        unfinished = not (folder / ROWS).exists() or (folder / ROWS).read_bytes().count(b"\n") < CELLS
        counts["killed before the end"] += what == signal.SIGKILL and unfinished
        counts["killed after"] += what == signal.SIGKILL and not unfinished
        counts["frozen before the end"] += what == signal.SIGSTOP and unfinished
        counts["frozen past its claims"] += what == signal.SIGSTOP and unfinished and asleep > STALE_SECONDS
    survivors = [process for process in processes if process not in killed]
    assert [process.said(PATIENCE) for process in survivors] == [CELLS, CELLS]
    assert figures(folder) == expected
    Claims(folder).release()  # as the next run does: one that was killed last of all leaves its own
    assert not (folder / CLAIMS).exists(), "claims were left"
    fresh = [Process() for _ in killed]
    for process in fresh:
        process.said(PATIENCE)
    return [*survivors, *fresh]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rounds(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(scratch))
