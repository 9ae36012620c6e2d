"""Every implementation of the packed product x every format x shapes with edges, against float64."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import gpu, integers, layout, tpu, xla
from qjax.kernels import matmul as matmul_module
from qjax.kernels.matmul import choose
from qjax.linear import apply_linear, prepare_tree
from qjax.maps import Scale
from qjax.models.model import runnable
from qjax.qtensor import unpack_parameters

from .conftest import random_model, tiny_config

FORMATS = (
    "int4-g32", "int4-g128-sym", "int3-g64", "int2-g32", "int8-g32", "int8-channel-sym", "int3-channel", "int1-g32", "int5-g40",
    "int6-g64", "nf4-g64", "nf4-b32-dq", "fp4_bnb-g32", "fp8_e4m3-channel",
)  # fmt: skip
SHAPES = ((1, 100, 33), (40, 256, 130))  # rows, inputs, outputs


def weight_of(inputs: int, outputs: int, fmt: str, seed: int = 0) -> qjax.QTensor:
    """A rounded weight without zeros, its scales spread over a factor of a hundred."""
    values, spread = jax.random.split(jax.random.key(seed))
    scale = jnp.exp(jax.random.uniform(spread, (1, outputs), minval=-2.3, maxval=2.3))
    return qjax.rtn(jax.random.normal(values, (inputs, outputs)) * scale, fmt)[0]


def exact(x: jax.Array, q: qjax.QTensor) -> tuple[np.ndarray, np.ndarray]:
    """(x W, |x| |W|) in float64."""
    wide, weight = np.asarray(x, np.float64), np.asarray(qjax.dequantize(q), np.float64)
    return wide @ weight, np.abs(wide) @ np.abs(weight)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of the XLA path so small that the weights here take several."""
    monkeypatch.setattr(xla, "CHUNK", 2000)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(("implementation", "fmt"), [("reference", "int4-g32"), *(("xla", fmt) for fmt in FORMATS)])
def test_products(implementation, fmt):
    for rows, inputs, outputs in SHAPES:
        q = weight_of(inputs, outputs, fmt)
        if "-b32" in fmt and inputs % 32:
            assert "cross" in xla.refusal(q)
            continue
        x = jax.random.normal(jax.random.key(1), (rows, inputs))
        product, size = exact(x, q)
        error = np.abs(qjax.matmul(x, q, implementation=implementation, precision="highest") - product)
        assert np.max(error / size) < 1e-6
        if fmt != "int4-g32":  # everything is float32 inside: the type of x is that of the ends alone
            continue
        narrow = x.astype(jnp.bfloat16)
        product, size = exact(narrow, q)
        y = qjax.matmul(narrow, q, implementation=implementation, precision="highest")
        assert y.dtype == jnp.bfloat16 and np.max(np.abs(np.asarray(y, np.float64) - product) / size) < 1e-2


ONE_ROW = ("int4-g32", "int3-g64", "int8-channel-sym", "nf4-b32-dq", "fp8_e4m3-channel")
NOT_IN_TPU_TESTS = ("int1-g32", "int6-g64", "nf4-b32-dq", "fp4_bnb-g32")  # test_kernels_tpu.py has the others


@pytest.mark.parametrize("fmt", ["int4-g32", "nf4-g64", "int8-channel-sym"])
def test_rows_of_bfloat16_meet_weights_of_it(fmt, small_chunks):
    """With sums in float32, as exact as the dense product, backwards too; where "highest" is asked for they stay float32."""
    q = weight_of(256, 64, fmt)
    x = jax.random.normal(jax.random.key(1), (40, 256)).astype(jnp.bfloat16)
    dense = qjax.dequantize(q).astype(jnp.bfloat16)
    for packed, rows, weight, target in (
        (xla.multiply, x, dense, exact(x, q)[0]),
        (xla.multiply_transposed, x[:, :64], dense.T, np.asarray(x[:, :64], np.float64) @ np.asarray(qjax.dequantize(q)).T),
    ):
        errors = [np.sqrt(np.mean(np.square(np.asarray(y, np.float64) - target))) for y in (packed(rows, q), rows @ weight)]
        assert errors[0] < 1.05 * errors[1]
        for precision, found in ((None, True), ("highest", False)):
            program = packed.lower(rows, q, precision=precision).as_text()
            assert any("dot_general" in line and "bf16" in line for line in program.splitlines()) == found


@pytest.mark.parametrize(
    ("module", "fmt"),
    [*((gpu, fmt) for fmt in FORMATS), *((tpu, fmt) for fmt in NOT_IN_TPU_TESTS)],
    ids=lambda value: getattr(value, "__name__", value).rpartition(".")[2],
)
def test_kernel_products(module, fmt):
    """The Pallas kernels in the interpreter, some rows in float32, and for kinds of formats one in bfloat16; x W and y W^T."""
    inputs, outputs = (96, 40) if "-b32" in fmt else (100, 33)
    q = weight_of(inputs, outputs, fmt)
    decoded = np.asarray(qjax.dequantize(q), np.float64)
    if fmt == "int5-g40":
        assert layout.refusal(q) == "groups of 40 are not whole words of 5-bit codes: a multiple of 32 is"
        return

    @jax.jit
    def run(x, y, held):
        return module.multiply(x, held, interpret=True), module.multiply_transposed(y, held, interpret=True)

    for rows, dtype, limit in ((5, jnp.float32, 1e-5), *([(1, jnp.bfloat16, 1e-2)] if fmt in ONE_ROW else [])):
        x, y = (jax.random.normal(jax.random.key(size), (rows, size)).astype(dtype) for size in (inputs, outputs))
        for found, given, weight in zip(run(x, y, layout.prepare(q)), (x, y), (decoded, decoded.T), strict=True):
            wide = np.asarray(given, np.float64)
            assert found.dtype == dtype and found.shape == (rows, weight.shape[1])
            assert np.all(np.abs(np.asarray(found, np.float64) - wide @ weight) <= limit * (np.abs(wide) @ np.abs(weight)))


@pytest.mark.parametrize("fmt", ["int4-g32", "int3-g64", "int8-channel-sym", "nf4-g64"])
@pytest.mark.usefixtures("small_chunks")
def test_xla_in_many_chunks(fmt):
    q = weight_of(232, 30, fmt)
    x = jax.random.normal(jax.random.key(1), (3, 232))
    product, size = exact(x, q)
    assert np.max(np.abs(xla.multiply(x, q, precision="highest") - product) / size) < 1e-6
    y = jax.random.normal(jax.random.key(2), (3, 30))
    weight = np.asarray(qjax.dequantize(q), np.float64)
    back = np.asarray(y, np.float64) @ weight.T
    assert np.max(np.abs(xla.multiply_transposed(y, q, precision="highest") - back)) < 1e-5 * np.max(np.abs(back))


@pytest.mark.parametrize("fmt", ["int4-g32", "int3-g64", "nf4-g64"])
def test_gradients_are_those_of_the_decoded_weight(fmt):
    """With respect to x and to the scales."""
    q = weight_of(128, 20, fmt)
    x = jax.random.normal(jax.random.key(1), (7, 128))

    def loss(x, scales, implementation):
        held = qjax.QTensor(q.codes, scales, q.zeros, q.format, q.in_features)
        return jnp.sum(jnp.sin(qjax.matmul(x, held, implementation=implementation, precision="highest")))

    wide = q.scales.astype(jnp.float32)
    for argument in (0, 1):
        found, expected = (jax.grad(loss, argument)(x, wide, name) for name in ("xla", "reference"))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(expected))))


def test_jit_vmap_scan_and_leading_axes():
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight_of(64, 24, "int4-g32", seed) for seed in range(3)))
    x = jax.random.normal(jax.random.key(1), (3, 2, 5, 64))
    expected = jnp.einsum("sbti,sio->sbto", x, qjax.dequantize(stack), precision="highest")
    multiply = functools.partial(qjax.matmul, implementation="xla", precision="highest")
    np.testing.assert_allclose(jax.vmap(multiply)(x, stack), expected, rtol=1e-4, atol=1e-4)
    _, scanned = jax.lax.scan(lambda _, each: (None, multiply(*each)), None, (x, stack))
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-4)
    stacked = qjax.matmul(x.reshape(3, 10, 64), stack, precision="highest")
    np.testing.assert_allclose(stacked.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_rows_that_vmap_makes_are_one_product():
    """One row is met by a loop over its inputs; many, by a matrix product; with a weight for each, each by its own."""
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight_of(64, 24, "int4-g32", seed) for seed in range(3)))
    single = jax.tree.map(lambda leaf: leaf[0], stack)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    multiply = functools.partial(qjax.matmul, implementation="xla", precision="highest")
    assert "dot_general" not in str(jax.make_jaxpr(multiply)(x[0], single))
    assert "dot_general" in str(jax.make_jaxpr(jax.vmap(multiply, (0, None)))(x, single))
    wide = qjax.dequantize(stack)
    np.testing.assert_allclose(jax.vmap(multiply, (0, None))(x, single), x @ wide[0], rtol=1e-4, atol=1e-4)
    expected = jnp.einsum("bi,bio->bo", x, wide, precision="highest")
    np.testing.assert_allclose(jax.vmap(multiply)(x, stack), expected, rtol=1e-4, atol=1e-4)
    expected = jnp.einsum("i,bio->bo", x[0], wide, precision="highest")
    np.testing.assert_allclose(jax.vmap(multiply, (None, 0))(x[0], stack), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["int8-g37", "int4-g118", "int3-g104"])
def test_one_row_of_groups_without_small_divisors(fmt):
    q = weight_of(236, 24, fmt, 0)
    x = jax.random.normal(jax.random.key(1), (1, 236))
    np.testing.assert_allclose(qjax.matmul(x, q), x @ qjax.dequantize(q), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", ["weight", "x"])
def test_shard_map(split):
    """Outputs of the weight, or rows of x, over a mesh (of one device: what JAX checks of types is the same), and gradients."""
    mesh = jax.make_mesh((1,), ("part",), axis_types=(jax.sharding.AxisType.Auto,))
    q, x = weight_of(64, 24, "int4-g32-sym"), jax.random.normal(jax.random.key(1), (5, 64))
    whole, rows, columns = (jax.sharding.PartitionSpec(*axes) for axes in ((), ("part",), (None, "part")))
    specs = {"weight": ((whole, columns), columns), "x": ((rows, whole), rows)}[split]

    def loss(x, scales, implementation):
        multiply = functools.partial(qjax.matmul, precision="highest", implementation=implementation)
        product = jax.shard_map(multiply, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
        return jnp.sum(jnp.sin(product(x, qjax.QTensor(q.codes, scales, None, q.format, q.in_features))))

    found, expected = (
        jax.value_and_grad(loss, (0, 1))(x, q.scales.astype(jnp.float32), name) for name in ("auto", "reference")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b)))), found, expected
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_explicit_mesh(rows):
    """JAX's default kind of mesh has the layout of an array in its type: loops start from zeros of the same."""
    mesh = jax.make_mesh((1,), ("part",), axis_types=(jax.sharding.AxisType.Explicit,))
    q, x = weight_of(64, 24, "int4-g32"), jax.random.normal(jax.random.key(1), (rows, 64))
    laid, columns = (jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("part",), (None, "part")))
    expected = x @ qjax.dequantize(q)
    for found in (
        jax.jit(qjax.matmul)(jax.device_put(x, laid), q),
        jax.jit(qjax.matmul)(x, jax.tree.map(lambda leaf: jax.device_put(leaf, columns), q)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_one_row_with_64_bit_types():
    q, x = weight_of(64, 24, "int4-g32"), jax.random.normal(jax.random.key(1), (1, 64))
    jax.config.update("jax_enable_x64", True)
    try:
        assert jax.grad(lambda x: jnp.sum(qjax.matmul(x, q)))(x).dtype == jnp.float32
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("module", [tpu, gpu])
def test_kernels_trace_under_shard_map(module):
    """With the outputs of a weight over devices; x is the same on all. (Lowered, they would ask the mesh for its device.)"""
    mesh = jax.make_mesh((1,), ("part",), axis_types=(jax.sharding.AxisType.Auto,))
    held, whole = layout.prepare(weight_of(64, 24, "int4-g32")), jax.sharding.PartitionSpec()
    specs = jax.tree.map(lambda leaf: jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "part"), held)
    columns = jax.sharding.PartitionSpec(None, "part")
    forward = jax.shard_map(module.multiply, mesh=mesh, in_specs=(whole, specs), out_specs=columns)
    assert jax.eval_shape(forward, jax.ShapeDtypeStruct((3, 64), jnp.float32), held).shape == (3, 24)
    back = jax.shard_map(
        lambda y, w: jax.lax.psum(module.multiply_transposed(y, w), "part"),
        mesh=mesh,
        in_specs=(columns, specs),
        out_specs=whole,
    )
    assert jax.eval_shape(back, jax.ShapeDtypeStruct((3, 24), jnp.float32), held).shape == (3, 64)


@pytest.mark.parametrize("fmt", ["int8-channel-sym", "int8-channel-sym-dq"])
def test_int8_reference_of_every_scale(fmt):
    q, x = weight_of(96, 33, fmt), jax.random.normal(jax.random.key(1), (5, 96))
    multiply = functools.partial(qjax.matmul, activations="int8-token")
    expected = multiply(x, q, implementation="reference")
    np.testing.assert_allclose(multiply(x, q), expected, rtol=1e-6)
    np.testing.assert_allclose(multiply(x, layout.prepare(q), implementation="reference"), expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("inputs", [96, 3000])
def test_int8_activations(implementation, inputs):
    """W8A8: exactly the integer product of codes, in float64; its gradient is straight-through."""
    q = weight_of(inputs, 33, "int8-channel-sym")
    x = jax.random.normal(jax.random.key(1), (5, inputs)).at[2].set(0)
    largest = np.max(np.abs(np.asarray(x)), axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / np.float32(127))
    codes = np.round(np.asarray(x) / scale).astype(np.int64)
    product = codes @ (np.asarray(q.codes, np.int64) - 128) * scale.astype(np.float64) * np.asarray(q.scales, np.float64)
    multiply = functools.partial(qjax.matmul, activations="int8-token", implementation=implementation)
    found = multiply(x, q)
    np.testing.assert_allclose(found, product, rtol=1e-6)
    assert float(jnp.max(jnp.abs(found - x @ qjax.dequantize(q)))) < 0.02 * float(jnp.max(jnp.abs(found)))
    np.testing.assert_allclose(qjax.matmul(x, layout.prepare(q), activations="int8-token"), product, rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(multiply(x, q)))(x)
    np.testing.assert_allclose(gradient[0], jnp.sum(qjax.dequantize(q), axis=1), rtol=1e-4, atol=1e-4)


def test_int8_sums_are_exact(monkeypatch):
    """The largest codes in every place, with signs such that sums of parts cancel, but one product of 2,048, which makes sums
    odd that a float32 of a part twice as large could not hold; inputs of -128 too (int8-token-sym).
    """
    inputs = 2 * 2048 + 100
    q = weight_of(inputs, 3, "int8-channel-sym")
    centred = np.where(np.arange(inputs) < 2048, -128, 127)
    centred[::2048] = 1
    codes = jnp.asarray(np.repeat(centred[:, None] + 128, 3, 1), jnp.uint8)
    extreme = qjax.QTensor(codes, jnp.ones_like(q.scales), None, q.format, inputs)
    for value in (-127, -128):
        x = np.full(inputs, value)
        x[::2048] = 1
        for as_int8, as_bfloat16 in ((True, False), (False, True), (False, False)):
            monkeypatch.setattr(integers, "pays_for_codes", lambda rows, asked=as_int8: asked)
            monkeypatch.setattr(integers, "has_bfloat16", lambda asked=as_bfloat16: asked)
            jax.clear_caches()
            found = xla.multiply_int8(jnp.asarray(x[None], jnp.int8), jnp.ones((1, 1)), extreme)
            assert found.tolist() == [[float(np.float32(x @ centred))] * 3]
    jax.clear_caches()


@pytest.mark.parametrize(("held", "pieces"), [(5 * 1024, 4), (10 * 1024, 2), (5 * 4096, 1)])
@pytest.mark.parametrize("rows", [8, 300])
def test_int8_sums_of_pieces_are_whole_whatever_their_number(rows, held, pieces, monkeypatch):
    monkeypatch.setattr(integers, "pays_for_codes", lambda rows: True)
    monkeypatch.setattr(xla, "INTEGERS", held)
    dots, honest = [], integers.dot
    monkeypatch.setattr(integers, "dot", lambda x, w: dots.append(len(w)) or honest(x, w))
    q, key = weight_of(4096, 5, "int8-channel-sym"), jax.random.key(3)
    x = jax.random.randint(key, (rows, 4096), -128, 128).astype(jnp.int8)
    jax.clear_caches()
    found = xla.multiply_int8(x, jnp.ones((rows, 1)), q)
    whole = np.asarray(x, np.int64) @ (np.asarray(q.codes, np.int64) - 128)
    np.testing.assert_array_equal(found, whole.astype(np.float32) * np.asarray(unpack_parameters(q)[0]))
    assert 4096 // dots[0] == pieces
    jax.clear_caches()


def test_no_rows():
    q = weight_of(64, 24, "int4-g32")
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(qjax.matmul(x, q)))(jnp.zeros((0, 64)))
    assert value == 0 and gradient.shape == (0, 64)


def test_a_prepared_weight_multiplies_too():
    for fmt in ("int3-g64", "nf4-b32-dq", "int8-channel-sym"):
        q = weight_of(128, 24, fmt)
        held = layout.prepare(q)
        np.testing.assert_array_equal(layout.dequantize(held), qjax.dequantize(q))
        x = jax.random.normal(jax.random.key(1), (5, 128))
        np.testing.assert_allclose(qjax.matmul(x, held), x @ qjax.dequantize(q), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["tpu", "gpu"])
def accelerator(request, monkeypatch):
    """JAX's default device is said to be a TPU or GPU, whose kernels run in the interpreter."""
    module = {"tpu": tpu, "gpu": gpu}[request.param]
    for name in ("multiply", "multiply_transposed", "multiply_int8"):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(matmul_module.jax, "default_backend", lambda: request.param)
    return f"pallas_{request.param}"


def test_dispatch_to_kernels(accelerator):
    """auto takes the device's kernel, for a QTensor, Linear or prepared weight, forwards and backwards and for W8A8."""
    q, x = weight_of(64, 24, "int4-g32"), jax.random.normal(jax.random.key(1), (2, 3, 64))
    assert choose("auto", jnp.float32, q) == accelerator
    linear = qjax.Linear(q, (Scale(jnp.linspace(0.5, 2, 64).astype(jnp.float16)),))
    tree = prepare_tree({"a": linear, "b": jnp.ones(3)}, jnp.float32)
    assert isinstance(tree["a"].weight, layout.KernelWeight) and tree["a"].shape == (64, 24)
    assert tree["a"].inputs is linear.inputs
    for held in (linear, tree["a"]):
        value, (dx, dheld) = jax.value_and_grad(lambda x, w: jnp.sum(apply_linear(x, w) ** 2), (0, 1), allow_int=True)(x, held)
        weight = qjax.dequantize(linear)
        expected, dense = jax.value_and_grad(lambda x, weight=weight: jnp.sum((x @ weight) ** 2))(x)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        np.testing.assert_allclose(dx, dense, rtol=1e-4, atol=1e-3 * float(jnp.max(jnp.abs(dense))))
        _, exact = jax.value_and_grad(lambda w: jnp.sum(apply_linear(x, w, implementation="reference") ** 2), allow_int=True)(
            held
        )
        dscales, scales = (each.weight.scales.astype(jnp.float32) for each in (dheld, exact))
        np.testing.assert_allclose(dscales, scales, rtol=1e-2, atol=1e-3 * float(jnp.max(jnp.abs(scales))))
    eight = weight_of(64, 24, "int8-channel-sym")
    np.testing.assert_allclose(
        qjax.matmul(x, eight, activations="int8-token"),
        qjax.matmul(x, eight, activations="int8-token", implementation="xla"),
        rtol=1e-6,
    )
    with pytest.raises(qjax.QjaxError, match=f"{accelerator} cannot serve this product: .*float16"):
        qjax.matmul(x.astype(jnp.float16), q, implementation=accelerator)
    assert choose("auto", jnp.float16, q) == "xla"


@pytest.mark.parametrize("accelerator", ["gpu"], indirect=True)
@pytest.mark.usefixtures("accelerator")
def test_a_model_runs_on_kernels():
    """The decoder with laid-out kernels gives what the decoded kernels give."""
    model, _ = qjax.quantize(random_model(tiny_config()), None, rules="mlp/down=rtn:int4-g16")
    tokens = jnp.arange(10).reshape(2, 5) % model.config.vocabulary_size
    run = runnable(model, packed=True)
    leaves = jax.tree.leaves(run.params, is_leaf=lambda leaf: isinstance(leaf, layout.KernelWeight))
    assert sum(isinstance(leaf, layout.KernelWeight) for leaf in leaves) == model.config.layers
    expected = qjax.apply(runnable(model), tokens)
    assert float(jnp.max(jnp.abs(qjax.apply(run, tokens) - expected))) < 3e-2 * float(jnp.max(jnp.abs(expected)))


def test_devices_that_kernels_do_not_serve(monkeypatch):
    """GPUs older than Ampere, AMD's, whose capability is a name, and TPUs before v4."""
    held = layout.prepare(weight_of(64, 8, "int4-g32"))
    for module, kind, capability in ((gpu, "", "gfx942"), (gpu, "", "7.5"), (tpu, "TPU v3", "")):
        device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(module.jax, "devices", lambda device=device: [device])
        assert f"newer is served, this one {'is a' if kind else 'has'} {kind or capability}" in module.refusal(
            jnp.float32, held
        )
        monkeypatch.undo()
    for module in (gpu, tpu):
        with pytest.raises(qjax.QjaxError, match="int8 inputs go with symmetric int8 weights of one scale per channel"):
            module.multiply_int8(jnp.ones((2, 64), jnp.int8), jnp.ones((2, 1)), held)


def test_what_auto_takes_and_what_is_refused():
    assert choose("auto", jnp.float32, weight_of(64, 8, "int4-g32")) == "xla"
    x, q = jnp.ones((2, 64)), weight_of(64, 8, "int4-g32")
    crossing = weight_of(96, 8, "nf4-b64")
    assert choose("auto", jnp.float32, crossing) == "reference"
    with pytest.raises(qjax.QjaxError, match="xla cannot serve this product: blocks of nf4-b64 cross"):
        qjax.matmul(jnp.ones((2, 96)), crossing, implementation="xla")
    for name, device in (("pallas_tpu", "TPU"), ("pallas_gpu", "GPU")):
        with pytest.raises(qjax.QjaxError, match=f"{name} cannot serve this product: it needs a {device}, .* is a CPU"):
            qjax.matmul(x, q, implementation=name)
    with pytest.raises(qjax.QjaxError, match="unknown implementation 'fast'; allowed: auto"):
        qjax.matmul(x, q, implementation="fast")
    with pytest.raises(qjax.QjaxError, match=r"activations=int8-token needs a weight in int8-channel-sym, got int4-g32"):
        qjax.matmul(x, q, activations="int8-token")
    with pytest.raises(qjax.QjaxError, match="x is int32, expected floating point"):
        qjax.matmul(jnp.ones((2, 64), jnp.int32), q)
    with pytest.raises(qjax.QjaxError, match=r"the weight is a .*; expected a QTensor"):
        qjax.matmul(x, x.T)
    with pytest.raises(qjax.QjaxError, match=r"x has shape \(\)"):
        qjax.matmul(x[0, 0], q)
    with pytest.raises(qjax.QjaxError, match="unknown activations 'int4'"):
        qjax.matmul(x, q, activations="int4")
