"""qjax.maps: x W = M(x) M'(W), statistics of mapped inputs, what a leaf stores, and maps from outside the package."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import maps
from qjax.errors import QjaxError
from qjax.maps import MAPS, Divide, Permute, Scale, permute, register_map

IN, OUT, TOKENS = 12, 5, 40
GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((TOKENS, IN)).astype(np.float32)
WEIGHT = GENERATOR.standard_normal((IN, OUT)).astype(np.float32)
SCALE = jnp.asarray(np.exp(GENERATOR.standard_normal(IN)), jnp.float32)
KINDS = {
    "divide": (Divide(SCALE), lambda x: x / np.asarray(SCALE, np.float64)),
    "scale": (
        Scale(SCALE.astype(jnp.float16)),
        lambda x: x * np.asarray(SCALE.astype(jnp.float16), np.float64),
    ),
    "permute": (
        Permute(jnp.asarray(GENERATOR.permutation(IN), jnp.int32)),
        lambda x: x[..., np.asarray(KINDS["permute"][0].index)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_the_same(kind):
    mapped, formula = KINDS[kind]
    np.testing.assert_allclose(mapped.on_input(jnp.asarray(X)), formula(X.astype(np.float64)), rtol=1e-6)
    y = np.asarray(mapped.on_input(jnp.asarray(X)), np.float64) @ np.asarray(mapped.on_weight(jnp.asarray(WEIGHT)), np.float64)
    np.testing.assert_allclose(y, X.astype(np.float64) @ WEIGHT, atol=1e-5)
    assert mapped.on_input(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_mapped_inputs(kind):
    """Of no, one and two axes of inputs: recomputed from what the map makes of x."""
    mapped, formula = KINDS[kind]
    taken = {
        0: lambda x: np.float64(len(x)),
        1: lambda x: np.mean(np.abs(x), axis=0),
        2: lambda x: x.T @ x / len(x),
    }
    for axes, statistic in taken.items():
        before, after = statistic(X.astype(np.float64)), statistic(formula(X.astype(np.float64)))
        np.testing.assert_allclose(mapped.on_statistic(jnp.asarray(before, jnp.float32), axes), after, rtol=1e-5, atol=1e-6)


def test_a_leaf_stores_normal_halves_whose_weight_is_exact():
    """The stored scale is the nearest half of the inverse, kept in range; its own weight makes up for the rounding."""
    divide = Divide(jnp.asarray([1e-6, 0.3, 1.0, 1e6], jnp.float32))
    stored = divide.stored()
    np.testing.assert_array_equal(stored.scale, np.array([1e4, 1 / np.float32(0.3), 1, 1e-4], np.float16))
    x, weight = jnp.ones((1, 4)), jnp.ones((4, 1))
    np.testing.assert_allclose(stored.on_input(x) @ stored.on_weight(weight), 4, rtol=1e-6)
    for kind in ("scale", "permute"):
        assert KINDS[kind][0].stored() is KINDS[kind][0]


def test_maps_one_after_the_other():
    """The first one first; `merged` takes a weight for mapped inputs back to the input as it comes."""
    chain = tuple(mapped for mapped, _ in KINDS.values())
    expected, weight = X.astype(np.float64), jnp.asarray(WEIGHT)
    for mapped, formula in KINDS.values():
        expected, weight = formula(expected), mapped.on_weight(weight)
    np.testing.assert_allclose(maps.on_input(chain, jnp.asarray(X)), expected, rtol=1e-5)
    np.testing.assert_allclose(maps.merged(chain, weight), WEIGHT, rtol=1e-5)
    assert maps.merged((), weight) is weight


def test_neighbours_that_divide_are_one():
    first, second, order = Divide(SCALE), Divide(3 * SCALE), KINDS["permute"][0]
    both, *rest = maps.composed([first, second, order, second])
    np.testing.assert_array_equal(both.scale, SCALE * (3 * SCALE))
    assert isinstance(both, Divide) and rest == [order, second]


def test_a_map_of_ones_own_is_a_pytree_with_static_fields():
    try:

        @register_map
        class Roll:
            shift: jax.Array
            by: int = dataclasses.field(default=1, metadata={"static": True})

        assert MAPS["Roll"] is Roll and register_map(Roll) is Roll
        roll = Roll(jnp.ones(3), by=2)
        (leaf,), tree = jax.tree.flatten(roll)
        assert leaf is roll.shift and jax.tree.unflatten(tree, [leaf]).by == 2
        assert tree != jax.tree.structure(Roll(jnp.ones(3), by=3))
        register_map(type("Roll", (), {"__annotations__": {}}))  # one's own again
    finally:
        MAPS.pop("Roll", None)
    with pytest.raises(QjaxError, match="Scale is a map of qjax already"):
        register_map(type("Scale", (), {"__annotations__": {}}))
    assert MAPS["Scale"] is Scale


def test_an_order_of_inputs_has_every_input_once():
    made = permute([2, 0, 1])
    assert made.index.dtype == jnp.int32
    np.testing.assert_array_equal(made.on_input(jnp.asarray([[10.0, 11, 12]])), [[12, 10, 11]])
    for wrong in ([0, 0, 2], [1, 2, 3], [[0, 1]], [0.5, 1.0]):
        with pytest.raises(QjaxError, match="is no order of inputs"):
            permute(wrong)
