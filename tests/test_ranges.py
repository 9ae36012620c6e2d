"""qjax.rounding.parts.ranges: the search of ranges against trying every shrink in float64, for both kinds of error."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import grid
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.qtensor import dequantize
from qjax.rounding.gptq import gptq
from qjax.rounding.nearest import rtn
from qjax.rounding.parts import ranges
from qjax.rounding.parts.ranges import search_shrink, search_shrink_hessian
from tests.oracles import nearest as oracle
from tests.oracles.gptq import layer_error
from tests.test_factor import random_hessian

IN, OUT = 24, 5
SHRINKS = 1 - np.arange(81) / 100


def weights(seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(3, (IN, OUT)) * 0.02).astype(np.float32)


def errors(weight, fmt, hessian, shrinks) -> np.ndarray:
    """(shrinks, groups): e^T H_gg e of every group for every shrink, summed over what shares a scale."""
    index = oracle.group_index(weight.shape, fmt)
    found = []
    for shrink in shrinks:
        difference = oracle.rtn(weight, fmt, shrink).values - weight
        by_group = np.zeros(index.max() + 1)
        for column in range(weight.shape[1]):
            for g in np.unique(index[:, column]):
                inside = np.flatnonzero(index[:, column] == g)
                part = difference[inside, column]
                by_group[g] += part @ hessian[np.ix_(inside, inside)] @ part
        found.append(by_group)
    return np.array(found)


def flat(shrink, fmt) -> np.ndarray:
    """(groups,) in the oracle's numbering, output channel after output channel."""
    shrink = np.asarray(shrink)
    return shrink.T.reshape(-1) if fmt.granularity != "tensor" else shrink.reshape(-1)


def assert_least(shrink, table, shrinks):
    """Every group's shrink is one that was to be tried, and none has less error but by rounding."""
    chosen = np.argmin(np.abs(shrinks[:, None] - shrink), axis=0)
    np.testing.assert_allclose(shrinks[chosen], shrink, atol=1e-6)
    taken = table[chosen, np.arange(len(shrink))]
    assert np.all(taken <= table.min(axis=0) * (1 + 1e-3) + 1e-12)
    assert np.any(chosen > 0)


NAMES = ["int3-g8", "int2-g10", "int4-channel-sym", "int3-tensor", "nf4-g8", "int4-g8-dq", "int3-b8"]


@pytest.mark.parametrize("name", [*NAMES, "int3-b10", "nf4-b7"])
def test_least_weighted_squares(name):
    fmt = parse_format(name)
    weight = weights()
    importance = np.random.default_rng(1).uniform(0.1, 10, IN)
    groups = grid.to_groups(jnp.asarray(weight), fmt)
    plain = errors(weight, parse_format(name.removesuffix("-dq")), np.eye(IN), SHRINKS)
    present = grid.padding_mask(groups, weight.size)
    assert_least(flat(search_shrink(groups, present, fmt), fmt), plain, SHRINKS)
    if name not in ("int3-b10", "nf4-b7"):
        spread = grid.to_groups(jnp.asarray(importance[:, None], jnp.float32), fmt)
        weighted = errors(weight, parse_format(name.removesuffix("-dq")), np.diag(importance), SHRINKS)
        assert_least(flat(search_shrink(groups, spread, fmt), fmt), weighted, SHRINKS)


@pytest.mark.parametrize("part", [256, 4])
@pytest.mark.parametrize("name", NAMES)
def test_least_output_error(name, part, monkeypatch):
    """Of groups no larger than `part` the whole quadratic form; of larger ones the sum of their parts."""
    monkeypatch.setattr(ranges, "LARGEST_PART", part)
    fmt = parse_format(name)
    weight, hessian = weights(2), random_hessian(IN, 100)
    size = {"group": fmt.group, "flat": fmt.group}.get(fmt.granularity, IN)
    group, inside = np.divmod(np.arange(IN), size)
    same = group * IN + inside // part
    seen = np.where(same[:, None] == same, hessian.astype(np.float64), 0)
    shrinks = SHRINKS[:: ranges.HESSIAN_STEP]
    table = errors(weight, parse_format(name.removesuffix("-dq")), seen, shrinks)
    got = search_shrink_hessian(grid.to_groups(jnp.asarray(weight), fmt), jnp.asarray(hessian), fmt)
    assert_least(flat(got, fmt), table, shrinks)


def test_blocks_over_columns_have_no_hessian():
    groups = grid.to_groups(jnp.asarray(weights()), parse_format("int4-b10"))
    with pytest.raises(QjaxError, match=r"int4-b10: a block of 10.*24 inputs.*clip=mse.*g10"):
        search_shrink_hessian(groups, jnp.eye(IN), parse_format("int4-b10"))
    with pytest.raises(QjaxError, match="int4-b10"):
        rtn(jnp.asarray(weights()), "int4-b10", hessian=jnp.eye(IN), clip="hessian")


def test_what_the_search_is_for():
    """Each clip is the best of the three in what it minimises; in the layer's error the Hessian's is, with feedback too."""
    weight, hessian = weights(4), random_hessian(IN, 100)
    for method in (rtn, gptq):
        found = {
            clip: np.asarray(
                dequantize(method(jnp.asarray(weight), "int2-channel", hessian=jnp.asarray(hessian), clip=clip)[0])
            )
            for clip in ("none", "mse", "hessian")
        }
        loss = {clip: layer_error(values, weight, hessian) for clip, values in found.items()}
        assert loss["hessian"] < loss["none"]
        if method is rtn:
            assert loss["hessian"] <= loss["mse"] * 1.001
            squares = {clip: np.sum((values - weight) ** 2) for clip, values in found.items()}
            assert squares["mse"] <= squares["hessian"] * 1.001 and squares["mse"] < squares["none"]


def test_an_identity_is_least_squares():
    """clip=hessian with H = 1 tries every third range of clip=mse."""
    weight = jnp.asarray(weights(3))
    groups = grid.to_groups(weight, parse_format("int3-g8"))
    by_hessian = search_shrink_hessian(groups, jnp.eye(IN), parse_format("int3-g8"))
    steps = np.round((1 - np.asarray(by_hessian)) * 100)
    np.testing.assert_array_equal(steps % 3, 0)


def test_groups_of_zeros_keep_their_range():
    for name in ("int3-g8", "nf4-g8"):
        fmt = parse_format(name)
        groups = grid.to_groups(jnp.zeros((IN, OUT)), fmt)
        np.testing.assert_array_equal(search_shrink(groups, None, fmt), 1)
        np.testing.assert_array_equal(search_shrink_hessian(groups, jnp.eye(IN), fmt), 1)


@pytest.mark.parametrize("name", ["int3-g8", "int2-g10", "int4-channel-sym", "nf4-g8"])
def test_a_loop_in_larger_turns_finds_the_same(name, monkeypatch):
    fmt, weight = parse_format(name), jnp.asarray(weights())
    hessian = jnp.asarray(random_hessian(IN, 100))
    plain = search_shrink_hessian(grid.to_groups(weight, fmt), hessian, fmt)
    for turn in (2, 16):
        monkeypatch.setattr(ranges, "WORTH_UNROLLING", 1)
        monkeypatch.setattr(ranges, "UNROLLED", turn)
        np.testing.assert_array_equal(search_shrink_hessian(grid.to_groups(weight, fmt), hessian, fmt), plain)
