"""Placement by path: the first rule decides, and a rule that does nothing is an error."""

import pytest

from qjax.driver.placement import parse_rule, place
from qjax.errors import QjaxError
from qjax.recipe import parse_recipe

KERNELS = ["block_0/attention/q/kernel", "block_0/mlp/down/kernel", "block_1/mlp/down/kernel", "head/output/kernel"]
INT4 = parse_recipe("rtn:int4-g128")
INT8 = parse_recipe("rtn:int8-g128")


def test_first_match_decides_and_scope_limits_the_default():
    rules = [parse_rule("block_1/.*down=none"), parse_rule("down=rtn:int8-g128")]
    placed = place(KERNELS, INT4, rules, scope=KERNELS[:3])
    assert placed == dict(zip(KERNELS, [INT4, INT8, None, None], strict=True))
    assert place(KERNELS, INT4)["head/output/kernel"] == INT4


def test_rules_reach_beyond_the_scope():
    placed = place(KERNELS, INT4, [parse_rule("head=rtn(clip=mse):int8-g128")], scope=KERNELS[:3])
    assert str(placed["head/output/kernel"]) == "rtn(clip=mse):int8-g128"


def test_rules_that_match_nothing_are_all_named():
    with pytest.raises(QjaxError, match=r"rules 'gate=none', 'embed=none' match no kernel.*block_0/attention/q/kernel"):
        place(KERNELS, INT4, [parse_rule("gate=none"), parse_rule("embed=none"), parse_rule("down=none")])


@pytest.mark.parametrize(("text", "named"), [("down", "PATTERN=RECIPE"), ("(=none", "regular"), ("down=foo:int4", "foo")])
def test_bad_rules(text, named):
    with pytest.raises(QjaxError, match=named):
        parse_rule(text)
