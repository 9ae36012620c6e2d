"""qjax.calibrate.capture: the inputs of every kind of linear layer, which share them, weights, and modules that hide theirs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import capture
from qjax.calibrate.capture import (
    Batch,
    capture_statistics,
    distinct_calls,
    merge_arguments,
    module_outputs,
    sharing,
    split_arguments,
)
from qjax.errors import QjaxError
from qjax.interception.linen import linear_layers
from qjax.models.decoder import Block
from tests.conftest import tiny_config
from tests.random_weights import small_model

NAMES = ("hessian", "abs_mean", "abs_max")


def shapes_of(module, *args):
    """Parameters of the right shapes, without compiling anything."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(generator.standard_normal(s.shape) * 0.3, jnp.float32), shapes)


class Mixed(nn.Module):
    """Every kind of layer; `twice` is called twice, `left` and `right` are given the same array, `other` an equal one."""

    @nn.compact
    def __call__(self, x):  # (batch, time, 6)
        left, right = nn.Dense(8, name="left")(x), nn.Dense(8, name="right")(x)
        other = nn.Dense(8, name="other")(x + 0.0)
        twice = nn.Dense(8, name="twice")
        h = twice(nn.tanh(twice(left * right + other)))
        y = nn.DenseGeneral((2, 4), name="split")(h)
        z = nn.DenseGeneral(8, axis=(-1, -2), name="join")(y)  # kernel (2, 4, 8): Flax sorts the axes
        return nn.Einsum((3, 8, 2), "btd,hdk->bkth", name="einsum")(z), nn.Einsum((4, 2, 3), "...kh,khd->...d", name="dots")(
            y.swapaxes(-1, -2)
        )


@pytest.fixture(scope="module")
def mixed():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 5, 6)), jnp.float32)
    return Mixed(), shapes_of(Mixed(), x), x


def inputs_of_mixed(params, x) -> dict[str, np.ndarray]:
    """The matrices that each layer multiplies with its kernel, written out by hand in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)

    def dense(name, x):
        return x @ p[name]["kernel"].reshape(x.shape[-1], -1) + p[name]["bias"].reshape(-1)

    first = dense("left", x) * dense("right", x) + dense("other", x)
    second = np.tanh(dense("twice", first))
    h = dense("twice", second)
    y = dense("split", h)
    z = y @ p["join"]["kernel"].reshape(8, 8) + p["join"]["bias"]
    swapped = y.reshape(*y.shape[:-1], 2, 4).swapaxes(-1, -2).reshape(y.shape)
    both = np.concatenate([first, second])
    found = {"left": x, "right": x, "other": x, "twice": both, "split": h, "join": y, "einsum": z, "dots": swapped}
    return {f"{name}/kernel": value.reshape(-1, value.shape[-1]) for name, value in found.items()}


def test_inputs_of_every_kind_of_layer(mixed):
    module, params, x = mixed
    expected = inputs_of_mixed(params, x)
    sizes = {path: value.shape[-1] for path, value in expected.items()}
    batches = [Batch((x[:1],)), Batch((x[1:],))]
    found = capture_statistics(module, params, batches, sizes, NAMES).statistics
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path]["hessian"], value.T @ value / len(value), rtol=1e-4, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(found[path]["abs_mean"], np.mean(np.abs(value), axis=0), rtol=1e-4, err_msg=path)
        np.testing.assert_allclose(found[path]["abs_max"], np.max(np.abs(value), axis=0), rtol=1e-4, err_msg=path)
        assert int(found[path]["tokens"]) == len(value)


def test_layers_that_share_their_input(mixed):
    module, params, x = mixed
    shared = sharing(module, params, (x,))
    assert list(shared) == [f"{n}/kernel" for n in ("left", "right", "other", "twice", "split", "join", "einsum", "dots")]
    assert {path for path, first in shared.items() if path != first} == {"right/kernel"}
    assert shared["right/kernel"] == "left/kernel"


class BothAxes(nn.Module):
    """The same array, contracted over its last axis, over the one before it, over both, and over the last again."""

    @nn.compact
    def __call__(self, x):  # (batch, 6, 6)
        return [
            nn.DenseGeneral(4, axis=axis, name=name)(x)
            for name, axis in {"last": -1, "middle": -2, "both": (-2, -1), "again": -1}.items()
        ]


def test_one_array_contracted_over_other_axes_is_another_input():
    module, x = BothAxes(), jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 6)), jnp.float32)
    params = shapes_of(module, x)
    shared = sharing(module, params, (x,))
    assert shared == {
        f"{name}/kernel": f"{first}/kernel"
        for name, first in zip(("last", "middle", "both", "again"), ("last", "middle", "both", "last"), strict=True)
    }
    found = capture_statistics(module, params, [Batch((x,))], {"last/kernel": 6, "middle/kernel": 6}, ["hessian"]).statistics
    rows = {"last/kernel": np.asarray(x).reshape(-1, 6), "middle/kernel": np.asarray(x).swapaxes(1, 2).reshape(-1, 6)}
    for path, value in rows.items():
        np.testing.assert_allclose(found[path]["hessian"], value.T @ value / 24, rtol=1e-4, atol=1e-5, err_msg=path)


def test_sharing_in_the_decoder():
    model = small_model(tiny_config())
    shared = sharing(Block(model.config), model.params["block_0"], (jnp.zeros((1, 4, 32)),))
    groups = {}
    for path, first in shared.items():
        groups.setdefault(first, set()).add(path.removesuffix("/kernel"))
    assert list(map(sorted, groups.values())) == [
        ["attention/k", "attention/q", "attention/v"],
        ["attention/o"],
        ["mlp/gate", "mlp/up"],
        ["mlp/down"],
    ]


def test_weights_spread_over_further_axes(mixed):
    """Weights (batch,) count for all of a sequence's tokens; of a wrong shape they are refused by name."""
    module, params, x = mixed
    sizes = {"twice/kernel": 8}
    weights = jnp.array([1.0, 0.0, 2.0, 0.0])
    found = capture_statistics(module, params, [Batch((x,), weights)], sizes, NAMES).statistics["twice/kernel"]
    alone = capture_statistics(
        module, params, [Batch((x[:1],), weights[:1]), Batch((x[2:3],), weights[2:3])], sizes, NAMES
    ).statistics
    np.testing.assert_allclose(found["hessian"], alone["twice/kernel"]["hessian"], rtol=1e-4, atol=1e-5)
    assert int(found["tokens"]) == 20  # two sequences of 5, twice
    with pytest.raises(QjaxError, match=r"weights of shape \(4, 4\) do not fit the input of twice/kernel.*\(4, 5\)"):
        capture_statistics(module, params, [Batch((x,), jnp.ones((4, 4)))], sizes, NAMES)


def test_drift_is_of_both_runs(mixed):
    module, params, x = mixed
    changed = jax.tree.map(lambda leaf: leaf * 1.1, params)
    got = capture_statistics(
        module, changed, [Batch((x,))], {"split/kernel": 8}, ["drift"], exact=(params, [Batch((x,))])
    ).statistics["split/kernel"]["drift"]
    ours, exact = (inputs_of_mixed(each, x)["split/kernel"] for each in (changed, params))
    np.testing.assert_allclose(got, ours.T @ (exact - ours) / len(ours), rtol=1e-3, atol=1e-4)


def test_outputs_of_a_submodule(mixed):
    module, params, x = mixed
    weights = jnp.arange(20.0).reshape(4, 5)
    plain, weighted = (module_outputs(module, params, [Batch((x,), w)], ("left",)) for w in (None, weights))
    assert len(plain) == 1
    np.testing.assert_allclose(weighted[0] ** 2, plain[0] ** 2 * weights[..., None], rtol=1e-4)
    expected = np.asarray(x) @ np.asarray(params["left"]["kernel"]) + np.asarray(params["left"]["bias"])
    np.testing.assert_allclose(plain[0], expected, atol=1e-5)
    assert len(module_outputs(module, params, [Batch((x,))] * 2, ("twice",))) == 4  # two calls in each batch


def test_outputs_of_tokens_that_do_not_count_may_be_anything(mixed):
    module, params, x = mixed
    weights = jnp.ones((4, 5)).at[1, 2].set(0)
    (got,) = module_outputs(module, params, [Batch((x.at[1, 2].set(jnp.nan),), weights)], ("left",))
    (expected,) = module_outputs(module, params, [Batch((x,), weights)], ("left",))
    np.testing.assert_array_equal(got, expected)


def hidden(lift):
    """A model whose layer `inside` runs within a transformation of Flax."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="outside")(lift(x))

    return Model()


def remat(x):
    return nn.remat(Inner)(name="inside")(x)


def jitted(x):
    return nn.jit(Inner)(name="inside")(x)


def mapped(x):
    lifted = nn.vmap(Inner, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=1, out_axes=1)
    return lifted(name="inside")(x)


def scanned(x):
    """Over time, with one set of parameters."""
    lifted = nn.scan(Carried, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
    return lifted(name="inside")(jnp.zeros((x.shape[0], 6)), x)[1]


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="layer")(x)


class Carried(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        y = nn.Dense(6, name="layer")(x + carry)
        return y, y


@pytest.mark.parametrize("lift", [remat, jitted, mapped, scanned])
def test_layers_inside_transformations_are_seen_in_the_trace(lift):
    module = hidden(lift)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 6)), jnp.float32)
    params = shapes_of(module, x)
    (path,) = (p for p in linear_layers(module, params, x).views if "outside" not in p)
    seen, report = qjax.quantize_flax(module, params, "gptq:int4-g2@parallel", batches=[(x,)])
    assert {record.path: record.tokens for record in report.layers} == {path: 24, "outside/kernel": 24}
    decoded = qjax.dequantize_flax(module, seen)
    np.testing.assert_allclose(qjax.apply_flax(module, seen, x), module.apply({"params": decoded}, x), atol=1e-5)
    left, report = qjax.quantize_flax(module, params, "gptq:int4-g2@parallel", batches=[(x,)], rules=["inside=none"])
    assert qjax.linear.is_quantized(left["outside"]["kernel"])
    assert {record.path: record.tokens for record in report.layers}["outside/kernel"] == 24
    nearest, _ = qjax.quantize_flax(module, params, "rtn:int4-g2", batches=[(x,)])  # reads no inputs
    assert len(jax.tree.leaves(nearest)) > len(jax.tree.leaves(params))


def test_arguments_stay_what_they_are():
    args = (jnp.ones(2), True, None, {"mask": np.zeros(3), "rate": 0.5}, "mode", [1, jnp.zeros(())])
    static, arrays = split_arguments(args)
    hash(static)
    assert len(arrays) == 3
    back = merge_arguments(static, arrays)
    assert back[1] is True and back[2] is None and back[3]["rate"] == 0.5 and back[4] == "mode" and back[5][0] == 1
    np.testing.assert_array_equal(back[3]["mask"], 0)
    assert back[0] is args[0]


def test_a_module_that_cannot_be_hashed():
    class Sizes(nn.Module):
        table: dict

        @nn.compact
        def __call__(self, x):
            for i, size in enumerate(self.table["sizes"]):
                x = nn.Dense(size, name=f"layer_{i}")(x)
            return x

    module, x = Sizes({"sizes": np.array([4, 3])}), jnp.ones((20, 6)) + jnp.arange(6)
    params = shapes_of(module, x)
    quantized, _ = qjax.quantize_flax(module, params, "gptq:int8-g2@parallel", batches=[(x,)])
    assert qjax.linear.is_quantized(quantized["layer_1"]["kernel"])


class Sometimes(nn.Module):
    """A layer that a flag leaves out."""

    @nn.compact
    def __call__(self, x, more):
        x = nn.Dense(4, name="always")(x)
        return nn.Dense(4, name="sometimes")(x) if more else x


class Branches(nn.Module):
    """Layers between others, and an input shared with another layer in one of the calls only."""

    @nn.compact
    def __call__(self, x, more):
        a, b = nn.Dense(4, name="a")(x), nn.Dense(4, name="b")(x + 0.0 if more else x)
        if more:
            a = nn.Dense(4, name="between")(a)
        return nn.Dense(4, name="last")(a * b)


def test_sharing_over_several_calls():
    module, x = Branches(), jnp.ones((3, 4))
    params = module.init(jax.random.key(0), x, True)["params"]
    assert sharing(module, params, (x, False))["b/kernel"] == "a/kernel"
    found = sharing(module, params, (x, False), (x, True))
    assert list(found) == [f"{name}/kernel" for name in ("a", "b", "between", "last")]
    assert all(path == first for path, first in found.items())


def test_distinct_calls():
    x = jnp.ones((3, 4))
    calls = [(x, False), (x + 1, False), (x, True), (x[:2], True), (x, True)]
    assert [id(call) for call in distinct_calls(calls)] == [id(calls[i]) for i in (0, 2, 3)]


def test_batches_need_not_reach_every_layer():
    module, x = Sometimes(), jnp.ones((3, 4))
    params = module.init(jax.random.key(0), x, True)["params"]
    sizes = {"always/kernel": 4, "sometimes/kernel": 4}
    batches = [Batch((x, True)), Batch((x, False)), Batch((x, True))]
    found = capture_statistics(module, params, batches, sizes, ["abs_max"]).statistics
    assert (int(found["always/kernel"]["tokens"]), int(found["sometimes/kernel"]["tokens"])) == (9, 6)
    with pytest.raises(QjaxError, match=r"no calibration token.*block/sometimes/kernel"):
        capture_statistics(module, params, [Batch((x, False))], sizes, ["abs_max"], prefix="block/")


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="b")(jnp.tanh(nn.Dense(4, name="a")(x)))


@pytest.mark.parametrize("room", [2**30, 0])
def test_what_layers_return_is_kept_and_taken_in_their_place(room, monkeypatch):
    monkeypatch.setattr(capture, "KEPT_BYTES", room)
    module, x = TwoLayers(), jnp.arange(10.0).reshape(2, 5) / 10
    params = module.init(jax.random.key(0), x)["params"]
    needed = {"b/kernel": 4}
    found = capture_statistics(module, params, [Batch((x,))], needed, ["hessian"], keep_results=["a/kernel"])
    known, exact = found.results[0]
    assert exact == {} and list(known) == (["a/kernel"] if room else [])
    if room:
        np.testing.assert_allclose(known["a/kernel"], x @ params["a"]["kernel"] + params["a"]["bias"], rtol=1e-6)
        broken = {**params, "a": {name: each * jnp.nan for name, each in params["a"].items()}}  # it is not run again
        again = Batch((x,), known=known)
        same = capture_statistics(module, broken, [again], needed, ["hessian"]).statistics
        np.testing.assert_allclose(same["b/kernel"]["hessian"], found.statistics["b/kernel"]["hessian"], rtol=1e-6)
        states = [x]
        capture.advance(module, broken, states, [known])
        np.testing.assert_allclose(states[0], module.apply({"params": params}, x), rtol=1e-5)


class Shop(nn.Module):
    products: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(len(self.products), name="prices")(x)


def test_what_a_module_calls_products_is_its_own():
    """Those of a decoder's parts are a type (`models/compute.py`)."""
    module, x = Shop(("tea", "milk")), jax.random.normal(jax.random.key(1), (6, 4))
    params = module.init(jax.random.key(0), x)["params"]
    quantized, _ = qjax.quantize_flax(module, params, "gptq:int4-g2@parallel", batches=[(x,)])
    weight = qjax.dequantize(quantized["prices"]["kernel"])
    np.testing.assert_allclose(qjax.apply_flax(module, quantized, x), x @ weight, rtol=1e-5, atol=1e-6)
