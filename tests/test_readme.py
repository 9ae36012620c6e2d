"""What the README shows runs as it stands there."""

import re
import subprocess
import sys

import pytest

import qjax
from qjax.errors import QjaxError
from qjax.methods import added_methods
from qjax.recipe import parse_recipe
from qjax.sweep.measurements.provenance import provenance
from tests.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")


def test_own_method_from_function_to_figure(tmp_path):
    """The example, with fewer windows, as a script of its own."""
    (code,) = re.findall(r"<!-- own method -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) < 30
    script = tmp_path / "own.py"
    script.write_text(code.replace("max_windows=64", "max_windows=4").replace("windows=32", "windows=4"))
    paths = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    script.write_text(paths + script.read_text())
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [tmp_path / line for line in done.stdout.split()]
    assert {".md", ".tex", ".csv", ".pdf", ".png", ".txt"} == {path.suffix for path in written}
    (table,) = (tmp_path / "own-results").glob("*.md")
    for recipe in ("rtn:int3-g128", "cut:int3-g128", "cut(sigmas=2.5):int3-g128", "awq+cut:int3-g128", "cut:int4-g128"):
        assert f"| {recipe} " in table.read_text()


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
