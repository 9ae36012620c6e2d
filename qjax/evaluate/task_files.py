"""Readers of task files. What a file may hold, told by its name and the fields of its first line:

    .jsonl (.gz, .bz2)   {"query", "choices", "gold"}                     multiple choice
                         {"context_options", "continuation", "gold"}      Winograd schemas: which context
                         {"context", "continuation"}                      last-word prediction
    .txt (.gz, .bz2)     HellaSwag as text, six lines a question: "activity: context", the gold index, four endings
    folder or .zip       MMLU's CSV files (question, A, B, C, D, answer) in dev/ and test/, asked with examples from dev

The fields are those of MosaicML's llm-foundry, the text file is the one llama.cpp reads, the CSVs are Hendrycks et al. 2020
(arXiv 2009.03300), whose prompt is used. Every malformed line is an error that names it.
"""

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

from qjax.errors import QjaxError
from qjax.evaluate.questions import Question, last_word, multiple_choice, multiple_context
from qjax.files import expand, reason
from qjax.untrusted import (
    TEXT_BYTES,
    decode,
    is_folder,
    json_object,
    read_archive,
    read_bytes,
    read_unpacked,
    split_lines,
    status,
)

SCHEMAS = (("query", "choices", "gold"), ("context_options", "continuation", "gold"), ("context", "continuation"))
BYTES, QUESTIONS = 2**26, 3 * 10**5  # of a task, at most
SHOTS = 5
LETTERS = "ABCD"


def read_task_file(path: str | Path, suffix: str = "") -> list[Question]:
    """The questions of a file. suffix: what a query of multiple choice is followed by ("\\nAnswer:").

    Raises QjaxError for a missing or malformed file, with the line.
    """
    path = expand(path)
    if not status(path):
        raise QjaxError(f"task file {path} does not exist")
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".bz2") else path.suffix
    if is_folder(path) or path.suffix == ".zip":
        questions = _mmlu(path)
    elif kind == ".jsonl":
        questions = _jsonl(path, suffix)
    elif kind == ".txt":
        questions = _hellaswag(path)
    else:
        raise QjaxError(
            f"task file {path}: expected .jsonl, .txt (HellaSwag), either with .gz or .bz2, or a folder or .zip (MMLU)"
        )
    found = list(itertools.islice(questions, QUESTIONS + 1))
    if len(found) > QUESTIONS:
        raise QjaxError(f"task file {path} has more than {QUESTIONS} questions; give a part of it")
    return found


def _text(path: Path) -> str:
    return decode(read_unpacked(path, BYTES), f"task file {path}")


def _jsonl(path: Path, suffix: str) -> Iterator[Question]:
    schema = None
    for number, line in enumerate(split_lines(_text(path), f"task file {path}"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        entry = json_object(line, where)
        schema = schema or _schema(entry, where)
        missing = [field for field in schema if field not in entry]
        if missing:
            raise QjaxError(
                f"{where} has no {', '.join(missing)}; expected the fields {', '.join(schema)} as in the first line"
            )
        yield _question(entry, schema, suffix, where)
    if schema is None:
        raise QjaxError(f"task file {path} holds no questions")


def _schema(entry: dict, where: str) -> tuple[str, ...]:
    for schema in SCHEMAS:
        if all(field in entry for field in schema):
            return schema
    expected = " or ".join("{" + ", ".join(schema) + "}" for schema in SCHEMAS)
    raise QjaxError(f"{where} has the fields {', '.join(entry) or 'none'}; expected {expected}")


def _question(entry: dict, schema: tuple[str, ...], suffix: str, where: str) -> Question:
    wrong = [field for field in schema if not _fits(field, entry[field])]
    if wrong:
        raise QjaxError(
            f"{where}: {', '.join(wrong)} of the wrong type; expected texts, lists of at least two texts, and an index"
        )
    if "gold" in schema:
        options = entry["choices" if "choices" in schema else "context_options"]
        if not 0 <= entry["gold"] < len(options):
            raise QjaxError(f"{where}: gold is {entry['gold']}, expected 0 to {len(options) - 1}")
    if "choices" in schema:
        return multiple_choice(entry["query"] + suffix, entry["choices"], entry["gold"])
    if "context_options" in schema:
        return multiple_context(entry["context_options"], entry["continuation"], entry["gold"])
    return last_word(entry["context"], entry["continuation"])


def _fits(field: str, value: object) -> bool:
    if field == "gold":
        return isinstance(value, int) and not isinstance(value, bool)
    if field in ("choices", "context_options"):
        return isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) and item for item in value)
    return isinstance(value, str) and (bool(value) or field in ("query", "context"))


def _hellaswag(path: Path) -> Iterator[Question]:
    lines = list(split_lines(_text(path).rstrip("\n"), f"task file {path}"))
    if len(lines) % 6:
        raise QjaxError(f"{path} has {len(lines)} lines; expected six a question: context, gold index, four endings")
    for start in range(0, len(lines), 6):
        context, gold, *endings = lines[start : start + 6]
        if gold not in ("0", "1", "2", "3"):
            raise QjaxError(f"{path}: line {start + 2} is {gold[:20]!r}, expected the gold index, 0 to 3")
        empty = [start + line for line, ending in enumerate(endings, start=3) if not ending]
        if empty:
            raise QjaxError(f"{path}: line {empty[0]}: an ending is empty")
        yield multiple_choice(context, endings, int(gold))


# --- MMLU ----------------------------------------------------------------------------------------------------------------


def _mmlu(path: Path) -> list[Question]:
    """All subjects, a question of each in turn, so that the first questions are a fair sample."""
    files = _csv_files(path)
    tests = {name: rows for (part, name), rows in files.items() if part == "test"}
    if not tests:
        raise QjaxError(f"{path} holds no test/SUBJECT_test.csv; expected MMLU's folders dev and test")
    subjects = []
    for name, rows in sorted(tests.items()):
        examples = files.get(("dev", name), [])[:SHOTS]
        if len(examples) < SHOTS:
            raise QjaxError(f"{path}: subject {name} has {len(examples)} examples in dev, expected {SHOTS}")
        head = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        head += "".join(f"{_asked(row)} {row[5]}\n\n" for row in examples)
        if len(head) * len(rows) > TEXT_BYTES:
            raise QjaxError(f"{path}: the {SHOTS} examples of subject {name} have {len(head)} characters; expected short ones")
        subjects.append([multiple_choice(head + _asked(row), LETTERS, LETTERS.index(row[5])) for row in rows])
    in_turn = sorted((i, number) for number, questions in enumerate(subjects) for i in range(len(questions)))
    return [subjects[number][i] for i, number in in_turn]


def _asked(row: list[str]) -> str:
    options = "\n".join(f"{letter}. {text.strip()}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0].strip()}\n{options}\nAnswer:"


def _csv_files(path: Path) -> dict[tuple[str, str], list[list[str]]]:
    """(dev | test, subject) -> rows."""
    if is_folder(path):
        contents, left = {}, BYTES
        for file in _files_below(path):
            contents[file.relative_to(path).as_posix()] = content = read_bytes(file, left)
            left -= len(content)
    else:
        contents = read_archive(path, _subject, BYTES)
    return {_subject(name): _csv_rows(content, f"{path}: {name}") for name, content in contents.items()}


def _files_below(folder: Path) -> list[Path]:
    """MMLU's files in a folder or up to two below it: no deeper, as the folder named may be any."""
    try:
        found = [
            file for above in ("", "*/", "*/*/") for part in ("dev", "test") for file in folder.glob(f"{above}{part}/*.csv")
        ]
    except OSError as error:
        raise QjaxError(f"cannot read {folder}: {reason(error)}; give the folder with MMLU's dev and test") from error
    return sorted(file for file in found if _subject(file.relative_to(folder).as_posix()))


def _subject(name: str) -> tuple[str, str] | None:
    """(dev | test, subject) of a file's name; None for other files."""
    part, _, file = name.rpartition("/")
    part = part.rpartition("/")[2]
    if part in ("dev", "test") and "__MACOSX" not in name and file.endswith(f"_{part}.csv"):
        return part, file.removesuffix(f"_{part}.csv")
    return None


def _csv_rows(content: bytes, where: str) -> list[list[str]]:
    text = decode(content, where)
    if (count := text.count("\n")) > QUESTIONS:
        raise QjaxError(f"{where} has {count} lines, expected at most {QUESTIONS}; give a part of it")
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        return [_csv_row(row, f"{where}: row {number}") for number, row in enumerate(reader, start=1)]
    except csv.Error as error:
        raise QjaxError(f"{where} is no CSV file: {error}") from error


def _csv_row(row: list[str], where: str) -> list[str]:
    if len(row) != 6 or row[5] not in tuple(LETTERS):
        raise QjaxError(f"{where}: expected question, four options and a letter A to D, got {len(row)} fields")
    empty = [str(option) for option, text in enumerate(row[1:5], start=1) if not text.strip()]
    if empty:
        raise QjaxError(f"{where}: option {', '.join(empty)} is empty")
    return row
