"""models/tokenizer_trial.py and tokenizer_file.py: files that would panic, abort or eat all memory are one line of error."""

import base64
import json
import struct
import subprocess
import sys
import time

import pytest

from qjax.checkpoints.huggingface import load_folder_tokenizer
from qjax.errors import QjaxError
from qjax.models import tokenizer_trial
from qjax.models.tokenizer import load_tokenizer, wrap_tokenizer
from tests.conftest import byte_tokenizer, tiny_config

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
A = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Verdicts of a test stay in its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qjax" / "tokenizers"


def file(tmp_path, model=BPE, **parts):
    """A tokenizer.json of these parts."""
    path = tmp_path / "tokenizer.json"
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], **empty, "model": model, **parts}))
    return path


def template(single, **tokens):
    pair = [A, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {name: {"id": name, "ids": ids, "tokens": [name] * len(ids)} for name, ids in tokens.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def special(name):
    return {"SpecialToken": {"id": name, "type_id": 0}}


def precompiled(size, tail=b""):
    """A table that says how long it is itself."""
    charsmap = base64.b64encode(struct.pack("<I", size) + tail).decode()
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


def added(number):
    return [
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False) | {"id": number, "content": "<x>"}
    ]


def replacing(count, length):
    rules = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * length}] * count
    return {"type": "Sequence", "normalizers": rules}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": BPE | {"vocab": {"a": 2**31}}}, "has the token id 2147483648, expected 0 to 2147483647"),
        ({"model": BPE | {"vocab": {"a": -1}}}, "has the token id -1"),
        ({"model": BPE | {"vocab": {}}}, "has no vocabulary"),
        ({"added_tokens": added(2**40)}, "has the token id 1099511627776"),
        ({"post_processor": template([special("s"), A])}, "has a template with the token 's', which it does not define"),
        ({"post_processor": template([special("s"), A], s=[9])}, "'s' has ids [9], which are not in its vocabulary"),
        ({"post_processor": template([special("s"), A], s=[])}, "'s' has ids []"),
        ({"post_processor": template([A, {"Sequence": {"id": "B", "type_id": 0}}])}, "does not hold the text, A, once"),
        ({"post_processor": template([A] * 1000)}, "does not hold the text, A, once"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["x", 7], "cls": ["a", 0]}}, "'x' around texts, whose id 7"),
        ({"normalizer": replacing(3, 2_000)}, "makes 8000000000 characters of one by the rules of its normalizer"),
        ({"model": BPE | {"unk_token": "<unk>"}}, "cannot encode and decode a page of text (Unk token `<unk>` not found"),
        ({"model": WORDS | {"unk_token": "<unk>"}}, "cannot encode and decode a page of text (WordLevel error: Missing [UNK]"),
        ({"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}}, "unk_id"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|a)*b("}, "content": ""}}, "cannot be read"),
    ],
)
def test_faults_are_the_tokenizers(tmp_path, capfd, parts, said):
    with pytest.raises(QjaxError) as error:
        load_tokenizer(file(tmp_path, **parts))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: the tokenizer ") and said in message, message
    assert message.endswith("; get an intact tokenizer.json") and len(message) <= 1_000
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": precompiled(2**32 - 4)},
        {"normalizer": precompiled(256, bytes(range(256)) + b"abc")},
        {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(([^ ]+)+)+$"}}},
        {"decoder": {"type": "Strip", "content": "a", "start": 2**62, "stop": 2**62}},
    ],
    ids=["table of 4 GiB", "nonsense table", "regular expression", "characters cut off"],
)
def test_what_the_child_dies_of_is_one_line(tmp_path, capfd, parts):
    started = time.process_time()
    with pytest.raises(QjaxError, match=r"tokenizer\.json: the tokenizer .*; get an intact"):
        load_tokenizer(file(tmp_path, **parts))
    assert time.process_time() - started < 5
    assert capfd.readouterr().err == ""


def test_memory_and_aborts_of_the_child(tmp_path, monkeypatch):
    """A limit that even a sound tokenizer breaks."""
    monkeypatch.setattr(tokenizer_trial, "CHILD", "import os; os.abort()")
    path = file(tmp_path, pre_tokenizer=SPLIT)
    with pytest.raises(QjaxError, match=r"ends the process that tries it, or takes more than 1024 MiB .*exit -6"):
        load_tokenizer(path)
    monkeypatch.setattr(tokenizer_trial, "CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.05)
    with pytest.raises(QjaxError, match=r"takes more than 0\.2 s for a page of text"):
        load_tokenizer(path)


def test_plain_files_need_no_child_and_others_one(tmp_path, monkeypatch, cache):
    calls = []
    run = subprocess.run
    monkeypatch.setattr(tokenizer_trial.subprocess, "run", lambda *args, **options: calls.append(args) or run(*args, **options))
    load_tokenizer(file(tmp_path))
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer(bos=True).to_json())
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("é", special_tokens=True).tolist() == [256, 127, 102]
    assert calls == [] and not cache.exists()
    for _ in range(2):  # the second time it is known
        assert load_tokenizer(file(tmp_path, pre_tokenizer=SPLIT)).encode("ab a").tolist() == [0, 1, 0]
    assert len(calls) == 1 and len(list(cache.iterdir())) == 1
    load_tokenizer(file(tmp_path, WORDS, pre_tokenizer=SPLIT))
    assert len(calls) == 2
    with pytest.raises(QjaxError):
        load_tokenizer(file(tmp_path, BPE | {"unk_token": "<unk>"}, pre_tokenizer=SPLIT))
    assert len(list(cache.iterdir())) == 2


def test_the_child_imports_no_jax():
    script = "import sys; import qjax.models.tokenizer_trial; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_panics_while_encoding_are_errors():
    class PanicException(BaseException):
        pass

    class Inner:
        def encode(self, text, add_special_tokens):
            raise PanicException("index out of bounds")

        def decode(self, ids, skip_special_tokens):
            raise KeyboardInterrupt

    tokenizer = wrap_tokenizer(byte_tokenizer().inner)
    object.__setattr__(tokenizer, "inner", Inner())
    for encode in (tokenizer.encode, tokenizer.encode_with_bytes):
        with pytest.raises(QjaxError, match=r"the tokenizer cannot encode this text \(index out of bounds\)"):
            encode("a")
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([1])


def test_ids_beyond_the_vocabulary_in_memory():
    from tokenizers import processors

    inner = byte_tokenizer().inner
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 999)])
    with pytest.raises(QjaxError, match="the tokenizer has the token id 999 beside a vocabulary of 256"):
        wrap_tokenizer(inner)


def test_ids_of_the_configuration_beyond_the_embedding(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_json())
    assert load_folder_tokenizer(tmp_path, tiny_config(bos_id=256)).bos_id == 256
    with pytest.raises(QjaxError, match="eos is 257, the model's embedding has 257 tokens; set it to one of them, or to null"):
        load_folder_tokenizer(tmp_path, tiny_config(eos_id=257))
