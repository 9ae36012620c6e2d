"""Tokenizers of GGUF files: ids against the tokenizers that they were made from, and against SentencePiece's algorithm."""

import heapq
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import qjax
from qjax.checkpoints.gguf.container import read_contents
from qjax.checkpoints.gguf.cuts import CUTS, LETTERS
from qjax.checkpoints.gguf.tokens import tokenizer_values
from qjax.checkpoints.gguf.vocabulary import tokenizer_json
from qjax.errors import QjaxError
from qjax.models.tokenizer import load_tokenizer, wrap_tokenizer
from qjax.models.tokenizer_trial import parse
from tests.fuzz import seeds
from tests.paths import real_data

MIXED = (
    "Ünïcödé 漢字かな交じり文 — «кавычки» مرحبا नमस्ते 😀👍🏽 1234567 3.14159 "
    "$99.99 a\u0301 \u00a0x\r\n\t\tend  \n\n\n   x I'LL we've\n"
)


def texts() -> list[str]:
    """20 kB of four kinds: an encyclopedia, dialogue, code, and scripts, digits and white space."""
    kinds = [real_data("text/wikitext2/wiki.test.raw").read_text(), real_data("text/tinyshakespeare.txt").read_text()]
    return [text[:5_000] for text in (*kinds, Path(json.decoder.__file__).read_text(), MIXED * 40)]


def tokenizer_of(values, **ids):
    return wrap_tokenizer(parse(tokenizer_json(values)), **ids)


def test_gpt2s_own():
    """llama.cpp's test vocabulary against OpenAI's files."""
    ours = tokenizer_of(read_contents(real_data("tokenizers/gguf/ggml-vocab-gpt-2.gguf")).values)
    files = [str(real_data(f"tokenizers/gpt2/{name}")) for name in ("vocab.json", "merges.txt")]
    theirs = tokenizers.Tokenizer(models.BPE.from_file(*files))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["<|endoftext|>"])
    for text in [*texts(), "a<|endoftext|>b"]:
        np.testing.assert_array_equal(ours.encode(text), theirs.encode(text).ids)
        assert ours.decode(ours.encode(text), special_tokens=True) == text
    assert not ours.adds_bos


def sentencepiece(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """The two neighbours that make the best-scored token are joined, the leftmost first, until none make one; then bytes."""
    known = {token: i for i, token in enumerate(tokens)}
    pieces, after = list("▁" + text.replace(" ", "▁")), {}
    before = {i: i - 1 for i in range(len(pieces))}
    after = {i: i + 1 for i in range(len(pieces))}
    queue = []

    def propose(left):
        right = after[left]
        if left >= 0 and right < len(pieces) and (joint := pieces[left] + pieces[right]) in known:
            heapq.heappush(queue, (-scores[known[joint]], left, pieces[left], pieces[right]))

    for i in range(len(pieces)):
        propose(i)
    while queue:
        _, left, first, second = heapq.heappop(queue)
        right = after[left]
        if pieces[left] != first or right >= len(pieces) or pieces[right] != second or not first:
            continue
        pieces[left], pieces[right] = first + second, ""
        after[left] = after[right]
        before[after[right]] = left
        propose(left)
        if before[left] >= 0:
            propose(before[left])
    found = []
    for piece in filter(None, pieces):
        found += [known[piece]] if piece in known else [known[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def test_llama_2s_pieces():
    """llama.cpp's test vocabulary, by SentencePiece's algorithm."""
    values = read_contents(real_data("tokenizers/gguf/ggml-vocab-llama-spm.gguf")).values
    ours = tokenizer_of(values)
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"].tolist()
    for text in texts():
        assert ours.encode(text).tolist() == sentencepiece(text, tokens, scores)
        assert ours.decode(ours.encode(text)) == text
    assert ours.adds_bos and ours.bos_id == 1 and ours.encode("a", special_tokens=True).tolist() == [1, 263]


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 1234", " $", "5", "!!", "\n\n  ", " X"]),
        ("olmo", ["I", "'ll", " pay", " 1234", " $", "5", "!!", "\n\n  ", " X"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " $", "5", "!!", "\n\n  ", " X"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " $", "5", "!!\n\n", "  ", " X"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "4", " $", "5", "!!\n\n", "  ", " X"]),
        ("gpt-4o", ["I'll", " pay", " ", "123", "4", " $", "5", "!!\n\n", "  ", " X"]),
        ("tekken", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " $", "5", "!!\n\n", "  ", " X"]),
        ("glm4", ["I", "'ll", " pay", " ", "123", "4", " $", "5", "!!\n\n", "  ", " X"]),
        ("falcon", ["I", "'", "ll", " pay", " ", "123", "4", " ", "$", "5", "!!", "\n\n  ", " X"]),
        ("bloom", ["I'll", " pay", " 1234", " $5", "!!\n\n  ", " X"]),
        ("deepseek-llm", ["I", "'", "ll", " pay", " ", "1", "2", "3", "4", " $", "5", "!!", "\n", "\n", "  ", " X"]),
        ("deepseek-coder", ["I", "'", "ll", " pay", " ", "1", "2", "3", "4", " $", "5", "!!", "\n", "\n", "  ", " X"]),
        ("deepseek-v3", ["I", "'ll", " pay", " ", "123", "4", " $", "5", "!!\n\n", "  ", " X"]),
    ],
)
def test_where_text_is_cut(cut, words):
    values = seeds.gguf_parts(False)[0] | {"tokenizer.ggml.pre": cut}
    inner = parse(tokenizer_json(values))
    text = "".join(words)
    found = [text[a:b] for _, (a, b) in inner.pre_tokenizer.pre_tokenize_str(text)]
    assert found == words
    content = json.loads(tokenizer_json(values))
    assert content["model"]["ignore_merges"] == (cut in ("llama-bpe", "tekken"))
    assert (content["normalizer"] is None) == (cut not in ("qwen2", "olmo"))


def test_added_tokens_and_the_beginning():
    values = seeds.gguf_parts(False)[0]
    tokens = values["tokenizer.ggml.tokens"]
    ours = tokenizer_of(values)
    assert ours.adds_bos and ours.bos_id == 1
    assert ours.encode("aa</s>ab").tolist() == [tokens.index("aa"), 2, tokens.index("ab")]
    assert ours.decode(ours.encode("aa</s>ab")) == "aaab", "a control token is not shown"
    types = values["tokenizer.ggml.token_type"].copy()
    types[2] = 4
    assert tokenizer_of(values | {"tokenizer.ggml.token_type": types}).decode([2]) == "</s>"
    assert not tokenizer_of(values | {"tokenizer.ggml.add_bos_token": False}).adds_bos
    del values["tokenizer.ggml.add_bos_token"]
    beginning = {cut for cut in CUTS if tokenizer_of(values | {"tokenizer.ggml.pre": cut}).adds_bos}
    assert beginning == {"llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "tekken"}


def test_letters_with_case():
    """DeepSeek's list of them: ranges that ascend, of letters with case alone."""
    for first, last in re.findall("(.)(?:-(.))?", LETTERS):
        members = range(ord(first), ord(last or first) + 1)
        assert members and {unicodedata.category(chr(each)) for each in members} <= {"Lu", "Ll", "Lt", "Cn"}


def test_gpt_neox_tokens_under_the_name_of_mpt():
    """MPT's tokenizer is that of GPT-NeoX, which composes text."""
    theirs = load_tokenizer(real_data("tokenizers/neox/20B_tokenizer.json"))
    ours = tokenizer_of(tokenizer_values(theirs, theirs.vocabulary_size) | {"tokenizer.ggml.pre": "mpt"})
    for text in texts():
        np.testing.assert_array_equal(ours.encode(text), theirs.encode(text))


def test_runs_of_spaces_that_are_tokens_come_before_merges():
    """Gemma's, which files write as blanks: "▁a" would be the better merge."""
    values = seeds.gguf_parts(True)[0] | {"tokenizer.ggml.add_space_prefix": False}
    tokens = values["tokenizer.ggml.tokens"]
    assert tokenizer_of(values).encode("a  a a").tolist() == [tokens.index(token) for token in ("a", "  ", "a", "▁a")]


def test_what_is_not_read_and_what_is_broken():
    values = seeds.gguf_parts(False)[0]
    assert tokenizer_json({}) is None
    for changes, said in (({"model": "bert"}, "'bert', which is not read"), ({"pre": "viking"}, "cuts text by 'viking'")):
        with pytest.warns(qjax.QjaxWarning, match=re.escape(said)):
            assert tokenizer_json(values | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}) is None
    pieces = seeds.gguf_parts(True)[0]
    for base, changes, said in (
        (values, {"tokens": []}, "tokens is missing"),
        (values, {"tokens": 3}, "expected a list of str"),
        (values, {"merges": ["a q q"]}, "'aq q', which is no token"),
        (values, {"token_type": np.ones(2, np.int32)}, "2 numbers, expected one for each of"),
        (pieces, {"scores": np.ones(2, np.float32)}, "2 numbers, expected one for each of"),
        (pieces, {"tokens": [*pieces["tokenizer.ggml.tokens"][:-1], "a" * 600]}, "600 characters, expected at most 512"),
    ):
        with pytest.raises(QjaxError, match=re.escape(said)):
            tokenizer_json(base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
