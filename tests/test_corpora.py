"""Corpora: the built-in corpus' split, files, and the messages of what goes wrong."""

import gzip
import hashlib
import json
import sys
import types

import pytest

import qjax
from qjax.errors import QjaxError
from qjax.evaluate import corpora
from qjax.evaluate.corpora import load_corpus


@pytest.fixture(scope="module")
def held_out_side():
    return load_corpus("python-docs", "test")


@pytest.fixture(scope="module")
def calibration_side():
    return load_corpus("python-docs", "calibration")


def size(corpus):
    return sum(len(document.encode()) for document in corpus.documents)


def test_python_docs_sides_share_no_document_and_no_long_paragraph(held_out_side, calibration_side):
    assert not set(held_out_side.documents) & set(calibration_side.documents)
    shared = corpora.long_paragraphs(held_out_side.documents) & corpora.long_paragraphs(calibration_side.documents)
    assert not shared


def test_python_docs_holds_out_about_a_quarter(held_out_side, calibration_side):
    assert size(held_out_side) > 300_000
    assert 0.15 < size(held_out_side) / (size(held_out_side) + size(calibration_side)) < 0.4


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        ("topic:strings", True),
        ("topic:assert", False),
        ("module:difflib", True),
        ("module:json", False),
        ("module:datetime", True),
    ],
)
def test_python_docs_split_depends_on_the_name_alone(name, held_out):
    assert corpora.is_held_out(name) is held_out


def test_python_docs_mixes_topics_and_docstrings_at_its_head(held_out_side):
    from pydoc_data.topics import topics

    texts = {text.strip() for text in topics.values()}
    head = [document in texts for document in held_out_side.documents[:30]]
    assert 3 <= sum(head) <= 27


def test_python_docs_leaves_out_tests_and_installed_packages():
    modules = dict(corpora.standard_library_modules())
    assert {"json", "json.decoder", "datetime", "asyncio.tasks"} <= set(modules)
    assert not [name for name in modules if {"test", "tests", "site-packages", "idle_test"} & set(name.split("."))]
    assert corpora.held_out_modules().keys() == {name for name in modules if corpora.is_held_out(f"module:{name}")}


def test_docstrings_come_in_order_and_dedented():
    source = (
        '"""Module."""\nif True:\n    class A:\n        """Class.\n\n            Indented.\n        """\n'
        '        def f(self):\n            "method"\n'
    )
    assert corpora.docstrings(source) == ["Module.", "Class.\n\nIndented.", "method"]
    assert corpora.docstrings("def broken(:") == []


def test_without_paragraphs_ignores_white_space():
    paragraph = "a paragraph that is long enough to be no accident, over two lines"
    document = "kept\n\n" + paragraph.replace(", ", ",\n   ") + "\n\nkept too"
    assert corpora.without_paragraphs(document, corpora.long_paragraphs([paragraph])) == "kept\n\nkept too"


def test_fingerprint_is_of_the_joined_text(held_out_side):
    assert corpora.fingerprint_of(["a", "b"]) == corpora.fingerprint_of(["a\n\nb"]) != corpora.fingerprint_of(["ab"])
    assert corpora.fingerprint_of([""]) == "e3b0c44298fc1c14"  # SHA-256 of nothing
    assert held_out_side.fingerprint == corpora.fingerprint_of(held_out_side.documents) and len(held_out_side.fingerprint) == 16


@pytest.mark.parametrize("split", ["test", "calibration"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_file_is_one_document_in_either_split(tmp_path, name, split):
    data = "one\n\ntwo: naïve\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    corpus = load_corpus(f"text:{tmp_path / name}", split)
    assert corpus.name == f"text:{name}"
    assert corpus.documents == ("one\n\ntwo: naïve\n",)


def test_jsonl_documents_keep_unusual_line_separators(tmp_path):
    rows = [{"text": "one\u2028still one"}, {"text": "two", "other": 3}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert load_corpus(f"jsonl:{path}").documents == ("one\u2028still one", "two")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("python-doc", "did you mean python-docs"),
        ("wikitext", "did you mean wikitext2"),
        ("txt:a", "did you mean text:PATH"),
        ("", "expected one of python-docs"),
        ("zzz", "expected one of python-docs, wikitext2, ptb, c4, text:PATH, jsonl:PATH"),
        ("text:/no/such/file", "no such file"),
        ("text:", "did you mean text:PATH"),
    ],
)
def test_bad_spec_is_one_line_with_a_remedy(spec, said):
    with pytest.raises(QjaxError) as error:
        load_corpus(spec)
    assert said in str(error.value) and spec in str(error.value) and "\n" not in str(error.value)


def test_path_without_a_kind_is_told_how_to_write_it(tmp_path):
    (tmp_path / "corpus.dat").write_text("x")
    with pytest.raises(QjaxError, match=r"is given as text:"):
        load_corpus(str(tmp_path / "corpus.dat"))


def test_bad_split():
    with pytest.raises(QjaxError, match=r"'train'.*expected 'test' or 'calibration'"):
        load_corpus("python-docs", "train")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("text:a.txt", b"", "is empty"),
        ("text:a.txt", b" \n\t\n", "is empty"),
        ("text:a.bin", b"abc\xff\xfe", "not UTF-8 text"),
        ("text:a.bin", b"abc\0def", "NUL"),
        ("text:a.gz", b"not gzip", "cannot be read as its name says"),
        ("text:a.gz", gzip.compress(b"some text", mtime=0)[:-12], "cannot be read"),
        ("jsonl:a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        ("jsonl:a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', 'line 3 has no string field "text"'),
        ("jsonl:a.jsonl", b'{"messages": []}\n', "chats are for training"),
        ("jsonl:a.jsonl", b'{"text": ""}\n', "is empty"),
    ],
)
def test_bad_file_is_one_line(tmp_path, name, data, said):
    kind, file = name.split(":")
    (tmp_path / file).write_bytes(data)
    with pytest.raises(QjaxError) as error:
        load_corpus(f"{kind}:{tmp_path / file}")
    assert said in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def fake_datasets(monkeypatch):
    """Stands in for the datasets package: records what is asked for and answers with rows, or raises."""
    calls = []
    module = types.ModuleType("datasets")

    def load_dataset(*location, **options):
        calls.append((location, options))
        if isinstance(module.answer, Exception):
            raise module.answer
        return module.answer

    module.load_dataset = load_dataset
    module.calls = calls
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("spec", "split", "column", "part"),
    [
        ("wikitext2", "test", "text", "test"),
        ("wikitext2", "calibration", "text", "train"),
        ("ptb", "test", "sentence", "test"),
        ("c4", "test", "text", "validation[:1100]"),
        ("c4", "calibration", "text", "train[:8192]"),
    ],
)
def test_named_corpora_ask_for_the_right_part(fake_datasets, spec, split, column, part):
    fake_datasets.answer = {column: ["", " = Title = \n", "body"]}
    found = load_corpus(spec, split)
    assert found.documents == ("", " = Title = \n", "body")  # empty rows stay: GPTQ joins them too
    assert found.separator == ("\n\n" if spec == "wikitext2" else " ")
    joined = found.separator.join(found.documents)
    assert found.fingerprint == hashlib.sha256(joined.encode()).hexdigest()[:16]
    assert fake_datasets.calls[0][1]["split"] == part


def test_named_corpus_without_network_is_one_line(fake_datasets):
    fake_datasets.answer = ConnectionError("Couldn't reach\nthe hub")
    with pytest.raises(QjaxError, match=r"'wikitext2' cannot be fetched .ConnectionError: Couldn't reach the hub.*text:PATH"):
        load_corpus("wikitext2")


def test_named_corpus_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QjaxError, match="needs the datasets package"):
        load_corpus("c4")


def test_texts_in_memory(tmp_path):
    corpus = qjax.Corpus("mine", ["a tale", "of two"])
    assert corpus == ("mine", ("a tale", "of two"), corpora.fingerprint_of(["a tale\n\nof two"]), "\n\n", False)
    assert qjax.Corpus("mine", "a tale\n\nof two").fingerprint == corpus.fingerprint
    assert corpus._replace(name="other").documents == corpus.documents
    with pytest.raises(QjaxError, match="corpus 'mine': expected texts, got int"):
        qjax.Corpus("mine", ["a", 1])
    (tmp_path / "mine").write_text("a tale\n\nof two")
    named, held = qjax.Sweep(("nf4",), (f"text:{tmp_path / 'mine'}", corpus), None).corpora
    assert held is corpus and named == corpus._replace(name="text:mine", documents=("a tale\n\nof two",))
