"""qjax.evaluate.tasks and its readers: every schema, every malformed file, names and the nearest names."""

import bz2
import gzip
import itertools
import json
import shutil
import sys
import types
import zipfile
from pathlib import Path

import pytest

from qjax.errors import QjaxError
from qjax.evaluate.cloze import CONTEXT_WORDS, EVERY, WORDS, cloze_questions
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.questions import make_task
from qjax.evaluate.tasks import TASKS, load_task, load_tasks

from .paths import real_data

CHOICE = {"query": "Question: why?", "choices": ["because", "for no reason"], "gold": 1}
SCHEMA = {"context_options": ["The cup fell so the cup", "The cup fell so the table"], "continuation": "broke.", "gold": 0}
WORD = {"context": "Once upon a", "continuation": "time"}


def write(path, *entries):
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)(text.encode()))
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.bz2"])
def test_multiple_choice(tmp_path, name):
    task = load_task(f"arc_easy:{write(tmp_path / name, CHOICE, CHOICE)}")
    assert (task.name, task.kind, len(task.questions)) == ("arc_easy", "choices", 2)
    asked = "Question: why?\nAnswer:"
    assert task.questions[0] == (((asked, " because"), (asked, " for no reason")), 1, (7, 13), -1)
    plain = load_task(f"choices:{tmp_path / name}")
    assert (plain.name, plain.questions[0].candidates[0][0]) == (f"choices:{name}", "Question: why?")


@pytest.mark.parametrize(
    ("name", "query", "asked"),
    [
        ("arc_challenge", "Question: why?", "Question: why?\nAnswer:"),
        ("piqa", "Question: why?\n", "Question: why?\nAnswer:"),  # this file's queries end their line
        ("openbookqa", "They save by", "They save by"),
        ("boolq", "It is so.\nQuestion: is it?", "It is so.\nQuestion: is it?\nAnswer:"),
        ("copa", "It rained, therefore", "It rained, therefore"),
    ],
)
def test_queries_of_files_are_asked_as_those_of_the_hub(tmp_path, name, query, asked):
    task = load_task(f"{name}:{write(tmp_path / 't.jsonl', CHOICE | {'query': query})}")
    assert {context for context, _ in task.questions[0].candidates} == {asked}


def test_schemas_and_last_words(tmp_path):
    task = load_task(f"winogrande:{write(tmp_path / 's.jsonl', SCHEMA)}")
    assert task.questions[0].candidates == tuple((context, " broke.") for context in SCHEMA["context_options"])
    assert task.questions[0].lengths == (23, 25)
    task = load_task(f"lambada:{write(tmp_path / 'w.jsonl', WORD)}")
    assert (task.kind, task.questions[0].candidates) == ("last-word", (("Once upon a", " time"),))


def test_hellaswag_text(tmp_path):
    (tmp_path / "h.txt").write_text("Roof: A man is\n3\na\nb\nc\nd\nIron: She is\n0\ne\nf\ng\nh\n")
    task = load_task(f"hellaswag:{tmp_path / 'h.txt'}", 1)
    assert task.questions == ((tuple(("Roof: A man is", f" {end}") for end in "abcd"), 3, (1, 1, 1, 1), -1),)


def mmlu(folder, zipped=False):
    files = {
        "mmlu/dev/art_dev.csv": "\n".join(f"Example {i}?,w,x,y,z,{'ABCDAB'[i]}" for i in range(6)),
        "mmlu/test/art_test.csv": '"What, now?",one,two,three,four,C\nAnd then?,1,2,3,4,A\n',
        "__MACOSX/mmlu/test/._art_test.csv": "rubbish",
    }
    if zipped:
        with zipfile.ZipFile(folder / "m.zip", "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return folder / "m.zip"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "mmlu"


@pytest.mark.parametrize("zipped", [False, True])
def test_mmlu_with_examples(tmp_path, zipped):
    task = load_task(f"mmlu:{mmlu(tmp_path, zipped)}")
    context, choice = task.questions[0].candidates[2]
    assert context.startswith("The following are multiple choice questions (with answers) about art.\n\nExample 0?\nA. w\n")
    assert context.endswith("Answer: A\n\nWhat, now?\nA. one\nB. two\nC. three\nD. four\nAnswer:")
    assert context.count("Answer:") == 6  # the first five examples of dev, not the sixth
    assert (choice, task.questions[0].gold, len(task.questions)) == (" C", 2, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ("{not json}\n", "line 1 is not a JSON object"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"query": "q", "gold": 0}\n', "line 1 has the fields query, gold; expected"),
        (json.dumps(CHOICE) + '\n\n{"query": "q", "choices": ["a", "b"]}\n', "line 3 has no gold"),
        (json.dumps(CHOICE | {"gold": 2}), "gold is 2, expected 0 to 1"),
        (json.dumps(CHOICE | {"gold": "1"}), "gold of the wrong type"),
        (json.dumps(CHOICE | {"choices": ["alone"]}), "choices of the wrong type"),
        (json.dumps(CHOICE | {"choices": ["", "b"]}), "choices of the wrong type"),
        (json.dumps(WORD | {"continuation": ""}), "continuation of the wrong type"),
    ],
)
def test_malformed_lines_are_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(QjaxError, match=message):
        load_task(f"piqa:{tmp_path / 'bad.jsonl'}")


def encrypted(archive: bytes) -> bytes:
    """The archive with every member marked as encrypted."""
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        parts = archive.split(header)
        archive = header.join([parts[0], *(part[: flags - 4] + b"\x01" + part[flags - 3 :] for part in parts[1:])])
    return archive


def test_other_malformed_files(tmp_path):
    for name, content, message in (
        ("a.csv", b"", "expected .jsonl"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl", b"\xff\xfe\xff", "not UTF-8 text"),
        ("a.txt", b"one\ntwo\n", "six a question"),
        ("b.txt", b"c\n4\na\nb\nc\nd\n", "line 2 is '4'"),
        ("c.txt", b"c\n1\na\n\nc\nd\n", "line 4: an ending is empty"),
        ("a.zip", b"no zip", "no readable zip"),
        ("b.zip", encrypted(mmlu(tmp_path, zipped=True).read_bytes()), "no readable zip.*encrypted"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(QjaxError, match=message):
            load_task(f"hellaswag:{tmp_path / name}")
    with pytest.raises(QjaxError, match="'piqa:' names no file"):
        load_task("piqa:")
    with pytest.raises(QjaxError, match="does not exist"):
        load_task(f"piqa:{tmp_path / 'missing.jsonl'}")
    with pytest.raises(QjaxError, match="holds no test/"):
        load_task(f"mmlu:{tmp_path}")
    folder = mmlu(tmp_path)
    (folder / "test" / "art_test.csv").write_text("a question,one,two\n")
    with pytest.raises(QjaxError, match="row 1: expected question"):
        load_task(f"mmlu:{folder}")
    (folder / "test" / "art_test.csv").write_text("q,1,2,3,4,AB\n")
    with pytest.raises(QjaxError, match=r"row 1: expected question.*a letter A to D"):
        load_task(f"mmlu:{folder}")
    (folder / "test" / "art_test.csv").write_text("q,1,,3,4,A\n")
    with pytest.raises(QjaxError, match="row 1: option 2 is empty"):
        load_task(f"mmlu:{folder}")
    (folder / "dev" / "art_dev.csv").write_text("")
    (folder / "test" / "art_test.csv").write_text("q,1,2,3,4,A\n")
    with pytest.raises(QjaxError, match="subject art has 0 examples"):
        load_task(f"mmlu:{folder}")


def test_unknown_names_get_the_nearest(tmp_path):
    with pytest.raises(QjaxError, match=r"unknown task 'arc-easy' \(did you mean arc_easy\?\)"):
        load_task("arc-easy")
    with pytest.raises(QjaxError, match="did you mean hellaswag"):
        load_task("helaswag:x.jsonl")
    with pytest.raises(QjaxError, match="expected one of cloze, "):
        load_task("zzz")
    with pytest.raises(QjaxError, match="give mmlu:PATH"):
        load_task("mmlu")
    with pytest.raises(QjaxError, match="max_questions 0"):
        load_task("cloze", 0)
    path = write(tmp_path / "t.jsonl", CHOICE)
    with pytest.raises(QjaxError, match="piqa given more than once"):
        load_tasks([f"piqa:{path}", f"piqa:{path}"])
    with pytest.raises(QjaxError, match="one kind"):
        make_task(
            "mixed",
            [*load_task(f"piqa:{path}").questions, *load_task(f"lambada:{write(tmp_path / 'w.jsonl', WORD)}").questions],
        )


HUB = {
    "arc_easy": {"question": "Why?", "choices": {"label": ["1", "2"], "text": ["a", "b"]}, "answerKey": "2"},
    "piqa": {"goal": "Why?", "sol1": "a", "sol2": "b", "label": 1},
    "openbookqa": {"question_stem": "Because", "choices": {"label": ["A", "B"], "text": ["a", "b"]}, "answerKey": "B"},
    "boolq": {"passage": "Text.", "question": "is it", "answer": True},
    "copa": {"premise": "It fell.", "question": "cause", "choice1": "A", "choice2": "B", "label": 1},
    "winogrande": {"sentence": "Ann met Bo, and _ smiled.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    "hellaswag": {"activity_label": "Roof", "ctx_a": "A man", "ctx_b": "he", "endings": ["a [x]", "b"], "label": "1"},
}
ASKED = {
    "arc_easy": ("Question: Why?\nAnswer:", " b"),
    "piqa": ("Question: Why?\nAnswer:", " b"),
    "openbookqa": ("Because", " b"),
    "boolq": ("Text.\nQuestion: is it?\nAnswer:", " yes"),
    "copa": ("It fell because", " b"),
    "winogrande": ("Ann met Bo, and Bo", " smiled."),
    "hellaswag": ("Roof: A man He", " b"),
    "lambada": ("Once upon a", " time"),
}


@pytest.mark.parametrize("name", ASKED)
def test_rows_of_the_hub(monkeypatch, name):
    row = HUB.get(name, {"text": "Once upon a time"})
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *location, split: [row]))
    question = load_task(name).questions[0]
    assert question.candidates[question.gold] == ASKED[name]


def test_no_network_is_said(monkeypatch):
    def fail(*location, split):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(QjaxError, match=r"'piqa' cannot be fetched .*no route to host.*or give piqa:PATH"):
        load_task("piqa")
    assert set(HUB) <= set(TASKS)


def test_cloze_is_deterministic_and_fair():
    text = " ".join(f"w{i % 89}x{i % 13}" for i in range(2000))
    corpus = Corpus("toy", (text, text[::-1], "too short"), "f")
    questions = cloze_questions(corpus)
    assert questions == cloze_questions(corpus) and len(questions) > 20
    for question in questions:
        (context, truth), joined = question.candidates[question.gold], text + " " + text[::-1]
        assert context + truth in joined
        choices = [choice for _, choice in question.candidates]
        assert len(set(choices)) == 4 and all(len(choice.split()) == WORDS for choice in choices)
        assert {context for context, _ in question.candidates} == {context}
    assert {question.gold for question in questions} == {0, 1, 2, 3}
    with pytest.raises(QjaxError, match="long enough"):
        cloze_questions(Corpus("toy", ("too short",), "f"))


def test_wrong_stretches_are_from_outside_the_question():
    """Words are numbers, each once: a stretch says where it is from, and lies neither in the context nor in the answer."""
    questions = cloze_questions(Corpus("numbers", (" ".join(map(str, range(3000))),), "f"))
    assert len(questions) > 20
    starts = sorted(int(question.candidates[question.gold][1].split()[0]) for question in questions)
    assert min(b - a for a, b in itertools.pairwise(starts)) == EVERY  # no text is asked about twice
    for question in questions:
        start = int(question.candidates[question.gold][1].split()[0])
        for number, (context, choice) in enumerate(question.candidates):
            words = list(map(int, choice.split()))
            assert list(map(int, context.split())) == list(range(start - CONTEXT_WORDS, start))
            assert words == list(range(words[0], words[0] + WORDS))
            outside = words[-1] < start - CONTEXT_WORDS or words[0] >= start + WORDS
            assert outside or number == question.gold


def test_built_in_cloze():
    task = load_task("cloze", 50)
    assert len(task.questions) == 50
    assert task.fingerprint != make_task("cloze", task.questions[:49]).fingerprint


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("arc_easy", "arc_easy.jsonl", 2376), ("piqa", "piqa.jsonl", 1838), ("winogrande", "winogrande.jsonl", 1267),
        ("openbookqa", "openbook_qa.jsonl", 500), ("copa", "copa.jsonl", 100), ("wsc273", "winograd_wsc.jsonl", 273),
        ("boolq", "boolq.jsonl.gz", 3270), ("lambada", "lambada_openai.jsonl.gz", 5153),
        ("hellaswag", "hellaswag_val_full.txt.bz2", 10042), ("mmlu", "mmlu.zip", 14042),
    ],
)  # fmt: skip
def test_real_files(name, file, count):
    assert len(load_task(f"{name}:{real_data(f'tasks/{file}')}").questions) == count


def test_folders_of_other_things_are_not_walked(tmp_path, monkeypatch):
    """Whatever folder is named, "/" too: not deeper than MMLU's files may lie, and a folder that goes meanwhile is an error."""
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    mmlu(tmp_path / "a" / "b")
    assert len(load_task(f"mmlu:{tmp_path / 'a'}").questions) == 2
    mmlu(tmp_path / "a" / "b" / "c").rename(tmp_path / "a" / "b" / "c" / "d")
    shutil.rmtree(tmp_path / "a" / "b" / "mmlu")
    with pytest.raises(QjaxError, match="holds no test/"):
        load_task(f"mmlu:{tmp_path}")

    def gone(*args):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "glob", gone)
    with pytest.raises(QjaxError, match=r"cannot read .*No such file or directory; give the folder with"):
        load_task(f"mmlu:{tmp_path}")
