"""Methods x bits x group -> canonical recipes."""

import pytest

from qjax.errors import QjaxError
from qjax.recipe import parse_recipe
from qjax.sweep.cells import canonical, expand
from qjax.sweep.runner import Sweep, Treatment, rules_in_order, treatments_of


def test_methods_times_bits():
    assert expand(["rtn", "nf4"], [4, 2]) == ["rtn:int4-g128", "rtn:int2-g128", "rtn:nf4-g64"]


def test_group_applies_to_every_method():
    assert expand(["rtn(clip=mse)", "nf4-dq"], [4], "32") == ["rtn(clip=mse):int4-g32", "rtn:nf4-g32-dq"]
    assert expand(["rtn"], [3], "channel") == ["rtn:int3-channel"]


def test_codebooks_appear_at_their_own_bits_and_casts_always():
    assert expand(["bf16", "none"], [3]) == ["bf16", "none"]
    with pytest.raises(QjaxError, match="'nf4' has 4 bits"):
        expand(["rtn", "nf4"], [3, 2])
    assert expand(["fp8_e4m3"], [8, 4], "channel") == ["rtn:fp8_e4m3-channel"]


def test_formats_of_one_name_appear_once_with_their_own_group():
    assert expand(["mxfp4", "nvfp4", "fp4"], [4, 3]) == ["rtn:mxfp4", "rtn:nvfp4", "rtn:fp4_e2m1-g64"]
    assert expand(["mxfp8", "rtn"], [8], "64") == ["rtn:mxfp8_e4m3", "rtn:int8-g64"]
    with pytest.raises(QjaxError, match="'mxfp4' has 4 bits"):
        expand(["mxfp4"], [3])


def test_hqq_gets_real_zero_points():
    assert expand(["hqq", "hqq(iters=3)"], [4], "64") == ["hqq:int4-g64-z16", "hqq(iters=3):int4-g64-z16"]


def test_a_text_is_not_read_letter_by_letter():
    with pytest.raises(QjaxError, match=r"recipes is 'nf4', .*give \('nf4',\)"):
        Sweep("nf4", (), None)
    with pytest.raises(QjaxError, match="measures is 'divergence'"):
        Sweep(("nf4",), (), None, measures="divergence")


@pytest.mark.parametrize("order", [None, "block", "qep", "qep(alpha=1)"])
def test_names_in_an_order_stay_what_they_are(order):
    asked = ["gptq:int4-g128@qep", "gptq:int4-g128@parallel", "gptq:int3-g128", "rtn:int4-g128", "bf16", "none"]
    names, rules = canonical(asked, order), rules_in_order([f"mlp={recipe}" for recipe in asked], order)
    assert canonical(names, order) == names
    assert rules_in_order(rules, order) == rules
    meant = [[str(each and each.in_order(order)) for each in map(parse_recipe, texts)] for texts in (names, asked)]
    assert meant[0] == meant[1]


def test_a_cell_has_one_name_whatever_order_it_was_asked_in():
    options = {"corpora": (), "convention": None, "rules": ("mlp=gptq:int2-g128@qep",)}
    asked = [Sweep(("gptq:int4-g128@qep",), order=order, **options) for order in (None, "block", "qep")]
    treatments = [treatments_of(sweep, 2) for sweep in asked]
    assert treatments[0] == treatments[1] == treatments[2]
    assert treatments[0][1] == Treatment("gptq:int4-g128", ("mlp=gptq:int2-g128",))


def test_duplicates_are_dropped_and_every_recipe_is_checked():
    assert canonical(["nf4", "rtn:nf4-g64", "none"]) == ["rtn:nf4-g64", "none"]
    with pytest.raises(QjaxError, match="no recipes"):
        canonical([])
    with pytest.raises(QjaxError, match="gptqq"):
        canonical(["nf4", "gptqq:int4-g128"])
    with pytest.raises(QjaxError, match="bits 9"):
        expand(["rtn"], [9])
    with pytest.raises(QjaxError, match="'wide'"):
        expand(["rtn"], [4], "wide")
