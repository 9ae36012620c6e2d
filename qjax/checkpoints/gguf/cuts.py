"""How byte-level BPE cuts text first: the pre-tokenizers of a tokenizer.json, by the names of `tokenizer.ggml.pre`.

Each as the models have it that llama.cpp named it for. llama.cpp's own regular expressions cut in fewer places where no merge
of these models reaches across: between Falcon's digits and what is before them, between DeepSeek LLM's digits.
"""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (  # of what may follow a word, twice, and of how many digits are together
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
LETTERS = (  # with case, of scripts
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f"
    "\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126"
    "\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
ENDS = "(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])"  # of BLOOM's words: a group within a class, so ( | [ ) too


def _split(*expressions: str) -> tuple[dict, ...]:
    return tuple({"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in expressions)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}
CUTS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "roberta-bpe", "gpt-neox"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "command-r"), (DIGITS, GPT2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "smaug-bpe", "dbrx", "chatglm-bpe", "glm4"),
        (*_split(WORDS % "{1,3}"), BYTES),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (*_split(WORDS % ""), BYTES)),
    **dict.fromkeys(("gpt-4o", "llama4"), (*_split(CASED % (f"{CONTRACTIONS}?", f"{CONTRACTIONS}?", "{1,3}")), BYTES)),
    "tekken": (*_split(CASED % ("", "", "")), BYTES),
    "falcon": (PUNCTUATION, GPT2, DIGITS | {"individual_digits": False}, *_split("[0-9][0-9][0-9]")),
    "bloom": (*_split(f" ?[^{ENDS}]+"), BYTES),
    "deepseek-llm": (*_split("[\r\n]", rf"\s?[{LETTERS}]+", rf"\s?[{SIGNS}]+", r"\s+$", ASIAN), DIGITS, BYTES),
    "deepseek-coder": (*_split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN), DIGITS, BYTES),
    "deepseek-v3": (*_split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", MARKED), BYTES),
}
# Of these a word that is a token is that token, whatever merges say; unless the file says otherwise, texts begin with BOS.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "tekken")
# Of these text is in NFC, which llama.cpp leaves as it is.
COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez", "olmo", "mpt", "gpt-neox", "command-r")
