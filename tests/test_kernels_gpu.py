"""The GPU kernels: numbers in interpret mode, lowering for CUDA without a GPU, and numbers and speed on one where it is."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import gpu, layout
from qjax.kernels.timing import copy_bandwidth, seconds_per_call
from tests.test_kernels import FORMATS, exact, weight_of

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
weight = functools.cache(weight_of)
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
KERNEL = "__gpu$xla.gpu.triton"


def relative_error(x, q, y, *, transposed: bool = False) -> float:
    """The largest error of y, relative to |x| |W|."""
    if transposed:
        wide, back = np.asarray(x, np.float64), np.asarray(qjax.dequantize(q), np.float64).T
        product, size = wide @ back, np.abs(wide) @ np.abs(back)
    else:
        product, size = exact(x, q)
    assert y.dtype == x.dtype and y.shape == product.shape
    return float(np.max(np.abs(np.asarray(y, np.float64) - product) / np.maximum(size, 1e-30)))  # int1 has rows of zeros


def check(fmt: str, rows: int, inputs: int, outputs: int, dtype, *, transposed: bool = False, interpret: bool = True) -> None:
    """Multiplies random numbers and compares with float64."""
    q = weight(inputs, outputs, fmt)
    x = jax.random.normal(jax.random.key(1), (rows, outputs if transposed else inputs)).astype(dtype)
    multiply = gpu.multiply_transposed if transposed else gpu.multiply
    y = multiply(x, layout.prepare(q), interpret=interpret)
    assert relative_error(x, q, y, transposed=transposed) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt, dtype):
    for rows, inputs, outputs in ((1, 96, 72), (5, 384, 130), (40, 256, 200)):
        if layout.refusal(weight(inputs, outputs, fmt)):
            continue
        check(fmt, rows, inputs, outputs, dtype)
        check(fmt, rows, inputs, outputs, dtype, transposed=True)


def check_split(interpret: bool) -> None:
    """Inputs split over programs give the same sums."""
    q = weight(384, 130, "nf4-g64")
    x = jax.random.normal(jax.random.key(1), (3, 384))
    blocks = dataclasses.replace(gpu.pick_blocks("vector", 3), units=16, programs=15)
    assert gpu.Tile(layout.prepare(q), blocks).splits == 3
    y = gpu.multiply(x, layout.prepare(q), interpret=interpret, blocks=blocks)
    assert relative_error(x, q, y) < TOLERANCE[jnp.float32]


def test_split_inputs():
    check_split(interpret=True)


def check_int8(interpret: bool) -> None:
    """W8A8 is exact until the scales."""
    q = weight(100, 72, "int8-channel-sym")
    x = jax.random.randint(jax.random.key(1), (5, 100), -127, 128, jnp.int8)
    scale = jax.random.uniform(jax.random.key(2), (5, 1), minval=0.5)
    y = gpu.multiply_int8(x, scale, layout.prepare(q), interpret=interpret)
    expected = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(q), np.float64) * np.asarray(scale, np.float64)
    assert y.dtype == jnp.float32 and np.max(np.abs(y - expected)) < 1e-6 * np.max(np.abs(expected))


def test_int8_activations():
    check_int8(interpret=True)


def test_refusals():
    held = layout.prepare(weight(100, 72, "int4-g32"))
    assert gpu.refusal(jnp.bfloat16, held) is None
    assert "float16" in gpu.refusal(jnp.float16, held)
    stack = jax.tree.map(lambda leaf: leaf[None], held)
    assert "stack" in gpu.refusal(jnp.float32, stack)


@functools.cache
def abstract(shape: tuple[int, int], fmt: str) -> layout.KernelWeight:
    """The shapes of a prepared weight."""
    q = jax.eval_shape(lambda values: qjax.rtn(values, fmt)[0], jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.eval_shape(layout.prepare, q)


def lower(function, *arguments):
    """The program for CUDA, on a machine that need not have it."""
    device = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # asks which GPU it lowers for
        described = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
        device = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described))
    with device:
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("fmt", ["int8-channel", "int4-g128", "int3-g128-sym", "int2-g64", "nf4-g64", "fp4_e2m1-g32"])
def test_lowers_for_cuda(fmt):
    for inputs, outputs, dtype, sizes in ((4096, 4096, jnp.bfloat16, (1, 16, 512)), (100, 33, jnp.float32, (1, 40))):
        held = abstract((inputs, outputs), fmt)
        for rows in sizes:
            assert lower(gpu.multiply, jax.ShapeDtypeStruct((rows, inputs), dtype), held).as_text().count(KERNEL) == 1
        y = jax.ShapeDtypeStruct((sizes[-1], outputs), dtype)
        assert lower(gpu.multiply_transposed, y, held).as_text().count(KERNEL) == 1


@pytest.mark.parametrize("blocks", [b for b in gpu.TABLE if b.device], ids=lambda blocks: blocks.device)
def test_rows_of_one_device_lower_for_cuda(blocks):
    x, held = jax.ShapeDtypeStruct((512, 4096), jnp.bfloat16), abstract((4096, 4096), "int4-g128")
    assert KERNEL in lower(functools.partial(gpu.multiply, blocks=blocks), x, held).as_text()


def test_int8_and_vmap_lower_for_cuda():
    held = abstract((4096, 4096), "int8-channel-sym")
    x, scale = jax.ShapeDtypeStruct((32, 4096), jnp.int8), jax.ShapeDtypeStruct((32, 1), jnp.float32)
    assert KERNEL in lower(gpu.multiply_int8, x, scale, held).as_text()
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), abstract((256, 64), "int4-g128"))
    for rows in (1, 16):
        x = jax.ShapeDtypeStruct((3, rows, 256), jnp.bfloat16)
        assert KERNEL in lower(jax.vmap(gpu.multiply), x, stack).as_text()


def tensor_bytes(types: str) -> list[int]:
    """Bytes of every tensor type in a text of StableHLO."""
    sizes = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "ui8": 1}
    found = re.findall(r"tensor<((?:\d+x)*)(\w+)>", types)
    return [int(np.prod([int(size) for size in shape.split("x")[:-1]])) * sizes[kind] for shape, kind in found if kind in sizes]


@pytest.mark.parametrize("fmt", ["int4-g128", "nf4-g64"])
def test_bytes_read(fmt):
    """One row of x takes at most 0.3 times the bytes of the product in bfloat16, and no tensor is as large as the weight."""
    held, x = abstract((4096, 4096), fmt), jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    dense = lower(jnp.matmul, x, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    text = {name: program.as_text() for name, program in (("packed", lower(gpu.multiply, x, held)), ("dense", dense))}
    read = {name: sum(tensor_bytes(re.search(r"@main\((.*?)\) ->", each, re.DOTALL)[1])) for name, each in text.items()}
    assert read["dense"] == 2 * (4096 * 4096 + 4096)
    assert read["packed"] == held.nbytes + 2 * 4096 <= 0.3 * read["dense"]
    assert max(tensor_bytes(text["packed"])) == held.words.size * 4


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_products_on_a_gpu(fmt, dtype):
    for rows, inputs, outputs in ((1, 96, 72), (2, 384, 130), (5, 384, 130), (40, 256, 200), (200, 1024, 640)):
        if layout.refusal(weight(inputs, outputs, fmt)):
            continue
        check(fmt, rows, inputs, outputs, dtype, interpret=False)
        check(fmt, rows, inputs, outputs, dtype, transposed=True, interpret=False)


@pytest.mark.gpu
@needs_gpu
def test_splits_and_int8_on_a_gpu():
    check_split(interpret=False)
    check_int8(interpret=False)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize("fmt", ["int4-g128", "nf4-g64"])
def test_speed_on_a_gpu(fmt, rows):
    """75 % of the bandwidth of a copy, and 2.5 times the speed of the product in bfloat16."""
    x = jax.random.normal(jax.random.key(1), (rows, 4096)).astype(jnp.bfloat16)
    dense = [jax.random.normal(jax.random.key(seed), (4096, 14336)).astype(jnp.bfloat16) for seed in range(8)]
    packed = [layout.prepare(qjax.rtn(values.astype(jnp.float32), fmt)[0]) for values in dense]
    seconds = seconds_per_call(gpu.multiply, x, packed)
    assert packed[0].nbytes / seconds >= 0.75 * copy_bandwidth(2**30)
    assert seconds_per_call(jnp.matmul, x, dense) >= 2.5 * seconds
