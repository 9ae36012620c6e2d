"""The layout of kernels holds exactly what the QTensor held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import layout
from qjax.qtensor import unpack_codes, unpack_parameters


@pytest.mark.parametrize("inputs", [96, 100])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes(bits, inputs):
    weight = jax.random.normal(jax.random.key(bits), (inputs, 5))
    q, _ = qjax.rtn(weight, f"int{bits}-g32")
    held = layout.prepare(q)
    count, width = layout.unit(bits)
    assert held.words.shape == (width, -(-inputs // count), 5) and held.shape == q.shape
    parts = jnp.stack([layout.code(held.words, bits, c) for c in range(count)])
    codes = layout.join_inputs(parts.transpose(0, 2, 1), inputs).T
    np.testing.assert_array_equal(codes, unpack_codes(q))


@pytest.mark.parametrize("fmt", ["int4-g64", "int4-g64-sym", "int8-channel", "nf4-g64", "nf4-b64-dq", "int3-tensor"])
def test_parameters(fmt):
    q, _ = qjax.rtn(jax.random.normal(jax.random.key(0), (128, 6)), fmt)
    held = layout.prepare(q)
    scale, zero = unpack_parameters(q)
    np.testing.assert_array_equal(held.scales, jnp.broadcast_to(scale, held.scales.shape))
    assert (held.zeros is None) == (zero is None)
    if zero is not None:
        np.testing.assert_array_equal(held.zeros, jnp.broadcast_to(zero, held.zeros.shape))


def test_inputs_round_trip():
    x = jax.random.normal(jax.random.key(0), (3, 50))
    parts = layout.split_inputs(x, 3)
    assert parts.shape == (32, 3, 2)
    np.testing.assert_array_equal(parts[7], jnp.pad(x, ((0, 0), (0, 14)))[:, 7::32])
    np.testing.assert_array_equal(layout.join_inputs(parts, 50), x)


@pytest.mark.parametrize(
    ("fmt", "inputs", "reason"), [("bf16", 64, "is a cast"), ("nf4-b64", 96, "cross"), ("int3-g24", 96, "words")]
)
def test_refusals(fmt, inputs, reason):
    q, _ = qjax.rtn(jax.random.normal(jax.random.key(0), (inputs, 4)), fmt)
    assert reason in layout.refusal(q)
    with pytest.raises(qjax.QjaxError, match=reason):
        layout.prepare(q)


def test_prepare_takes_quantized_weights_alone():
    for wrong in (jnp.ones((4, 4)), layout.prepare(qjax.rtn(jnp.ones((32, 4)), "int4-g32")[0])):
        with pytest.raises(qjax.QjaxError, match=r"prepare: expected a QTensor, or a Linear of one, got \w+"):
            qjax.prepare(wrong)
