"""checkpoints/companions.py: files of a tokenizer and of generation go on with a model through every folder that is written."""

import json
import shutil

import pytest

from qjax.checkpoints.companions import COMPANIONS, read_companions
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import load_packed, save
from qjax.cli.app import main
from qjax.errors import QjaxError
from qjax.untrusted import read_json
from tests.conftest import byte_tokenizer, tiny_config
from tests.random_weights import weights_model

GIVEN = {
    "generation_config.json": '{"eos_token_id": [2, 3], "temperature": 0.6}',
    "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "chat_template": "{{ messages }}"}',
    **{"special_tokens_map.json": '{"pad_token": "<pad>"}', "added_tokens.json": "{}", "merges.txt": "a b", "vocab.json": "{}"},
    **{"chat_template.jinja": "{{ messages }}", "tokenizer.model": "a model"},
}


@pytest.fixture
def folder(tmp_path):
    """A model's, with all of them; tokenizer.json in other words than qjax's."""
    config = tiny_config(layers=1, kv_heads=4, mlp_size=64)
    save_huggingface(tmp_path / "a", weights_model(config, byte_tokenizer()))
    tokenizer = json.dumps(read_json(tmp_path / "a" / "tokenizer.json"))
    for name, content in {**GIVEN, "tokenizer.json": tokenizer}.items():
        (tmp_path / "a" / name).write_text(content)
    return tmp_path / "a"


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code in (0, None)


def test_they_go_through_packed_folders(folder, tmp_path):
    assert set(GIVEN) | {"tokenizer.json"} == set(COMPANIONS)
    given = read_companions(folder)
    run("quantize", folder, "--recipe", "rtn:int4-g16-sym", "--out", tmp_path / "p")
    assert load(tmp_path / "p").config.other_eos_ids == (2, 3)
    run("export", tmp_path / "p", "--to", "gptq", "--out", tmp_path / "g")
    run("dequantize", tmp_path / "p", "--out", tmp_path / "d")
    run("convert", tmp_path / "g", "--to", "compressed-tensors", "--out", tmp_path / "c")
    for name in ("p", "g", "d", "c"):
        assert read_companions(tmp_path / name) == given, name


def test_packed_folders_without_them_load_and_a_changed_one_does_not(folder, tmp_path):
    model = load(folder)
    save(tmp_path / "old", model)
    assert sorted(read_companions(tmp_path / "old")) == ["chat_template.jinja", "tokenizer.json"]
    assert load_packed(tmp_path / "old", lazy=True).config == model.config
    save(tmp_path / "new", model, beside=folder)
    load_packed(tmp_path / "new", lazy=True)
    (tmp_path / "new" / "merges.txt").write_text("b a")
    with pytest.raises(QjaxError, match=r"merges.txt is not as qjax.json tells it"):
        load_packed(tmp_path / "new", lazy=True)


def test_those_of_an_earlier_model_go(folder, tmp_path):
    """Where its folder is overwritten."""
    for write in (save, save_huggingface):
        shutil.copytree(folder, tmp_path / "out", dirs_exist_ok=True)
        (tmp_path / "out" / "notes.txt").write_text("kept")
        write(tmp_path / "out", weights_model(tiny_config(layers=1)), overwrite=True)
        assert read_companions(tmp_path / "out") == {} and (tmp_path / "out" / "notes.txt").exists()
