"""Packed products through int8: against float64, bfloat16 and the product in float32, whatever the machine has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import integers, xla

from .test_kernels import exact, weight_of


@pytest.fixture
def everywhere(monkeypatch):
    """Products go through int8 on this machine, of any shape and version of JAX; pieces are so small that there are several."""
    for name, value in {"_instructions": lambda: {"avx512_vnni"}, "SINCE": (0, 4), "LEAST": 0, "PIECE": 4096}.items():
        monkeypatch.setattr(integers, name, value)
    jax.clear_caches()
    yield
    jax.clear_caches()


def error(y, x, q) -> float:
    """Root mean square error over that of the product, both in float64."""
    product, _ = exact(x, q)
    return float(np.sqrt(np.mean((np.asarray(y, np.float64) - product) ** 2) / np.mean(product**2)))


@pytest.mark.parametrize("fmt", ["int4-g64", "int3-g64", "int5-g80", "int8-channel-sym"])
@pytest.mark.usefixtures("everywhere")
def test_errors_are_below_those_of_bfloat16(fmt):
    """Also with an input that is far larger than the others. 200 inputs: the last group is cut."""
    q = weight_of(200, 33, fmt)
    weight = qjax.dequantize(q).astype(jnp.bfloat16)
    even = jax.random.normal(jax.random.key(1), (6, 200))
    for x, most in ((even, 5e-5), (even.at[:, 3].multiply(300.0), 1)):
        narrow = jnp.matmul(x.astype(jnp.bfloat16), weight, preferred_element_type=jnp.float32)
        assert 1e-6 < error(qjax.matmul(x, q), x, q) < min(most, error(narrow, x, q))
    assert error(qjax.matmul(x, q, precision="highest"), x, q) < 1e-6


@pytest.mark.usefixtures("everywhere")
def test_inputs_that_are_not_finite_zero_or_huge():
    q = weight_of(128, 24, "int4-g64")
    x = jax.random.normal(jax.random.key(1), (4, 128)).at[0].set(0)
    assert not np.any(qjax.matmul(x, q)[0])
    huge = qjax.matmul(x * 1e30, q)
    np.testing.assert_allclose(huge / 1e30, qjax.matmul(x, q), rtol=1e-4, atol=1e-6)
    for value in (jnp.inf, -jnp.inf, jnp.nan):
        broken = x.at[1, 5].set(value)
        np.testing.assert_array_equal(qjax.matmul(broken, q), qjax.matmul(broken, q, precision="highest"))


@pytest.mark.usefixtures("everywhere")
def test_vmap_gradients_and_precision():
    q, x = weight_of(128, 24, "int4-g64"), jax.random.normal(jax.random.key(1), (3, 5, 128))
    expected = x @ qjax.dequantize(q)
    for found in (qjax.matmul(x, q), jax.vmap(qjax.matmul, (0, None))(x, q)):
        np.testing.assert_allclose(found, expected, atol=1e-3 * float(jnp.max(jnp.abs(expected))))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), q)
    np.testing.assert_allclose(jax.vmap(qjax.matmul)(x, stack), expected, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(qjax.matmul(x, q)))(x)
    np.testing.assert_allclose(gradient[0, 0], jnp.sum(qjax.dequantize(q), axis=1), rtol=1e-4, atol=1e-4)
    assert "i8[" in str(jax.make_jaxpr(qjax.matmul)(x, q))
    with jax.default_matmul_precision("highest"):
        assert "i8[" not in str(jax.make_jaxpr(qjax.matmul)(x, q))


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.usefixtures("everywhere")
def test_meshes(kind):
    mesh = jax.make_mesh((1,), ("part",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    q, x = weight_of(64, 24, "int4-g64"), jax.random.normal(jax.random.key(1), (4, 64))
    laid, columns = (jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("part",), (None, "part")))
    expected = x @ qjax.dequantize(q)
    for found in (
        jax.jit(qjax.matmul)(jax.device_put(x, laid), q),
        jax.jit(qjax.matmul)(x, jax.tree.map(lambda leaf: jax.device_put(leaf, columns), q)),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-3 * float(jnp.max(jnp.abs(expected))))
    eight = weight_of(64, 24, "int8-channel-sym")
    through = jax.jit(lambda x: qjax.matmul(x, eight, activations="int8-token"))
    np.testing.assert_allclose(through(jax.device_put(x, laid)), through(x), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 9])
def test_products_of_codes_are_equal_to_the_last_bit(rows, monkeypatch):
    """int8-token in integers and as exact sums of products of bfloat16 and float32, with more inputs than one piece holds."""
    q, x = weight_of(1300, 33, "int8-channel-sym"), jax.random.normal(jax.random.key(1), (rows, 1300))
    found = []
    monkeypatch.setattr(xla, "INTEGERS", 20_000)
    for flags in ({"avx_vnni"}, {"avx512_vnni", "avx512_bf16"}, set()):
        monkeypatch.setattr(integers, "_instructions", lambda flags=flags: flags)
        monkeypatch.setattr(jax, "__version_info__", (0, 10))
        jax.clear_caches()
        traced = str(jax.make_jaxpr(lambda x: qjax.matmul(x, q, activations="int8-token"))(x))
        assert ("preferred_element_type=int32" in traced) == (flags == {"avx_vnni"})
        assert ("bf16[" in traced) == ("avx512_bf16" in flags)
        found.append(qjax.matmul(x, q, activations="int8-token"))
    jax.clear_caches()
    np.testing.assert_array_equal(*found[:2])
    np.testing.assert_array_equal(*found[1:])


@pytest.mark.parametrize("rows", [32, 33, 128, 129])
@pytest.mark.usefixtures("everywhere")
def test_how_many_rows_go_through_int8(rows, monkeypatch):
    """Fewer of bfloat16 where the processor multiplies that."""
    q, x = weight_of(128, 24, "int4-g64"), jnp.ones((rows, 128))
    for flags in ({"avx512_vnni"}, {"avx512_vnni", "avx512_bf16"}):
        monkeypatch.setattr(integers, "_instructions", lambda flags=flags: flags)
        assert integers.pays(x, q) == (rows <= 128)
        assert integers.pays(x.astype(jnp.bfloat16), q) == (rows <= (32 if "avx512_bf16" in flags else 128))


@pytest.mark.parametrize(
    ("flags", "version", "codes", "many", "decoded"),
    [
        ("flags : avx2 avx512_vnni", (0, 12), True, True, True),
        ("flags : avx2 avx512_vnni", (0, 10), True, False, False),
        ("flags : avx512_vnni avx512_bf16", (0, 12), True, True, True),
        ("flags : avx512_vnni avx512_bf16", (0, 10), False, False, True),
        ("flags : avx2 fma", (0, 12), False, False, False),
        ("flags : avx512_bf16", (0, 12), False, False, True),
        ("", (0, 12), False, False, False),
    ],
)
def test_which_machines_multiply_int8(flags, version, codes, many, decoded, monkeypatch, tmp_path):
    """Few rows, many, and in place of decoded weights (as bfloat16 too)."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(integers, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(integers, "_instructions", integers._instructions.__wrapped__)
    monkeypatch.setattr(jax, "__version_info__", version)
    assert (integers.pays_for_codes(8), integers.pays_for_codes(512), integers.pays_decoded()) == (codes, many, decoded)
