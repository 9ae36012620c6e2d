"""Recipes that read calibration data: transforms, orders, one name for equal ones, and errors."""

import pytest

from qjax.driver.placement import parse_rule
from qjax.errors import QjaxError
from qjax.methods import Stage, method_table
from qjax.recipe import DEFAULT_ORDER, parse_order, parse_recipe
from qjax.sweep.cells import canonical


@pytest.mark.parametrize(
    ("texts", "canonical"),
    [
        (("gptq:int3-g128", "gptq():int3-g128", "gptq(damp=1e-2,act_order=TRUE):int3-g128"), "gptq:int3-g128"),
        ((f"gptq:int3-g128@{DEFAULT_ORDER}", " gptq:int3-g128 @ qep ", "gptq:int3-g128@qep(alpha=0.5)"), "gptq:int3-g128"),
        (("gptq(panel=128,damp=5e-2):nf4", "gptq( damp = 0.05, panel=128 ):nf4-g64"), "gptq(damp=0.05,panel=128):nf4-g64"),
        (("awq:int4-g128", "awq+rtn(clip=hessian):int4-g128", "awq(scaling=both,ratios=20):int4-g128"), "awq:int4-g128"),
        (("awq+rtn:int4-g128", "awq+rtn(clip=none):int4-g128"), "awq+rtn:int4-g128"),
        (("awq+gptq:int3-g128", "awq + gptq(clip=none):int3-g128"), "awq+gptq:int3-g128"),
        (("awq(loss=module)+gptq:int3-g128@block",), "awq(loss=module)+gptq:int3-g128@block"),
        (("rtn(clip=hessian):int3-g128@parallel",), "rtn(clip=hessian):int3-g128@parallel"),
        (("gptq(damp=1e+1):int4-g128",), "gptq(damp=10.0):int4-g128"),
        (("gptq:int4-g128@qep(damp=1,alpha=1)",), "gptq:int4-g128@qep(alpha=1.0,damp=1.0)"),
        (("awq+awq(scaling=duo)+gptq:int4-g128",), "awq+awq(scaling=duo)+gptq:int4-g128"),
    ],
)
def test_equal_recipes_have_one_name(texts, canonical):
    for text in texts:
        recipe = parse_recipe(text)
        assert str(recipe) == canonical
        assert str(parse_recipe(canonical)) == canonical
        assert str(parse_recipe(str(recipe))) == canonical


def test_recipes_of_one_name_mean_the_same():
    """The default order has no name, so names are for recipes whose order is settled; until then an explicit order wins."""
    explicit, silent = parse_recipe(f"gptq:int3-g128@{DEFAULT_ORDER}"), parse_recipe("gptq:int3-g128")
    assert str(explicit) == str(silent) == "gptq:int3-g128"
    assert explicit == silent and hash(explicit) == hash(silent)
    assert explicit != parse_recipe("gptq:int3-g128@block") and explicit != parse_recipe("gptq:int3-g64") and explicit != "x"
    assert str(explicit.in_order("parallel")) == "gptq:int3-g128"
    assert str(silent.in_order("parallel")) == "gptq:int3-g128@parallel"
    named = ["gptq:int3-g128@qep", "gptq:int3-g128@parallel"]
    assert canonical(["gptq:int3-g128@qep", "gptq:int3-g128"], "parallel") == named


@pytest.mark.parametrize(
    ("text", "statistics"),
    [
        ("rtn:int4-g128", ()),
        ("rtn(clip=mse):int4-g128", ()),
        ("rtn(clip=hessian):int4-g128", ("hessian",)),
        ("gptq:int4-g128", ("hessian",)),
        ("gptq(clip=hessian):int4-g128", ("hessian",)),
        ("awq:int4-g128", ("hessian", "abs_mean")),
        ("awq+rtn:int4-g128", ("hessian", "abs_mean")),
        ("awq(loss=module)+gptq:int4-g128", ("hessian", "abs_mean")),
    ],
)
def test_statistics(text, statistics):
    assert parse_recipe(text).statistics == statistics


def test_orders():
    assert parse_recipe("gptq:int4-g128").order in (None, Stage(DEFAULT_ORDER))
    assert parse_recipe("gptq:int4-g128@block").order == Stage("block")
    assert parse_recipe("gptq:int4-g128@qep(alpha=0.25)").order == Stage("qep", (("alpha", 0.25),))
    assert str(parse_recipe("gptq:int4-g128").in_order("parallel")) == "gptq:int4-g128@parallel"
    assert str(parse_recipe("gptq:int4-g128@block").in_order("parallel")) == "gptq:int4-g128@block"
    assert parse_recipe("rtn:int4-g128").in_order("parallel") == parse_recipe("rtn:int4-g128")
    assert parse_recipe("bf16").in_order("qep(alpha=1)") == parse_recipe("bf16")
    assert parse_order("qep(damp=0.01)") == Stage("qep")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gptq", "a method needs a format, for example gptq:int4-g128"),
        ("awq", "a method needs a format, for example awq:int4-g128"),
        ("gtpq:int4-g128", "did you mean 'gptq'"),
        ("gptq(dampp=1):int4-g128", "no option 'dampp=1'.*damp=0.01.*static_groups=true"),
        ("gptq(hessian=1):int4-g128", "no option 'hessian=1'"),
        ("gptq(factor=1):int4-g128", "no option 'factor=1'"),
        ("gptq(damp=nan):int4-g128", "expects a finite float"),
        ("awq(loss=hesian):int4-g128", "hessian, module.*'hesian'"),
        ("awq(abs_mean=1):int4-g128", "no option 'abs_mean=1'"),
        ("gptq+awq:int4-g128", "'awq' is a transform and cannot follow a rounding"),
        ("rtn+gptq:int4-g128", "'gptq' is a rounding and cannot follow a rounding"),
        ("gptq:bf16", "bf16 is a cast and takes no method"),
        ("awq:fp32", "fp32 is a cast and takes no method"),
        ("gptq:int4-g128@", "unknown order of calibration ''.*parallel, block, sequential, qep"),
        ("gptq:int4-g128@sequental", "unknown order of calibration 'sequental'; did you mean 'sequential'"),
        ("gptq:int4-g128@qep(beta=1)", "qep has no option 'beta=1'; allowed, with defaults: alpha=0.5, damp=0.01"),
        ("gptq:int4-g128@block(alpha=1)", "block has no option 'alpha=1'; allowed, with defaults: none"),
        ("gptq:int4-g128@block@qep", "unknown order"),
        ("rtn:int4-g128@block", "read no calibration data"),
        ("rtn(clip=mse):int4-g128@qep", "read no calibration data"),
        ("bf16@block", "read no calibration data"),
        ("gptq@block:int4-g128", "needs a format|unknown"),
        ("awq++gptq:int4-g128", r"did you mean 'awq\+gptq:int4-g128'"),
        ("awq+:int4-g128", "did you mean 'awq:int4-g128'"),
    ],
)
def test_errors_name_the_part(text, named):
    with pytest.raises(QjaxError, match=named):
        parse_recipe(text)


def test_rules_hold_orders():
    rule = parse_rule("mlp/down=gptq(damp=0.05):int4-g128@block")
    assert rule.pattern == "mlp/down"
    assert str(rule) == "mlp/down=gptq(damp=0.05):int4-g128@block"


def test_method_table_lists_transforms_and_orders():
    table = {record["method"]: record for record in method_table()}
    assert {name: record["kind"] for name, record in table.items()} == {
        "rtn": "rounding",
        "gptq": "rounding",
        "hqq": "rounding",
        "awq": "transform",
        "smoothquant": "transform",
        "hadamard": "transform",
        "descend": "refiner",
        "block_ap": "block refiner",
        "llm_int8": "activation",
        "@parallel": "order",
        "@block": "order",
        "@sequential": "order",
        "@qep": "order",
    }
    assert table["gptq"]["needs"] == "hessian"
    assert table["gptq"]["options"] == "damp=0.01, panel=64, act_order=true, static_groups=true, clip=none"
    assert table["awq"]["needs"] == "hessian, abs_mean"
    assert table["smoothquant"]["needs"] == "abs_max" and table["smoothquant"]["options"] == "alpha=0.5, search=false"
    assert table["llm_int8"]["options"] == "threshold=6.0, outliers=batch"
    assert all(record["what"].strip() for record in table.values())
