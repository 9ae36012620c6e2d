"""qjax.refining.descend: no sweep raises the loss, what it ends at is a minimum, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.qtensor import dequantize
from qjax.refining.descend import descend
from qjax.rounding.gptq import gptq
from qjax.rounding.nearest import rtn
from qjax.rounding.parts.feedback import factorize
from tests.test_gptq import IN, layer, unpack_codes, unpack_parameters, weights


def refined(weight, fmt, hessian, sweeps, *, damp=0.01, **options):
    """GPTQ's result and what `sweeps` of descent make of it."""
    q, info = gptq(weight, fmt, hessian=hessian, damp=damp, **options)
    return descend(weight, q, hessian=hessian, damp=damp, sweeps=sweeps) if sweeps else (q, info)


def test_refinement_lowers_the_loss_sweep_by_sweep():
    """For integers, codebooks, channels, doubly quantized and cut groups; the loss told is that of the result."""
    weight, hessian = layer()
    for fmt in ("int2-g16", "int3-channel", "int4-g20-sym", "nf4-b16-dq"):
        losses = []
        for sweeps in (0, 1, 3):
            q, info = refined(weight, fmt, hessian, sweeps, damp=0.0, clip="mse")
            error = np.asarray(dequantize(q), np.float64) - weight
            losses.append(np.sum(error * (hessian.astype(np.float64) @ error)))
            np.testing.assert_allclose(info.proxy_loss, losses[-1], rtol=1e-3)
        assert losses[0] > losses[1] > losses[2], fmt


def test_refined_scales_stay_in_their_type():
    """float16 holds no scale of such weights."""
    weight, hessian = layer()
    for sweeps in (0, 2):
        q, info = refined(1e8 * weight, "int3-g16", hessian, sweeps)
        assert np.all(np.isfinite(dequantize(q)))
        assert np.isfinite(info.weight_error) and np.isfinite(info.proxy_loss)


def test_a_scale_never_turns_negative():
    """Though the loss were least there: a start of the wrong sign keeps its scales, but where other groups draw them."""
    weight, hessian = layer()
    start, _ = rtn(-jnp.asarray(weight), "int4-g16-sym-fp32")
    q, _ = descend(weight, start, hessian=hessian, sweeps=1)
    assert np.all(q.scales > 0) and np.mean(q.scales == start.scales) > 0.9


def test_refined_codes_are_a_minimum():
    """No single code and no single scale can be changed for a lower loss; float64."""
    weight, hessian = layer()
    q, _ = refined(weight, "int3-g16-fp32", hessian, 30, damp=0.0)
    codes, (scale, zero) = np.asarray(unpack_codes(q), np.int64), map(np.float64, unpack_parameters(q))
    wide = np.asarray(hessian, np.float64)

    def loss(codes, scale):
        error = (codes - np.repeat(zero, 16, axis=0)) * np.repeat(scale, 16, axis=0) - weight
        return np.sum(error * (wide @ error), axis=0)

    least = loss(codes, scale)
    for row in range(IN):
        for step in (-1, 1):
            other = codes.copy()
            other[row] = np.clip(other[row] + step, 0, 7)
            assert np.all(loss(other, scale) >= least * (1 - 1e-5))
    for group in range(IN // 16):
        for factor in (0.99, 1.01):
            other = scale.copy()
            other[group] *= factor
            assert np.all(loss(codes, other) >= least * (1 - 1e-5))


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_refinement_passes_over_dead_inputs(damp):
    """Weights that calibration never moved are rounded to nearest and do not pull at the scales they share with others."""
    weight, hessian = weights(), np.array(layer()[1])
    dead = np.arange(IN) % 3 == 0
    hessian[dead] = hessian[:, dead] = 0
    losses = []
    for sweeps in (0, 2, 6):
        q, info = refined(weight, "int3-channel", hessian, sweeps, damp=damp)
        scale, zero = (np.asarray(part)[0] for part in unpack_parameters(q))
        nearest = np.clip(np.round(weight[dead] / scale) + zero, 0, 7)
        assert np.mean(np.asarray(unpack_codes(q))[dead] == nearest) > 0.99
        error = np.asarray(dequantize(q), np.float64) - weight
        losses.append(np.sum(error * (hessian.astype(np.float64) @ error)))
        np.testing.assert_allclose(info.proxy_loss, losses[-1], rtol=1e-3)
    assert losses[0] > losses[1] >= losses[2] * (1 - 1e-4)


def test_refinement_refuses_blocks_that_cross_columns():
    weight, hessian = layer()
    with pytest.raises(QjaxError, match="blocks of nf4-b32 cross output columns where 32 does not divide the 48 inputs"):
        refined(weight, "nf4-b32", hessian, 1)


def test_it_starts_from_any_rounding():
    """From nearest codes it gains more than half of what GPTQ gains on them, and a factor at hand is the one it would make."""
    weight, hessian = layer()
    nearest, _ = rtn(weight, "int3-g16")
    start, _ = gptq(weight, "int3-g16", hessian=hessian)

    def loss(q):
        error = np.asarray(dequantize(q), np.float64) - weight
        return np.sum(error * (hessian.astype(np.float64) @ error))

    q, _ = descend(weight, nearest, hessian=hessian)
    assert loss(nearest) - loss(q) > 0.5 * (loss(nearest) - loss(start)) > 0
    shared, _ = descend(weight, nearest, hessian=hessian, factor=factorize(jnp.asarray(hessian)))
    jax.tree.map(np.testing.assert_array_equal, q, shared)


@pytest.mark.parametrize(
    ("fmt", "options", "named"),
    [("int3-g16", {"sweeps": 0}, "sweeps=0"), ("int3-g16", {"damp": -1.0}, "damp=-1.0"), ("bf16", {}, "bf16 is a cast")],
)
def test_bad_options_are_named(fmt, options, named):
    weight, hessian = layer()
    with pytest.raises(QjaxError, match=named):
        descend(weight, rtn(weight, fmt)[0], hessian=hessian, **options)
