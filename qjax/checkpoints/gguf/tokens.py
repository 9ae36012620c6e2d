"""A tokenizer as the keys of a GGUF file: the inverse of `vocabulary.py`, proven on a text that tells its kinds apart.

Byte-level BPE is of the kind gpt2, and how it cuts text has a name; whichever name makes the ids of the sample is written.
BPE with SentencePiece's spaces is of the kind llama, whose scores are the order of the merges. Anything else is left out.
"""

import json
import re
import warnings

import numpy as np
import tokenizers

from qjax.checkpoints.gguf.vocabulary import CONTROL, SPACE, USER_DEFINED, tokenizer_json
from qjax.errors import QjaxError, QjaxWarning
from qjax.models.tokenizer import Tokenizer

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6
WRITTEN_CUTS = (  # one name of every way to cut text, composed or not
    *("gpt-2", "olmo", "smollm", "command-r", "llama-bpe", "smaug-bpe", "qwen2", "stablelm2", "gpt-4o", "tekken"),
    *("falcon", "bloom", "deepseek-llm", "deepseek-coder", "deepseek-v3"),
)
SAMPLE = (
    "Hello world, it's I'LL DON'T we've 1234567 3.14159 camelCase HTMLParser e\u0301 Ünïcödé 漢字かな мир مرحبا 😀 "
    "foo_bar // a/b/ ...!!\n\n\r\n\tend  two   three \u00a0x $99 (x)=[y];\n  def f(x):\n    return x*2\n"
)


def tokenizer_values(tokenizer: Tokenizer, rows: int) -> dict[str, object]:
    """The keys of a tokenizer whose tokens are as many as the embedding has rows; none, with a warning, for a kind that a GGUF
    file has no word for.
    """
    content = json.loads(tokenizer.to_json())
    model, normal = content["model"], tokenizer.inner.get_vocab(with_added_tokens=False)
    merges = [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in model.get("merges", [])]
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = np.full(rows, UNUSED, np.int32)
    for token, i in normal.items():
        tokens[i], types[i] = token, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    base = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    base["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    if tokenizer.bos_id is not None:
        base["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
    if model["type"] == "BPE":
        spaces = any(SPACE in token for token in normal)
        for more in (_sentencepiece if spaces else _byte_level)(model, merges, tokens, types):
            if _same(tokenizer, base | more, model, set(merges)):
                return base | more
    warnings.warn(
        f"the tokenizer is left out of the file: one of the kind {model['type']} that cuts text as this one does, and puts "
        "what this one puts before and behind it, has no name in GGUF files; llama.cpp then takes token ids alone, and its "
        "server does not start",
        QjaxWarning,
        stacklevel=2,
    )
    return {}


def _byte_level(model: dict, merges: list[tuple[str, str]], tokens: list[str], types: np.ndarray):
    joined = [" ".join(pair) for pair in merges]
    for cut in WRITTEN_CUTS:
        yield {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut, "tokenizer.ggml.merges": joined}


def _sentencepiece(model: dict, merges: list[tuple[str, str]], tokens: list[str], types: np.ndarray):
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair), place)
    scores = np.array([-float(rank.get(token, len(merges))) for token in tokens], np.float32)
    types[
        [bool(re.fullmatch(r"<0x[0-9A-F]{2}>", token)) and kind == NORMAL for token, kind in zip(tokens, types, strict=True)]
    ] = BYTE
    scores[types != NORMAL] = 0
    more = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}
    if model.get("unk_token") in tokens:
        unknown = tokens.index(model["unk_token"])
        types[unknown] = UNKNOWN
        more["tokenizer.ggml.unknown_token_id"] = unknown
    for prefix in (True, False):
        yield more | {"tokenizer.ggml.add_space_prefix": prefix}


def _same(tokenizer: Tokenizer, values: dict[str, object], model: dict, merges: set[tuple[str, str]]) -> bool:
    """Whether a file's tokenizer has the same merges, and cuts the sample at the same places into the same ids."""
    try:
        content = tokenizer_json(values)
    except QjaxError:
        return False
    said = json.loads(content)["model"]
    if {tuple(pair) for pair in said["merges"]} != merges or said.get("ignore_merges", False) != model.get(
        "ignore_merges", False
    ):
        return False
    found = tokenizers.Tokenizer.from_str(content.decode())
    same = all(
        found.encode(SAMPLE, add_special_tokens=each).ids == tokenizer.encode(SAMPLE, special_tokens=each).tolist()
        for each in (False, True)
    )
    return same and _pieces(found) == _pieces(tokenizer.inner)


def _pieces(inner: tokenizers.Tokenizer) -> list[tuple[int, int]]:
    text = inner.normalizer.normalize_str(SAMPLE) if inner.normalizer else SAMPLE
    return [span for _, span in inner.pre_tokenizer.pre_tokenize_str(text)] if inner.pre_tokenizer else [(0, len(text))]
