"""Changes to bytes, JSON values and texts, drawn from a random generator."""

import json
import random
from collections.abc import Sequence

RAW = "raw:"  # of a string that stands for JSON text of its own
ODD_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    65536,
    2**31 - 2,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    10**18,
    10**39,
    0.5,
    1e-45,
    1e308,
)
ODD_TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "é",
    "😀",
    "../x",
    "/dev/zero",
    "a" * 300,
    "%s{0}",
    "=1+1",
    "$^$",
)
ODD_JSON = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-0", "1" * 41, "1" * 5_000, "0.1e1", "1E5", "[" * 200 + "]" * 200),
    *('{"a":' * 100 + "1" + "}" * 100, "[" * 20_000, '"\\ud800"', '{"a": 1, "a": 2}', "nul", "[1,]", "\ufeff1", "'a'"),
)
PIECES = (
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b",",
    b":",
    b"\x1b[2J",
    b"\xed\xa0\x80",
)


def value(rng: random.Random) -> object:
    """Anything that may stand where something else should."""
    match rng.randrange(6):
        case 0:
            return rng.choice(ODD_NUMBERS)
        case 1:
            return rng.choice(ODD_TEXTS)
        case 2:
            return RAW + rng.choice(ODD_JSON)
        case 3:
            return rng.choice((None, True, False, [], {}, [[]], [{}], {"": 0}, [None], [1, "a"], {"id": None}))
        case 4:
            return rng.choice((-1, 1)) * rng.random() * 10 ** rng.randint(-30, 30)
        case _:
            return rng.choice((-1, 1)) * rng.getrandbits(rng.choice((4, 8, 16, 31, 32, 64)))


def json_value(rng: random.Random, tree: object) -> object:
    """A copy of a JSON value with one to three changes: values replaced, dropped, moved."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.choice(list(_places(tree)) or [None])
        if place is None:
            return value(rng)
        holder, key = place
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1:
                others = list(_places(tree))
                other, name = rng.choice(others)
                holder[key] = json.loads(json.dumps(other[name]))
            case 2 if isinstance(holder, dict):
                holder[rng.choice((*ODD_TEXTS, *map(str, holder)))] = holder.pop(key)
            case 3 if isinstance(holder, list):
                holder.extend([holder[key]] * rng.choice((1, 2, 100)))
            case 4 if isinstance(holder[key], str):
                holder[key] = text(rng, holder[key])
            case 5 if type(holder[key]) in (int, float):
                holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, holder[key] / 3))
            case _:
                holder[key] = value(rng)
    return tree


def near(rng: random.Random, tree: object, words: Sequence[object] = ()) -> object:
    """A copy of a JSON value with one or two values replaced by others of their kind, so that it is often read to its end.

    words: strings and numbers that may stand there too.
    """
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(tree))
        if not places:
            return tree
        holder, key = rng.choice(places)
        holder[key] = _like(rng, holder[key], [*words, *(each[name] for each, name in places)])
    return tree


def _like(rng: random.Random, old: object, others: Sequence[object]) -> object:
    """Another value of the kind of the old one."""
    match old:
        case bool():
            return not old
        case int() | float():
            return rng.choice((old + 1, old - 1, old * 2, old // 2, *(each for each in others if type(each) is type(old))))
        case list():
            return rng.choice((old[:-1], old[::-1], old * 2))
        case dict():
            left_out = rng.choice(list(old) or [None])
            return {key: each for key, each in old.items() if key != left_out}
        case _:
            return rng.choice([each for each in others if each is None or isinstance(each, str)])


def _places(tree: object):
    """(holder, key) of every value inside."""
    stack = [tree]
    while stack:
        each = stack.pop()
        for key in each if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ():
            yield each, key
            stack.append(each[key])


def json_bytes(rng: random.Random, tree: object) -> bytes:
    """The tree, changed, as a file; now and then its bytes are changed, too, and `RAW` strings are JSON text of their own."""
    content = json.dumps(json_value(rng, tree), indent=rng.choice((None, 1)))
    while (start := content.find(f'"{RAW}')) >= 0:
        raw, length = json.JSONDecoder().raw_decode(content[start:])
        content = content[:start] + raw.removeprefix(RAW) + content[start + length :]
    content = content.encode("utf-8", "surrogatepass")
    return binary(rng, content) if rng.random() < 0.15 else content


def binary(rng: random.Random, content: bytes) -> bytes:
    """Bytes with one to four changes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 8, 100, 5_000)))
        match rng.randrange(7):
            case 0:
                del content[at:end]
            case 1:
                content[at:at] = content[at:end] * rng.choice((1, 2, 50))
            case 2:
                content[at:at] = rng.choice(PIECES) * rng.choice((1, 1, 3, 1000))
            case 3:
                del content[at:]
            case 4 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 5:
                content[at:end] = rng.randbytes(end - at)
            case _:
                content[at : at + 8] = rng.choice(ODD_NUMBERS[:14]).__and__(2**64 - 1).to_bytes(8, "little")
    return bytes(content)


def text(rng: random.Random, words: str, vocabulary: Sequence[str] = ()) -> str:
    """A text with one to four changes; vocabulary: what its grammar knows."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(words) + 1)
        end = min(len(words), at + rng.choice((0, 1, 1, 2, 5)))
        match rng.randrange(4):
            case 0:
                new = ""
            case 1:
                new = rng.choice((*ODD_TEXTS, *map(str, ODD_NUMBERS)))
            case 2:
                new = words[at : at + rng.randint(1, 9)] * rng.choice((1, 2, 300))
            case _:
                new = rng.choice(vocabulary or ODD_TEXTS)
        words = words[:at] + new + words[end:]
    return words
