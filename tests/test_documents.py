"""Every number of the README's results and of results/**/README.md is what the rows give."""

import pytest

from tests.documents import Statement, corrected, every_statement, numbers, printed_like, statements, values
from tests.paths import REPOSITORY

EVERY = every_statement()


@pytest.mark.parametrize("statement", EVERY, ids=lambda statement: statement.where)
def test_documents_say_what_the_rows_say(statement):
    text, wrong = corrected(statement)
    assert wrong == []
    assert statement.text == text


def test_there_are_claims():
    assert {statement.path.relative_to(REPOSITORY).parts[0] for statement in EVERY} == {"README.md", "results"}
    assert len(EVERY) > 10


def made(text: str, expressions: str) -> Statement:
    return Statement(REPOSITORY / "README.md", 0, text, expressions)


def test_a_false_number_is_found():
    statement = made("It costs 0.39 of 1,066 (`int4`, arXiv 2305.14314), by +0.5 %.", "0.394; 1066; 0.46; 1 < 2")
    assert [each[0] for each in numbers(statement.text)] == ["0.39", "1,066", "+0.5"]
    assert corrected(statement) == (statement.text, [])
    assert corrected(statement._replace(expressions="0.396; 1066; 0.46"))[0].startswith("It costs 0.40 of")
    assert corrected(statement._replace(expressions="0.394; 1066; 0.46; 2 < 1"))[1] == ["2 < 1"]
    assert "3 numbers" in corrected(statement._replace(expressions="0.394"))[1][0]
    assert values(made("| a |\n", '"| b |\\n"'))[1] == "| b |\n"


def test_a_paragraph_without_expressions_is_found(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# 1 title\n\n```\n2\n```\nNo number.\n\nThere are 3.\n\nThere are 4.\n<!-- = 4 -->\n")
    found = {statement.text: statement.expressions for statement in statements(path) if numbers(statement.text)}
    assert found == {"There are 3.\n": "", "There are 4.\n": "4"}


def test_numbers_are_written_as_they_were():
    assert [printed_like(1234.5, shown) for shown in ("1,000", "+1,000.0", "7")] == ["1,234", "+1,234.5", "1234"]
    assert printed_like(-0.04, "+0.0") == "-0.0"
