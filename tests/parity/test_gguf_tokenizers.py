"""Tokenizers of real GGUF files against transformers', on 20 kB of four kinds of text.

Needs transformers, and the files in QJAX_TEST_MODELS. What transformers makes of two files differs from those models' own
tokenizer.json, and is mended here before it is compared:

    SmolLM2   of a file whose architecture is Llama's, text is cut as GPT-2 does it; the model cuts digits out first, so that
              three blanks before a digit are one token, and not two blanks and one
    Gemma     scores, which say what is merged first, are taken for logarithms of probabilities (Unigram): up to twice as many
              tokens. Gemma's own class is given the tokens, with merges in their order; those that a user defined, runs of
              blanks among them, are found before, the longest first, as SentencePiece and llama.cpp do it
"""

import json
import random
from pathlib import Path

import pytest

from qjax.checkpoints.gguf.container import read_contents
from qjax.checkpoints.gguf.model import load_gguf
from qjax.checkpoints.gguf.vocabulary import USER_DEFINED
from tests.parity.peers import IGNORED
from tests.paths import real_data, real_model

transformers = pytest.importorskip("transformers", reason="compares with transformers")
tokenizers = pytest.importorskip("tokenizers", reason="compares with transformers")

pytestmark = [pytest.mark.peer, pytest.mark.real, *IGNORED]
ALPHABETS = (  # first and last: Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, marks, kana, Han, Hangul, emoji
    *((0x61, 0x7A), (0xC0, 0x17F), (0x370, 0x3FF), (0x400, 0x52F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x94D)),
    *((0xE01, 0xE4D), (0x300, 0x36F), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3)),
    *((0x1F300, 0x1F64F), (0x1F3FB, 0x1F3FF)),
)
SIGNS = ("", "", "-", "$", "€", "²", "٣", "½")
SPACES = (" ", "  ", "   ", " " * 9, " " * 40, "\n", "\n\n", "\r\n", "\t", "\t\t", "\u00a0", "\u3000", "\n   ", " \n")


def texts() -> dict[str, str]:
    """5 kB of each kind."""
    draw = random.Random(0)
    words = ("".join(chr(draw.randint(*draw.choice(ALPHABETS))) for _ in range(draw.randint(1, 3))) for _ in range(900))
    runs = (chr(draw.randint(*each)) * draw.randint(1, 2) for each in draw.choices(ALPHABETS, k=900))
    numbers = (f"{draw.choice(SIGNS)}{10 ** draw.uniform(-3, 12):,.{draw.randint(0, 4)}f}" for _ in range(900))
    made = {
        "prose": real_data("text/wikitext2/wiki.test.raw").read_text(),
        "code": Path(json.decoder.__file__).read_text(),
        "scripts": "".join(word + run + draw.choice(SPACES) for word, run in zip(words, runs, strict=True)),
        "numbers": "".join(number + draw.choice(SPACES) for number in numbers),
    }
    return {kind: text.encode()[:5_000].decode("utf-8", "ignore") for kind, text in made.items()}


def mended(path: Path):
    """transformers' tokenizer of a file, as the model's own has it."""
    values = read_contents(path).values
    if values["general.architecture"] == "gemma3":
        return of_gemma(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"])
    found = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    if values["tokenizer.ggml.pre"] == "smollm":
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, found.pre_tokenizer])
    return found


def of_gemma(tokens, types):
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = transformers.GemmaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, None)).backend_tokenizer
    defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    found.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in defined])
    return found


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf", "qwen2.5-coder-0.5b-instruct.gguf"]
)
def test_ids_of_texts(name):
    path = real_model(name)
    ours, theirs = load_gguf(path, lazy=True).tokenizer, mended(path)
    for kind, text in texts().items():
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids, kind
