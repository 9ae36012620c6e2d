"""The TPU kernels in Pallas's TPU interpreter (memory that nothing wrote is NaN, races are found) against float64 products."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import qjax
from qjax.kernels import layout, tpu, tpu_pairs
from qjax.kernels.tpu import Blocks
from tests.paths import REPOSITORY

SMALL = Blocks("", 2**31, rows=16, inputs=128, columns=128)  # several tiles along every axis of a small weight
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3}  # of |x| |W|

# format, rows, inputs, columns, type of x, blocks: edges in every axis, all shape classes, scales of every type
CASES = [
    ("int4-g32", 5, 384, 130, "float32", SMALL),
    pytest.param("int4-g128", 40, 256, 200, "bfloat16", None, marks=pytest.mark.slow),  # the others show it two by two
    (
        "int4-g32-fp32",
        5,
        1096,
        72,
        "bfloat16",
        Blocks("", 2**31, rows=16, inputs=1024, columns=128),
    ),  # pairs, groups that share
    ("int4-channel", 1, 200, 130, "bfloat16", SMALL),  # pairs
    ("int3-g128-sym", 1, 256, 72, "bfloat16", None),  # pairs of codes that straddle words
    ("int3-g32-sym", 40, 200, 72, "float32", None),
    pytest.param("int8-g32-sym", 1, 256, 200, "bfloat16", SMALL, marks=pytest.mark.slow),
    ("int2-g32-bf16", 1, 384, 130, "float32", None),
    ("nf4-g64", 40, 256, 130, "bfloat16", SMALL),
    ("nf4-g64-dq", 1, 256, 72, "float32", None),
    ("fp8_e4m3-channel", 5, 96, 72, "float32", None),
]


def prepare(fmt: str, inputs: int, columns: int):
    """(KernelWeight, float64 weight) of a random weight whose groups differ in scale and middle."""
    keys = jax.random.split(jax.random.key(inputs), 3)
    weight = jax.random.normal(keys[0], (inputs, columns)) * jnp.exp(jax.random.normal(keys[1], (1, columns)))
    weight += 0.5 * jax.random.normal(keys[2], (inputs, 1))
    q, _ = qjax.rtn(weight, fmt)
    return layout.prepare(q), np.asarray(qjax.dequantize(q), np.float64)


def float64(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def largest_error(y, x, weight) -> float:
    """Largest |y - x W| / (|x| |W|)."""
    assert y.shape == (len(x), weight.shape[1]) and np.isfinite(float64(y)).all()
    return np.max(np.abs(float64(y) - float64(x) @ weight) / (np.abs(float64(x)) @ np.abs(weight)))


@pytest.mark.parametrize(("fmt", "rows", "inputs", "columns", "dtype", "blocks"), CASES, ids=lambda v: str(v)[:20])
def test_products(capfd, fmt, rows, inputs, columns, dtype, blocks):
    held, weight = prepare(fmt, inputs, columns)
    x = jax.random.normal(jax.random.key(1), (rows, inputs), dtype)
    y = jax.random.normal(jax.random.key(2), (rows, columns), dtype)
    both = (tpu.multiply, tpu.multiply_transposed)
    forward, backward = jax.jit(
        lambda *args: [f(a, held, interpret=STRICT, blocks=blocks) for f, a in zip(both, args, strict=True)]
    )(x, y)
    assert forward.dtype == backward.dtype == x.dtype
    assert largest_error(forward, x, weight) < TOLERANCE[dtype]
    assert largest_error(backward, y, weight.T) < TOLERANCE[dtype]
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(("rows", "inputs", "columns", "blocks"), [(40, 384, 130, SMALL), (1, 200, 72, None)])
def test_int8_is_exact(rows, inputs, columns, blocks):
    held, weight = prepare("int8-channel-sym-max-fp32", inputs, columns)
    x = jax.random.randint(jax.random.key(1), (rows, inputs), -127, 128, jnp.int8)
    x_scale = jnp.exp(jax.random.normal(jax.random.key(2), (rows, 1)))
    y = jax.jit(functools.partial(tpu.multiply_int8, interpret=STRICT, blocks=blocks))(x, x_scale, held)
    scale = np.asarray(held.scales, np.float64)
    integers = np.asarray(x, np.float64) @ np.rint(weight / scale)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, integers * np.asarray(x_scale) * scale, rtol=3e-7)


def test_plain_interpreter_vmap_and_scan():
    """A stack of weights, as a model's layers are, in the interpreter that compiles."""
    weights = jax.random.normal(jax.random.key(0), (2, 96, 72))
    q = jax.vmap(lambda w: qjax.rtn(w, "int4-g32")[0])(weights)
    held, x = layout.prepare(q), jax.random.normal(jax.random.key(1), (2, 5, 96))
    expected = jnp.einsum("bmk,bkn->bmn", x, qjax.dequantize(q), precision="highest")
    multiply = functools.partial(tpu.multiply, interpret=True)
    np.testing.assert_allclose(jax.vmap(multiply)(x, held), expected, rtol=1e-5, atol=1e-5)
    _, scanned = jax.lax.scan(lambda _, each: (None, multiply(*each)), None, (x, held))
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)


def test_pairs_serve_integers():
    for fmt, part, units, expected in [
        ("int4-g128", 16, 512, True),
        ("int4-g64", 8, 512, True),
        ("int3-g32", 1, 128, True),
        ("int4-g128", 16, 125, False),  # a group in part
        ("int4-g96", 12, 96, False),
        ("int8-g128", 32, 1024, False),  # 128 + code is no bfloat16 number
        ("nf4-g64", 8, 512, False),
        ("int1-g32-sym", 1, 128, False),
    ]:
        assert tpu_pairs.serves(qjax.parse_format(fmt), part, units) == expected, fmt


def test_refusals():
    held, _ = prepare("int4-g32", 96, 72)
    assert tpu.refusal(jnp.float32, held) is None and tpu.refusal(jnp.bfloat16, held) is None
    assert "float16" in tpu.refusal(jnp.float16, held)
    assert "symmetric int8" in tpu.refusal(jnp.int8, held)
    assert "vmap" in tpu.refusal(jnp.float32, jax.tree.map(lambda a: a[None], held))
    with pytest.raises(qjax.QjaxError, match="float16"):
        tpu.multiply(jnp.ones((1, 96), jnp.float16), held)
    with pytest.raises(qjax.QjaxError, match="do not fit"):
        tpu.multiply_transposed(jnp.ones((1, 96)), held)


def test_table_covers_every_number_of_rows():
    for rows in (1, 16, 17, 10**6):
        assert tpu.pick_blocks(rows, "any device").rows >= min(rows, 17)


def test_tuner():
    """It refuses a CPU, and finds sizes where products run, here in the interpreter."""
    specification = importlib.util.spec_from_file_location("tune_kernels", REPOSITORY / "experiments" / "tune_kernels.py")
    tuner = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tuner)
    if jax.default_backend() == "cpu":
        with pytest.raises(SystemExit, match="needs a GPU or a TPU"):
            tuner.load_kernels()
    found, seconds = tuner.tune(tpu, [tuner.make_case("int4-g32", 1, 32, 8, weights=1)], "here", repeats=1, interpret=True)
    assert (found.device, found.most_rows) == ("here", 1) and 0 < seconds < math.inf
