"""checkpoints/parts.py: folders written part by part, and gone on with after a kill at any moment."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock

from qjax.checkpoints.load import load
from qjax.checkpoints.parts import PartWriter
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.lazy import is_lazy, materialised
from qjax.models import walk
from qjax.models.parameters import flatten, unflatten
from qjax.rounding.nearest import rtn
from tests.conftest import byte_tokenizer, tiny_config
from tests.random_weights import weights_model

CONFIG = tiny_config(layers=3)
IDENTITY = {"recipe": "rtn:int4-g16", "seed": 1}
NAMES = ["embed", "block_0", "block_1", "block_2", "head"]


@pytest.fixture(scope="module")
def model():
    """A model with kernels in two formats and in none."""
    model = weights_model(CONFIG, byte_tokenizer(), dtype=jnp.bfloat16)
    leaves = flatten(model.params)
    for name, fmt in {"attention/q": "int4-g16", "mlp/up": "nf4-g16-dq"}.items():
        for i in range(CONFIG.layers):
            path = f"block_{i}/{name}/kernel"
            leaves[path], _ = rtn(leaves[path].astype(jnp.float32), parse_format(fmt))
    return model._replace(params=unflatten(leaves), recipe="mixed", name="tiny")


def leaves_of(model, name):
    return {path: leaf for path, leaf in flatten(model.params).items() if path.startswith(f"{name}/")}


def write_all(model, folder, **options):
    """Whatever is missing, and the end; names of what was missing."""
    with PartWriter(folder, CONFIG, IDENTITY, **options) as writer:
        missing = [part.name for part in walk.parts(CONFIG) if part.name not in writer.complete]
        for name in missing:
            writer.write(name, leaves_of(model, name), {"number": NAMES.index(name), "loss": 0.1})
        assert writer.finish(model) == folder.resolve()
    return missing


def begin(model, folder, *names):
    """Writes these parts."""
    with PartWriter(folder, CONFIG, IDENTITY) as writer:
        for name in names:
            writer.write(name, leaves_of(model, name))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_whole(folder, model):
    """The folder is the model, and nothing is left beside it."""
    back = load(folder)
    assert_equal(back.params, model.params)
    assert (back.config, back.name, back.recipe) == (model.config, model.name, model.recipe)
    assert back.tokenizer.to_json() == model.tokenizer.to_json()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} >= {f"model-{name}.safetensors" for name in NAMES}
    assert not (folder / "qjax-progress.json").exists()


def test_written_part_by_part(model, tmp_path):
    assert write_all(model, tmp_path / "out") == NAMES
    assert_whole(tmp_path / "out", model)
    assert_equal(materialised(load(tmp_path / "out", lazy=True).params), model.params)


def test_records_and_leaves_are_there_after_a_kill(model, tmp_path):
    with PartWriter(tmp_path / "out", CONFIG, IDENTITY) as writer:
        writer.write("embed", leaves_of(model, "embed"), [1, None, 0.1])
        writer.write("block_0", leaves_of(model, "block_0"))
    again = PartWriter(tmp_path / "out", CONFIG, IDENTITY)
    assert again.complete == {"embed": [1, None, 0.1], "block_0": None}
    back = again.read("block_0")
    assert all(is_lazy(leaf) for leaf in back.values())
    assert_equal(materialised(back), leaves_of(model, "block_0"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(QjaxError, match="missing block_1"):
        again.finish(model)


@pytest.mark.parametrize("renamed", range(12))
def test_a_kill_between_any_two_steps(model, tmp_path, monkeypatch, renamed):
    """After so many files (two a part, tokenizer, description) took their names, what comes next was written and has none; the
    second process makes the parts that the first did not. The folder's own name: `test_folders.py`.
    """
    replace, calls = Path.replace, []

    def killed(self, target):
        calls.append(self)
        if len(calls) > renamed:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_all(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write_all(model, tmp_path / "out") == NAMES[renamed // 2 :]
    assert_whole(tmp_path / "out", model)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_part_is_made_again(model, tmp_path, kept):
    begin(model, tmp_path / "out", *NAMES[:3])
    file = tmp_path / ".out.partial" / "model-block_0.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert write_all(model, tmp_path / "out") == ["block_0", "block_2", "head"]
    assert_whole(tmp_path / "out", model)


def test_a_missing_part_is_made_again(model, tmp_path):
    begin(model, tmp_path / "out", "embed")
    (tmp_path / ".out.partial" / "model-embed.safetensors").unlink()
    assert PartWriter(tmp_path / "out", CONFIG, IDENTITY).complete == {}


def test_something_else_is_not_gone_on_with(model, tmp_path):
    begin(model, tmp_path / "out", "embed")
    with pytest.raises(QjaxError, match=r"\.out\.partial holds the beginning of something else \(seed: 1, now 2\)"):
        PartWriter(tmp_path / "out", CONFIG, IDENTITY | {"seed": 2})
    assert list(PartWriter(tmp_path / "out", CONFIG, IDENTITY).complete) == ["embed"]
    assert PartWriter(tmp_path / "out", CONFIG, IDENTITY | {"seed": 2}, overwrite=True).complete == {}


def test_a_folder_in_use(model, tmp_path, monkeypatch):
    """It is refused before anything is made; with overwrite a model's files go, others are kept, also after a kill."""
    (tmp_path / "out").mkdir()
    for name in ("qjax.json", "model.safetensors", "model-old.safetensors", "qjax-progress.json", "mine.md"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(QjaxError, match="is not empty"):
        PartWriter(tmp_path / "out", CONFIG, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def killed(self, target):
        if self.name == ".out.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.rename
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_all(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()
    assert write_all(model, tmp_path / "out", overwrite=True) == []
    assert_whole(tmp_path / "out", model)
    assert (tmp_path / "out" / "mine.md").exists() and not (tmp_path / "out" / "model-old.safetensors").exists()


def test_leaves_that_do_not_fit(model, tmp_path):
    writer = PartWriter(tmp_path / "out", CONFIG, IDENTITY)
    with pytest.raises(QjaxError, match="unexpected block_7/x; head/norm/scale has shape"):
        writer.write("head", {"head/norm/scale": jnp.ones(3), "block_7/x": jnp.ones(3)})
    with pytest.raises(QjaxError, match="expected letters"):
        writer.write("../head", leaves_of(model, "head"))
    assert writer.complete == {}


@pytest.mark.parametrize("files", [[], "model.safetensors", ["../model-head.safetensors"], [3]])
def test_a_malformed_list_of_files(model, tmp_path, files):
    write_all(model, tmp_path / "out")
    description = json.loads((tmp_path / "out" / "qjax.json").read_text())
    assert description["files"] == [f"model-{name}.safetensors" for name in NAMES]
    (tmp_path / "out" / "qjax.json").write_text(json.dumps(description | {"files": files}))
    with pytest.raises(QjaxError, match=r"qjax\.json: 'files' is"):
        load(tmp_path / "out")


def test_one_writer_at_a_time(model, tmp_path):
    """Until it is closed, by an error too: another process is as good as another writer of this one."""
    folder = tmp_path / ".out.partial"
    with PartWriter(tmp_path / "out", CONFIG, IDENTITY) as writer:
        writer.write("embed", leaves_of(model, "embed"))
        with pytest.raises(QjaxError, match=r"\.out\.partial is in use by another process"):
            PartWriter(tmp_path / "out", CONFIG, IDENTITY, overwrite=True)
        assert list(writer.complete) == ["embed"] and len(list(folder.iterdir())) == 3
    with pytest.raises(QjaxError, match="unexpected"), PartWriter(tmp_path / "out", CONFIG, IDENTITY) as kept:
        kept.write("head", {"head/x": jnp.ones(3)})
    with pytest.raises(QjaxError, match="something else"):
        PartWriter(tmp_path / "out", CONFIG, IDENTITY | {"seed": 2})
    assert write_all(model, tmp_path / "out") == NAMES[1:]
    assert_whole(tmp_path / "out", model)
    assert not (tmp_path / "out" / "qjax.lock").exists()


def test_a_writer_that_waited_for_one_that_finished(model, tmp_path, monkeypatch):
    """It has the lock of a folder that has another name by then."""
    acquire = FileLock.acquire

    def late(self, *args, **options):
        found = acquire(self, *args, **options)
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        return found

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(QjaxError, match="in use by another process"):
        PartWriter(tmp_path / "out", CONFIG, IDENTITY)
