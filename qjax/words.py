"""What people type for a recipe or a format, and which of ours means it: for messages.

Names of other tools stand in ELSEWHERE with the format that comes nearest (bits and groups alike, not bytes). Any other
spelling is taken apart into words that are known ("gptq-4bit-128g" is gptq, int4, g128) and put together as a recipe.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator

GGUF = "a type of GGUF files, which is not made here; the nearest is"  # that such a file can hold, where there is one
WRITTEN = "a type of GGUF files; here it is"
PRESET = "a name of bits alone; the preset of that name in compressed-tensors is"
LIBRARY = "another library's name; the nearest here is"
BNB_INT8 = r"llm[._]?int8(\(\))?|load_in_8bit|bnb[_-]?(8|8bit|int8)"
ELSEWHERE: tuple[tuple[str, str, str | Callable[[re.Match], str]], ...] = (
    (r"q([458])_0", WRITTEN, lambda m: f"int{m[1]}-g32-sym-{'max' if m[1] == '8' else 'full'}"),
    (r"q([45])_1", WRITTEN, "int{0}-g32-m16"),
    (r"q2_k(_[a-z]+)?", GGUF, "int2-g16-dq"),
    (r"q([45])_k(_[a-z]+)?", GGUF, "int{0}-g32-m16"),
    (r"q([36])_k(_[a-z]+)?", WRITTEN, lambda m: f"int{m[1]}-g16-sym-full-k{'6' if m[1] == '3' else '8'}s"),
    (r"iq4_xs", GGUF, "iq4_nl-g32-fp16"),
    (r"iq([123])_[a-z]+", GGUF, "int{0}-g128"),
    (r"w([1-8])(?:a16)?g(\d+)", "a name of bits and groups; here it is", "int{0}-g{1}"),
    (r"w4a16_asym", PRESET, "int4-g128"),
    (r"w8a16", PRESET, "int8-channel-sym"),
    (r"w([1-7])a16", PRESET, "int{0}-g128-sym"),
    (r"w8a8", PRESET, "int8-channel-sym/int8-token"),
    (r"w([1-7])a([48])", PRESET, "int{0}-g128-sym/int{1}-token"),
    (r"(?:w8a8[_-])?fp8[_-]dynamic|w8a8[_-]fp8", PRESET, "fp8_e4m3-channel/fp8_e4m3-token"),
    (r"(?:(?:float8|fp8)[-_]?)?(e4m3|e5m2)(?:fn)?", "spelled", "fp8_{0}"),
    (r"(nv|mx)fp4a16", PRESET, "{0}fp4"),
    (BNB_INT8, "bitsandbytes' name; here it is", "llm_int8:int8-channel-sym-max"),
    (BNB_INT8, "bitsandbytes' name; of weights alone the nearest is", "int8-channel-sym-max"),
    (r"load_in_4bit|bnb[_-]?(4|4bit|nf4)", "bitsandbytes' name; with its type nf4 the same here is", "nf4-b64"),
    (r"int4(wo|[_-]weight[_-]only)", LIBRARY, "int4-g128"),
    (r"int8(wo|[_-]weight[_-]only)", LIBRARY, "int8-channel-sym-max"),
)
SPELLINGS = (  # a word -> how it is said here; none: nothing has to be said
    (r"(?:u?int|i|u|q|w)?([1-8])[_ ]?bits?|(?:uint|i|u|q|w)([1-8])", "int{}"),
    (r"(?:group|groupsize|group_size|gs|q)_?(\d+)|(\d+)g", "g{}"),
    (r"block_?(\d+)", "b{}"),
    (r"per_?channel|channelwise|per_?row|row", "channel"),
    (r"per_?tensor|tensorwise", "tensor"),
    (r"per_?token", "token"),
    (r"symmetric|symm", "sym"),
    (r"asym|asymmetric|affine|zp|zero_?point", ""),
    (r"double_?quant|double|nested|bnb_?dq", "dq"),
    (r"normal_?float4|nf_4", "nf4"),
    (r"float8", "fp8_e4m3"),
    (r"bfloat16|bf_16", "bf16"),
    (r"float16|half|f16", "fp16"),
    (r"float32|float|full|f32", "fp32"),
    (r"round_?to_?nearest|nearest|absmax|minmax", "rtn"),
)


def advice(text: str, *, methods: Collection[str], grids: Collection[str], parts: Collection[str]) -> Iterator[tuple[str, str]]:
    """(what to say before it, a recipe or format that may be meant) for a text that is neither, the likeliest first.

    methods: names that may stand before the colon, none for a format. grids: names of grids. parts: what may follow them.
    """
    head, colon, last = text.strip().lower().rpartition(":")
    if head in methods or not colon:
        for pattern, what, meant in ELSEWHERE:
            if found := re.fullmatch(pattern, last):
                name = meant.format(*found.groups()) if isinstance(meant, str) else meant(found)
                yield f"{text.strip()[-len(last) :]!r} is {what}", f"{head}{colon}{name}"
    yield from (("did you mean", each) for each in _put_together(text, methods, grids, parts))


def _put_together(text: str, methods: Collection[str], grids: Collection[str], parts: Collection[str]) -> Iterable[str]:
    known = {**dict.fromkeys(methods, "method"), **dict.fromkeys(parts, "part"), **dict.fromkeys(grids, "grid")}
    found: dict[str, list[str]] = {"method": [], "grid": [], "group": [], "part": []}
    for word in _words(text, methods, known):
        if re.fullmatch(r"[gb]\d+|channel|tensor", word):
            kind = "group"
        elif not found["group"] and found["grid"] and re.fullmatch(r"\d+", word):
            kind, word = "group", f"g{word}"  # noqa: PLW2901
        elif not found["grid"] and re.fullmatch(r"[1-8]", word):
            kind, word = "grid", f"int{word}"  # noqa: PLW2901
        elif (kind := known.get(word)) is None or word in found[kind]:
            return []
        found[kind].append(word)
    if len(found["grid"]) != 1 or len(found["group"]) > 1:
        return []
    if "hqq" in found["method"] and found["grid"][0].startswith("int"):
        found["part"].append("z16")  # it has no other zero points
    name = "-".join([*found["grid"], *found["group"], *found["part"]])
    return [f"{'+'.join(found['method'])}:{name}" if found["method"] else name]


def _words(text: str, methods: Collection[str], known: Collection[str]) -> Iterator[str]:
    """The words of a text as they are said here."""
    text = re.sub(r"\bg?-1\b(?!\d)", "channel", text.strip().lower())
    text = re.sub(r"(?<=\d)[-_ ](?=bits?\b)|(?<=per)[-_ ]", "", text)
    for chunk in filter(None, re.split(r"[-:+,\s]+", text)):
        pieces = [chunk]
        if _spelled(chunk, known) is None:
            method = next((name for name in methods if chunk.startswith(name)), "")  # gptq4, gptq_int4
            rest = re.sub(r"(?<=\d)(?=g\d+$)", "_", chunk.removeprefix(method))  # int4g128
            pieces = [method, *rest.split("_")]
        for piece in filter(None, pieces):
            word = _spelled(piece, known)
            if word != "":
                yield piece if word is None else word


def _spelled(word: str, known: Collection[str]) -> str | None:
    """A word as it is said here; None where it is not known."""
    if word in known or re.fullmatch(r"[gb]\d+|channel|tensor", word):
        return word
    for pattern, said in SPELLINGS:
        if found := re.fullmatch(pattern, word):
            return said.format(next(filter(None, found.groups()), ""))
    return None
