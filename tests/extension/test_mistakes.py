"""What an outsider gets wrong is one clear error that names it, and nothing asked for is dropped."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import QjaxError
from qjax.maps import Divide
from tests.extension.common import tiny_model

pytestmark = pytest.mark.usefixtures("registries")
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32)


def good(weight, fmt):
    return qjax.rtn(weight, fmt)


def another_format(weight, fmt):
    return qjax.rtn(weight, "int8-g16")


def alone(weight, fmt):
    return qjax.rtn(weight, fmt)[0]


def no_map(weights, fmt):
    return jnp.ones(len(weights[0]))


def a_class(weights, fmt):
    return Divide


def too_short(weights, fmt):
    return Divide(jnp.ones(3))


def nothing(weight, start):
    return None


def forgetful(block, start):
    return {}, qjax.BlockInfo()


def uninformed(block, start):
    return dict(start), qjax.rtn(jnp.ones((4, 4)), "int4-g4")[1]


BAD = {  # function: its kind, a recipe with it, what the error says
    another_format: (
        "rounding",
        "another_format",
        "another_format returned QTensor .* in int8-g16, Info; expected .* int4-g16",
    ),
    alone: ("rounding", "alone", "alone returned QTensor"),
    no_map: ("transform", "no_map+rtn", "no_map returned ArrayImpl, expected a map of the input, as qjax.maps.Divide"),
    a_class: ("transform", "a_class+rtn", "a_class returned .*Divide.*, expected a map"),
    too_short: ("transform", "too_short+rtn", "too_short returned a Divide that does not fit"),
    nothing: ("refiner", "rtn+nothing", "nothing returned NoneType"),
    forgetful: ("block refiner", "rtn+forgetful", "forgetful returned dict, BlockInfo; expected .* every path"),
    uninformed: ("block refiner", "rtn+uninformed", "uninformed returned dict, Info; expected .*BlockInfo"),
}


@pytest.mark.parametrize("function", BAD)
def test_what_a_method_returns_is_checked(function):
    kind, methods, named = BAD[function]
    qjax.register(function, kind=kind)
    with pytest.raises(QjaxError, match=named):
        qjax.quantize(
            tiny_model(), f"{methods}:int4-g16", calibration=TOKENS, order="parallel", rules=("attention|block_1=none",)
        )


def test_a_transform_that_reads_no_data_is_done():
    """Alone, and in front of a rounding that reads some."""
    seen = []

    def halves(weights, fmt):
        seen.append(len(weights))
        return Divide(jnp.full(len(weights[0]), 2.0))

    qjax.register(halves, kind="transform")
    quantized, report = qjax.quantize(tiny_model(), "halves+rtn:int8-g16")
    assert report.layers[0].recipe == "halves:int8-g16" and sum(seen) == 14
    logits = qjax.apply(quantized, TOKENS)
    plain, _ = qjax.quantize(tiny_model(), "rtn:int8-g16")
    np.testing.assert_allclose(logits, qjax.apply(plain, TOKENS), atol=1e-4)
    assert [type(each).__name__ for each in quantized.params["block_0"]["attention"]["o"]["kernel"].inputs] == ["Scale"]


def with_statistic(block, start, *, abs_max, factor):
    assert set(abs_max) == set(factor) == set(block.sites) == set(start)
    assert all(value.shape == block.sites[path].weight.shape[:1] for path, value in abs_max.items())
    return dict(start), qjax.BlockInfo(jnp.float32(2), jnp.float32(1))


def test_a_block_refiner_is_given_statistics_by_path():
    qjax.register(with_statistic, kind="block refiner")
    _, report = qjax.quantize(tiny_model(), "rtn+with_statistic:int4-g16@block", calibration=TOKENS)
    assert {(layer.block_loss_before, layer.block_loss_after) for layer in report.layers if layer.recipe != "none"} == {(2, 1)}


def untyped(weight, fmt, *, sigmas=3.0): ...
def unset(weight, fmt, *, sigmas: float): ...
def listed(weight, fmt, *, sigmas: list = ()): ...
def three(weight, fmt, more): ...
def two_types(weight, fmt, *, sigmas: int | float | None = None): ...
def parent(weight, fmt, *, module): ...


@pytest.mark.parametrize("function", [untyped, unset, listed, three, two_types, parent])
def test_functions_that_are_no_methods(function):
    with pytest.raises(QjaxError, match=f"register: {function.__name__}.*(is no rounding: expected|only to a transform)"):
        qjax.register(function)


def literal(weight, fmt, *, mode: Literal["a", "b"] = "a", share: float | None = None): ...


def test_what_statistics_cannot_be():
    qjax.register(literal)
    for name, given, named in (
        ("mine", lambda x: x, "expected a qjax.Statistic"),
        ("damp", qjax.Statistic(0, 0, 0, 0), "argument"),
        ("weight", qjax.Statistic(0, 0, 0, 0), "argument"),
    ):
        with pytest.raises(QjaxError, match=named):
            qjax.register_statistic(name, given)
    with pytest.raises(QjaxError, match="as a 'rounder'; kinds are transform, rounding, refiner, block refiner"):
        qjax.register(good, kind="rounder")
