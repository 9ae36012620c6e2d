"""qjax.rounding.gptq with clips: every group's range against a search of all shrinks in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import grid
from qjax.formats import parse_format
from qjax.rounding.gptq import gptq
from tests.oracles import gptq as oracle
from tests.test_gptq import IN, assert_codes_agree, grids_by_row, layer, unpack_codes, unpack_parameters
from tests.test_ranges import SHRINKS, assert_least, errors, flat

DAMP = 0.01


def costs_of_inputs(hessian, act_order) -> np.ndarray:
    """What an input's squared error costs in the loss that feedback leaves, 1 / U_ii^2, in the weight's own order."""
    order = oracle.find_order(hessian, act_order)
    wide = hessian.astype(np.float64)[np.ix_(order, order)]
    costs = np.zeros(len(order))
    costs[order] = np.diag(oracle.inverse_factor(wide, DAMP * np.mean(np.diag(wide)))) ** -2.0
    return costs


@pytest.mark.parametrize("clip", ["mse", "hessian"])
@pytest.mark.parametrize("name", ["int3-g16-fp32", "int2-channel-fp32", "nf4-g20", "int3-b20-sym-fp32"])
def test_ranges_of_static_groups(name, clip):
    """On the original weight: least squares, or squares weighed by what each input's error costs; the blocks cross columns."""
    fmt, (weight, hessian) = parse_format(name), layer()
    q, _ = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian), clip=clip, damp=DAMP)
    costs = costs_of_inputs(hessian, True) if clip == "hessian" else np.ones(IN)
    table = errors(weight, fmt, np.diag(costs), SHRINKS)
    whole = grid.find_parameters(grid.to_groups(jnp.asarray(weight), fmt), fmt).scale
    assert_least(flat(unpack_parameters(q)[0] / whole, fmt), table, SHRINKS)
    assert_codes_agree(fmt, q, weight, hessian, act_order=True)


@pytest.mark.parametrize("clip", ["mse", "hessian"])
@pytest.mark.parametrize("name", ["int3-g20-fp32", "nf4-g16", "int2-channel-fp32"])
def test_ranges_of_dynamic_groups(name, clip):
    """On weights with all earlier updates: the oracle goes the way of the codes found and hands each group to the search."""
    fmt, (weight, hessian) = parse_format(name), layer()
    options = {"static_groups": False, "act_order": False, "damp": DAMP}
    q, _ = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian), clip=clip, **options)
    size, held, seen = fmt.group or IN, grids_by_row(q)[:: fmt.group or IN], []
    find, encode, decode = oracle.codebook(fmt.codebook.values) if fmt.codebook else oracle.integers(fmt.bits, fmt.symmetric)

    def find_held(rows):
        seen.append(rows.copy())
        return held[(len(seen) - 1) % len(held)]

    expected = oracle.gptq(weight, hessian, find_held, encode, decode, group=size, static=False, zero_dead=False)
    same = np.all(expected.codes == np.asarray(unpack_codes(q)), axis=0)
    assert same.mean() > 0.6
    costs = costs_of_inputs(hessian, False) if clip == "hessian" else np.ones(IN)
    for number, rows in enumerate(seen[len(held) :]):  # the first ones are of the weight as it came
        scale, *zero = find(rows)
        weighed = costs[number * size : (number + 1) * size, None]
        table = [
            np.sum(weighed * (decode(encode(rows, scale * p, *zero), scale * p, *zero) - rows) ** 2, axis=0) for p in SHRINKS
        ]
        assert_least((held[number][0] / scale)[same], np.array(table)[:, same], SHRINKS)
