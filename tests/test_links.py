"""untrusted.refuse_links_out: no reader of models follows a link out of the folder that it was given."""

import os
from pathlib import Path

import pytest

from qjax.checkpoints.companions import COMPANIONS, read_companions
from qjax.checkpoints.export import export
from qjax.checkpoints.gguf.model import load_gguf
from qjax.checkpoints.huggingface import load_huggingface, save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import load_packed, save
from qjax.checkpoints.peft import load_adapter, save_adapter
from qjax.driver.decoder import quantize_to
from qjax.errors import QjaxError
from tests.conftest import byte_tokenizer, tiny_config
from tests.random_weights import weights_model
from tests.test_peft import adapters_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="makes links")

CONFIG = tiny_config(layers=1)
OUT = "links out of a model's folder are not followed: copy the file into it, or give the folder that the file is in"


@pytest.fixture(scope="module")
def model():
    return weights_model(CONFIG, byte_tokenizer())


@pytest.fixture
def folders(model, tmp_path):
    """One of every kind that is read, by name."""
    save_huggingface(tmp_path / "huggingface", model, shard_bytes=20_000)
    save(tmp_path / "packed", model)
    save_adapter(tmp_path / "adapter", CONFIG, adapters_for(CONFIG), base="base")
    (tmp_path / "gguf").mkdir()
    export(tmp_path / "gguf" / "m.gguf", model, "gguf")
    return tmp_path


def moved(file: Path, to: Path) -> None:
    """The file stands at `to`, and where it was a link to that."""
    to.parent.mkdir(parents=True, exist_ok=True)
    file.rename(to)
    file.symlink_to(to)


READERS = {
    "huggingface": [load, load_huggingface, read_companions],
    "packed": [load, load_packed],
    "adapter": [lambda folder: load_adapter(folder, CONFIG)],
    "gguf": [load],
}


@pytest.mark.parametrize("kind", READERS)
def test_every_file_of_every_folder(kind, folders):
    names = sorted(path.name for path in (folders / kind).iterdir())
    assert kind != "huggingface" or len(names) > 5  # shards and their index with it
    for name in names:
        file, secret = folders / kind / name, folders / "elsewhere" / name
        moved(file, secret)
        for read in READERS[kind]:
            if read is read_companions and name not in COMPANIONS:
                continue  # it reads no other
            with pytest.raises(QjaxError) as error:
                read(folders / kind)
            assert str(error.value) == f"{file} is a link to {secret}; {OUT}"
        file.unlink()
        secret.rename(file)
    for read in READERS[kind]:
        read(folders / kind)


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "generation_config.json"])
def test_nothing_from_outside_is_copied_on(name, folders, model):
    folder, secret = folders / "huggingface", folders / "secret"
    secret.write_text("secret")
    (folder / name).symlink_to("../secret")
    for write in (save, save_huggingface):
        with pytest.raises(QjaxError, match=f"{name} is a link to {secret};"):
            write(folders / "out", model, beside=folder)
    with pytest.raises(QjaxError, match=f"{name} is a link to {secret};"):
        export(folders / "out.gguf", model, "gguf", beside=folder)
    assert not (folders / "out").exists() and not (folders / "out.gguf").exists()


def test_links_that_stay_within_and_links_to_the_folder(folders):
    folder = folders / "huggingface"
    moved(folder / "config.json", folder / "files" / "config.json")
    (folders / "one").symlink_to("huggingface")
    (folders / "two").symlink_to(folders / "one")
    (folder / "unrelated").symlink_to("../packed")  # a folder, of which nothing is read
    (folder / "broken").symlink_to("../nowhere")
    for place in ("huggingface", "one", "two"):
        assert load(folders / place, lazy=True).config == CONFIG
    (folder / "files" / "config.json").unlink()
    (folder / "files" / "config.json").symlink_to(folders / "packed" / "qjax.json")  # out by way of a link within
    with pytest.raises(QjaxError, match=r"config.json is a link to .*qjax.json; links out"):
        load(folders / "two")


def test_a_snapshot_in_the_hubs_cache(folders):
    """Links lead to the blobs of its own repository, and to those alone."""
    snapshot = folders / "hub" / "models--a--b" / "snapshots" / "0f"
    snapshot.parent.mkdir(parents=True)
    (folders / "huggingface").rename(snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = snapshot.parents[1] / "blobs" / str(number)
        moved(file, blob)
        file.unlink()
        file.symlink_to(f"../../blobs/{number}")
    assert load(snapshot).config == CONFIG
    (folders / "mine").symlink_to(snapshot)
    assert load(folders / "mine").config == CONFIG
    (snapshot / "Q8").mkdir()  # a repository with a folder for each quantization
    (folders / "gguf" / "m.gguf").rename(snapshot.parents[1] / "blobs" / "m")
    (snapshot / "Q8" / "m.gguf").symlink_to("../../../blobs/m")
    assert load(snapshot / "Q8").config.vocabulary_size == CONFIG.vocabulary_size
    for other in ("models--c--d/blobs/0", "models--a--b/refs/0"):
        (folders / "hub" / other).parent.mkdir(parents=True)
        (folders / "hub" / other).write_text("secret")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(folders / "hub" / other)
        with pytest.raises(QjaxError, match=f"config.json is a link to .*{other}; links out"):
            load(snapshot)


def test_a_files_own_path_may_be_a_link(folders):
    (folders / "elsewhere").mkdir()
    (folders / "elsewhere" / "mine.gguf").symlink_to(folders / "gguf" / "m.gguf")
    assert load(folders / "elsewhere" / "mine.gguf").config == load_gguf(folders / "gguf" / "m.gguf").config
    with pytest.raises(QjaxError, match=r"mine.gguf is a link to"):
        load(folders / "elsewhere")


def test_what_is_to_be_copied_is_looked_at_before_work(folders, model, tmp_path):
    (folders / "huggingface" / "tokenizer.model").symlink_to(folders / "packed" / "qjax.json")
    layers = []
    with pytest.raises(QjaxError, match=r"tokenizer.model is a link to"):
        quantize_to(tmp_path / "q", model, "rtn:int8-g16", beside=folders / "huggingface", on_layer=layers.append)
    assert not layers


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "none"):
        with pytest.raises(QjaxError, match=f"cannot read {tmp_path / place}: "):
            load_packed(tmp_path / place)


def test_files_of_qjax_itself_may_be_links(folders):
    """As some installers make them."""
    for file in list((folders / "huggingface").iterdir()):
        moved(file, folders / "store" / file.name)
    assert load_huggingface(folders / "huggingface", trusted=True).config == CONFIG
