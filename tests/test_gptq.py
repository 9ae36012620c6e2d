"""qjax.rounding.gptq: the float64 oracle for every grid, its theorem, what must not change codes, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import qtensor
from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.qtensor import dequantize
from qjax.rounding.gptq import gptq
from qjax.rounding.nearest import rtn
from qjax.rounding.parts.feedback import factorize
from tests.oracles import gptq as oracle
from tests.oracles import nearest as nearest_oracle
from tests.test_factor import random_hessian

IN, OUT = 48, 12
unpack_codes = jax.jit(qtensor.unpack_codes)
unpack_parameters = jax.jit(qtensor.unpack_parameters)


def weights(shape=(IN, OUT), seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(np.float32)


@functools.cache
def layer(inputs: int = IN) -> tuple[np.ndarray, np.ndarray]:
    return weights((inputs, OUT)), random_hessian(inputs, 6 * inputs)


def grids_by_row(q) -> list[tuple[np.ndarray, ...]]:
    """The oracle's parameters, of one input each: the scales and zero points the QTensor holds."""
    fmt, (rows, columns) = q.format, q.shape
    scale, zero = (None if part is None else np.asarray(part, np.float64) for part in unpack_parameters(q))
    index = nearest_oracle.group_index((rows, columns), fmt)

    def spread(values):  # (rows, columns): each weight's
        if fmt.granularity in ("tensor", "channel"):
            return np.broadcast_to(values, (rows, columns))
        if fmt.granularity == "group" or rows % fmt.group == 0:
            return values[np.arange(rows) // min(fmt.group, rows)]
        return values.reshape(-1)[index]

    zero = -zero / scale if fmt.has_minima else zero
    zero = spread(zero) if zero is not None else np.full((rows, columns), 2.0 ** (fmt.bits - 1))
    parts = (spread(scale),) if fmt.codebook else (spread(scale), zero)
    return [tuple(part[row] for part in parts) for row in range(rows)]


def oracle_of(fmt, q, weight, hessian, **options) -> tuple[oracle.Rounded, object]:
    """The oracle on the grid that the QTensor holds."""
    _, encode, decode = oracle.codebook(fmt.codebook.values) if fmt.codebook else oracle.integers(fmt.bits, fmt.symmetric)
    parameters = grids_by_row(q)
    expected = oracle.gptq(weight, hessian, None, encode, decode, group=1, parameters=parameters, zero_dead=False, **options)
    return expected, encode


def assert_codes_agree(fmt, q, weight, hessian, *, tolerance=2e-3, **options) -> oracle.Rounded:
    expected, encode = oracle_of(fmt, q, weight, hessian, **options)
    codes = np.asarray(unpack_codes(q))
    wrong = oracle.disagreements(expected, codes, encode, group=1, tolerance=tolerance)
    assert not wrong, wrong[:3]
    agreed = np.all(expected.codes == codes, axis=0)
    assert agreed.mean() >= 0.7, "more channels left the oracle at a tie than ties there can be"
    return expected


STATIC = [
    *("int8-g16", "int4-g16", "int3-g16", "int2-g16", "int1-g16", "int6-channel", "int5-tensor"),
    *("int4-g16-sym", "int3-channel-sym-max", "int2-tensor-sym", "int1-g16-sym", "int4-g20", "int4-g64"),
    *("int4-b16", "int4-b20", "int3-b7-sym-max", "int4-g16-dq", "nf4-g16-dq", "nf4-b20"),
    *("nf4-g16", "nf4-channel", "fp4_e2m1-g16", "fp4_bnb-g16", "fp8_e4m3-channel", "fp8_e5m2-tensor"),
    *("mxfp4", "mxfp8_e5m2", "nvfp4", "int2-g16-sym-full", "int3-g16-z16", "int3-b20-z32"),
    *("int4-g16-m16", "int5-g20-m16", "int2-channel-m16", "int3-b20-m16"),
]


@pytest.mark.parametrize("name", STATIC)
def test_equals_the_oracle(name):
    """Codes but for ties; the grid that of nearest rounding; and Info says the true figures."""
    fmt = parse_format(name)
    weight, hessian = layer()
    q, info = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian))
    assert_codes_agree(fmt, q, weight, hessian, act_order=True)
    plain, _ = rtn(jnp.asarray(weight), fmt)
    for ours, theirs in zip(jax.tree.leaves((q.scales, q.zeros)), jax.tree.leaves((plain.scales, plain.zeros)), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=1e-3)
    values = np.asarray(dequantize(q), np.float64)
    assert float(info.proxy_loss) == pytest.approx(oracle.layer_error(values, weight, hessian), rel=2e-3)
    square = np.sum((values - weight) ** 2) / np.sum(np.square(weight, dtype=np.float64))
    assert float(info.weight_error) == pytest.approx(square, rel=1e-4)
    assert float(info.damp) == np.float32(0.01)
    assert q.nbytes == fmt.nbytes(IN, OUT)


@pytest.mark.parametrize("options", [{}, {"clip": "mse"}, {"static_groups": False, "act_order": False}])
def test_minima_of_weights_far_from_zero(options):
    """They are near them in the last group too, which has 8 weights of 20; and the loss is below that of nearest rounding."""
    weight, hessian = layer()
    for name in ("int4-g20-m16", "int5-g20-m16"):
        shifted = weight + np.float32(0.5)
        q, info = gptq(jnp.asarray(shifted), name, hessian=jnp.asarray(hessian), **options)
        plain, _ = rtn(jnp.asarray(shifted), name)
        assert float(info.proxy_loss) < 0.9 * oracle.layer_error(np.asarray(dequantize(plain)), shifted, hessian)
        assert float(info.proxy_loss) == pytest.approx(
            oracle.layer_error(np.asarray(dequantize(q)), shifted, hessian), rel=2e-3
        )
        scale, minimum = unpack_parameters(q)
        assert np.all(minimum > 0.2) and np.all(scale < 0.05) and float(info.clipped) < 0.2


@pytest.mark.parametrize("name", ["nf4-b20-dq", "int4-b20-dq"])
def test_blocks_with_dq_code_with_the_exact_scale(name):
    """As bitsandbytes does, so that the grid for coding is not the one that the QTensor holds; errors are of what it holds."""
    weight, hessian = layer()
    q, info = gptq(jnp.asarray(weight), name, hessian=jnp.asarray(hessian))
    error = oracle.layer_error(np.asarray(dequantize(q)), weight, hessian)
    assert float(info.proxy_loss) == pytest.approx(error, rel=2e-3)
    plain, _ = rtn(jnp.asarray(weight), name)
    assert error < 0.9 * oracle.layer_error(np.asarray(dequantize(plain)), weight, hessian)


@pytest.mark.parametrize(("act_order", "damp"), [(False, 0.01), (True, 0.2)])
def test_order_and_damping(act_order, damp):
    weight, hessian = layer()
    fmt = parse_format("int3-g16")
    q, _ = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian), act_order=act_order, damp=damp)
    assert_codes_agree(fmt, q, weight, hessian, act_order=act_order, damp=damp)


@pytest.mark.parametrize(
    "name", ["int3-g16", "int4-g20", "int4-b16", "int2-channel", "nf4-g16", "int4-g16-sym-max", "int4-g64"]
)
def test_dynamic_groups(name):
    """Codes are the oracle's on the grids found, and these span weights with all earlier updates."""
    fmt = parse_format(name)
    weight, hessian = layer()
    q, info = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian), static_groups=False, act_order=False)
    expected = assert_codes_agree(fmt, q, weight, hessian, act_order=False)
    error = oracle.layer_error(np.asarray(dequantize(q)), weight, hessian)
    assert float(info.proxy_loss) == pytest.approx(error, rel=2e-3)
    # The grids: a second oracle that finds them itself, block by block, the last group judged the hardest.
    group = IN if fmt.granularity == "channel" else min(fmt.group, IN)
    find, encode, decode = oracle.codebook(fmt.codebook.values) if fmt.codebook else oracle.integers(fmt.bits, fmt.symmetric)
    if fmt.bound == "max":
        return
    free = oracle.gptq(weight, hessian, find, encode, decode, group=group, static=False)
    same = np.all(free.codes == expected.codes, axis=0)
    assert same.mean() > 0.3
    held = grids_by_row(q)
    for number, parameters in enumerate(free.parameters):
        np.testing.assert_allclose(held[number * group][0][same], parameters[0][same], rtol=2e-3)


@pytest.mark.parametrize("name", ["int4-g16", "nf4-b20", "int3-g16-sym"])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_a_diagonal_hessian_is_nearest_rounding(name, clip):
    weight, _ = layer()
    plain, plain_info = rtn(jnp.asarray(weight), name, clip=clip)
    diagonal = np.random.default_rng(1).uniform(0.1, 10, IN).astype(np.float32)
    for hessian in (np.eye(IN, dtype=np.float32), np.diag(diagonal)):
        q, info = gptq(jnp.asarray(weight), name, hessian=jnp.asarray(hessian), clip=clip)
        np.testing.assert_array_equal(unpack_codes(q), unpack_codes(plain))
        np.testing.assert_array_equal(dequantize(q), dequantize(plain))
        assert float(info.weight_error) == pytest.approx(float(plain_info.weight_error), rel=1e-5)
        assert float(info.clipped) == pytest.approx(float(plain_info.clipped), abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_gain_over_nearest_is_the_theorems(bits, act_order):
    """Expected damped loss: sum of R_ii^2 over the trace (QuIP, arXiv 2307.13304), for errors spread evenly over a cell."""
    size, outputs = 64, 512
    hessian = random_hessian(size, 1000, seed=3)
    hessian += 0.2 * np.mean(np.diag(hessian)) * np.eye(size, dtype=np.float32)  # feedback that four levels have room for
    damp = 0.01
    factor = factorize(jnp.asarray(hessian), damp=damp, act_order=act_order)
    damped = hessian.astype(np.float64) + damp * np.mean(np.diag(hessian)) * np.eye(size)
    expected = float(np.sum(np.square(factor.pivots, dtype=np.float64))) / np.trace(damped)
    order = oracle.find_order(hessian, act_order)
    assert expected == pytest.approx(oracle.expected_ratio(hessian, damp, order), rel=1e-4)
    # The first column's weights fix the grid, -(largest + 1) / 2 .. (largest - 1) / 2 steps of 1; the others keep one and a
    # half steps from its ends, so that no update leaves it, and fill whole cells.
    largest = 2**bits - 1
    weight = np.random.default_rng(4).uniform(-1, 1, (size, outputs)) * (largest / 2 - 1) - 0.5
    weight[:, 0] = np.where(np.arange(size) == 0, largest / 2, -largest / 2)
    arguments = (jnp.asarray(weight, jnp.float32), f"int{bits}-tensor-fp32")
    got, _ = gptq(*arguments, hessian=jnp.asarray(hessian), factor=factor)
    plain, _ = rtn(*arguments)
    losses = [oracle.layer_error(np.asarray(dequantize(q))[:, 1:], weight[:, 1:], damped) for q in (got, plain)]
    assert expected < 0.9
    assert losses[0] / losses[1] == pytest.approx(expected, rel=0.05)


def test_never_worse_than_nearest_in_its_own_loss():
    weight, hessian = layer()
    for name in ("int2-g16", "int3-g16", "nf4-g16"):
        for clip in ("none", "hessian"):
            q, _ = gptq(jnp.asarray(weight), name, hessian=jnp.asarray(hessian), clip=clip)
            plain, _ = rtn(jnp.asarray(weight), name)
            ours, theirs = (oracle.layer_error(np.asarray(dequantize(each)), weight, hessian) for each in (q, plain))
            assert ours < theirs, (name, clip)


@pytest.mark.parametrize("name", ["int3-g16"])
def test_block_changes_nothing_but_ties(name):
    """Blocks of 1, of a size that does not divide, and of more than all inputs."""
    fmt = parse_format(name)
    weight, hessian = layer()
    for block in (1, 13):
        q, _ = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian), panel=block)
        assert_codes_agree(fmt, q, weight, hessian, act_order=True)


def test_vmap_and_jit_give_the_same_codes():
    stacked = jnp.stack([jnp.asarray(weights(seed=seed)) for seed in range(3)])
    hessians = jnp.stack([jnp.asarray(random_hessian(IN, 300, seed=seed)) for seed in range(3)])
    quantize = functools.partial(gptq, fmt="int3-g16")
    together, info = jax.jit(jax.vmap(lambda w, h: quantize(w, hessian=h)))(stacked, hessians)
    assert together.shape == (3, IN, OUT)
    assert info.damp.shape == (3,)
    decoded = dequantize(together)
    for i in range(3):
        alone, alone_info = quantize(stacked[i], hessian=hessians[i])
        assert np.mean(np.asarray(decoded[i]) == np.asarray(dequantize(alone))) > 0.97
        assert float(info.proxy_loss[i]) == pytest.approx(float(alone_info.proxy_loss), rel=0.05)


def test_a_shared_factor_is_the_same_as_its_own():
    weight, hessian = map(jnp.asarray, layer())
    factor = factorize(hessian, damp=0.05, act_order=False)
    shared, info = gptq(weight, "int4-g16", hessian=hessian, factor=factor)
    own, _ = gptq(weight, "int4-g16", hessian=hessian, damp=0.05, act_order=False)
    np.testing.assert_array_equal(shared.codes, own.codes)
    assert float(info.damp) == np.float32(0.05)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_are_rounded_to_nearest(act_order):
    weight, hessian = (array.copy() for array in layer())
    dead = [0, 5, IN - 1]
    hessian[dead] = 0
    hessian[:, dead] = 0
    fmt = parse_format("int3-g16")
    q, info = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian), act_order=act_order)
    plain, _ = rtn(jnp.asarray(weight), fmt)
    np.testing.assert_array_equal(np.asarray(unpack_codes(q))[dead], np.asarray(unpack_codes(plain))[dead])
    assert_codes_agree(fmt, q, weight, hessian, act_order=act_order)
    error = oracle.layer_error(np.asarray(dequantize(q)), weight, hessian)
    assert float(info.proxy_loss) == pytest.approx(error, rel=2e-3)
    nothing, info = gptq(jnp.asarray(weight), fmt, hessian=jnp.zeros((IN, IN)))  # all dead
    np.testing.assert_array_equal(nothing.codes, plain.codes)
    assert float(info.proxy_loss) == 0


def test_a_singular_hessian_is_damped_more_and_info_says_so():
    weight, _ = layer()
    x = np.random.default_rng(0).standard_normal((7, IN)).astype(np.float32)
    hessian = x.T @ x / 7
    q, info = gptq(jnp.asarray(weight), "int4-g16", hessian=jnp.asarray(hessian), damp=0.0)
    assert float(info.damp) > 0
    assert np.all(np.isfinite(dequantize(q)))
    error = oracle.layer_error(np.asarray(dequantize(q)), weight, hessian)
    plain, _ = rtn(jnp.asarray(weight), "int4-g16")
    assert error < 0.5 * oracle.layer_error(np.asarray(dequantize(plain)), weight, hessian)
    assert float(info.proxy_loss) == pytest.approx(error, rel=0.05)


def test_what_is_not_finite_shows_in_info():
    weight, hessian = map(jnp.asarray, layer())
    _, info = gptq(weight.at[3, 2].set(jnp.nan), "int4-g16", hessian=hessian)
    assert not np.isfinite(info.weight_error)
    _, info = gptq(weight, "int4-g16", hessian=hessian.at[3, 2].set(jnp.nan).at[2, 3].set(jnp.nan))
    assert np.isnan(info.proxy_loss)


def test_any_float_type_and_zero_weights():
    weight, hessian = map(jnp.asarray, layer())
    half, _ = gptq(weight.astype(jnp.bfloat16), "int4-g16", hessian=hessian)
    same, _ = gptq(weight.astype(jnp.bfloat16).astype(jnp.float32), "int4-g16", hessian=hessian)
    np.testing.assert_array_equal(half.codes, same.codes)
    for name in ("int4-g16", "nf4-g16"):
        q, info = gptq(jnp.zeros((IN, OUT)), name, hessian=hessian)
        np.testing.assert_array_equal(dequantize(q), 0)
        assert float(info.weight_error) == float(info.proxy_loss) == 0
    q, _ = gptq(jnp.ones((1, 3)), "int4-g16", hessian=jnp.ones((1, 1)))  # one input
    np.testing.assert_allclose(dequantize(q), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("int4-g16", {"clip": "all"}, "unknown clip 'all'.*none, mse, hessian"),
        ("int4-g16", {"damp": -0.1}, "damp=-0.1"),
        ("int4-g16", {"panel": 0}, "panel=0"),
        ("bf16", {}, "bf16 is a cast"),
        ("int4-g16", {"static_groups": False}, "permutation"),
        ("int4-g16-dq", {"static_groups": False, "act_order": False}, "dq quantizes all scales"),
        ("int4-b20", {"static_groups": False, "act_order": False}, "span output columns"),
        ("int4-g16", {"hessian": jnp.eye(IN + 1)}, r"\(49, 49\).*\(48, 48\)"),
        ("int4-q16", {}, "did you mean 'int4-g16'"),
    ],
)
def test_bad_options_are_named(name, options, named):
    weight, hessian = map(jnp.asarray, layer())
    with pytest.raises(QjaxError, match=named):
        gptq(weight, name, **({"hessian": hessian} | options))
    with pytest.raises(QjaxError, match="expected a weight"):
        gptq(weight[0], "int4-g16", hessian=hessian)
