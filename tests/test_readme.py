"""What the README and the guides show runs as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import qjax
from qjax.cli.app import app
from qjax.errors import QjaxError
from qjax.methods import added_methods
from qjax.recipe import parse_recipe
from qjax.sweep.measurements.provenance import provenance
from tests.paths import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "qjax" / "guide").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a document in a language; of "": commands and plain text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


PYTHON = [(path.name, number, block) for path in DOCUMENTS for number, block in enumerate(blocks(path, "python"))]
COMMANDS = sorted(
    {line for path in DOCUMENTS for block in blocks(path, "") for line in block.splitlines() if line.startswith("qjax ")}
)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(("name", "number", "block"), PYTHON, ids=[f"{name}-{number}" for name, number, _ in PYTHON])
def test_python_runs_on_paste(name, number, block, tmp_path, monkeypatch, capsys):
    """Each block by itself, in an empty folder, without a warning; it prints or makes something."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / f"{name}_{number}.py"  # where the source of a registered function is read from
    source.write_text(block)
    exec(compile(block, str(source), "exec"), {"__name__": "pasted"})
    if (name, number) == ("README.md", 2):  # from function to figure
        written = [tmp_path / line for line in capsys.readouterr().out.splitlines() if line.startswith("own-results")]
        assert {".md", ".tex", ".csv", ".pdf", ".png", ".txt"} == {path.suffix for path in written}
        (table,) = (tmp_path / "own-results").glob("*.md")
        for recipe in ("rtn:int3-g128", "cut:int3-g128", "cut(sigmas=2.5):int3-g128", "cut:int4-g128"):
            assert f"| {recipe} " in table.read_text()


def test_there_are_commands_and_blocks():
    assert len(PYTHON) >= 6 and len(COMMANDS) >= 15


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    """Every option of every command that is shown is one of that command's."""
    _, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    assert command.make_context(command.name, words).params


def test_the_readme_is_short():
    assert len(DOCUMENTS[0].read_text("utf-8").splitlines()) <= 145


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, *sorted((REPOSITORY / "results").rglob("README.md"))],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@pytest.mark.usefixtures("registries")
def test_registered_methods():
    """They are in recipes, may be replaced, are told apart in rows by their source, and take no name that is in use."""

    @qjax.register
    def twice(weight, fmt):
        return qjax.rtn(2 * weight, fmt)

    before = parse_recipe("twice:int4-g32").sources()
    assert str(parse_recipe("awq+twice:int4-g32")) == "awq+twice:int4-g32" and list(added_methods()) == ["twice"]
    assert parse_recipe("rtn:int4-g32").sources() == {} and provenance(before)["code"] != provenance()["code"]

    @qjax.register
    def twice(weight, fmt, *, by: float = 2.0):  # noqa: F811
        return qjax.rtn(by * weight, fmt)

    assert str(parse_recipe("twice(by=3):int4-g32")) == "twice(by=3.0):int4-g32"
    assert parse_recipe("twice:int4-g32").sources() != before
    made = {}
    exec("def unseen(weight, fmt): ...", made)
    qjax.register(made["unseen"])
    with pytest.raises(QjaxError, match="the source of unseen cannot be read"):
        parse_recipe("unseen:int4-g32").sources()


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", ["rtn", "awq", "qep", "nf4", "fp4", "none", "Twice", ""])
def test_names_that_cannot_be_registered(name):
    def function(weight, fmt): ...

    function.__name__ = name
    with pytest.raises(QjaxError, match="is no name" if name in ("Twice", "") else f"{name} is a method, statistic"):
        qjax.register(function)


@pytest.mark.usefixtures("registries")
def test_functions_that_are_no_methods():
    def untyped(weight, fmt, *, sigmas=3.0): ...

    def short(weight): ...

    for function in (untyped, short):
        with pytest.raises(QjaxError, match=r"is no rounding: expected \(weight, fmt, \*, options\)"):
            qjax.register(function)
