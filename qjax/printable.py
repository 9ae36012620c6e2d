"""Names that come from outside (folders, files, rows) as they may be shown: one line, nothing that a terminal obeys."""

import unicodedata

_SPACES, _HIDDEN = "\t\n\v\f\r\x85\u2028\u2029", ("Cc", "Cf", "Cs")  # controls, direction marks, surrogates


def printable(text: str) -> str:
    """The text with line breaks and tabs as blanks, and � for each control character."""
    if text.isprintable():
        return text
    return "".join(
        " " if c in _SPACES else "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in _HIDDEN else c for c in text
    )
