"""qjax.qtensor: exact sizes, and a pytree that goes through every JAX transformation."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import qtensor
from qjax.errors import QjaxError
from qjax.format_table import EXAMPLES
from qjax.formats import parse_format
from qjax.qtensor import QTensor, dequantize, nbytes
from qjax.rounding.nearest import rtn

unpack_codes, unpack_parameters = jax.jit(qtensor.unpack_codes), jax.jit(qtensor.unpack_parameters)
FORMATS = [name for name, _ in EXAMPLES if not parse_format(name).is_read_only]
SHAPES = [(1, 1), (3, 5), (65, 3), (130, 7), (256, 64)]
KINDS = ["int3-g16", "int4-g16-sym", "nf4-b16-dq", "nf4-b24", "fp8_e4m3-tensor", "bf16"]  # one of each structure


def random_weight(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_those_of_the_format(name):
    """Every documented format x shape, sizes that no group divides included; abstractly, so nothing is computed."""
    fmt = parse_format(name)
    for shape in SHAPES:
        q, _ = jax.eval_shape(functools.partial(rtn, fmt=fmt), jax.ShapeDtypeStruct(shape, jnp.float32))
        assert isinstance(q, QTensor)
        assert q.shape == shape
        assert q.format == fmt
        assert q.nbytes == fmt.nbytes(*shape) == nbytes(q)
        assert q.bits_per_weight == fmt.bits_per_weight(*shape)
        restored = jax.eval_shape(dequantize, q)
        assert restored.shape == shape
        assert restored.dtype == jnp.float32
        if not fmt.is_float:
            scale, zero = jax.eval_shape(unpack_parameters, q)
            assert scale.shape == fmt.parameter_shape(*shape)
            assert (zero is not None) == fmt.is_affine


@pytest.mark.parametrize("name", KINDS)
def test_is_a_pytree_whose_structure_says_the_format(name):
    q, _ = rtn(random_weight(40, 6), name)
    leaves, tree = jax.tree.flatten(q)
    again = jax.tree.unflatten(tree, leaves)
    assert again.format == q.format
    assert again.in_features == 40
    assert hash(tree) == hash(jax.tree.structure(again))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(q)[0]]
    assert paths[0] == ".codes"
    assert nbytes(q) == sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("name", KINDS)
def test_stacks_under_vmap_and_scan(name):
    """A stack of layers: quantized by vmap, dequantized whole, by vmap and one after another in a scan."""
    weights = random_weight(3, 40, 6)
    stacked, info = jax.vmap(functools.partial(rtn, fmt=name))(weights)
    singles = [rtn(weight, name) for weight in weights]
    expected = np.stack([dequantize(q) for q, _ in singles])
    assert stacked.shape == (3, 40, 6)
    assert stacked.nbytes == sum(q.nbytes for q, _ in singles)
    assert stacked.bits_per_weight == singles[0][0].bits_per_weight
    for got, (q, _) in zip(np.asarray(jax.vmap(_codes)(stacked)), singles, strict=True):
        np.testing.assert_array_equal(got, _codes(q))
    np.testing.assert_allclose(info.weight_error, [single.weight_error for _, single in singles], rtol=1e-5)
    _, by_scan = jax.lax.scan(lambda carry, q: (carry, dequantize(q)), None, stacked)
    for got in (dequantize(stacked), jax.vmap(dequantize)(stacked), by_scan):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def _codes(q):
    return q.codes if q.format.is_float else unpack_codes(q)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dequantize_casts_at_the_end(dtype):
    q, _ = rtn(random_weight(40, 6), "int4-g16")
    np.testing.assert_array_equal(dequantize(q, dtype=dtype), dequantize(q).astype(dtype))


@pytest.mark.parametrize("name", ["int4-g16-fp32", "int4-g16-sym-fp32", "nf4-g16", "nf4-b24", "fp8_e4m3-channel"])
def test_gradient_with_respect_to_scales(name):
    """A weight is linear in its scale: the gradient of sum(c * weight) is the sum of c times the grid's values."""
    weight, coefficients = random_weight(40, 6), random_weight(40, 6, seed=1)
    q, _ = rtn(weight, name)

    def loss(scales):
        return jnp.sum(coefficients * dequantize(dataclasses.replace(q, scales=scales)))

    gradient = jax.grad(loss)(q.scales)
    assert gradient.shape == q.scales.shape
    direction = random_weight(*q.scales.shape, seed=2)
    along = loss(q.scales + direction) - loss(q.scales)
    np.testing.assert_allclose(jnp.sum(gradient * direction), along, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(jnp.sum(gradient * q.scales), loss(q.scales), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_dequantize_is_one_compiled_function(name):
    """One call, not some twenty operations that each write an array of the weight's size."""
    q, _ = rtn(random_weight(40, 6), name)
    assert len(jax.make_jaxpr(dequantize)(q).eqns) == 1
    assert len(jax.make_jaxpr(dequantize)(jax.tree.map(lambda leaf: leaf[None], q)).eqns) == 1


def test_donation():
    q, _ = rtn(random_weight(40, 6), "int4-g16")
    expected = np.asarray(dequantize(q)) * 2
    codes, scales = q.codes, q.scales
    double = jax.jit(lambda q: dataclasses.replace(q, scales=q.scales * 2), donate_argnums=0)(q)
    np.testing.assert_allclose(dequantize(double), expected, rtol=1e-3)
    assert codes.is_deleted()
    assert scales.is_deleted()


def test_device_put_with_a_sharding():
    mesh = jax.make_mesh((1,), ("out",))
    q, _ = rtn(random_weight(48, 6), "int4-g16-sym")
    sharded = jax.device_put(q, jax.NamedSharding(mesh, jax.P(None, "out")))
    assert all(leaf.sharding.spec == jax.P(None, "out") for leaf in jax.tree.leaves(sharded))
    np.testing.assert_array_equal(dequantize(sharded), dequantize(q))


TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from qjax.qtensor import dequantize
from qjax.rounding.nearest import rtn
mesh = jax.make_mesh((2,), ("out",))
columns = jax.NamedSharding(mesh, jax.P(None, "out"))
weight = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16)), jnp.float32)
expected, _ = rtn(weight, "int4-g16")
q, _ = rtn(jax.device_put(weight, columns), "int4-g16")
for got, want in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(got, want)
moved = jax.device_put(expected, jax.NamedSharding(mesh, jax.P(None, "out")))
restored = jax.jit(dequantize)(moved)
assert len(moved.codes.sharding.device_set) == 2
np.testing.assert_array_equal(restored, dequantize(expected))
print("both agree", len(jax.devices()))
"""


def test_two_devices():
    """Output columns on two devices: the same codes, and dequantized where they lie."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", TWO_DEVICES], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "both agree 2", done.stderr


def test_from_codes_and_back():
    """Packing codes with their parameters and unpacking gives them back, flat blocks and short groups included."""
    for name in ("int5-g16", "int3-b24", "int3-b20", "int2-tensor", "int1-channel"):
        fmt = parse_format(name)
        codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**fmt.bits, (40, 6)), jnp.uint8)
        shape = fmt.parameter_shape(40, 6)
        scale = jnp.asarray(np.random.default_rng(1).random(shape), jnp.float16).astype(jnp.float32)
        zero = jnp.asarray(np.random.default_rng(2).integers(0, 2**fmt.bits, shape), jnp.float32)
        stored = qtensor.grid.store_scales(scale, fmt)
        q = qtensor.from_codes(codes, qtensor.grid.Parameters(scale, scale, zero, stored), fmt)
        np.testing.assert_array_equal(unpack_codes(q), codes)
        for got, want in zip(unpack_parameters(q), (scale, zero), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "index", "kept"),
    [
        ("int3-g16", [5, 0, 3], "int3-g16"),
        ("nf4-b16", [1, 2], "nf4-b16"),
        ("int4-b16", [6, 2], "int4-b16"),
        ("int4-g16-m16", [6, 2], "int4-g16-m16"),
        ("nvfp4", [0, 6], "nvfp4"),
        ("fp8_e4m3-tensor", [4, 1], "fp8_e4m3-tensor"),
        ("bf16", [2], "bf16"),
        ("nf4-b1-dq", range(256, 512), "nf4-b1-dq"),
        ("nf4-b1-dq", range(255, 512), "nf4-b1"),
        ("nf4-b16-dq", [3, 1], "nf4-b16"),
        ("int4-g16-fp32x128", range(128, 200), "int4-g16-fp32x128"),
        ("int4-g16-fp32x128", range(64, 200), "int4-g16-fp32"),
    ],
)
def test_columns_keep_their_codes(name, index, kept):
    """And their scales' form, where it can be cut."""
    q, _ = rtn(random_weight(32, 512 if "b1-" in name else 200 if "x128" in name else 7), name)
    part = qtensor.columns(q, np.asarray(index))
    assert str(part.format) == kept and part.nbytes == part.format.nbytes(*part.shape)
    np.testing.assert_array_equal(part.codes, np.asarray(q.codes)[:, list(index)])
    np.testing.assert_array_equal(dequantize(part), np.asarray(dequantize(q))[:, list(index)])


def test_columns_that_share_groups_cannot_be_cut():
    with pytest.raises(QjaxError, match="blocks of 24 go over the ends of columns of 40 weights"):
        qtensor.columns(rtn(random_weight(40, 6), "nf4-b24")[0], np.arange(3))
