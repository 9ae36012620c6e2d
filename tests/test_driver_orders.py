"""The driver: every order of calibration against a plain re-computation of the whole model, layer by layer.

The methods are smooth stand-ins (`fake_methods.py`), so nothing hides behind ties. The slow way runs the whole decoder from
the tokens for every layer, keeps all activations and does its arithmetic in float64.
"""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import methods
from qjax.calibrate import tokens as calibration_tokens
from qjax.calibrate.order import Order
from qjax.calibrate.tokens import Calibration
from qjax.driver.decoder import quantize
from qjax.driver.flow import quantize_piece
from qjax.driver.piece import Piece
from qjax.formats import parse_format
from qjax.maps import Divide
from qjax.methods import GIVENS, Memo, Site, Stage
from qjax.models.parameters import flatten, unflatten
from qjax.models.walk import Decoder
from qjax.recipe import Recipe, parse_order, parse_recipe
from tests.conftest import tiny_config
from tests.fake_methods import powers, shrink
from tests.random_weights import small_model

CALLS = ["attention/q", "attention/k", "attention/v", "attention/o", "mlp/up", "mlp/gate", "mlp/down"]
FOLDED = [
    (["attention/q", "attention/k", "attention/v"], "attention_norm/scale"),
    (["attention/o"], "attention/v/kernel"),
    (["mlp/gate", "mlp/up"], "mlp_norm/scale"),
    (["mlp/down"], "mlp/up/kernel"),
]
ORDERS = ["parallel", "block", "sequential", "qep(alpha=0.7,damp=0.05)", "qep(alpha=0)"]


@pytest.fixture(scope="module")
def case():
    """A model of two blocks with one head of keys for every head of queries, tokens, and weights with holes."""
    model = small_model(tiny_config(vocabulary_size=61, kv_heads=4, qkv_bias=True))
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 61, (5, 16)).astype(np.int32)
    weights = generator.uniform(0.5, 2, tokens.shape).astype(np.float32) * (generator.random(tokens.shape) > 0.2)
    return SimpleNamespace(model=model, tokens=tokens, weights=weights, leaves=flatten(model.params))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(methods.METHODS["rounding"], "fake", "tests.fake_methods:fake")
    monkeypatch.setitem(methods.METHODS["transform"], "stretch", "tests.fake_methods:stretch")


@functools.cache
def recorder(config):
    """Compiled: parameters, tokens -> the input of every linear layer, by path of the kernel."""

    def run(params, tokens):
        seen = {}

        def record(call, args, kwargs, context):
            if isinstance(context.module, nn.Dense):
                seen["/".join((*context.module.path, "kernel"))] = args[0].reshape(-1, args[0].shape[-1])
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            Decoder(config).apply({"params": params}, tokens)
        return seen

    return jax.jit(run)


def slowly(case, order: Order, transform: bool) -> dict[str, np.ndarray]:
    """The leaves of the whole model after quantization, float64 arithmetic."""

    def inputs(leaves):
        seen = recorder(case.model.config)(unflatten({p: jnp.asarray(x, jnp.float32) for p, x in leaves.items()}), case.tokens)
        return {path: np.asarray(x, np.float64) for path, x in seen.items()}

    counts = case.weights.reshape(-1, 1).astype(np.float64)
    original = {path: np.asarray(leaf, np.float64) for path, leaf in case.leaves.items()}
    result = dict(original)
    for number in range(case.model.config.layers):
        prefix = f"block_{number}/"
        block = {path: leaf for path, leaf in original.items() if path.startswith(prefix)}
        before, done = result if order.prefix else original, {}
        for half in ("attention", "mlp"):
            seen = inputs(before | block | (done if order.inside else {})) if transform else {}
            for layers, source in FOLDED if transform else ():
                if not source.startswith(half):
                    continue
                scale = powers(np.sum(np.abs(seen[f"{prefix}{layers[0]}/kernel"]) * counts, 0) / np.sum(counts), np)
                for layer in layers:
                    block[f"{prefix}{layer}/kernel"] = block[f"{prefix}{layer}/kernel"] * scale[:, None]
                block[prefix + source] = block[prefix + source] / scale
                if (bias := (prefix + source).replace("/kernel", "/bias")) in block and source.endswith("kernel"):
                    block[bias] = block[bias] / scale
            for layer in (layer for layer in CALLS if layer.startswith(half)):
                path = f"{prefix}{layer}/kernel"
                x = inputs(before | block | (done if order.inside else {}))[path]
                hessian = x.T @ (x * counts) / np.sum(counts)
                weight = block[path]
                if order.alpha:
                    exact = inputs(original | block)[path]
                    drift = x.T @ ((exact - x) * counts) / np.sum(counts)
                    damped = hessian + order.damp * np.mean(np.diag(hessian)) * np.eye(len(hessian))
                    weight = weight + order.alpha * np.linalg.solve(damped, drift @ weight)
                done[path] = shrink(weight, hessian, np.sum(np.abs(x) * counts, 0) / np.sum(counts), np)
        result |= block | done
    return result


@pytest.mark.parametrize(
    ("name", "transform"), [*((name, False) for name in ORDERS), ("parallel", True), ("block", True), (ORDERS[3], True)]
)
def test_orders_are_what_they_say(case, name, transform):
    stage = parse_order(name)
    order = stage()
    transforms = (Stage("stretch"),) if transform else ()
    recipe = Recipe(transforms, Stage("fake"), parse_format("fp32"), stage)
    quantized, _ = quantize(case.model, recipe, calibration=Calibration(case.tokens, case.weights), rules=["head=none"])
    expected = slowly(case, order, transform)
    for path, leaf in flatten(quantized.params).items():
        largest = np.max(np.abs(expected[path]))
        np.testing.assert_allclose(leaf, expected[path], atol=3e-5 * largest, err_msg=f"{name} {path}")


def test_the_orders_differ(case):
    """Otherwise the test above would show nothing."""
    found = []
    for name in ORDERS:
        recipe = Recipe((), Stage("fake"), parse_format("fp32"), parse_order(name))
        quantized, _ = quantize(case.model, recipe, calibration=Calibration(case.tokens, case.weights), rules=["head=none"])
        found.append(np.asarray(flatten(quantized.params)["block_1/mlp/down/kernel"]))
    for i, a in enumerate(found):
        for b in found[:i]:
            different = np.max(np.abs(a - b)) > 1e-3 * np.max(np.abs(a))
            assert different or (a is found[4] and b is found[2])  # qep(alpha=0) is sequential
    np.testing.assert_array_equal(found[4], found[2])


def test_batches_do_not_matter(case, monkeypatch):
    """Batches of two windows, the last filled up with one that does not count, and all at once."""
    recipe = Recipe((), Stage("fake"), parse_format("fp32"), Stage("sequential"))
    results = []
    for at_once in (2048, 33):
        monkeypatch.setitem(calibration_tokens.BATCH_TOKENS, jax.default_backend(), at_once)
        quantized, report = quantize(
            case.model, recipe, calibration=Calibration(case.tokens, case.weights), rules=["head=none"]
        )
        assert {record.tokens for record in report.layers} - {None} == {int(np.sum(case.weights > 0))}
        results.append(flatten(quantized.params))
    for path, leaf in results[0].items():
        np.testing.assert_allclose(leaf, results[1][path], atol=1e-5 * float(jnp.max(jnp.abs(leaf))), err_msg=path)


def test_a_chain_of_transforms_sees_what_those_before_it_left(case):
    """Inputs divided by powers of two near their means have means near 1, so the same transform again finds 1."""
    found, rules = [], ["attention|mlp/down|head|block_1=none"]
    for transforms in ((Stage("stretch"),), (Stage("stretch"),) * 2):
        recipe = Recipe(transforms, Stage("fake"), parse_format("fp32"), Stage("parallel"))
        quantized, _ = quantize(case.model, recipe, calibration=Calibration(case.tokens), rules=rules)
        found.append(flatten(quantized.params))
    for path, leaf in found[0].items():
        np.testing.assert_array_equal(found[1][path], leaf, err_msg=path)
    changed = found[0]["block_0/mlp_norm/scale"] / case.leaves["block_0/mlp_norm/scale"]
    assert float(jnp.max(changed)) > 1 > float(jnp.min(changed))


@pytest.mark.usefixtures("registries")
def test_a_later_transform_is_given_mapped_weights(case):
    seen = []

    def double(weights, fmt):
        return Divide(jnp.full(len(weights[0]), 2.0))

    def look(weights, fmt):
        seen.extend(weights)
        return Divide(jnp.ones(len(weights[0])))

    for each in (double, look):
        methods.register(each, kind="transform")
    quantize(case.model, "double+look:int8-g16", rules=["attention|mlp/down|head|block_1=none"])
    assert len(seen) == 2  # gate and up, which share an input
    for weight, name in zip(seen, ("gate", "up"), strict=True):
        np.testing.assert_array_equal(weight, 2 * case.leaves[f"block_0/mlp/{name}/kernel"])


def test_windows_that_fill_up_a_batch_do_not_count(case, monkeypatch):
    """Five windows in batches of three: the sixth is no text."""
    monkeypatch.setitem(calibration_tokens.BATCH_TOKENS, jax.default_backend(), 3 * case.tokens.shape[1])
    recipe = Recipe((), Stage("fake"), parse_format("fp32"), Stage("parallel"))
    rules = ["attention|mlp/down|head|block_1=none"]
    quantized, report = quantize(case.model, recipe, calibration=Calibration(case.tokens), rules=rules)
    assert {record.tokens for record in report.layers} == {None, case.tokens.size}
    x = recorder(case.model.config)(case.model.params, case.tokens)["block_0/mlp/up/kernel"]
    x = np.asarray(x, np.float64)
    weight = np.asarray(case.leaves["block_0/mlp/up/kernel"], np.float64)
    expected = shrink(weight, x.T @ x / len(x), np.mean(np.abs(x), axis=0), np)
    np.testing.assert_allclose(flatten(quantized.params)["block_0/mlp/up/kernel"], expected, atol=3e-5 * np.abs(expected).max())


def test_methods_that_mean_the_same_share_a_factor():
    site = Site((), {"hessian": jnp.eye(3)}, Memo())
    made = [GIVENS["factor"].make(site, options) for options in ({}, {"damp": 0.01}, {"damp": 0.01, "act_order": True})]
    assert made[0] is made[1] is made[2]
    assert GIVENS["factor"].make(site, {"damp": 0.02}) is not made[0]


def test_memo_computes_once_per_object():
    calls = []

    def compute(x, *, damp):
        calls.append(damp)
        return x + damp

    memo, x = Memo(), jnp.ones(3)
    assert memo.get(compute, x, damp=1) is memo.get(compute, x, damp=1)
    memo.get(compute, x, damp=2)
    memo.get(compute, jnp.ones(3), damp=1)
    assert calls == [1, 2, 1]


def test_a_piece_without_calibrated_plans_runs_nothing(case):
    """rtn needs no batches and no tracing, and leaves everything else as it was."""
    from qjax.interception.contraction import KernelView
    from qjax.models.decoder import Block

    params = case.model.params["block_0"]
    flat = flatten(params)
    views = {path: KernelView(leaf.shape, (0,), (1,)) for path, leaf in flat.items() if path.endswith("kernel")}
    piece = Piece(Block(case.model.config), "block_0/", params, views, {})
    plan = dict.fromkeys(views, parse_recipe("rtn:int4-g16")) | {"mlp/up/kernel": None}
    seen = []
    (found,) = quantize_piece(piece, [plan], Stage("parallel")(), on_layer=seen.append)
    assert [record.path for record in found.records] == [f"block_0/{path}" for path in views]
    assert sorted(record.path for record in seen) == sorted(record.path for record in found.records)
    assert found.leaves["mlp/up/kernel"] is flat["mlp/up/kernel"]
    assert found.leaves["attention_norm/scale"] is flat["attention_norm/scale"]
