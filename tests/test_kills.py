"""kill -9 at random moments over whatever writes: the old or the new is there, whole, and the next run leaves nothing behind.

The writers run in forked children and on NumPy arrays, so that a moment costs milliseconds. `test_folders.py` goes through the
calls one by one; here the kernel decides. Whole commands: `command_kills.py`. QJAX_KILLS: moments of each writer.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.checkpoints.parts import PartWriter
from qjax.models import walk
from qjax.models.parameters import flatten
from qjax.report.reports import tables, write_table
from qjax.sweep.store import append_rows, read_rows
from tests.conftest import tiny_config
from tests.random_weights import weights_model
from tests.report_rows import measured_row

KILLS = int(os.environ.get("QJAX_KILLS", "75"))
CONFIG = tiny_config(layers=2, vocabulary_size=4000, hidden_size=64, mlp_size=64, head_dim=16)


def numpy_model(seed):
    model = weights_model(CONFIG, seed=seed)
    return model._replace(params=jax.tree.map(np.asarray, model.params), name=f"model {seed}")


def write_parts(folder, model):
    leaves = flatten(model.params)
    with PartWriter(folder, CONFIG, {"model": model.name}, overwrite=True) as writer:
        for part in walk.parts(CONFIG):
            if part.name not in writer.complete:
                writer.write(part.name, {path: leaf for path, leaf in leaves.items() if path.startswith(part.prefix)})
        writer.finish(model, '{"path": "a"}\n')


WRITERS = {
    "packed": lambda folder, model: save(folder, model, overwrite=True),
    "huggingface": lambda folder, model: save_huggingface(folder, model, overwrite=True),
    "parts": write_parts,
}


def in_child(work, after=None):
    """Runs work() in a child that is killed after so many seconds; whether it was, and how long it took."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), time.perf_counter() - started


def moments(work, seed):
    """Random moments of a run of `work`, which is tried undisturbed first."""
    whole = min(in_child(work)[1] for _ in range(3))
    print(f"undisturbed {whole:.3f} s")
    generator = random.Random(seed)
    return (generator.uniform(0, 2 * whole) for _ in range(KILLS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("writer", WRITERS)
def test_models(writer, tmp_path):
    write, models = WRITERS[writer], (numpy_model(1), numpy_model(2))
    write(tmp_path / "out", models[0])
    (tmp_path / "out" / "mine.md").write_text("kept")
    held, counts = 0, {"killed": 0, "old": 0, "new": 0}
    for delay in moments(lambda: write(tmp_path / "try", models[0]), writer):
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        new = 1 - held
        killed, _ = in_child(lambda new=new: write(tmp_path / "out", models[new]), delay)
        found = load(tmp_path / "out")
        theirs = {i: flatten(model.params) for i, model in enumerate(models)}
        (now,) = (i for i in (0, 1) if all(np.array_equal(leaf, theirs[i][p]) for p, leaf in flatten(found.params).items()))
        counts["killed"] += killed
        counts["old" if now == held else "new"] += 1
        held = now
        if counts["killed"] % 5 == 0:  # the next run; otherwise the one after it finds what several left
            write(tmp_path / "out", models[held])
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            assert (tmp_path / "out" / "mine.md").read_text() == "kept"
            assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith((".", "qjax-p", "qjax.l"))]
    print(writer, counts)
    assert counts["killed"] > KILLS / 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_tables(tmp_path):
    """Every file is one of two versions, whole; of killed writers nothing is left after the next."""
    versions = [[(name, table) for name, table in tables([measured_row("none"), measured_row("nf4", by)])] for by in (0.1, 0.2)]

    def write(folder, version):
        folder.mkdir(exist_ok=True)
        for name, table in versions[version]:
            write_table(folder, name, table)

    whole = {}
    for version in (0, 1):
        write(tmp_path / str(version), version)
        for path in (tmp_path / str(version)).iterdir():
            whole.setdefault(path.name, []).append(path.read_bytes())
    write(tmp_path / "out", 0)
    killed = 0
    for number, delay in enumerate(moments(lambda: write(tmp_path / "try", 0), "tables")):
        killed += in_child(lambda number=number: write(tmp_path / "out", number % 2), delay)[0]
        for name, contents in whole.items():
            assert (tmp_path / "out" / name).read_bytes() in contents
    print("tables", {"killed": killed})
    from qjax.folders import prepare_output_folder

    prepare_output_folder(tmp_path / "out")  # as every report and sweep begins
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(whole)
    assert killed > KILLS / 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_rows(tmp_path):
    """Rows that were on disk stay, the last is whole or not there, and appending goes on."""
    path, killed = tmp_path / "rows.jsonl", 0

    def write(target, start):
        for i in range(start, start + 20):
            append_rows(target, [measured_row("none", key=str(i))])

    for delay in moments(lambda: write(tmp_path / "try.jsonl", 0), "rows"):
        before = len(read_rows(path))
        killed += in_child(lambda before=before: write(path, before), delay)[0]
        keys = [row["key"] for row in read_rows(path)]
        assert keys == [str(i) for i in range(len(keys))] and len(keys) >= before
    print("rows", {"killed": killed, "rows": len(keys)})
    assert killed > KILLS / 4


@pytest.mark.slow
def test_commands():
    """In a process of their own, which has begun nothing that a fork would lack."""
    words = [sys.executable, "-m", "tests.command_kills", str(KILLS // 5)]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
