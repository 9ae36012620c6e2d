"""The TPU kernels compile ahead of time for v5e and v6e with libtpu, on a machine without a TPU, and read packed weights only.

Needs the libtpu that belongs to the installed JAX: the one that `pip install 'jax[tpu]'` chooses, 0.0.42.1 for JAX 0.10.2.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import qjax
from qjax.kernels import layout, tpu

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
pytestmark = pytest.mark.peer

SQUARE, EDGES = (4096, 4096), (1000, 1416)
CASES = [
    ("bfloat16", 1, SQUARE),
    ("bfloat16", 512, SQUARE),
    ("bfloat16", 5, EDGES),
    ("float32", 16, SQUARE),
    ("float32", 200, EDGES),
]
FORMATS = ("int8-channel", "int4-g128", "int3-g128", "int2-g128-sym", "nf4-g64")
PRODUCTS = [  # each format with three of the cases, each case with three of the formats; the others slow
    pytest.param(fmt, *case, marks=[pytest.mark.slow] if (i + j) % 5 in (1, 3) else [])
    for i, fmt in enumerate(FORMATS)
    for j, case in enumerate(CASES)
]


@pytest.fixture(scope="module", params=["v5e:2x2", pytest.param("v6e:2x2", marks=pytest.mark.slow)])
def sharding(request):
    """Of one device of the topology; the library is told not to look for a TPU machine around it, nor to lock one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else a file in /tmp is locked, which fails where another user made it
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=request.param)
    return SingleDeviceSharding(topology.devices[0])


def weight_shapes(fmt: str, inputs: int, columns: int) -> layout.KernelWeight:
    return jax.eval_shape(lambda w: layout.prepare(qjax.rtn(w, fmt)[0]), jax.ShapeDtypeStruct((inputs, columns), jnp.float32))


def compile_memory(sharding, function, *shapes):
    """The memory analysis of the compiled program."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)
    return jax.jit(function).lower(*shapes).compile().memory_analysis()


@pytest.mark.parametrize(("fmt", "dtype", "rows", "shape"), PRODUCTS)
def test_products(sharding, fmt, dtype, rows, shape):
    held = weight_shapes(fmt, *shape)
    for function, width in ((tpu.multiply, shape[0]), (tpu.multiply_transposed, shape[1])):
        memory = compile_memory(sharding, function, jax.ShapeDtypeStruct((rows, width), dtype), held)
        x_bytes = rows * width * jnp.dtype(dtype).itemsize
        assert memory.argument_size_in_bytes < 1.1 * (held.nbytes + 2 * x_bytes) + 2**16
        assert memory.temp_size_in_bytes < shape[0] * shape[1]  # a byte a weight: half of an unpacked one


@pytest.mark.parametrize("fmt", ["int4-g32", "int3-g32", "fp4_bnb-g64-bf16", "nf4-g64-dq", "fp8_e4m3-channel", "int1-g32"])
def test_other_formats(sharding, fmt):
    held = weight_shapes(fmt, *EDGES)
    memory = compile_memory(sharding, tpu.multiply, jax.ShapeDtypeStruct((1, EDGES[0]), jnp.bfloat16), held)
    assert memory.argument_size_in_bytes >= 4 * held.words.size
    assert memory.temp_size_in_bytes < EDGES[0] * EDGES[1]


@pytest.mark.parametrize(("rows", "shape"), [(1, SQUARE), (512, SQUARE), (5, EDGES)])
def test_int8(sharding, rows, shape):
    x, x_scale = jax.ShapeDtypeStruct((rows, shape[0]), jnp.int8), jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    memory = compile_memory(sharding, tpu.multiply_int8, x, x_scale, weight_shapes("int8-channel-sym-max", *shape))
    assert memory.temp_size_in_bytes < shape[0] * shape[1]


def test_reads_at_most_three_tenths_of_the_dense_bytes(sharding):
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    packed = compile_memory(sharding, tpu.multiply, x, weight_shapes("int4-g128", *SQUARE))
    dense = compile_memory(sharding, jnp.matmul, x, jax.ShapeDtypeStruct(SQUARE, jnp.bfloat16))
    assert packed.argument_size_in_bytes <= 0.3 * dense.argument_size_in_bytes
    assert packed.temp_size_in_bytes < 2**20
