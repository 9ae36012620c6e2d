"""Numbers that documents print, computed from the rows of results/.

Behind a paragraph stands a comment of expressions in Python, one for each of its numbers in order, of names of `evidence.py`;
numbers in code, headings and links are not counted:

    GPTQ costs 0.39 of what nearest rounding does at 4 bits.
    <!-- = share("quickstart", "gptq:int4-g128", "rtn:int4-g128"); 4 -->

`HERE` is the folder of results that the document is in; `*(...)` stands for several numbers. A number must be what its
expression is with as many decimals as are printed. An expression that gives a bool stands for no
number and must be True; one that gives a text is the whole paragraph (a table). `python -m tests.documents` writes what the
rows say into the documents, and lists what is not True.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import evidence
from tests.paths import REPOSITORY

PARAGRAPH = re.compile(r"(?P<text>(?:^(?!<!--)\S[^\n]*\n)+)(?:<!-- = (?P<expressions>(?s:.*?)) -->\n)?", re.MULTILINE)
UNCOUNTED = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv \S+|doi \S+|^\|?[-:| ]+$|^#.*$|[A-Za-z][\w.-]*\d[\w.-]*", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


class Statement(NamedTuple):
    """A paragraph and the expressions behind it; "" where it has none."""

    path: Path
    start: int
    text: str
    expressions: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path.relative_to(REPOSITORY)}: {self.text.strip()[:60]!r}"


def statements(path: Path) -> Iterator[Statement]:
    """The paragraphs of a document with their expressions."""
    for found in PARAGRAPH.finditer(_without_fences(path.read_text("utf-8"))):
        yield Statement(path, found.start(), found["text"], found["expressions"] or "")


def _without_fences(text: str) -> str:
    """The text with code blocks blank, of the same length."""
    return re.sub(r"^```.*?^```$", lambda found: re.sub(r"\S", " ", found[0]), text, flags=re.MULTILINE | re.DOTALL)


def numbers(text: str) -> list[re.Match]:
    """The numbers of a paragraph, in order."""
    return list(NUMBER.finditer(UNCOUNTED.sub(lambda found: " " * len(found[0]), text)))


def values(statement: Statement) -> tuple[list[float], str | None, list[str]]:
    """(numbers, the whole paragraph or None, expressions that are not True)."""
    found, whole, wrong = [], None, []
    names = vars(evidence) | {"HERE": statement.path.parent.name}
    for expression in filter(None, map(str.strip, statement.expressions.split(";"))):
        for value in eval(f"({expression},)", names):
            if isinstance(value, str):
                whole = value
            elif isinstance(value, (bool, np.bool_)):
                wrong += [] if value else [expression]
            else:
                found.append(float(value))
    return found, whole, wrong


def printed_like(value: float, shown: str) -> str:
    """A value with the decimals, sign and separators of a printed number."""
    decimals = len(shown.partition(".")[2])
    text = f"{value:,.{decimals}f}" if "," in shown or abs(value) >= 1e4 else f"{value:.{decimals}f}"
    return f"+{text}" if shown[0] == "+" and value >= 0 else text


def corrected(statement: Statement) -> tuple[str, list[str]]:
    """The paragraph as the rows have it, and what is wrong with it beside its numbers."""
    found, whole, wrong = values(statement)
    if whole is not None:
        return whole, wrong
    places = numbers(statement.text)
    if len(places) != len(found):
        return statement.text, [
            *wrong,
            f"{len(places)} numbers ({', '.join(each[0] for each in places)}), {len(found)} expressions",
        ]
    text = statement.text
    for place, value in reversed(list(zip(places, found, strict=True))):
        text = text[: place.start()] + printed_like(value, place[0]) + text[place.end() :]
    return text, wrong


def documents() -> list[Path]:
    """Those whose every paragraph is checked."""
    return sorted((REPOSITORY / "results").rglob("README.md"))


def readme() -> list[Statement]:
    """The README's paragraphs with expressions: others speak of no measurement."""
    return [statement for statement in statements(REPOSITORY / "README.md") if statement.expressions]


def every_statement() -> list[Statement]:
    """Of all documents; a paragraph without numbers and expressions states nothing that can be computed."""
    checked = [
        statement for path in documents() for statement in statements(path) if statement.expressions or numbers(statement.text)
    ]
    return [*readme(), *checked]


def main() -> int:
    """Writes the documents anew; the number of paragraphs that need a hand."""
    bad = 0
    for path in [REPOSITORY / "README.md", *documents()]:
        text = path.read_text("utf-8")
        for statement in reversed([each for each in every_statement() if each.path == path]):
            right, wrong = corrected(statement)
            text = text[: statement.start] + right + text[statement.start + len(statement.text) :]
            bad += bool(wrong)
            for line in wrong:
                print(f"{statement.where}: {line}")
        path.write_text(text, "utf-8")
    return bad


if __name__ == "__main__":
    sys.exit(main())
