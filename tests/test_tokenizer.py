"""models/tokenizer.py: ids, exact byte counts, and the beginning of text."""

import json
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from qjax.errors import QjaxError
from qjax.models.tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer
from tests.paths import real_data


def byte_level(merges=(), trim=False):
    """A byte-level BPE, the kind of GPT-2 and Llama 3; ids of merges follow the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if trim:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    return inner


def byte_fallback():
    """A BPE with byte tokens and a space put in front: the kind of Llama 2; only "a", "b" and the space have tokens."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {"▁": 259, "a": 260, "b": 261, "ab": 262}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


TEXTS = ["a", " a  b ", "abé😀 漢\n字", "😀😀", "\n\n", "a" * 50, "é" * 5 + " "]


@pytest.mark.parametrize("inner", [byte_level(), byte_level(trim=True), byte_fallback()], ids=["bytes", "trimmed", "fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_counts_add_up(inner, text):
    ids, counts = wrap_tokenizer(inner).encode_with_bytes(text)
    assert ids.dtype == counts.dtype == np.int32
    assert ids.shape == counts.shape
    assert counts.min() >= 0
    assert counts.sum() == len(text.encode())
    np.testing.assert_array_equal(ids, wrap_tokenizer(inner).encode(text))


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_byte_counts_add_up_for_any_text(text):
    for inner in (byte_level(), byte_level(trim=True), byte_fallback()):
        assert wrap_tokenizer(inner).encode_with_bytes(text)[1].sum() == len(text.encode())


def test_byte_counts_of_known_tokens():
    # One token for "ab", one per byte of what follows: a character's bytes count to its first token.
    assert wrap_tokenizer(byte_level([("a", "b")])).encode_with_bytes("abaé😀")[1].tolist() == [2, 1, 2, 0, 4, 0, 0, 0]
    # The space in front of the text is not in it.
    assert wrap_tokenizer(byte_fallback()).encode_with_bytes("ab a")[1].tolist() == [1, 1, 1, 1]


def test_bytes_that_the_tokenizer_drops_count_to_a_neighbour():
    inner = tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids, counts = wrap_tokenizer(inner).encode_with_bytes("  one two\n")
    assert ids.tolist() == [0, 1]
    assert counts.tolist() == [5, 5]  # "  one", " two\n"
    ids, counts = wrap_tokenizer(inner).encode_with_bytes("  ")
    assert ids.size == counts.size == 0


def test_tokens_that_go_back_in_the_text_count_nothing():
    """Offsets need not rise: a tokenizer may name a place that an earlier token has covered already."""

    class Encoding:
        ids, offsets = (7, 8, 9), ((0, 3), (0, 1), (3, 5))

    class Inner:
        encode = staticmethod(lambda text, add_special_tokens: Encoding)

    tokenizer = Tokenizer(Inner(), 10, None, None, False)
    assert tokenizer.encode_with_bytes("abcde")[1].tolist() == [3, 0, 2]


def test_beginning_of_text():
    plain, framed = wrap_tokenizer(byte_level(), bos_id=7, eos_id=9), wrap_tokenizer(byte_fallback(), bos_id=7)
    assert (plain.adds_bos, plain.bos_id, plain.eos_id) == (False, 7, 9)
    assert (framed.adds_bos, framed.bos_id) == (True, 1)  # the post-processor knows better than the configuration
    assert framed.encode("ab").tolist() == [259, 262]
    assert framed.encode("ab", special_tokens=True).tolist() == [1, 259, 262]
    assert wrap_tokenizer(byte_level()).bos_id is None


def test_an_end_of_text_is_no_beginning():
    inner = byte_level()
    inner.add_special_tokens(["</s>"])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 256)])
    assert not wrap_tokenizer(inner).adds_bos


def test_decode_is_the_inverse_and_hides_special_tokens():
    tokenizer = wrap_tokenizer(byte_level([("a", "b")]))
    text = "ab é😀\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    inner = byte_level()
    inner.add_special_tokens(["<s>"])
    assert wrap_tokenizer(inner).decode([256, 64]) != wrap_tokenizer(inner).decode([256, 64], special_tokens=True)


def test_vocabulary_size_covers_the_largest_id():
    inner = byte_level()
    assert wrap_tokenizer(inner).vocabulary_size == 256
    inner.add_special_tokens(["<s>"])
    assert wrap_tokenizer(inner).vocabulary_size == 257
    gaps = tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 40}, unk_token="one"))
    assert wrap_tokenizer(gaps).vocabulary_size == 41


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    inner = byte_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=20)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("abcdef").size == 6


def test_json_round_trip(tmp_path):
    tokenizer = wrap_tokenizer(byte_fallback())
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    back = load_tokenizer(tmp_path / "tokenizer.json")
    assert back.to_json() == tokenizer.to_json()
    assert (back.bos_id, back.adds_bos, back.vocabulary_size) == (1, True, 263)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 3}', b"\x80\x04\x95"], ids=repr)
def test_corrupt_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(QjaxError, match=r"tokenizer\.json") as error:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(QjaxError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_lone_surrogates_are_refused():
    tokenizer = wrap_tokenizer(byte_level())
    for encode in (tokenizer.encode, tokenizer.encode_with_bytes):
        with pytest.raises(QjaxError, match="surrogate at character 2"):
            encode("ab\ud800")


def test_long_texts_are_fast():
    text = ("ab é " * 40 + "\n") * 5000  # 1.2 MB
    started = time.process_time()
    _, counts = wrap_tokenizer(byte_fallback()).encode_with_bytes(text)
    assert counts.sum() == len(text.encode())
    assert time.process_time() - started < 20


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-hf"])
def test_a_real_tokenizer(name):
    folder = real_data(f"models/{name}")
    ids = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.vocabulary_size) == (1, True, ids["vocab_size"])
    text = real_data("text/tinystories_val.txt").read_text()[:20_000]
    ids, counts = tokenizer.encode_with_bytes(text)
    assert counts.sum() == len(text.encode())
    if name == "stories260K-hf":
        assert tokenizer.decode(ids) == text


MIXED = "The  queue's\tend:\n\n    return é😀漢 (1234567)" + " " * 30 + "x"


def test_the_tokenizer_of_pythia():
    """Runs of spaces are tokens of their own, added behind the vocabulary."""
    tokenizer = load_tokenizer(real_data("tokenizers/neox/20B_tokenizer.json"), bos_id=0, eos_id=0)
    assert (tokenizer.vocabulary_size, tokenizer.adds_bos, tokenizer.bos_id) == (50277, False, 0)
    ids, counts = tokenizer.encode_with_bytes(MIXED)
    assert tokenizer.decode(ids) == MIXED and counts.sum() == len(MIXED.encode())
    assert ids.max() >= 50254


def test_the_tokenizer_of_opt(tmp_path):
    """GPT-2's bytes and merges with a beginning of text; as transformers' save_pretrained writes it."""
    folder = real_data("tokenizers/opt")
    inner = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", bos_id=2, eos_id=2)
    assert (tokenizer.vocabulary_size, tokenizer.adds_bos, tokenizer.bos_id) == (50265, True, 2)
    ids, counts = tokenizer.encode_with_bytes(MIXED)
    assert tokenizer.decode(ids) == MIXED and counts.sum() == len(MIXED.encode())
    assert tokenizer.encode(MIXED, special_tokens=True)[0] == 2
