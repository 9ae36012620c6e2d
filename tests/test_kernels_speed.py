"""What a packed 4096 x 4096 product costs on a CPU, against the dense float32 product and decoding all of the weight.

Only ratios count: ours and theirs run in turns, each a second time right after a first that is not timed, so that what the
other left in the caches does not count; the median of the ratios of neighbours is asserted.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import pytest

import qjax

pytestmark = pytest.mark.slow
SIZE, PAIRS = 4096, 15


@pytest.fixture(scope="module")
def weight() -> qjax.QTensor:
    return qjax.rtn(jax.random.normal(jax.random.key(0), (SIZE, SIZE)), "int4-g128")[0]


def ratio(slow, fast) -> float:
    """Median over pairs of seconds of `slow` over those of `fast`."""

    def seconds(function) -> float:
        jax.block_until_ready(function())
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    slow(), fast()  # compile
    return statistics.median(seconds(slow) / seconds(fast) for _ in range(PAIRS))


@pytest.mark.parametrize(("rows", "limit"), [(1, 1.5), (16, 1.5), (512, 1.3)])
def test_against_the_dense_product(weight, rows, limit):
    x = jax.random.normal(jax.random.key(1), (rows, SIZE))
    decoded = qjax.dequantize(weight)
    dense, packed = jax.jit(jnp.matmul), jax.jit(qjax.matmul)
    found = ratio(lambda: packed(x, weight), lambda: dense(x, decoded))
    print(f"\npacked / dense at {rows} rows: {found:.2f}")
    assert found <= limit


def test_against_decoding_everything(weight):
    x = jax.random.normal(jax.random.key(1), (1, SIZE))
    reference = jax.jit(lambda x, q: qjax.matmul(x, q, implementation="reference"))
    packed = jax.jit(qjax.matmul)
    found = ratio(lambda: reference(x, weight), lambda: packed(x, weight))
    print(f"\ndecode then multiply / packed at 1 row: {found:.1f}")
    assert found >= 8
