"""Which kernels the pattern of a rule means, and the one way to spell it.

A pattern is a regular expression searched in our path of a kernel ("block_0/mlp/down/kernel"). Where it finds none, it is tried

    as Hugging Face's name of the module   "down_proj", "model.layers.0.mlp.down_proj", "re:.*c_attn": a plain name means whole
                                           components, so that layers.1 is not layers.10; others are regular expressions
    with case ignored                      "conv" finds Conv_0

and is then spelled by our paths, so that a rule has one name in results whatever it was asked as. A tensor that holds q, k and
v together (c_attn, query_key_value, qkv_proj) stands for all that are in it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from qjax.models.walk import TABLE, block_of

PLAIN = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
NO_NAMES: Mapping[str, str] = MappingProxyType({})
EMBED = "embed"  # how the table of embeddings is named
TIED_OR_NO_KERNEL = r"lm_head|embed_out|head/output|embed|wte|wpe|norm|ln_"


def meant(pattern: str, kernels: Sequence[str], theirs: Mapping[str, str] = NO_NAMES) -> str:
    """The pattern, in our spelling where it finds no path as it is; one that finds nothing at all is returned as it is.

    theirs: Hugging Face's name of the module of each kernel path that has one.
    """
    if any(re.search(pattern, path) for path in kernels):
        return pattern
    named = _names_pattern(pattern)
    for flags in (0, re.IGNORECASE):
        found = [path for path, name in theirs.items() if path in kernels and re.search(named, name, flags)]
        found = found or [path for path in kernels if re.search(pattern, path, flags)]
        if found:
            return _spelled(found, kernels) if theirs else f"(?i){pattern}"
    return pattern


def meant_with_table(pattern: str, kernels: Sequence[str], theirs: Mapping[str, str], table: str | None) -> str:
    """`meant`, with "embed" for the table of embeddings where the pattern names it. table: its module's name there."""
    component = table and table.rpartition(".")[2]
    by_theirs = component and component in pattern and re.search(_names_pattern(pattern), table)
    if not names_table(pattern) and not by_theirs:
        return meant(pattern, kernels, theirs)
    found = meant(pattern, kernels, theirs)
    if not any(re.search(found, path) for path in kernels):
        return EMBED
    return found if names_table(found) else f"{found}|{EMBED}"


def names_table(pattern: str) -> bool:
    """Whether a pattern by our paths names the table of embeddings, and not just everything."""
    return EMBED in pattern and re.search(pattern, TABLE) is not None


def _names_pattern(pattern: str) -> str:
    """The pattern as it is searched in names of modules."""
    pattern = pattern.removeprefix("re:").removesuffix(".weight").removesuffix(r"\.weight")
    if PLAIN.fullmatch(plain := pattern.strip(".")):
        return rf"(^|\.){re.escape(plain)}(\.|$)"
    try:
        re.compile(pattern)
    except re.error:  # without its first letters
        return r"$^"
    return pattern


def _spelled(found: Sequence[str], kernels: Sequence[str]) -> str:
    """The shortest pattern by our paths that finds these kernels and no others, whatever their order."""
    by_kind: dict[str, set[str]] = {}
    for path in kernels:
        by_kind.setdefault(_kind(path), set()).add(path)
    whole = [kind for kind, paths in sorted(by_kind.items()) if paths <= set(found)]
    if {path for kind in whole for path in by_kind[kind]} == set(found):
        return "|".join(whole)
    ordered = sorted(found, key=lambda path: (-1 if (block := block_of(path)) is None else block, path))
    blocks = dict.fromkeys(map(block_of, ordered))
    if None not in blocks and {path for path in kernels if block_of(path) in blocks} == set(found):
        return "|".join(f"^block_{block}/" for block in blocks)
    return "|".join(path.removesuffix("/kernel") for path in ordered)


def _kind(path: str) -> str:
    return re.sub(r"^block_\d+/", "", path).removesuffix("/kernel")


def nothing_found(patterns: Iterable[str], kernels: Sequence[str], theirs: Mapping[str, str] = NO_NAMES) -> str:
    """What to say beside "matches no kernel": why, or the nearest names."""
    patterns = list(patterns)
    if theirs and any(re.search(TIED_OR_NO_KERNEL, pattern) for pattern in patterns):
        tied = "" if any(path.startswith("head/") for path in kernels) else ", nor has a head that is tied to the embedding"
        return f"; embeddings and norms have no kernel and stay as they are{tied}"
    known = [*map(_kind, kernels), *(name.rsplit(".", 1)[-1] for name in theirs.values())]
    known += [part for path in kernels for part in path.split("/")[:-1]]
    words = [re.split(r"[./\\]", pattern.strip("^$./*"))[-1] for pattern in patterns]
    near = [name for word in words for name in difflib.get_close_matches(word, dict.fromkeys(known), n=2)]
    return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
