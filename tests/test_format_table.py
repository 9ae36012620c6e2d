"""Every way to store scales and zero points through what is done with a format: methods, refinement, products, range search.

Roundings themselves are compared with float64 oracles in test_nearest.py and test_gptq.py, sizes in test_qtensor.py, folders in
test_packed.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import qtensor
from qjax.errors import QjaxError
from qjax.format_table import EXAMPLES
from qjax.formats import parse_format
from qjax.kernels import layout
from qjax.kernels.matmul import choose
from qjax.qtensor import dequantize
from qjax.recipe import method_name
from qjax.refining.descend import descend
from qjax.rounding.gptq import gptq
from qjax.rounding.hqq import hqq
from qjax.rounding.nearest import rtn
from qjax.scales import SCALES
from qjax.transforms.awq import awq_scale
from qjax.zeros import ZEROS
from tests.oracles.gptq import layer_error
from tests.test_factor import random_hessian

IN, OUT = 64, 6
FORMATS = [
    *("int4-g16", "int3-g32-sym-max-bf16", "nf4-g16-fp32", "int4-g16-dq"),
    *("mxfp4", "mxfp8_e5m2_ceil", "fp4_e2m1-b16-e8m0_even", "nvfp4", "nf4-b32-e4m3"),
    *("int2-g16-sym-full", "int4-channel-sym-full-dq", "int3-g16-z16", "int2-b32-z32-fp32"),
    *("fp8_e4m3-g16-fp32x128", "int4-g16-sym-bf16x128", "fp4_e2m1-g16-e4m3_div"),
    *("int6-g16-sym-full-k8s", "int3-g32-sym-full-k6s", "int4-g8-k6", "int5-b32-sym-k4", "int4-g16-m16", "int3-b32-m16-bf16"),
]


@pytest.fixture(scope="module")
def layer():
    weight = (np.random.default_rng(0).standard_t(4, (IN, OUT)) * 0.02).astype(np.float32)
    return weight, random_hessian(IN, 6 * IN)


def test_the_table_has_every_codec():
    found = [parse_format(name) for name in FORMATS]
    rounded_to = {name for name, codec in ZEROS.items() if not codec.together}
    assert {fmt.scales for fmt in found} >= SCALES.keys() and {fmt.zeros for fmt in found} >= rounded_to
    assert {fmt.bound for fmt in found} >= {"max", "full"}


@pytest.mark.parametrize("name", FORMATS)
def test_refinement_lowers_the_loss_and_holds_what_it_may_not_move(name, layer):
    weight, hessian = layer
    fmt = parse_format(name)
    start, info = gptq(jnp.asarray(weight), fmt, hessian=jnp.asarray(hessian), damp=0.0)
    refined, better = descend(jnp.asarray(weight), start, hessian=jnp.asarray(hessian), damp=0.0, sweeps=2)
    assert float(better.proxy_loss) < float(info.proxy_loss)
    error = layer_error(np.asarray(dequantize(refined)), weight, hessian)
    assert float(better.proxy_loss) == pytest.approx(error, rel=2e-3), "the scales stored are those that were used"
    before, after = qtensor.unpack_parameters(start), qtensor.unpack_parameters(refined)
    if fmt.scale_codec.signed:  # powers of two rarely move
        assert np.any(before[0] != after[0]) == fmt.scale_codec.movable
    if fmt.bound == "full" and fmt.scale_codec.movable:
        assert np.all((before[0] != after[0]) | (before[0] == 0)), "of either sign"
    if fmt.is_affine:
        np.testing.assert_array_equal(before[1], after[1])
    common = fmt.scale_codec.common_of
    np.testing.assert_array_equal(common(start.scales) or 0.0, common(refined.scales) or 0.0)
    if fmt.scale_codec.label == "E8M0":
        scale = np.asarray(after[0])
        np.testing.assert_array_equal(scale, np.exp2(np.round(np.log2(scale))))


def test_a_moved_scale_goes_to_the_nearest_that_can_be_stored():
    scale = jnp.array([0.0, 1e-45, 0.74, 0.76, 1.49, 1.51, 3.4e38])
    powers = SCALES["e8m0"].nearest(scale, None)
    np.testing.assert_array_equal(powers, np.float32([0, 0, 0.5, 1, 1, 2, 2.0**127]))
    common = jnp.float32(0.5)
    levels = SCALES["e4m3"].nearest(jnp.array([0.0, 0.5, -0.53, 0.54, 1e6]), common)
    np.testing.assert_array_equal(levels, np.float32([0, 0.5, -0.5, 0.5625, 224]))
    for name, codec in SCALES.items():
        if codec.movable:  # stored and loaded it is what `nearest` says, in groups and flat
            scale = jnp.asarray(np.random.default_rng(0).uniform(0.01, 3, (4, 5)), jnp.float32)
            for flat in (False, True):
                stored = codec.store(scale, common if codec.together else None, flat)
                np.testing.assert_array_equal(codec.load(stored, (4, 5)), codec.nearest(scale, common), name)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_decoded_weight(name, layer):
    """By what `auto` takes, which decodes the whole weight of minima alone; and by the layout of kernels, which may refuse."""
    q, _ = rtn(jnp.asarray(layer[0]), name)
    x = jax.random.normal(jax.random.key(1), (3, IN))
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    assert choose("auto", jnp.float32, q) == ("reference" if q.format.has_minima else "xla")
    np.testing.assert_allclose(qjax.matmul(x, q, precision="highest"), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(qjax.matmul(x[:1], q), exact[:1], rtol=1e-4, atol=1e-5)
    if q.format.has_whole_zeros:
        np.testing.assert_array_equal(layout.dequantize(layout.prepare(q)), dequantize(q))
    else:
        assert ("minima" if q.format.has_minima else "real zero points") in layout.refusal(q)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int2-g16-sym-full", "int3-g16-z16", "int3-g16-m16"])
def test_awq_scales_before_any_format(name, layer):
    weight, hessian = layer
    channels = np.exp(np.random.default_rng(1).standard_normal(IN))
    hessian = (hessian * channels * channels[:, None]).astype(np.float32)
    scale = awq_scale(
        [jnp.asarray(weight)], name, abs_mean=jnp.asarray(channels, jnp.float32), hessian=jnp.asarray(hessian), ratios=4
    ).scale
    scaled, _ = rtn(jnp.asarray(weight) * scale[:, None], name)
    losses = [
        layer_error(np.asarray(value), weight, hessian)
        for value in (dequantize(scaled) / scale[:, None], dequantize(rtn(weight, name)[0]))
    ]
    assert losses[0] < 0.95 * losses[1]


def test_formats_whose_scales_are_stored_together_have_no_dynamic_groups(layer):
    for name in ("nvfp4", "int4-g16-dq"):
        with pytest.raises(QjaxError, match="quantizes all scales together"):
            gptq(*map(jnp.asarray, layer[:1]), name, hessian=jnp.asarray(layer[1]), static_groups=False, act_order=False)


def test_full_range_maps_the_outermost_weight_to_the_lowest_code():
    """Of either sign, also after the search of ranges; a group of zeros stays zeros."""
    weight = np.random.default_rng(0).uniform(-0.4, 0.4, (16, 4)).astype(np.float32)
    weight[3] = [1, -1, 1, 0]
    weight[:, 3] = 0
    q, _ = rtn(jnp.asarray(weight), "int3-channel-sym-full-fp32")
    np.testing.assert_array_equal(q.scales, np.float32([[-0.25, 0.25, -0.25, 0]]))
    assert qtensor.unpack_codes(q)[3, :3].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(dequantize(q)[3], weight[3])
    assert not np.any(dequantize(q)[:, 3])
    searched, info = rtn(jnp.asarray(weight), "int2-channel-sym-full-fp32", clip="mse")
    assert np.sign(searched.scales).tolist() == [[-1, 1, -1, 0]]
    assert float(info.weight_error) < float(rtn(jnp.asarray(weight), "int2-channel-sym-full-fp32")[1].weight_error)


def test_real_zeros_beat_whole_ones_at_few_bits():
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((256, 32)), jnp.float32)
    errors = [float(rtn(weight, f"int2-g32-fp32{zeros}")[1].weight_error) for zeros in ("", "-z16", "-z32")]
    assert errors[1] < 0.95 * errors[0] and errors[1] == pytest.approx(errors[2], rel=1e-3)


@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize("bits", [2, 4, 5])
def test_minima_beat_zero_points_on_weights_of_one_sign(sign, bits):
    """By more than the ratio of the ranges; and by what a zero point is rounded where signs are mixed."""
    for low in (0.0, 0.5, 2.0):
        weight = np.random.default_rng(0).uniform(low, low + 1, (256, 32)) * float(sign + "1")
        zeros, minima = (float(rtn(jnp.asarray(weight), f"int{bits}-g32{end}")[1].weight_error) for end in ("", "-m16"))
        assert minima <= zeros and (not low or minima < 1.1 * zeros / (low + 1) ** 2)
    mixed = jnp.asarray(np.random.default_rng(1).standard_normal((256, 32)))
    for clip in ("none", "mse"):
        zeros, minima = (rtn(mixed, f"int{bits}-g32{end}", clip=clip)[1].weight_error for end in ("", "-m16"))
        assert minima < zeros


def test_minima_of_groups_of_one_value_are_that_value():
    weight = jnp.asarray(np.repeat([[0.3], [-4.0], [0.0], [1e-3]], 40, axis=1).T, jnp.float32)
    q, info = rtn(weight, "int4-g16-m16")
    np.testing.assert_array_equal(dequantize(q), np.asarray(weight, np.float16))
    assert not np.any(q.codes) and not np.any(q.scales) and float(info.weight_error) < 1e-6


@pytest.mark.parametrize("name", ["int3-g16-z16", "int2-b24-z32-dq", "int4-tensor-z32-fp32", "int2-g12-z16", "int3-g24-m16"])
def test_hqq_is_its_formulas(name):
    """Against float64, one group after another; groups that padding fills up count their weights alone."""
    fmt = parse_format(name)
    weight = np.random.default_rng(0).standard_t(4, (40, 6)).astype(np.float32)
    unit = 2.0 ** (np.frexp(np.abs(weight).max())[1] + 3)
    q, info = hqq(jnp.asarray(weight), fmt, lp_norm=0.6, beta=2000.0, kappa=1.1, iters=9)
    start, _ = rtn(jnp.asarray(weight), fmt)
    scale, zero = (np.asarray(p, np.float64).T.ravel() for p in qtensor.unpack_parameters(start))
    groups = (
        np.asarray(qtensor.grid.to_groups(jnp.ones_like(weight), fmt)),
        np.asarray(qtensor.grid.to_groups(jnp.asarray(weight), fmt), np.float64),
    )
    present, rows = (part.transpose(2, 0, 1).reshape(len(scale), -1) for part in groups)
    low = np.where(present, rows, np.inf).min(axis=1)
    low = low if fmt.has_minima else np.minimum(low, 0)
    zero, beta, best = -low / scale, 2000.0, np.inf
    for _ in range(9):
        codes = np.clip(np.round(rows / scale[:, None] + zero[:, None]), 0, fmt.largest_code)
        error = rows - (codes - zero[:, None]) * scale[:, None]
        size = np.maximum(np.abs(error) / unit, 1e-300)
        sparse = unit * np.sign(error) * np.maximum(size - size**-0.4 / beta, 0)
        zero = np.sum(present * (codes - (rows - sparse) / scale[:, None]), axis=1) / present.sum(axis=1)
        mean, beta = np.sum(present * np.abs(error)) / weight.size, beta * 1.1
        if mean >= best:
            break
        best = mean
    found = np.asarray(qtensor.unpack_parameters(q)[1]).T.ravel()
    zero = -zero * scale if fmt.has_minima else zero
    np.testing.assert_allclose(found, zero, rtol=1e-4 if fmt.zeros == "z32" else 2e-3, atol=1e-4)
    restored = np.asarray(dequantize(q), np.float64)
    assert float(info.weight_error) == pytest.approx(
        np.sum((restored - weight) ** 2) / np.sum(np.float64(weight) ** 2), rel=1e-4
    )


def test_formats_of_files_are_not_rounded_to():
    for name, nearest in (("int4-g32-k6m-k6", "int4-g32-m16"), ("int2-g16-k4m-k4", "int2-g16-m16")):
        said = f"{name} is a format of files: it can be read, not rounded to; the nearest that can be is {nearest}"
        with pytest.raises(QjaxError, match=said):
            rtn(jnp.ones((32, 4)), name)
        with pytest.raises(QjaxError, match=f"recipe 'gptq:{name}': {said}"):
            qjax.parse_recipe(f"gptq:{name}")
        assert str(qjax.parse_recipe(f"gptq:{nearest}")) == f"gptq:{nearest}"


def test_multiples_of_a_scale_of_several_groups():
    """Of 8 groups the largest scale asks for the largest multiple; others are the nearest, in groups that follow each other."""
    scale = np.random.default_rng(0).uniform(0.01, 3, (9, 5)).astype(np.float32)
    for name, codes, groups, lowest in (("k6", 63, 8, 0), ("k4", 15, 16, 0), ("k6s", 31, 16, -32), ("k8s", 127, 16, -128)):
        signs = np.where(np.arange(9)[:, None] % 2, -1, 1) if lowest else 1
        flat = np.pad((scale * signs).T.reshape(-1), (0, -45 % groups)).reshape(-1, groups)
        shared = np.float16(np.abs(flat).max(axis=1, keepdims=True) / codes).astype(np.float32)
        expected = (np.clip(np.round(flat / shared), lowest, codes) * shared).reshape(-1)[:45].reshape(5, 9).T
        codec = SCALES[name]
        for is_flat in (False, True):
            stored = codec.store(jnp.asarray(scale * signs), None, is_flat)
            np.testing.assert_array_equal(codec.load(stored, (9, 5)), expected)
            assert qtensor.nbytes(stored) == codec.nbytes(45)
        doubled = codec.load(codec.times(stored, 1), (9, 5))
        np.testing.assert_array_equal(doubled, 2 * expected)


def test_hqq_refuses_what_it_cannot_do():
    weight = jnp.ones((32, 4))
    for name in ("int4-g16", "nf4-g16", "int4-g16-sym", "bf16"):
        with pytest.raises(QjaxError, match="real zero points"):
            hqq(weight, name)
    with pytest.raises(QjaxError, match=r"got lp_norm=0\.7, beta=-1"):
        hqq(weight, "int4-g16-z16", beta=-1.0)


def test_recipes_and_lines_of_figures():
    names = {
        "mxfp4": "mxfp4",
        "nvfp4": "nvfp4",
        "fp4-g64-e8m0": "fp4_e2m1",
        "hqq:int3-g64-z16": "hqq",
        "int2-g32-sym-full": "rtn",
    }
    assert {text: method_name(qjax.parse_recipe(text)) for text in names} == names
    assert str(qjax.parse_recipe("hqq(iters=5):int3-g64-z16")) == "hqq(iters=5):int3-g64-z16"


def test_every_documented_format_says_how_it_is_stored():
    for name, _ in EXAMPLES:
        fmt = parse_format(name)
        assert fmt.scales in SCALES and (fmt.zeros in ZEROS) == fmt.is_affine
        assert fmt.searched == (
            fmt if fmt.scale_codec.movable else dataclasses.replace(fmt, scales="fp16" if "int" in name else "fp32")
        )


def test_64_bit_types_change_nothing(layer):
    """Codes, scales and zeros of every codec with jax_enable_x64 on, in the types they have without."""
    expected = {name: rtn(jnp.asarray(layer[0]), name)[0] for name in FORMATS}
    expected["hqq"] = hqq(jnp.asarray(layer[0]), "int3-g16-z16")[0]
    jax.config.update("jax_enable_x64", True)
    try:
        found = {name: rtn(jnp.asarray(layer[0]), name)[0] for name in FORMATS}
        found["hqq"] = hqq(jnp.asarray(layer[0]), "int3-g16-z16")[0]
    finally:
        jax.config.update("jax_enable_x64", False)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
