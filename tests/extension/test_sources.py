"""The source of what comes from outside is part of the key of rows that use it, and of no others."""

import dataclasses
import importlib.util
import sys

import pytest

import qjax
from qjax import maps, registry
from qjax.recipe import parse_recipe
from qjax.sweep import columns
from qjax.sweep.columns import Column, Measurement, register_measurement

pytestmark = pytest.mark.usefixtures("registries")
SOURCE = """
import jax
import jax.numpy as jnp
import qjax
from qjax.scales import Floats
import dataclasses

fourth = qjax.Statistic(
    init=lambda size: jnp.zeros(size),
    update=lambda state, x, exact, w: state + w @ x**POWER,
    finalize=lambda state: state,
    axes=1,
)

class Turn:
    sign: jax.Array

    def on_input(self, x):
        return x * POWER

def turn(weights, fmt):
    return Turn(None)

def heavy(weight, fmt, *, fourth):
    return qjax.rtn(weight, fmt)

@dataclasses.dataclass(frozen=True)
class Up(Floats):
    dtype: str = "float16"

    def find(self, exact, largest, bound, mantissa):
        return POWER * exact
"""


def from_file(path, power, monkeypatch):
    """Registers everything that the file defines, with this number in it."""
    path.write_text(SOURCE.replace("POWER", str(power)))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where the source of a class is looked for
    spec.loader.exec_module(module)
    qjax.register_statistic("fourth", module.fourth)
    qjax.register_map(module.Turn)
    qjax.register(module.turn, kind="transform")
    qjax.register(module.heavy)
    return module


def test_what_rows_are_told_apart_by(tmp_path, monkeypatch):
    found = []
    for power in (2, 3):
        with registry.scoped():
            earlier = [*maps.MAPS.values()]
            from_file(tmp_path / f"own{power}.py", power, monkeypatch)
            recipes = {"rtn:int4-g16": set(), "rtn:int4-g16/int8-token": set(), "heavy:int4-g16": {"heavy", "statistic fourth"},
                       "turn+heavy:int4-g16": {"turn", "heavy", "statistic fourth", "map Turn"}}  # fmt: skip
            sources = {recipe: parse_recipe(recipe).sources() for recipe in recipes}
            left = {f"map {each.__name__}" for each in earlier}  # of other files, if this process ran their tests
            assert {recipe: set(each) - left for recipe, each in sources.items()} == recipes
            found.append(sources["turn+heavy:int4-g16"])
    changed = {name for name in found[0] if found[0][name] != found[1][name]}
    assert changed == {"statistic fourth", "map Turn"}


def test_formats_of_weights_and_inputs(tmp_path, monkeypatch):
    module = from_file(tmp_path / "own.py", 2, monkeypatch)
    qjax.register_codebook("twolevel", (-1.0, 1.0))
    qjax.register_scales("upward", module.Up())
    assert set(parse_recipe("rtn:twolevel-g16-upward").sources()) == {"codebook twolevel", "scales upward"}
    assert set(parse_recipe("rtn:int4-g16/twolevel-token").sources()) == {"codebook twolevel"}
    assert parse_recipe("nf4").sources() == parse_recipe("mxfp4").sources() == {}
    (book,) = parse_recipe("rtn:twolevel-g16").sources().values()
    (codec,) = parse_recipe("rtn:int4-g16-upward").sources().values()
    assert "(-1.0, 1.0)" in book and "return 2 * exact" in codec and "float16" in codec


def test_a_scope_forgets_maps_and_measurements():
    before = dict(maps.MAPS), list(columns.measurements())

    @dataclasses.dataclass
    class Fresh:
        size: int

    with registry.scoped():
        qjax.register_map(Fresh)
        register_measurement(Measurement("fresh", "Fresh", (Column("fresh", int, "", "a count"),), measure=lambda cell: {}))
        assert maps.MAPS["Fresh"] is Fresh and "fresh" in columns.measurements() and columns.column_of("fresh")
    assert (dict(maps.MAPS), list(columns.measurements())) == before and columns.column_of("fresh") is None
    qjax.register_map(Fresh)  # JAX knows the class from before
