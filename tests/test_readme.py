"""What the README shows runs as it stands there."""

import re
import runpy

import pytest

import qjax
from qjax.errors import QjaxError
from qjax.methods import added_methods
from qjax.recipe import parse_recipe
from qjax.sweep.measurements.provenance import provenance
from tests.conftest import first_block
from tests.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")


@pytest.mark.usefixtures("registries")
def test_own_method_from_function_to_figure(tmp_path, monkeypatch, capsys):
    """The example as a script, on the bundled model's first block and fewer windows."""
    (code,) = re.findall(r"<!-- own method -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) < 30
    model = first_block(tmp_path / "bundled")
    smaller = {"max_windows=64": "max_windows=4", "windows=32": "windows=4", '"bundled"': f'"{model}"'}
    for each, other in smaller.items():
        assert each in code
        code = code.replace(each, other)
    script = tmp_path / "own.py"
    script.write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    written = [tmp_path / line for line in capsys.readouterr().out.split()]
    assert {".md", ".tex", ".csv", ".pdf", ".png"} == {path.suffix for path in written}
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
