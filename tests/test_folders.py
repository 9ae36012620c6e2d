"""folders.py: a model's folder is the old one or the new one, whatever call a kill comes before."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qjax import folders, place
from qjax.checkpoints.gguf.export import export_gguf
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.checkpoints.parts import PartWriter
from qjax.cli.early import check_names
from qjax.errors import QjaxError
from qjax.files import temporary_of, write_atomically
from qjax.folders import (
    new_folder,
    prepare_output_folder,
    prepare_results_folder,
    refuse_inputs,
    require_place,
    standing,
)
from qjax.models import walk
from qjax.models.parameters import flatten
from qjax.place import this_place
from tests.conftest import tiny_config
from tests.random_weights import weights_model

CONFIG = tiny_config(layers=1, vocabulary_size=5, hidden_size=4, mlp_size=4, heads=1, kv_heads=1, head_dim=4)
OLD, NEW = (weights_model(CONFIG, seed=seed)._replace(name=f"model {seed}") for seed in (1, 2))
CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "link", "fsync", "chmod", "open")


class Killed(BaseException):
    """A process that is killed runs no handler, so after it no call changes anything."""


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def killed_before(monkeypatch, number, process, run):
    """Runs `run` as a process of that number, killed before its call number `number` that changes files; whether it was.

    A file is opened for writing empty, so that a kill between opening and writing leaves an empty one.
    """
    calls = 0
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: process)
        for name, original in {name: getattr(os, name) for name in CHANGES}.items():

            def call(*args, _call=original, _name=name, **options):
                nonlocal calls
                if _name == "open" and not (len(args) > 1 and args[1] & (os.O_WRONLY | os.O_RDWR)):
                    return _call(*args, **options)
                calls += 1
                if calls > number:
                    raise Killed
                return None if _name == "fsync" else _call(*args, **options)  # a test need not wait for the disk

            patched.setattr(os, name, call)
        write = Path.write_bytes

        def write_bytes(self, content):
            nonlocal calls
            calls += 1
            if calls == number:
                return write(self, content[: len(content) // 2])
            if calls > number:
                raise Killed
            return write(self, content)

        patched.setattr(Path, "write_bytes", write_bytes)
        try:
            run()
        except Killed:
            return True
    return calls > number


def write_parts(folder, model):
    leaves = flatten(model.params)
    with PartWriter(folder, CONFIG, {"model": model.name}, overwrite=True) as writer:
        for part in walk.parts(CONFIG):
            if part.name not in writer.complete:
                writer.write(part.name, {path: leaf for path, leaf in leaves.items() if path.startswith(part.prefix)})
        writer.finish(model, '{"path": "new"}\n')


def which(folder):
    """The model in a folder, by what it holds; raises where it holds none, or a mixture."""
    found = load(folder)
    for model in (OLD, NEW):
        theirs = flatten(model.params)
        if all(np.array_equal(leaf, theirs[path]) for path, leaf in flatten(found.params).items()):
            return model
    raise AssertionError("a mixture")


WRITERS = {
    "packed": lambda folder, model: save(folder, model, overwrite=True),
    "huggingface": lambda folder, model: save_huggingface(folder, model, overwrite=True),
    "parts": write_parts,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_before_every_call(writer, tmp_path, monkeypatch, dead):
    """The old model or the new one loads, files of others are kept, and the next run leaves nothing of the killed one."""
    write, source = WRITERS[writer], tmp_path / "source" / "out"
    write(source, OLD)
    (source / "layers.jsonl").write_text("of the old")
    (source / "mine").mkdir()
    (source / "mine" / "notes.md").write_text("kept")
    seen, number = [], 0
    while True:
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "source", place)
        killed = killed_before(monkeypatch, number, dead, lambda place=place: write(place / "out", NEW))
        seen.append(which(place / "out"))
        assert (standing(place / "out") / "mine" / "notes.md").read_text() == "kept"
        write(place / "out", NEW)
        assert which(place / "out") is NEW
        assert [path.name for path in place.iterdir()] == ["out"]
        assert (place / "out" / "mine" / "notes.md").read_text() == "kept"
        assert not (place / "out" / "layers.jsonl").exists() or "new" in (place / "out" / "layers.jsonl").read_text()
        assert not [path for path in (place / "out").iterdir() if path.name.startswith((".", "qjax-progress", "qjax.lock"))]
        shutil.rmtree(place)
        number += 1
        if not killed:
            break
    assert number > 30 and seen[0] is OLD and seen[-1] is NEW
    assert seen == sorted(seen, key=lambda model: model is NEW)  # once it is the new one it stays so


def test_a_kill_before_every_call_of_one_file(tmp_path, monkeypatch, dead):
    """The old file or the new one loads, and the next run, of whatever name, leaves nothing of the killed one."""
    seen, number, killed, file = [], 0, True, tmp_path / "out" / "a.gguf"
    while killed:
        export_gguf(file, OLD, overwrite=True)
        killed = killed_before(monkeypatch, number, dead, lambda: export_gguf(file, NEW, overwrite=True))
        seen.append(which(file))
        export_gguf(tmp_path / "out" / "b.gguf", OLD, overwrite=True)
        assert sorted(path.name for path in file.parent.iterdir()) == ["a.gguf", "b.gguf"]
        number += 1
    assert number > 5 and seen[0] is OLD and seen[-1] is NEW
    assert seen == sorted(seen, key=lambda model: model is NEW)


def test_a_kill_in_the_first_run_leaves_no_folder(tmp_path, monkeypatch, dead):
    assert killed_before(monkeypatch, 12, dead, lambda: save(tmp_path / "out", OLD))
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    save(tmp_path / "other", OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_is_swept(tmp_path, dead, monkeypatch):
    """Files and folders of dead processes here, and those of other machines after a day; nothing else."""
    for process in (dead, os.getpid()):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        write = temporary_of(tmp_path / f"file{process}")
        write.write_text("")
        temporary_of(tmp_path / f"folder{process}").mkdir()
        monkeypatch.undo()
    for name, age in {"a": 0, "b": 2 * folders.DAY}.items():
        other = tmp_path / f".{name}.00000000-{dead}.tmp"
        other.write_text("")
        os.utime(other, (other.stat().st_atime - age,) * 2)
    (tmp_path / f".vim.{dead}.tmp").write_text("")
    prepare_output_folder(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    kept = [temporary_of(tmp_path / f"{kind}{os.getpid()}").name for kind in ("file", "folder")]
    assert left == sorted([*kept, f".a.00000000-{dead}.tmp", f".vim.{dead}.tmp"])


def test_a_process_of_this_number_elsewhere_is_not_this_one(tmp_path, dead, monkeypatch):
    """In another container, or before this machine was started again, a number means another process."""
    monkeypatch.setattr(os, "getpid", lambda: dead)
    here = temporary_of(tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr(place, "this_place", lambda: f"{this_place()} of another container")
        there = temporary_of(tmp_path / "a")
    assert here != there
    for path in (here, there):
        path.write_text("")
    prepare_output_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [there]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(QjaxError, match=r"cannot write .*/out/a/b: No such"), new_folder(tmp_path / "out") as new:
        write_atomically(new / "a" / "b", "")
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", OLD)
    assert (tmp_path / "link").is_symlink() and which(tmp_path / "real") is OLD


def test_what_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "empty").mkdir()
    for name, message in {"file": "it is a file", "rows": "results of a sweep", "empty/.": "the folder you are in"}.items():
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path / "empty")
            with pytest.raises(QjaxError, match=message):
                require_place(tmp_path / name, overwrite=True)
    with pytest.raises(QjaxError, match=r"null (byte|character)"):
        require_place("a\0b")


@pytest.mark.parametrize("name", ["qjax.json", "config.json"])
def test_results_do_not_go_into_a_models_folder(name, tmp_path):
    """Which has rows of its own, of its layers."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(QjaxError, match=rf"holds a model \({name}\); name another folder for results"):
        prepare_results_folder(tmp_path)
    assert prepare_results_folder(tmp_path / "results").is_dir()


def test_links_to_nothing_and_empty_paths_are_no_place(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "below")
    for prepare in (require_place, prepare_output_folder, prepare_results_folder):
        with pytest.raises(QjaxError, match=r"is a link to .*, where nothing is"):
            prepare(tmp_path / "link")
        with pytest.raises(QjaxError, match="an empty path names nothing"):
            prepare("")
    assert not (tmp_path / "nowhere").exists()


def test_an_output_that_is_an_input(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for same in ("model", "link", "model/../model/."):
        with pytest.raises(QjaxError, match="is what is read"):
            refuse_inputs(tmp_path / same, ["bundled", tmp_path / "model"])
    refuse_inputs(tmp_path / "model" / "quantized", [tmp_path / "model"])


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save("~/out", OLD)
    write_atomically("~/a.txt", "a")
    assert prepare_output_folder("~/results") == tmp_path / "results"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out", "results"] and which("~/out") is OLD


def test_wherever_one_is(tmp_path, monkeypatch):
    """By a path without a name; and by its name where a kill left the old one, which the command line knows too."""
    save(tmp_path / "out", OLD)
    monkeypatch.chdir(tmp_path / "out")
    assert which(".") is OLD and standing(Path("/")) == Path("/")
    (tmp_path / "out").rename(tmp_path / ".out.qjax-old")
    check_names(models=[str(tmp_path / "out")])
    assert which(tmp_path / "out") is OLD


def test_a_folder_of_ones_own_beside_stays(tmp_path):
    """Names that others give are not those of what has been put aside."""
    for name in (".out.old", ".out.tmp", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("kept")
    for overwrite in (False, True):
        with new_folder(tmp_path / "out", overwrite=overwrite, replaces=["*"]) as folder:
            (folder / "new.txt").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.old", ".out.tmp", "out", "out.old"]
    assert len(list(tmp_path.glob("*/precious.txt"))) + len(list(tmp_path.glob(".*/precious.txt"))) >= 3
