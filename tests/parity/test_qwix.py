"""qwix: its arrays and ours hold the same codes, and its product is ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

pytestmark = [
    pytest.mark.peer,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
qwix = pytest.importorskip("qwix")
WEIGHT = jax.random.normal(jax.random.key(0), (64, 24))


@pytest.mark.parametrize("fmt", ["int4-g16", "int4-g16-sym", "int8-g32-sym-max", "int8-channel", "int8-channel-sym-fp32"])
def test_both_ways_are_exact(fmt):
    q, _ = qjax.rtn(WEIGHT, fmt)
    there = qjax.to_qwix(q)
    np.testing.assert_array_equal(qwix.dequantize(there), qjax.dequantize(q))
    back = qjax.from_qwix(there)
    np.testing.assert_array_equal(qjax.dequantize(back), qjax.dequantize(q))
    x = jax.random.normal(jax.random.key(1), (5, 64))
    np.testing.assert_allclose(qwix.dot_general(x, there, (((1,), (0,)), ((), ()))), qjax.matmul(x, q), atol=1e-4)


@pytest.mark.parametrize(("kind", "tiles"), [(jnp.int4, 16), (jnp.int8, 64)])
def test_arrays_that_qwix_made_are_read(kind, tiles):
    made = qwix.quantize(WEIGHT, kind, channelwise_axes=[1], tiled_axes={0: tiles})
    np.testing.assert_array_equal(qjax.dequantize(qjax.from_qwix(made)), qwix.dequantize(made))


def test_what_qwix_has_not_is_named():
    for fmt in ("nf4-g16", "int3-g16", "int4-g24", "bf16"):
        with pytest.raises(qjax.QjaxError, match="to_qwix: qwix has no"):
            qjax.to_qwix(qjax.rtn(WEIGHT, fmt)[0])
    made = qwix.quantize(WEIGHT, jnp.int8, channelwise_axes=[], tiled_axes={1: 8})
    with pytest.raises(qjax.QjaxError, match="from_qwix: expected int4 or int8"):
        qjax.from_qwix(made)
