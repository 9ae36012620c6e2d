"""Names as people type them: what is taken, and what is answered with the recipe that means it."""

import re

import pytest

import qjax
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.grammar import METHODS, names, options_in_source, require_method, require_words, split_rule
from qjax.methods import options_of
from qjax.recipe import parse_recipe
from qjax.sweep.cells import expand


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("int4", "rtn:int4-g128"),
        ("GPTQ:INT4", "gptq:int4-g128"),
        ("AWQ+GPTQ:int3-g64", "awq+gptq:int3-g64"),
        ("int4-sym", "rtn:int4-g128-sym"),
        ("int8-channel-sym-max/INT8-token", "rtn:int8-channel-sym-max/int8-token"),
        ("NF4-dq", "rtn:nf4-g64-dq"),
        ("fp8", "rtn:fp8_e4m3-channel"),
        ("fp8/fp8-token", "rtn:fp8_e4m3-channel/fp8_e4m3-token"),
        ("fp8_e5m2", "rtn:fp8_e5m2-channel"),
        ("BF16", "bf16"),
    ],
)
def test_what_has_one_meaning_is_taken(typed, canonical):
    assert str(parse_recipe(typed)) == canonical
    assert parse_recipe("None") is None


@pytest.mark.parametrize(
    ("typed", "said", "recipe"),
    [
        ("W4A16", "preset.*compressed-tensors", "rtn:int4-g128-sym"),
        ("gptq:W4A16", "preset", "gptq:int4-g128-sym"),
        ("w4a16_asym", "preset", "rtn:int4-g128"),
        ("W8A8", "preset", "rtn:int8-channel-sym/int8-token"),
        ("w4a8", "preset", "rtn:int4-g128-sym/int8-token"),
        ("FP8_DYNAMIC", "preset", "rtn:fp8_e4m3-channel/fp8_e4m3-token"),
        ("NVFP4A16", "preset", "rtn:nvfp4"),
        ("w3a16g64", "bits and groups", "rtn:int3-g64"),
        ("Q4_K_M", "'Q4_K_M' is a type of GGUF files", "rtn:int4-g32-m16"),
        ("gptq:q5_k", "not made here", "gptq:int5-g32-m16"),
        ("Q2_K", "GGUF", "rtn:int2-g16-dq"),
        ("Q6_K", "GGUF files; here it is", "rtn:int6-g16-sym-full-k8s"),
        ("gptq:Q3_K_M", "GGUF files; here it is", "gptq:int3-g16-sym-full-k6s"),
        ("Q8_0", "GGUF", "rtn:int8-g32-sym-max"),
        ("Q4_0", "GGUF", "rtn:int4-g32-sym-full"),
        ("Q5_1", "GGUF files; here it is", "rtn:int5-g32-m16"),
        ("gptq:Q4_1", "GGUF files; here it is", "gptq:int4-g32-m16"),
        ("IQ4_XS", "GGUF", "rtn:iq4_nl-g32-fp16"),
        ("IQ2_XXS", "GGUF", "rtn:int2-g128"),
        ("bnb-4bit", "bitsandbytes", "rtn:nf4-b64"),
        ("LLM.int8()", "bitsandbytes", "llm_int8:int8-channel-sym-max"),
        ("int4wo", "another library", "rtn:int4-g128"),
        ("fp8-e4m3", "spelled", "rtn:fp8_e4m3-channel"),
        ("gptq-4bit-128g", "did you mean", "gptq:int4-g128"),
        ("gptq4", "did you mean", "gptq:int4-g128"),
        ("awq_int4_g64", "did you mean", "awq:int4-g64"),
        ("hqq-4bit", "did you mean", "hqq:int4-g128-z16"),
        ("8-bit", "did you mean", "rtn:int8-g128"),
        ("int4-g-1", "did you mean", "rtn:int4-channel"),
        ("int4-per-channel", "did you mean", "rtn:int4-channel"),
        ("int4-g128-asym", "did you mean", "rtn:int4-g128"),
        ("uint4-128", "did you mean", "rtn:int4-g128"),
        ("int4g128", "did you mean", "rtn:int4-g128"),
        ("nf4_double", "did you mean", "rtn:nf4-g64-dq"),
        ("bfloat16", "did you mean", "bf16"),
    ],
)
def test_other_names_are_answered_with_the_recipe_that_means_it(typed, said, recipe):
    with pytest.raises(QjaxError, match=rf"^recipe '{re.escape(typed)}': .*{said}.* '{re.escape(recipe)}'\??$"):
        parse_recipe(typed)
    assert str(parse_recipe(recipe)) == recipe


def test_formats_alone_are_answered_with_formats():
    with pytest.raises(QjaxError, match=r"^format 'W4A16': .* 'int4-g128-sym'$"):
        parse_format("W4A16")
    with pytest.raises(QjaxError, match=r"^recipe 'gptq\(clip=mse\):4bit-64g': format '4bit-64g': did you mean 'int4-g64'\?$"):
        parse_recipe("gptq(clip=mse):4bit-64g")


@pytest.mark.parametrize("typed", ["nonsense", "int4-g128-foo", "(" * 5000, "int4-g" + "9" * 5000, "gptq:", "q_k_m", "w4a16:x"])
def test_what_means_nothing_gets_the_list(typed):
    with pytest.raises(QjaxError, match=r"allowed|needs a format|expected"):
        parse_recipe(typed)


def test_groups_as_configurations_say_them():
    assert expand(["GPTQ", "NF4"], [4], "-1") == ["gptq:int4-channel", "rtn:nf4-channel"]
    assert expand(["rtn"], [4], "G64") == expand(["rtn"], [4], " 64 ") == ["rtn:int4-g64"]
    for wrong in ("", "0", "-2", "all"):
        with pytest.raises(QjaxError, match=r"expected a number of weights, channel \(or -1\) or tensor"):
            expand(["rtn"], [4], wrong)


@pytest.mark.parametrize("name", names(*METHODS))
def test_options_in_a_methods_source_are_those_of_the_method(name):
    """So that a mistake in one is found without importing it."""
    written, options = options_in_source(name), options_of(name)
    assert {each: option.default for each, option in written.items()} == {each: o.default for each, o in options.items()}
    assert {each: option.annotation for each, option in written.items()} == {each: o.annotation for each, o in options.items()}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("gptq(dam=1):int4", r"gptq has no option 'dam=1'; allowed, with defaults: damp=0.01, panel=64, act_order=true"),
        ("gptq(hessian=1):int4", "gptq has no option 'hessian=1'"),
        ("gptq(clip=foo):int4", "gptq.clip=....* is one of none, mse, hessian, got 'foo'"),
        ("rtn+descend(sweeps=1.5):int4", "descend.sweeps=....* expects int, got '1.5'"),
        ("gptq:int4@qep(alph=1)", "qep has no option 'alph=1'; allowed, with defaults: alpha=0.5, damp=0.01"),
        ("gptq:int4@block(a=1)", "block has no option 'a=1'; allowed, with defaults: none"),
    ],
)
def test_a_wrong_option_is_told_alike_before_and_after_a_method_is_imported(recipe, message):
    told = []
    for check in (require_words, parse_recipe):
        with pytest.raises(QjaxError, match=message) as error:
            check(recipe)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_options_that_are_right_as_far_as_words_go():
    for recipe in ("gptq(refine=4,block=8):int4", "GPTQ(damp=1):INT4@QEP(alpha=1)", "none", "rtn(clip=mse):int4", "nf4"):
        require_words(recipe)
    require_method("awq(guard=false)+gptq(act_order=false)@qep(damp=0.1)")
    with pytest.raises(QjaxError, match=r"^method 'gptq@qpe': unknown order"):
        require_method("gptq@qpe")
    with pytest.raises(QjaxError, match=r"^method 'W4A16': a method has no format, .*'int4-g128-sym'"):
        require_method("W4A16")
    with pytest.raises(QjaxError, match=r"^method 'W4A16@qep': a method has no format, .*'int4-g128-sym'"):
        require_method("W4A16@qep")
    with pytest.raises(QjaxError, match=r"^method 'rtn:int4': a method has no format, .* give 'rtn'$"):
        require_method("rtn:int4")
    with pytest.raises(QjaxError, match=r"^method 'gptq\(dmap=1\)': gptq has no option 'dmap=1'"):
        require_method("gptq(dmap=1)")


@pytest.mark.usefixtures("registries")
def test_options_of_a_method_from_outside():
    def mine(weight, fmt, *, hessian, sigmas: float = 3.0):
        return weight

    qjax.register(mine)
    require_words("mine(sigmas=2):int4")
    for wrong in ("mine(hessian=1):int4", "mine(sigma=1):int4"):
        with pytest.raises(QjaxError, match=r"allowed, with defaults: sigmas=3\.0"):
            require_words(wrong)


@pytest.mark.parametrize("typed", ["W4A16", "W8A8", "Q4_K_M", "IQ4_XS", "int4wo", "bnb_nf4"])
def test_what_is_meant_is_told_alike_before_and_after_a_method_is_imported(typed):
    told = []
    for check in (require_words, parse_recipe):
        with pytest.raises(QjaxError, match=rf"^recipe '{typed}': .*'.+'") as error:
            check(typed)
        told.append(str(error.value).replace("rtn:", ""))  # the rounding that a format alone means
    assert told[0] == told[1] and "None" not in told[0]


@pytest.mark.parametrize("pattern", ["(.+)+z", "(.*)*x", r"((a|b+)c)*", "(?:x{2,})+"])
def test_a_rule_that_may_match_without_end_is_refused(pattern):
    with pytest.raises(QjaxError, match="repeats what has repeats in it, which may take long"):
        split_rule(f"{pattern}=none")


@pytest.mark.parametrize("pattern", ["block_(0|1)+/", "(mlp/)?up", r"[+*)]+", r"\(a+\)+", "(attention|mlp)/.*", "(a+)?b"])
def test_a_rule_of_other_repeats_is_taken(pattern):
    assert split_rule(f"{pattern}=none") == (pattern, "none")
