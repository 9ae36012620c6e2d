"""Recipes: the grammar both ways, options from signatures, errors that name the part."""

from typing import Literal

import pytest

from qjax.driver.layer import problem_of
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.methods import Stage, method_table, register
from qjax.recipe import parse_recipe
from qjax.rounding.nearest import rtn


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("rtn:int4-g128", "rtn:int4-g128"),
        (" rtn ( clip = mse ) : int3-g128 ".replace(" : ", ":"), "rtn(clip=mse):int3-g128"),
        ("rtn(clip=none):int3-g128", "rtn:int3-g128"),
        ("rtn():int3-g128", "rtn:int3-g128"),
        ("nf4", "rtn:nf4-g64"),
        ("fp4-g32", "rtn:fp4_e2m1-g32"),
        ("int4-g128-sym-edge", "rtn:int4-g128-sym"),
        ("bf16", "bf16"),
        ("rtn:fp32", "fp32"),
    ],
)
def test_equal_recipes_have_one_name(text, canonical):
    recipe = parse_recipe(text)
    assert str(recipe) == canonical
    assert parse_recipe(canonical) == recipe


def test_none_is_the_unquantized_model():
    assert parse_recipe("none") is None


def test_parts():
    recipe = parse_recipe("rtn(clip=mse):nf4-g64-dq")
    assert recipe.format == parse_format("nf4-g64-dq")
    assert dict(recipe.rounding.options) == {"clip": "mse"}
    assert recipe.statistics == ()
    assert not recipe.is_cast
    assert parse_recipe("bf16").is_cast


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rtn", "a method needs a format"),
        ("rnt:int4-g128", "did you mean 'rtn'"),
        ("rtn(clip=all):int4-g128", "none, mse.*'all'"),
        ("rtn(clap=mse):int4-g128", "'clap=mse'.*clip=none"),
        ("rtn(mse):int4-g128", "no option 'mse'"),
        ("rtn(clip=mse,clip=none):int4-g128", r"rtn\(clip=...\) is given twice"),
        ("rtn:int4-q128", r"did you mean 'rtn:int4-g128'\?"),
        ("rtn:int12-g128", "'int12'"),
        ("rtn(clip=mse):bf16", "bf16 is a cast"),
        ("a:b:c", "2 colons"),
        ("rtn+rtn:int4-g128", "'rtn' is a rounding and cannot follow a rounding"),
        ("gptq+awq:int4-g128", "'awq' is a transform and cannot follow a rounding"),
        ("descend+rtn:int4-g128", "'rtn' is a rounding and cannot follow a refiner"),
        ("rtn:int8-channel/int8", "activation format 'int8'"),
        ("rtn:int8-channel/", "activation format ''"),
        ("rtn:int8-channel/int9-token", "activation format 'int9-token': expected GRID-token"),
        ("bf16/int8-token", "is a cast and takes no method"),
        ("gptq(refine=-1):int4-g128", r"gptq\(refine=...\) expects a number of sweeps, 0 for none, got '-1'"),
        ("gptq(refine=x):int4-g128", r"gptq\(refine=...\) expects a number of sweeps, 0 for none, got 'x'"),
        ("", "unknown grid"),
    ],
)
def test_errors_name_the_part(text, named):
    with pytest.raises(QjaxError, match=named):
        parse_recipe(text)


def test_method_table_lists_options_with_defaults():
    table = {record["method"]: record for record in method_table()}
    assert table["rtn"]["options"] == "clip=none"
    assert table["rtn"]["needs"] == "no data"


@pytest.fixture
def every_kind(registries):
    """A method `kinds` with an option of every type."""

    def kinds(
        weight,
        fmt,
        *,
        block: int | None = None,
        damp: float = 0.01,
        decay: float | None = 0.5,
        order: bool = False,
        mode: Literal["slow", "fast"] | None = None,
        level: Literal[1, 2] = 1,
    ):
        raise NotImplementedError

    register(kinds)


@pytest.mark.usefixtures("registries")
def test_a_method_registered_again_is_the_new_one():
    def again(weight, fmt, *, sigmas: float = 3.0):
        raise QjaxError("again: the first one")

    register(again)
    recipe = parse_recipe("again(sigmas=2):int4-g8")
    assert str(recipe) == "again(sigmas=2.0):int4-g8"
    assert problem_of(recipe, (8, 8)) == "again: the first one"

    def again(weight, fmt, *, sigmas: float = 2.0):
        return rtn(weight, fmt)

    register(again)
    recipe = parse_recipe("again(sigmas=2):int4-g8")
    assert str(recipe) == "again:int4-g8"
    assert problem_of(recipe, (8, 8)) is None
    register(again, transform=True)
    assert parse_recipe("again:int4-g8").rounding == Stage("rtn")


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("", {}),
        ("block=64,damp=1e-3", {"block": 64, "damp": 1e-3}),
        ("block=none,mode=None,damp=0.01,level=1,order=False", {}),
        ("decay=none,mode=fast,level=2,order=TRUE", {"decay": None, "mode": "fast", "level": 2, "order": True}),
        ("decay=2", {"decay": 2.0}),
    ],
)
@pytest.mark.usefixtures("every_kind")
def test_options_have_the_annotated_type(given, options):
    recipe = parse_recipe(f"kinds({given}):int4-g128")
    found = dict(recipe.rounding.options)
    assert found == options
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in options.items()}
    assert parse_recipe(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("block=1.5", r"block=...\) expects int or none, got '1.5'"),
        ("damp=nan", r"damp=...\) expects a finite float, got 'nan'"),
        ("damp=-inf", r"damp=...\) expects a finite float, got '-inf'"),
        ("damp=none", r"damp=...\) expects a finite float, got 'none'"),
        ("decay=inf", r"decay=...\) expects a finite float or none, got 'inf'"),
        ("order=1", r"order=...\) expects bool, got '1'"),
        ("mode=medium", "one of slow, fast, got 'medium'"),
        ("level=3", "one of 1, 2, got '3'"),
        ("level=one", "expects int, got 'one'"),
        ("block=64,block=64", r"kinds\(block=...\) is given twice"),
        ("blok=64", "block=none, damp=0.01, decay=0.5, order=false, mode=none, level=1"),
    ],
)
@pytest.mark.usefixtures("every_kind")
def test_options_of_a_wrong_type(given, named):
    with pytest.raises(QjaxError, match=named):
        parse_recipe(f"kinds({given}):int4-g128")
