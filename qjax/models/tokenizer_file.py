"""What a tokenizer.json may say: faults that the tokenizers library meets with a panic, an abort or all of the memory.

Its parts are looked at as JSON, before the library sees them. `is_plain` names those whose code is known to be harmless
whatever they are given; others are tried in a process of their own (`tokenizer_trial.py`).
"""

from collections.abc import Iterator

from qjax.untrusted import quoted

LARGEST_ID = 2**31 - 1  # tokens are int32
EXPANSION = 1_000  # characters that rules may make of one; those of real tokenizers make three
PIECES = 64  # of a template, and of tokens of one of them
CUT = 64  # characters that a plain decoder takes off
PLAIN_BYTES = 2**18
PLAIN = {  # types of known code: no regular expression of the file's, no table that the file brings along
    "model": ("BPE", "WordLevel"),
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace", "Sequence"),
    "pre_tokenizer": ("ByteLevel", "Whitespace", "WhitespaceSplit", "Metaspace", "Digits", "Punctuation", "Sequence"),
    "post_processor": ("ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing", "Sequence"),
    "decoder": ("ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "Replace", "Sequence"),
}


def is_plain(content: dict) -> bool:
    """Whether a tokenizer.json consists of parts alone that need no trial in a process of their own."""
    parts = [(kind, part) for kind in PLAIN for part in _parts(content.get(kind))]
    return isinstance(content.get("model"), dict) and all(
        part.get("type") in PLAIN[kind] and _is_harmless(part) for kind, part in parts
    )


def _is_harmless(part: dict) -> bool:
    """Whether a part of known code has no pattern that is code or empty, and cuts off few characters."""
    pattern, cut = _entry(part, "pattern"), [part.get(name, 0) for name in ("start", "stop")]
    return "Regex" not in pattern and pattern.get("String") != "" and all(size in range(CUT) for size in cut)


def faults(content: dict) -> list[str]:
    """What is wrong with a tokenizer.json, each as words that follow "the tokenizer"."""
    found = _token_faults(content)
    if found:
        return found
    ids = set(_ids(content))
    for part in _parts(content.get("post_processor")):
        if part.get("type") == "TemplateProcessing":
            found += _template_faults(part, ids)
        for name in ("sep", "cls"):
            pair = part.get(name)
            if isinstance(pair, list) and len(pair) == 2 and not _is_id(pair[1], ids):
                found.append(f"puts {quoted(pair[0])} around texts, whose id {quoted(pair[1])} is not in its vocabulary")
    for kind in ("normalizer", "decoder"):
        size = 1
        for part in _parts(content.get(kind)):
            texts = [part[name] for name in ("content", "prepend") if isinstance(part.get(name), str)]
            size *= max([1, *map(len, texts)])
        if size > EXPANSION:
            found.append(f"makes {size} characters of one by the rules of its {kind}, expected at most {EXPANSION}")
    return found


def _token_faults(content: dict) -> list[str]:
    ids = list(_ids(content))
    if not ids:
        return ["has no vocabulary"]
    wrong = [each for each in ids if type(each) is not int or not 0 <= each <= LARGEST_ID]
    return [f"has the token id {quoted(wrong[0])}, expected 0 to {LARGEST_ID}"] if wrong else []


def _ids(content: dict) -> Iterator[object]:
    """Ids of the vocabulary and of added tokens."""
    vocabulary = _entry(content, "model").get("vocab")
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram: by their place
        yield from range(len(vocabulary))
    added = content.get("added_tokens")
    yield from (each.get("id") for each in (added if isinstance(added, list) else ()) if isinstance(each, dict))


def _is_id(value: object, ids: set[int]) -> bool:
    return type(value) is int and value in ids


def _template_faults(part: dict, ids: set[int]) -> list[str]:
    found, known = [], _entry(part, "special_tokens")
    for name, token in known.items():
        held = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(held, list) or not 0 < len(held) <= PIECES or not all(_is_id(i, ids) for i in held):
            found.append(f"has a template whose {quoted(name)} has ids {quoted(held)}, which are not in its vocabulary")
    pieces = part.get("single")
    pieces = pieces if isinstance(pieces, list) else []
    texts = [each["Sequence"] for each in pieces if isinstance(each, dict) and isinstance(each.get("Sequence"), dict)]
    if [each.get("id") for each in texts] != ["A"] or len(pieces) > PIECES:
        found.append("has a template for single texts that does not hold the text, A, once")
    names = [each["SpecialToken"] for each in pieces if isinstance(each, dict) and isinstance(each.get("SpecialToken"), dict)]
    absent = [each.get("id") for each in names if not isinstance(each.get("id"), str) or each.get("id") not in known]
    if absent:
        found.append(f"has a template with the token {quoted(absent[0])}, which it does not define")
    return found


def _parts(part: object) -> Iterator[dict]:
    """A component and, of a sequence, its parts; nesting is bounded by the parser."""
    if not isinstance(part, dict):
        return
    yield part
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        inside = part.get(name)
        for each in inside if isinstance(inside, list) else ():
            yield from _parts(each)


def _entry(values: dict, name: str) -> dict:
    found = values.get(name)
    return found if isinstance(found, dict) else {}
