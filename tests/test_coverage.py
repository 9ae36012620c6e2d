"""What a function does with its parameters is seen without computing, and so is what cannot be quantized."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.tracing.layout import whole
from tests.traced_models import CASES, X, normal, rows


def test_each_library_is_seen():
    told = {name: str(qjax.coverage(case.fn, case.params, X)) for name, case in CASES.items()}
    assert told["tunix"].splitlines() == [
        "parameter  shape  contraction",
        "q/w        8 2 4  (8) -> (8)",
        "o/w        2 4 8  (8) -> (8)",
    ]
    assert "layers/up/kernel    8 3 2 4  3 x (8) -> (8)" in told["maxtext"]
    assert "up         2 8 4  (8) -> (2 4)" in told["experts"] and "down       2 4 8  2 x (4) -> (8)" in told["experts"]
    assert "key/kernel    8 2 4  (8) -> (8), input of query/kernel" in told["attention"]
    assert "layers     2 8 8  2 x (8) -> (8), 3 times" in told["indexed"]
    assert "down/kernel  2 4 8  2 x (4) -> (8)" in told["heads"]
    assert "a          8 2    (8) -> (2), input of kernel" in told["lora"]


def by_index(p, x):
    return lax.fori_loop(0, 2, lambda i, x: x @ p["w"].reshape(2, 8, 4)[i] @ p["w"][:, :4].T, x)


def swapped(p, x):
    return lax.scan(lambda carry, _: ((carry[0] @ carry[1], -carry[1]), None), (x, p["w"]), None, length=2)[0][0]


REFUSED = {
    "contracted, and looked up": lambda p, x: p["w"][jnp.arange(2)] @ p["w"].T,  # a tied embedding
    "contracted in 2 ways: (8) -> (8); (8) -> (8)": lambda p, x: x @ p["w"] @ p["w"].T,
    "multiplied elementwise": lambda p, x: x * p["w"],
    "added elementwise": lambda p, x: x + p["w"],
    "multiplied with another parameter": lambda p, x: x @ (p["w"] @ p["v"]),
    "never used": lambda p, x: x @ p["v"],
    "returned": lambda p, x: p["w"],
    "carried by a loop": swapped,
    "in a convolution with groups": lambda p, x: lax.conv_general_dilated(
        x, p["w"].reshape(2, 1, 32), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=8
    ),
    "joined with other values": lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1),
    "cut": lambda p, x: x[..., :4] @ p["w"][::2],
    "multiplied with int32": lambda p, x: jnp.ones((8, 8), jnp.int32) @ p["w"],
    "read at an index that is computed": lambda p, x: x @ lax.dynamic_slice(p["w"], (x[0, 0, 0].astype(int), 0), (8, 8)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_quantized_is_an_error_that_says_why(why):
    params = {"w": normal(1, 8, 8), "v": normal(2, 8, 8)}
    found = {each.path: each.why for each in qjax.coverage(REFUSED[why], params, X).parameters}
    assert found["w"] == why
    with pytest.raises(qjax.QjaxError, match=r"cannot be quantized: .*w is .*A rule 'PATTERN=none' leaves"):
        qjax.quantize_function(REFUSED[why], params, "rtn:int4-g4", batches=[(X,)])


def test_a_parameter_is_followed_through_all_that_rearranges_it():
    def fn(p, x):
        w = p["w"].astype(jnp.bfloat16).astype(jnp.float32).reshape(2, 4, 8)[None].transpose(0, 3, 2, 1).squeeze(0)
        run = jax.jit(jax.checkpoint(lambda w, x: jax.nn.relu(jnp.einsum("dhn,btnh->btd", w, x))))
        return lax.cond(x[0, 0, 0] > 0, run, run, w, x.reshape(2, 8, 2, 4))

    (found,) = qjax.coverage(fn, {"w": normal(1, 8, 8)}, X).parameters
    assert found.view.in_axes == (0,) and found.view.matrix_shape == (8, 8) and found.uses == 2
    params, _ = qjax.quantize_function(fn, {"w": normal(1, 8, 8)}, "gptq:int4-g4@parallel", batches=[(X,)])
    alone, _ = qjax.quantize_function(
        lambda p, x: x @ p["w"], {"w": normal(1, 8, 8)}, "gptq:int4-g4@parallel", batches=[(rows(X),)]
    )
    assert bool(jnp.all(params["w"].weight.codes == alone["w"].weight.codes))


def test_an_input_is_shared_where_its_axes_are_read_in_the_same_order():
    def fn(p, x):
        x = x.reshape(2, 8, 2, 4)
        same = jnp.einsum("btnh,nhd->btd", x, p["a"]) + jnp.einsum("btnh,nhd->btd", x, p["b"])
        return same + jnp.einsum("btnh,hnd->btd", x, p["swapped"])

    params = {"a": normal(1, 2, 4, 8), "b": normal(2, 2, 4, 8), "swapped": normal(3, 4, 2, 8)}
    shared = {each.path: each.same_input for each in qjax.coverage(fn, params, X).parameters}
    assert shared == {"a": "a", "b": "a", "swapped": "swapped"}
    found = qjax.capture_function(fn, params, batches=[(X,)])
    order = rows(jnp.arange(8).reshape(1, 2, 4)).T.reshape(-1)
    expected = found["a"]["hessian"][order][:, order]
    assert bool(jnp.allclose(found["swapped"]["hessian"], expected, atol=1e-6))


def test_layouts_are_those_of_the_array():
    """A reshape is followed where the axes fit, split where they are cut, and given up where they are mixed."""
    layout = whole((4, 6))
    assert layout.reshaped((24,)).axes == ((0, 1),)
    assert layout.reshaped((24,)).reshaped((2, 2, 6)) == layout.reshaped((2, 2, 6))
    assert layout.reshaped((2, 2, 6)).shape == (2, 2, 6)
    assert layout.reshaped((1, 4, 1, 6)).axes == ((), (0,), (), (1,))
    assert layout.transposed((1, 0)).reshaped((3, 8)).axes == ((1,), (2, 0))
    assert layout.reshaped((8, 3)).axes == ((0, 1), (2,)) and layout.reshaped((3, 8)) is None
    assert whole((1, 4)).reshaped((4,)).axes == ((0, 1),) and whole((4, 1)).reshaped((4,)).axes == ((0,),)


def test_one_matrix_of_a_stack_with_two_axes():
    """Both indices of w[i, j], on its way through what only derivatives see."""
    params = {"w": normal(1, 2, 3, 8, 8), "vector": normal(2, 8)}

    def fn(p, x):
        return x @ lax.stop_gradient(p["w"])[1, 2] @ p["vector"]

    quantized, report = qjax.quantize_function(fn, params, "rtn:int4-g4", batches=[(X,)])
    assert [record.path for record in report.layers] == [f"w[{i},{j}]" for i in range(2) for j in range(3)]
    alone = qjax.dequantize(qjax.rtn(params["w"][1, 2], "int4-g4")[0])
    np.testing.assert_array_equal(qjax.dequantize_function(quantized)["w"][1, 2], alone)
    np.testing.assert_allclose(qjax.apply_function(fn, quantized, X), X @ alone @ params["vector"], atol=1e-5)
    assert quantized["vector"] is params["vector"]  # a vector is no matrix


def test_matrices_are_named_as_the_parameter_is_indexed():
    """A scan under vmap has layers before copies in its stack, whatever the axes' order."""
    w = normal(1, 3, 2, 8, 8)
    fn = lambda p, x: jax.vmap(lambda w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])(p["w"])  # noqa: E731
    quantized, report = qjax.quantize_function(fn, {"w": w}, "rtn:int4-g4", batches=[(X,)])
    assert {record.path for record in report.layers} == {f"w[{i},{j}]" for i in range(3) for j in range(2)}
    alone = qjax.dequantize(qjax.rtn(w[2, 1], "int4-g4")[0])
    np.testing.assert_array_equal(qjax.dequantize_function(quantized)["w"][2, 1], alone)


def test_paths_are_those_of_the_tree():
    """A field that is named value is one like others; Flax's boxes hold nothing else, and their name is left out."""

    @functools.partial(jax.tree_util.register_dataclass, data_fields=("key", "value"), meta_fields=())
    @dataclasses.dataclass
    class Heads:
        key: object
        value: object

    params = {"heads": Heads(normal(1, 8, 8), normal(2, 8, 8)), "rest": [nn.Partitioned(normal(3, 8, 8), (None, None))]}
    fn = lambda p, x: (x @ p["heads"].key + x @ p["heads"].value) @ p["rest"][0].value  # noqa: E731
    assert [each.path for each in qjax.coverage(fn, params, X).parameters] == ["heads/key", "heads/value", "rest/0"]
