"""Recipes: the grammar both ways, options from signatures, errors that name the part."""

import pytest

from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.recipe import method_table, parse_recipe


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
        ("rtn:int4-q128", "'q128'"),
        ("rtn:int12-g128", "'int12'"),
        ("rtn(clip=mse):bf16", "bf16 is a cast"),
        ("a:b:c", "2 colons"),
        ("rtn+rtn:int4-g128", "'rtn' is a rounding and must come last"),
        ("rtn:int8-channel/int8-tensor", "not supported yet"),
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
