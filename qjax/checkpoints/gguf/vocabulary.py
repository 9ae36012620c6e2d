"""Tokenizers of GGUF files as the content of a tokenizer.json.

gpt2    byte-level BPE: tokens, merges, and the name of how text is cut first (`cuts.py`)
llama   SentencePiece's BPE: tokens with scores. A merge is worth its token's score, so the merges are all ways to cut a token
        into two others, the best token's first, as Hugging Face's converter has it; bytes where there is no token
"""

import itertools
import json
import warnings
from collections.abc import Mapping

import numpy as np

from qjax.checkpoints.gguf.cuts import COMPOSED, CUTS, GPT2, WHOLE_WORDS
from qjax.errors import QjaxError, QjaxWarning
from qjax.untrusted import quoted

NO_TOKENIZER = "none"  # llama.cpp's word; it loads no file that says nothing of a tokenizer
CONTROL, USER_DEFINED = 3, 4  # types of tokens
SPACE = "▁"
CHARACTERS = 512  # of a token that is cut in two


def tokenizer_json(values: Mapping[str, object]) -> bytes | None:
    """A tokenizer.json of a file's values; None, with a warning, for kinds that are not read, and where there is none.

    Raises QjaxError for what is malformed.
    """
    model, cut = str(values.get("tokenizer.ggml.model", NO_TOKENIZER)), str(values.get("tokenizer.ggml.pre", "default"))
    if model == NO_TOKENIZER:
        return None
    if model not in ("gpt2", "llama") or (model == "gpt2" and cut not in CUTS):
        what = f"{quoted(model)}" + (f" that cuts text by {quoted(cut)}" if model == "gpt2" else "")
        warnings.warn(
            f"the file's tokenizer is of the kind {what}, which is not read; read are gpt2 with {', '.join(CUTS)}, and llama",
            QjaxWarning,
            stacklevel=2,
        )
        return None
    tokens = _list(values, "tokens", str)
    if not tokens:
        raise QjaxError("tokenizer.ggml.tokens is missing")
    content = _byte_level(values, tokens, cut) if model == "gpt2" else _sentencepiece(values, tokens)
    empty = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    beginning = _beginning(values, tokens, model == "llama" or cut in WHOLE_WORDS)
    added = {"added_tokens": _added(values, tokens), "post_processor": beginning}
    return json.dumps(empty | added | content, ensure_ascii=False).encode("utf-8", "replace")


def _byte_level(values: Mapping[str, object], tokens: list[str], cut: str) -> dict:
    merges = [merge.partition(" ")[::2] for merge in _list(values, "merges", str)]
    return {
        "normalizer": {"type": "NFC"} if cut in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[cut]},
        "decoder": GPT2,
        "model": _bpe(tokens, merges) | {"ignore_merges": cut in WHOLE_WORDS},
    }


def _sentencepiece(values: Mapping[str, object], tokens: list[str]) -> dict:
    scores = _list(values, "scores", float)
    if len(scores) != len(tokens):
        raise QjaxError(f"tokenizer.ggml.scores has {len(scores)} numbers, expected one for each of {len(tokens)} tokens")
    prefix = values.get("tokenizer.ggml.add_space_prefix", True) is not False
    unknown = values.get("tokenizer.ggml.unknown_token_id")
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    written = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    special = {tokens[i] for i, kind in enumerate(_types(values, tokens)) if kind == CONTROL}
    model = _bpe(tokens, _merges(tokens, scores, special)) | {"byte_fallback": True, "fuse_unk": True}
    if type(unknown) is int and 0 <= unknown < len(tokens):
        model["unk_token"] = tokens[unknown]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + spaces},
        "decoder": {"type": "Sequence", "decoders": written + stripped * prefix},
        "model": model,
    }


def _bpe(tokens: list[str], merges: list[tuple[str, str]]) -> dict:
    known = {token: i for i, token in enumerate(tokens)}
    if strange := {part for pair in merges for part in (*pair, "".join(pair))} - known.keys():
        raise QjaxError(f"the tokenizer merges what is, or makes, {quoted(min(strange))}, which is no token")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": known,
        "merges": merges,
    }


def _merges(tokens: list[str], scores: list[float], special: set[str]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order in which they are to be merged."""
    known = {token: i for i, token in enumerate(tokens) if token not in special}
    if longest := next((token for token in known if len(token) > CHARACTERS), None):
        raise QjaxError(
            f"the tokenizer has the token {quoted(longest)}, of {len(longest)} characters, expected at most {CHARACTERS}"
        )
    pairs = []
    for token, i in known.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        cuts = sorted(
            (pair for pair in cuts if pair[0] in known and pair[1] in known), key=lambda p: (known[p[0]], known[p[1]])
        )
        pairs += zip(cuts, itertools.repeat(scores[i]))
    pairs.sort(key=lambda each: (each[1], len(each[0][0]), len(each[0][1])), reverse=True)
    return [pair for pair, _ in pairs]


def _added(values: Mapping[str, object], tokens: list[str]) -> list[dict]:
    """Tokens that are found in a text before it is cut."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], **flags, "special": kind == CONTROL}
        for i, kind in enumerate(_types(values, tokens))
        if kind in (CONTROL, USER_DEFINED) and tokens[i]
    ]


def _beginning(values: Mapping[str, object], tokens: list[str], by_default: bool) -> dict | None:
    """What puts the beginning of text before every text, where the file says so, or nothing and it is by default."""
    bos = values.get("tokenizer.ggml.bos_token_id")
    if values.get("tokenizer.ggml.add_bos_token", by_default) is not True or type(bos) is not int or not 0 <= bos < len(tokens):
        return None
    token, a, b = (
        {"SpecialToken": {"id": tokens[bos], "type_id": 0}},
        *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
    )
    special = {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}}
    return {"type": "TemplateProcessing", "single": [token, a], "pair": [token, a, b], "special_tokens": special}


def _types(values: Mapping[str, object], tokens: list[str]) -> list[int]:
    types = _list(values, "token_type", int)
    if types and len(types) != len(tokens):
        raise QjaxError(f"tokenizer.ggml.token_type has {len(types)} numbers, expected one for each of {len(tokens)} tokens")
    return types


def _list(values: Mapping[str, object], name: str, kind: type) -> list:
    """tokenizer.ggml.NAME, [] where it is missing."""
    found = values.get(f"tokenizer.ggml.{name}", [])
    found = found.tolist() if isinstance(found, np.ndarray) else found
    if not isinstance(found, list) or (found and type(found[0]) is not kind):
        raise QjaxError(f"tokenizer.ggml.{name} is {quoted(found)}, expected a list of {kind.__name__}")
    return found
