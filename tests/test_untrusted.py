"""untrusted.py: what is read is a regular file of bounded size, and whatever is wrong with it is one line."""

import bz2
import contextlib
import gzip
import json
import os
import socket
import time
import types
import zipfile

import pytest

from qjax import untrusted
from qjax.checkpoints.huggingface import load_huggingface
from qjax.checkpoints.parts import PROGRESS, PartWriter
from qjax.driver.placement import parse_rule
from qjax.errors import QjaxError, one_line
from qjax.evaluate.corpora import load_corpus
from qjax.evaluate.tasks import load_task
from qjax.files import expand
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.families import read_config
from qjax.models.ranges import RANGES
from qjax.models.scalings import SCALINGS
from qjax.report.reports import tables
from qjax.sweep.columns import column_of, misfits
from qjax.sweep.store import read_rows
from qjax.untrusted import (
    decode,
    digest_of,
    json_object,
    lines,
    parse_json,
    read_archive,
    read_bytes,
    read_json,
    read_unpacked,
    split_lines,
    status,
)
from tests.conftest import FAMILY_CHANGES, tiny_config
from tests.report_rows import measured_row

posix = pytest.mark.skipif(os.name != "posix", reason="needs devices and pipes")


@contextlib.contextmanager
def refused(*parts: str, seconds: float = 2.0):
    """What is inside ends in a QjaxError of one short line that holds the parts, at once."""
    started = time.monotonic()
    with pytest.raises(QjaxError) as error:
        yield
    message = str(error.value)
    assert time.monotonic() - started < seconds
    assert message.isprintable() and len(message) <= 1_000, message
    assert [part for part in parts if part not in message] == [], message


# --- messages ------------------------------------------------------------------------------------------------------------


def test_messages_are_one_printable_line():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("red \x1b[31m, \u202e, \ud800, \0") == "red \\x1b[31m, \\u202e, \\ud800, \\x00"
    assert str(QjaxError("a\r\nb")) == "a b"
    assert one_line("é 漢 😀") == "é 漢 😀"


def test_long_messages_keep_beginning_and_end():
    message = one_line("file.json " + "x" * 10**7 + "; do this")
    assert len(message) == 1_000 and message.startswith("file.json xx") and message.endswith("xx; do this")
    assert " ... " in message
    assert len(one_line("\x1b" * 900)) == 1_000
    assert one_line("y" * 1_000) == "y" * 1_000


# --- files ---------------------------------------------------------------------------------------------------------------


@posix
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
            for read in (read_bytes, digest_of):
                with refused("cannot read", "not a regular file"):
                    read(path)
        with refused("cannot read", "socket"):
            read_bytes(tmp_path / "socket")
    with refused("cannot read", "Is a directory"):
        read_bytes(tmp_path)


@posix
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_models_of_pipes_and_devices(tmp_path, name, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / target)
    if name == "tokenizer.json":
        from qjax.checkpoints.huggingface import load_folder_tokenizer

        with refused(name, "not a regular file"):
            load_folder_tokenizer(tmp_path, tiny_config())
        return
    with refused(name, "not a regular file"):
        load_huggingface(tmp_path)


@posix
def test_texts_and_tasks_of_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.zip").symlink_to("/dev/zero")
    for spec in ("text:/dev/zero", f"text:{tmp_path / 'pipe.jsonl'}", f"jsonl:{tmp_path / 'pipe.jsonl'}"):
        with refused("not a regular file"):
            load_corpus(spec)
    for spec in (f"piqa:{tmp_path / 'pipe.jsonl'}", f"mmlu:{tmp_path / 'zero.zip'}"):
        with refused("not a regular file"):
            load_task(spec)


@posix
def test_rows_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with refused("rows.jsonl", "not a regular file"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5_000, "~\0", "/".join(["d" * 200] * 30), "\ud800"])
def test_what_can_be_no_path(path):
    for read in (load_huggingface, lambda p: load_corpus(f"text:{p}"), lambda p: load_task(f"piqa:{p}"), read_bytes):
        with refused():
            read(expand(path) if read is read_bytes else path)


def test_status(tmp_path):
    (tmp_path / "file").write_text("")
    assert status(tmp_path / "file").st_size == 0
    assert status(tmp_path / "none") is status(tmp_path / "file" / "below") is None
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert status(tmp_path / "link").st_size == 0
    (tmp_path / "file").unlink()
    with refused(f"{tmp_path / 'link'} is a link to {tmp_path / 'file'}, where nothing is"):
        status(tmp_path / "link")


def test_sizes_are_limited(tmp_path):
    (tmp_path / "a").write_bytes(b"12345\n12345678")
    assert read_bytes(tmp_path / "a", 14) == b"12345\n12345678"
    with refused("holds more than 13 bytes"):
        read_bytes(tmp_path / "a", 13)
    assert list(lines(tmp_path / "a", 8)) == [(1, b"12345\n"), (2, b"12345678")]
    with refused("line 2"):
        list(lines(tmp_path / "a", 7))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_decompression_is_limited(tmp_path, suffix, pack):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(pack(b"x" * 1_000) + pack(b"y"))
    assert read_unpacked(file, 2_002) == b"x" * 1_000 + b"y"
    with refused("holds more than 1000 bytes"):
        read_unpacked(file, 2_000)
    for broken in (file.read_bytes()[:-20], b"", b"\0" * 50, file.read_bytes()[:12] + b"\xff" * 30):
        file.write_bytes(broken)
        if broken:
            with refused("cannot be read as its name says"):
                read_unpacked(file)


@pytest.mark.parametrize("kind", ["text", "jsonl", "piqa"])
def test_bombs(tmp_path, kind):
    """A quarter of a GiB of blanks in 250 kB."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 2**20, 1) * 256)
    with refused("holds more than", seconds=8):
        (load_task if kind == "piqa" else load_corpus)(f"{kind}:{tmp_path / 'a.jsonl.gz'}")


def test_archives(tmp_path):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one", b"x" * 1_000)
        archive.writestr("two", b"y" * 1_000)
        archive.writestr("three", b"z" * 10_000)
    wanted = {"one", "two"}.__contains__
    assert read_archive(file, wanted, 2_000) == {"one": b"x" * 1_000, "two": b"y" * 1_000}
    with refused("holds more than"):
        read_archive(file, wanted, 1_999)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("one", b"x")
    with refused("no readable zip archive", "one is compressed oddly"):
        read_archive(file, wanted)
    file.write_bytes(file.read_bytes()[:-30])
    with refused("no readable zip archive"):
        read_archive(file, wanted)


# --- text and JSON -------------------------------------------------------------------------------------------------------


def test_json_values():
    assert parse_json('\ufeff{"a": [1, -2.5, 1e3, true, null, "\\u00e9"]}'.encode(), "x") == {
        "a": [1, -2.5, 1e3, True, None, "é"]
    }
    assert parse_json("[" * 64 + "]" * 64, "x") is not None
    assert parse_json(str(10**39), "x") == 10**39
    assert json_object("{}", "x") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        ("[" + "1" * 5_000 + "]", "an integer of 5000 digits"),
        ("-" + "1" * 40, "an integer of 41 digits"),
        ("[1e400]", "1e400 is no finite number"),
        ("NaN", "NaN is no finite number"),
        ("-Infinity", "no finite number"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' is there 2 times"),
        ('{"a": ', "Expecting value"),
        (b"\xff\xfe", "can't decode"),
        (b" " * (2**24 + 1), "more than 16 MiB"),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_json_beyond_the_limits(tmp_path, text, said):
    with refused("here", said):
        parse_json(text, "here")
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused("config.json"):
        load_huggingface(tmp_path)


def test_objects_alone(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    with refused("a.json is not a JSON object", "list"):
        (tmp_path / "a.json").write_text("[1]")
        read_json(tmp_path / "a.json")


def test_text():
    assert decode(b"\xef\xbb\xbfa\xc3\xa9", "x") == "aé"
    with refused("here is not UTF-8 text (byte 1)"):
        decode(b"a\xff", "here")
    for text in ("", "a", "a\n", "\n\n", "a\u2028b\nc"):
        assert list(split_lines(text, "x")) == text.split("\n")
    with refused("here has 1048577 lines, expected at most 1048576"):
        next(split_lines("\n" * (2**20 + 1), "here"))


# --- numbers of configurations -------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"head_dim": 2147483646}, "head_dim is 2147483646, expected 1 to 65536"),
        ({"num_hidden_layers": 10**18, "model_type": "qwen2", "use_sliding_window": True}, "layers is"),
        ({"num_hidden_layers": 2**31}, "layers is 2147483648, expected 1 to 1024"),
        ({"vocab_size": 10**39}, "vocabulary_size is 1000"),
        ({"rms_norm_eps": 1e308}, "norm_epsilon is 1e+308, expected 1e-20 to 0.1"),
        ({"rms_norm_eps": 0}, "norm_epsilon is 0.0"),
        ({"rms_norm_eps": float("inf")}, "norm_epsilon is inf"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": -1}, "rope_theta is -1.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor is -1.0, expected 0.001"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**12}}, "original_context is"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64, "high_freq_factor": 1.0}}, "above the low"),
        ({"bos_token_id": 2**31}, "bos_id is 2147483648"),
        ({"model_type": "mistral", "sliding_window": 2**31}, "sliding_window is"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": [[1]]}, "layer_types"),
    ],
)
def test_numbers_out_of_range(tmp_path, entries, said):
    """At once, and by name; the file may hold them wherever JSON allows it."""
    with refused(said):
        read_config(LLAMA | entries)


def test_layers_without_a_window_are_counted_not_made():
    qwen = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    assert read_config(qwen | {"max_window_layers": -(10**18)}).sliding_window == 8
    assert read_config(qwen | {"max_window_layers": 10**18}).sliding_window is None


def test_every_number_has_a_range():
    numbers = {"int", "float", "int | None", "float | None"}
    for cls in (DecoderConfig, LayerKind, *SCALINGS.values()):
        for name, field in cls.__dataclass_fields__.items():
            kind = getattr(field.type, "__name__", str(field.type))
            assert (name in RANGES) == (kind in numbers), name
    for changes in FAMILY_CHANGES.values():
        tiny_config(**changes)
    with refused("layers is True", "norm_epsilon is '1'"):
        tiny_config(layers=True, norm_epsilon="1")


def test_the_largest_configuration_is_answered_at_once(tmp_path):
    """Nothing is allocated by its numbers: the file's tensors do not fit it."""
    from safetensors.numpy import save_file

    largest = {
        **{"vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 2**10},
        **{"num_attention_heads": 2**14, "head_dim": 2**16, "max_position_embeddings": 2**27},
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | largest))
    save_file({}, tmp_path / "model.safetensors")
    with refused("missing model.embed_tokens.weight", "and 9214 more", seconds=8):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("header", [b"", b"\1", (2**40).to_bytes(8, "little") + b"{}", (2**63).to_bytes(8, "little")])
def test_headers_of_weights(tmp_path, header):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(header)
    with refused("model.safetensors is truncated or corrupt"):
        load_huggingface(tmp_path)


# --- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, 10**39, "text", True])
def test_columns_of_rows_have_one_type_each(value):
    assert column_of("bits_per_weight").type is float
    assert misfits({"bits_per_weight": value}, whole=False) == ["bits_per_weight"]


def test_losses_alone_may_be_null_in_a_list():
    """As old rows have them."""
    row = {"window_nll": [1.0, None], "window_tokens": [1, None], "rules": ["a=none", None]}
    assert misfits(row, whole=False) == ["window_tokens", "rules"]


def test_rows_that_lost_columns_are_shown_all_the_same(tmp_path):
    """Of those that reading does not demand."""
    recipes = [
        f"{method}:int{bits}-{sharing}" for method in ("rtn", "gptq") for bits in (2, 3, 4) for sharing in ("g64", "channel")
    ]
    rows = [measured_row("none"), *(measured_row(recipe, 0.01) for recipe in recipes)]
    for lost in ("rules", "perplexity_ratio"):
        text = "".join(json.dumps({name: each for name, each in row.items() if name != lost}) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text)
        assert len(dict(tables(read_rows(tmp_path / "rows.jsonl")))) >= 2


@pytest.mark.parametrize(
    "content",
    ["{}", '{"identity": 1, "parts": {}}', '{"identity": {}, "parts": []}', '{"identity": {}, "parts": {"head": {}}}'],
)
def test_progress_of_an_interrupted_folder(tmp_path, content):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / PROGRESS).write_text(content)
    with refused("holds the beginning of something else (", "qjax-progress.json: 'unreadable', now None", "ask to overwrite"):
        PartWriter(tmp_path / "m", tiny_config(), {"recipe": "none"})
    assert PartWriter(tmp_path / "m", tiny_config(), {"recipe": "none"}, overwrite=True).complete == {}


# --- rules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["a{4294967296}", "(" * 5_000 + "a" + ")" * 5_000, "(", "a" * 10**5 + "["])
def test_patterns_that_are_none(pattern):
    with refused("is not a regular expression"):
        parse_rule(f"{pattern}=none")


def test_a_file_that_has_nothing_to_read_yet():
    """As those of the kernel, which are regular and read without waiting."""
    with pytest.raises(QjaxError, match=r"^/proc/kmsg is a file of the kernel that has nothing to read yet; give"):
        untrusted._limited(types.SimpleNamespace(read=lambda size: None), "/proc/kmsg", 10)
