"""qjax.linear: what a layer with all its parts computes, against float64; its bytes, trees of leaves, and transformations."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import qtensor
from qjax.activations import parse_activation
from qjax.errors import QjaxError
from qjax.kernels.layout import KernelWeight
from qjax.linear import (
    Linear,
    LowRank,
    Outliers,
    apply_linear,
    cast_tree,
    dense,
    dense_tree,
    dequantize,
    dequantize_tree,
    is_quantized,
    nbytes,
    prepare,
)
from qjax.maps import Divide, Permute, Scale
from qjax.rounding.nearest import rtn

IN, OUT = 32, 6
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, IN)), jnp.float32)
NAMES = ("inputs", "activation", "outliers", "adapter")


def layer(*names: str, fmt: str = "int4-g8", seed: int = 1) -> Linear:
    """A layer with the named parts."""
    generator = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(generator.standard_normal(shape), dtype)

    scale = jnp.asarray(np.exp(generator.standard_normal(IN)), jnp.float16)
    parts = {
        "inputs": (Scale(scale), Permute(jnp.asarray(generator.permutation(IN), jnp.int32))),
        "activation": parse_activation("int8-token"),
        "outliers": Outliers(jnp.asarray([3, 17], jnp.int32), normal(2, OUT, dtype=jnp.float16)),
        "adapter": LowRank(normal(IN, 2), normal(2, OUT), scaling=0.5),
    }
    return Linear(rtn(normal(IN, OUT), fmt)[0], **{name: parts[name] for name in names})


EVERY = [names for count in range(5) for names in itertools.combinations(NAMES, count)]
ALL = layer(*NAMES)


def expected_output(x: jax.Array, leaf: Linear) -> np.ndarray:
    """The formula of the module's beginning, in float64."""
    given = x = np.asarray(x, np.float64)
    if leaf.inputs:
        scale, permute = leaf.inputs
        x = (x * np.asarray(scale.scale, np.float64))[..., np.asarray(permute.index)]
    rest, extra = x.copy(), 0.0
    if leaf.outliers is not None:
        index = np.asarray(leaf.outliers.index)
        rest[..., index] = 0
        extra = x[..., index] @ np.asarray(leaf.outliers.weight, np.float64)
    if leaf.activation is not None:
        step = np.max(np.abs(rest), axis=-1, keepdims=True) / 127
        rest = np.round(rest / step) * step
    y = rest @ np.asarray(qtensor.dequantize(leaf.weight), np.float64) + extra
    if leaf.adapter is not None:
        y += 0.5 * (given @ np.asarray(leaf.adapter.a, np.float64)) @ np.asarray(leaf.adapter.b, np.float64)
    return y


@pytest.mark.parametrize("names", EVERY, ids=lambda names: "+".join(names) or "none")
def test_every_part_does_what_it_says(names):
    """Packed and decoded; what is decoded keeps its activation format, and is an array where there is none."""
    leaf = layer(*names)
    expected = expected_output(X, leaf)
    np.testing.assert_allclose(apply_linear(X, leaf), expected, atol=2e-5 * np.max(np.abs(expected)))
    decoded = dense(leaf)
    assert isinstance(decoded, Linear if "activation" in names else jax.Array)
    np.testing.assert_allclose(apply_linear(X, decoded), expected, atol=2e-5 * np.max(np.abs(expected)))
    if "activation" not in names:
        np.testing.assert_allclose(np.asarray(X, np.float64) @ np.asarray(dequantize(leaf), np.float64), expected, atol=1e-4)
        assert dense(leaf, jnp.bfloat16).dtype == jnp.bfloat16


def test_integers_multiply_where_the_weight_allows():
    leaf = layer(*NAMES, fmt="int8-channel-sym")
    assert "i32" in str(jax.make_jaxpr(apply_linear)(X, leaf))  # the sum of products of int8
    expected = expected_output(X, leaf)
    np.testing.assert_allclose(apply_linear(X, leaf), expected, atol=2e-5 * np.max(np.abs(expected)))


def test_a_layer_laid_out_for_kernels_is_the_same_layer():
    held = prepare(ALL)
    assert isinstance(held.weight, KernelWeight) and held.shape == ALL.shape and held.inputs is ALL.inputs
    np.testing.assert_array_equal(dequantize(held), dequantize(ALL))
    expected = expected_output(X, ALL)
    got = apply_linear(X, held, implementation="reference")
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.max(np.abs(expected)))
    with pytest.raises(QjaxError, match="prepare: expected a QTensor, or a Linear of one"):
        prepare(dense(ALL))


def test_scaled_weights_are_the_scale_times_the_weight_bit_by_bit():
    leaf = Linear(ALL.weight, ALL.inputs[:1])
    scale = ALL.inputs[0].scale.astype(jnp.float32)
    np.testing.assert_array_equal(dequantize(leaf), scale[:, None] * qtensor.dequantize(ALL.weight))
    np.testing.assert_array_equal(dequantize(ALL.weight), qtensor.dequantize(ALL.weight))
    assert dense(ALL.weight).dtype == jnp.float32


def test_gradients():
    """Of x: with the weight that the layer stands for, straight through the rounding; of the adapter and the scale: by jvp of
    the formula.
    """
    dy = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, OUT)), jnp.float32)
    exact = np.asarray(dequantize(ALL), np.float64)
    gradient = jax.grad(lambda x: jnp.sum(apply_linear(x, ALL) * dy))(X)
    np.testing.assert_allclose(gradient, np.asarray(dy, np.float64) @ exact.T, atol=1e-4)

    def loss(adapter):
        return jnp.sum(apply_linear(X, dataclasses.replace(ALL, adapter=adapter)) * dy)

    found = jax.grad(loss)(ALL.adapter)
    x, y = (np.asarray(array, np.float64).reshape(6, -1) for array in (X, dy))
    np.testing.assert_allclose(found.a, 0.5 * x.T @ y @ np.asarray(ALL.adapter.b, np.float64).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.b, 0.5 * np.asarray(ALL.adapter.a, np.float64).T @ x.T @ y, rtol=1e-4, atol=1e-4)


def test_stacks_go_through_vmap_and_jit():
    """Layers one by one; two with different static parts are different programs."""
    leaves = [layer(*NAMES, seed=seed) for seed in (1, 2)]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)
    assert stack.shape == (2, IN, OUT) and stack.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert stack.bits_per_weight == leaves[0].bits_per_weight
    y = jax.jit(jax.vmap(apply_linear, in_axes=(None, 0)))(X, stack)
    for got, weight, leaf in zip(y, dequantize(stack), leaves, strict=True):
        expected = expected_output(X, leaf)
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.max(np.abs(expected)))
        np.testing.assert_allclose(weight, dequantize(leaf), rtol=1e-6)
    assert dense(stack).weight.shape == stack.shape
    with pytest.raises(QjaxError, match=r"apply_linear: got a stack of shape \(2, 32, 6\); use jax.vmap"):
        apply_linear(X, stack)


def test_bytes_are_those_of_all_parts():
    sizes = {"inputs": 2 * IN + 4 * IN, "activation": 0, "outliers": 8 + 2 * 2 * OUT, "adapter": 4 * 2 * (IN + OUT)}
    for names in EVERY:
        leaf = layer(*names)
        assert leaf.nbytes == leaf.weight.nbytes + sum(sizes[name] for name in names) == nbytes(leaf)
        assert leaf.bits_per_weight == pytest.approx(8 * leaf.nbytes / (IN * OUT), rel=1e-12)
    assert ALL.format == ALL.weight.format and dense(ALL).format is None
    assert dense(ALL).bits_per_weight == pytest.approx(8 * dense(ALL).nbytes / (IN * OUT), rel=1e-12)


def test_trees():
    q = ALL.weight
    tree = {"all": ALL, "kernel": q, "held": prepare(q), "scale": jnp.ones(6, jnp.bfloat16), "table": jnp.arange(3)}
    assert [is_quantized(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_quantized)] == [True, True, True, False, False]
    assert nbytes(tree) == ALL.nbytes + q.nbytes + tree["held"].nbytes + 12 + 4 * 3
    restored = dequantize_tree(tree)
    np.testing.assert_array_equal(restored["kernel"], dequantize(q))
    np.testing.assert_array_equal(restored["held"], dequantize(q))
    np.testing.assert_array_equal(restored["all"], dequantize(ALL))
    for dtype, others in ((jnp.float32, jnp.float32), (None, jnp.bfloat16), (jnp.bfloat16, jnp.bfloat16)):
        kernels = jnp.float32 if dtype is None else dtype
        run = dense_tree(tree, dtype)
        assert run["kernel"].dtype == run["all"].weight.dtype == kernels and run["all"].activation == ALL.activation
        assert run["scale"].dtype == dequantize_tree(tree, dtype)["scale"].dtype == others
        assert run["table"].dtype == jnp.int32
    assert cast_tree(tree, jnp.float32)["scale"].dtype == jnp.float32 and cast_tree(tree, jnp.float32)["all"] is ALL


def test_what_cannot_be_applied_is_named():
    with pytest.raises(QjaxError, match=r"x is float32 \(2, 3, 31\), the weight \(32, 6\) expects floats \(..., 32\)"):
        apply_linear(X[..., 1:], ALL)
    with pytest.raises(QjaxError, match="x is int32"):
        apply_linear(X.astype(jnp.int32), ALL)
    with pytest.raises(QjaxError, match=r"the weight is a Linear; expected a QTensor or KernelWeight .*qjax\.apply_linear"):
        qjax.matmul(X, ALL)
    with pytest.raises(QjaxError, match="int8-tensor is static, but there is none"):
        apply_linear(X, dataclasses.replace(ALL, activation=parse_activation("int8-tensor")))


def test_an_activation_may_be_named():
    assert Linear(ALL.weight, (), "int8-token") == Linear(ALL.weight, (), parse_activation("int8-token"))
    with pytest.raises(QjaxError, match="activation format 'int8': expected"):
        Linear(ALL.weight, (), "int8")


def test_a_static_scale_is_used():
    leaf = dataclasses.replace(
        layer(),
        activation=parse_activation("int8-tensor"),
        activation_scale=jnp.float32(0.25),
        inputs=(Divide(jnp.full(IN, 2.0)),),
    )
    expected = np.clip(np.round(np.asarray(X) / 2 / 0.25), -128, 127) * 0.25 @ np.asarray(qtensor.dequantize(leaf.weight))
    np.testing.assert_allclose(apply_linear(X, leaf), expected, atol=1e-4)
