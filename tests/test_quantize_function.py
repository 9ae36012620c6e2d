"""Any JAX function: its contractions are quantized as the same layer would be alone, and run in its own code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.capture import Batch
from qjax.linear import Linear, is_quantized
from qjax.tracing import capture
from qjax.tracing.coverage import found_in
from qjax.tracing.kernel import Kernel
from qjax.tracing.trace import leaves_of, trace
from tests.traced_models import CASES, X, attention_einsums, experts, normal, ragged, rows

pytestmark = pytest.mark.filterwarnings("ignore:fewer calibration tokens")
GPTQ, OTHERS = "gptq:int4-g4@parallel", ("awq:int4-g4@parallel", "nf4-g4", "rtn:int4-g4")


def product(p, x):
    return x @ p["w"]


def by_hand(weight, x, recipe):
    """The weight as a recipe's own function rounds it for these inputs; AWQ, which looks for scales, by a plain product's."""
    if recipe.startswith("awq"):
        return qjax.dequantize(qjax.quantize_function(product, {"w": weight}, recipe, batches=[(x,)])[0]["w"])
    if recipe != GPTQ:
        return qjax.dequantize(qjax.rtn(weight, recipe.removeprefix("rtn:"))[0])
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return qjax.dequantize(qjax.gptq(weight, "int4-g4", hessian=jnp.float32(rows.T @ rows / len(rows)))[0])


def matrices(params):
    """Every quantized matrix by name, decoded."""
    found = {}
    for path, leaf in leaves_of(params).arrays.items():
        if is_quantized(leaf):
            decoded = qjax.dequantize(leaf)
            stack = decoded.shape[:-2]
            places = [f"[{','.join(map(str, place))}]" if place else "" for place in np.ndindex(stack)]
            found |= dict(zip((path + place for place in places), decoded.reshape(-1, *decoded.shape[-2:]), strict=True))
    return found


def with_gradient(fn):
    """The function's output, and the gradient of its size by the input."""

    def run(params, x):
        y, back = jax.vjp(lambda x: fn(params, x), x)
        return y, back(y)

    return run


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_quantized_as_it_would_be_alone(name):
    case = CASES[name]
    expected = case.products(case.params, X)
    run = OTHERS[list(CASES).index(name) % 3]  # the methods know nothing of the models
    for recipe in (GPTQ, *OTHERS):
        params, report = qjax.quantize_function(case.fn, case.params, recipe, batches=[(X,)], rules=case.rules)
        got = matrices(params)
        assert got.keys() == expected.keys() == {record.path for record in report.layers if record.recipe != "none"}
        for path, (weight, x) in expected.items():
            np.testing.assert_allclose(got[path], by_hand(weight, x, recipe), atol=1e-6, err_msg=f"{recipe} {path}")
        if recipe == run:
            runs = jax.jit(with_gradient(functools.partial(qjax.apply_function, case.fn)))
            wanted = with_gradient(case.fn)(qjax.dequantize_function(params), X)
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), runs(params, X), wanted)
            runs(params, X + 1)
            assert runs._cache_size() == 1  # no call compiles again


@pytest.fixture(scope="module")
def quantized():
    case = CASES["tunix"]
    return qjax.quantize_function(case.fn, case.params, "rtn:int4-g4", batches=[(X,)])[0]


def normalised(p, x):
    return jax.lax.pmean(x @ p["w"], "devices") / jax.lax.axis_size("devices")


def test_a_trace_holds_where_it_was_made():
    """Sizes of named axes are numbers in it; outside of them the function has no meaning."""
    params = qjax.quantize_function(product, {"w": normal(0, 8, 8)}, "rtn:int4-g4", batches=[(normal(1, 3, 8),)])[0]
    for size in (2, 4, 2):
        x = normal(size, size, 3, 8)
        run, plain = (
            jax.vmap(functools.partial(fn, p), axis_name="devices")
            for fn, p in (
                (functools.partial(qjax.apply_function, normalised), params),
                (normalised, qjax.dequantize_function(params)),
            )
        )
        np.testing.assert_allclose(run(x), plain(x), atol=1e-5)
    with pytest.raises(NameError, match="devices"):
        qjax.apply_function(normalised, params, x[0])


def test_flags_that_are_equal_are_told_apart(quantized):
    scaled = lambda p, x, by: (attention_einsums(p, x), jnp.ones(2, jnp.int32) * by)  # noqa: E731
    kinds = [qjax.apply_function(scaled, quantized, X, by)[1].dtype for by in (1, 1.0, True)]
    assert kinds == [jnp.int32, jnp.float32, jnp.int32]


def test_errors_inside_programs_name_the_parameter(quantized):
    with pytest.raises(qjax.QjaxError, match=r"^q/w: a quantized parameter reaches sin"):
        qjax.apply_function(lambda p, x: jax.jit(jnp.sin)(p["q"]["w"]), quantized, X)


def test_other_batches_are_run_anew():
    """A capture goes on from where another one stopped only with the same batch."""
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    fn = lambda p, x: layer(p["c"], layer(p["b"], layer(p["a"], x)))  # noqa: E731
    leaves = leaves_of({name: normal(number, 8, 8) for number, name in enumerate("abc")})
    sites = found_in(leaves, [trace(fn, leaves, (X[0],), {})[0]]).sites
    runs, found = capture.Runs(fn, sites), {}
    for x, path in ((X[0], "b"), (5 * X[0], "c")):
        found = runs.capture(leaves, [Batch((x,))], {path: 8}, ["hessian"])
    alone = capture.Runs(fn, sites).capture(leaves, [Batch((5 * X[0],))], {"c": 8}, ["hessian"])
    np.testing.assert_array_equal(found["c"]["hessian"], alone["c"]["hessian"])


@pytest.mark.filterwarnings("ignore:experts that hardly any")
def test_experts_that_hardly_any_row_is_of_have_statistics_of_all():
    """As the driver's mixtures do; their record says how many rows were theirs."""
    fn = lambda p, x: jax.lax.ragged_dot(rows(x), p["experts"], sizes)  # noqa: E731
    count = rows(X).shape[0]
    sizes, weights = jnp.array([count - 2, 0, 2]), normal(5, 3, 8, 8)
    params, report = qjax.quantize_function(fn, {"experts": weights}, GPTQ, batches=[(X,)])
    assert [(layer.tokens, layer.routed) for layer in report.layers] == [(count - 2, count - 2), (count, 0), (2, 2)]
    parts = (rows(X)[: count - 2], rows(X), rows(X)[count - 2 :])
    for number, x in enumerate(parts):
        found = qjax.dequantize(params["experts"])[number]
        np.testing.assert_allclose(found, by_hand(weights[number], x, GPTQ), atol=1e-6)


def test_results_are_the_same_under_every_transformation(quantized):
    fn = attention_einsums
    expected = fn(qjax.dequantize_function(quantized), X)
    apply = functools.partial(qjax.apply_function, fn, quantized)
    near = functools.partial(np.testing.assert_allclose, atol=2e-5)
    near(apply(X), expected)
    near(jax.vmap(lambda x: apply(x[None])[0])(X), expected)
    near(jax.lax.scan(lambda _, x: (None, apply(x[None])[0]), None, X)[1], expected)
    near(jax.checkpoint(apply)(X), expected)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda p, x: qjax.apply_function(fn, p, x),
        mesh=mesh,
        in_specs=(jax.P(), jax.P("data")),
        out_specs=jax.P("data"),
    )
    near(spread(quantized, X), expected)
    gradient = jax.grad(lambda x: jnp.sum(apply(x) ** 2))(X)
    near(gradient, jax.grad(lambda x: jnp.sum(fn(qjax.dequantize_function(quantized), x) ** 2))(X), atol=1e-4)


def test_gradients_reach_parameters_beside_quantized_ones():
    case = CASES["lora"]
    params, _ = qjax.quantize_function(case.fn, case.params, "rtn:int4-g4", batches=[(X,)], rules=case.rules)
    loss = lambda run, p, a: jnp.sum(run({**p, "a": a}, X) ** 2)  # noqa: E731
    gradient = jax.grad(lambda a: loss(functools.partial(qjax.apply_function, case.fn), params, a))(params["a"])
    dense = qjax.dequantize_function(params)
    np.testing.assert_allclose(gradient, jax.grad(lambda a: loss(case.fn, dense, a))(params["a"]), rtol=1e-4, atol=1e-4)


def test_a_function_is_traced_once_for_each_shape():
    traces = []

    def fn(p, x):
        traces.append(x.shape)
        return x @ p["w"]

    params, _ = qjax.quantize_function(fn, {"w": normal(1, 8, 8)}, "rtn:int4-g4", batches=[(X,), (X + 1,)])
    for _ in range(3):
        qjax.apply_function(fn, params, X)
        jax.jit(lambda p, x: qjax.apply_function(fn, p, x))(params, X)
    assert traces == [X.shape]
    qjax.apply_function(fn, params, X[:1])
    assert traces == [X.shape, X[:1].shape]


def test_nothing_of_tracing_is_left_under_jit(quantized):
    """The compiled program is that of the products written by hand."""

    def by_hand(p, x):
        q = qjax.apply_linear(x, Linear(p["q"]["w"].weight)).reshape(2, 8, 2, 4)
        return qjax.apply_linear(jnp.tanh(q).reshape(2, 8, 8), Linear(p["o"]["w"].weight))

    def flops(fn):
        cost = jax.jit(fn).lower(quantized, X).compile().cost_analysis()
        return cost["flops"], cost["bytes accessed"]

    assert flops(functools.partial(qjax.apply_function, attention_einsums)) == flops(by_hand)


def test_rules_and_casts_decide_by_path():
    case = CASES["tunix"]
    rules = ["^q=gptq:int4-g4@parallel", "^o=none"]
    params, report = qjax.quantize_function(case.fn, case.params, "rtn:int4-g4", batches=[(X,)], rules=rules)
    assert [record.recipe for record in report.layers] == ["gptq:int4-g4@parallel", "none"]
    assert isinstance(params["q"]["w"], Kernel) and params["o"]["w"] is case.params["o"]["w"]
    cast, _ = qjax.quantize_function(case.fn, {**case.params, "scale": jnp.ones(3)}, "bf16", batches=[(X,)])
    assert cast["q"]["w"].dtype == cast["scale"].dtype == jnp.bfloat16 and cast["q"]["w"].shape == (8, 2, 4)


@pytest.mark.parametrize("order", ["sequential", "qep"])
def test_orders_see_what_quantized_layers_make(order):
    """The second layer's codes are those of its own inputs then, of a function of it alone."""
    case = CASES["tunix"]
    params, _ = qjax.quantize_function(case.fn, case.params, f"gptq:int4-g4@{order}", batches=[(X,)])
    first = {"q": case.params["q"], "o": {"w": jnp.zeros((2, 4, 8))}}
    q, _ = qjax.quantize_function(case.fn, first, f"gptq:int4-g4@{order}", batches=[(X,)], rules=["^o=none"])
    np.testing.assert_array_equal(q["q"]["w"].weight.codes, params["q"]["w"].weight.codes)
    inputs = jnp.tanh(rows(X) @ qjax.dequantize(q["q"]["w"]))
    weight, exact = case.params["o"]["w"].reshape(8, 8), jnp.tanh(rows(X) @ case.params["q"]["w"].reshape(8, 8))
    if order == "qep":
        hessian, drift = inputs.T @ inputs / 16, inputs.T @ (exact - inputs) / 16
        damped = hessian + 0.01 * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(8)
        weight = weight + 0.5 * jnp.linalg.solve(damped, drift @ weight)
    alone, _ = qjax.quantize_function(product, {"w": weight}, "gptq:int4-g4@parallel", batches=[(inputs,)])
    np.testing.assert_allclose(qjax.dequantize(params["o"]["w"]), qjax.dequantize(alone["w"]), atol=1e-4)


@jax.jit
def looped(p, x):
    """Layers before, inside and after a loop, one of them used twice."""
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ p["a"]), p["loop"])
    return jnp.tanh(h @ p["twice"]) @ p["twice"] + jnp.tanh(h @ p["b"]) @ p["c"]


@pytest.mark.parametrize("order", ["sequential", "qep"])
def test_products_that_are_kept_change_nothing(order, monkeypatch):
    params = {
        str(i): {
            name: normal(10 * i + j, *(2,) * (name == "loop"), 8, 8) for j, name in enumerate(("a", "loop", "twice", "b", "c"))
        }
        for i in range(2)
    }

    def made():
        given, advance = set(), capture.advance
        monkeypatch.setattr(capture, "advance", lambda *all_of: given.update(all_of[3]) or advance(*all_of))
        fn = lambda p, x: looped(p["1"], looped(p["0"], x))  # noqa: E731
        quantized, _ = qjax.quantize_function(fn, params, f"gptq:int4-g4@{order}", batches=[(X,), (2 * X,)])
        monkeypatch.setattr(capture, "advance", advance)
        return {path.removeprefix(capture.KNOWN) for path in given if path.startswith(capture.KNOWN)}, matrices(quantized)

    known, found = made()
    assert known == {"0/a", "0/b", "1/a"}  # not what is used twice or in a loop, nor what nothing reads later
    monkeypatch.setattr(capture, "KEPT_BYTES", 0)
    none, expected = made()
    assert not none and found.keys() == expected.keys() and len(found) == 2 * 6
    for name, matrix in found.items():
        np.testing.assert_array_equal(matrix, expected[name], err_msg=name)


@functools.partial(jax.jit, static_argnums=2)
def swapped(p, x, flag):
    first, second = ("a", "b") if flag else ("b", "a")
    return jnp.tanh(jnp.tanh(x @ p[first]) @ p[second]) @ p["c"]


@jax.jit
def unrolled(p, x):
    h = x[:, 0]
    for t in range(x.shape[1]):
        h = jnp.tanh((h + x[:, t]) @ p["a"])
    return jnp.tanh(h @ p["b"]) @ p["c"]


layer = jax.jit(lambda w, x: jnp.tanh(x @ w))


def delayed(p, x, count):
    for _ in range(count):
        x = jnp.sin(x)
    return layer(p["c"], layer(p["b"], layer(p["a"], x)))


@pytest.mark.parametrize("order", ["sequential", "qep"])
@pytest.mark.parametrize(
    ("fn", "batches"),
    [
        (swapped, [(X, True), (X, False)]),
        (unrolled, [(X[:, :1],), (X,)]),
        (delayed, [(X, 0), (2 * X, 3)]),
        (delayed, [(2 * X, 3), (X, 0)]),
    ],
    ids=["swapped", "unrolled", "later", "earlier"],
)
def test_batches_that_are_traced_otherwise_are_captured_as_they_are(fn, batches, order, monkeypatch):
    """As by one program, which begins each run anew."""
    params = {name: normal(i, 8, 8) for i, name in enumerate("abc")}
    whole = lambda *given: jax.jit(lambda p, x: fn(p, x, *given[2:]))(*given[:2])  # noqa: E731
    found, _ = qjax.quantize_function(fn, params, f"gptq:int4-g4@{order}", batches=batches)
    monkeypatch.setattr(capture, "KEPT_BYTES", 0)
    expected, _ = qjax.quantize_function(whole, params, f"gptq:int4-g4@{order}", batches=batches)
    for name, matrix in matrices(found).items():
        np.testing.assert_array_equal(matrix, matrices(expected)[name], err_msg=name)


def test_statistics_are_those_of_the_rows():
    case = CASES["maxtext"]
    found = qjax.capture_function(case.fn, case.params, batches=[(X,), (2 * X,)])
    expected = [case.products(case.params, x) for x in (X, 2 * X)]
    for name in ("up", "down"):
        value = found[f"layers/{name}/kernel"]["hessian"]
        for i in range(3):
            x = jnp.concatenate([each[f"layers/{name}/kernel[{i}]"][1] for each in expected])
            np.testing.assert_allclose(value[i], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_tokens_of_weight_zero_do_not_count():
    weights = jnp.zeros((2, 8)).at[0].set(1.0)
    case = CASES["experts"]
    found = qjax.capture_function(case.fn, case.params, batches=[(X,)], weights=[weights])
    half = qjax.capture_function(case.fn, case.params, batches=[(X[:1],)])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, half)
    with pytest.raises(qjax.QjaxError, match=r"experts.*whose tokens have shape \(16,\)"):
        qjax.capture_function(ragged, CASES["ragged"].params, batches=[(X,)], weights=[weights])


def test_activation_formats_hold_for_experts_too():
    params, _ = qjax.quantize_function(ragged, CASES["ragged"].params, "rtn:int8-channel/int8-token", batches=[(X,)])
    leaf = params["experts"]
    each = [jax.tree.map(lambda part, e=e: part[e], leaf) for e in range(2)]
    expected = [qjax.apply_linear(rows(X)[:5], each[0]), qjax.apply_linear(rows(X)[5:], each[1])]
    np.testing.assert_allclose(qjax.apply_function(ragged, params, X), jnp.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize("order", ["parallel", "sequential", "qep"])
def test_bfloat16_parameters_stay_what_the_function_expects(order):
    """A scan's carry keeps its type in every run that calibrates; the codes are those of the same weights in float32."""

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(p["w"].dtype), p["w"])[0]

    wide = normal(1, 2, 8, 8).astype(jnp.bfloat16).astype(jnp.float32)
    narrow, _ = qjax.quantize_function(fn, {"w": wide.astype(jnp.bfloat16)}, f"gptq:int4-g4@{order}", batches=[(X,)])
    assert qjax.apply_function(fn, narrow, X).dtype == narrow["w"].array().dtype == jnp.bfloat16
    first, _ = qjax.quantize_function(
        product, {"w": wide[0]}, "gptq:int4-g4@parallel", batches=[(X.astype(jnp.bfloat16).astype(jnp.float32),)]
    )
    np.testing.assert_array_equal(narrow["w"].weight.codes[0], first["w"].weight.codes)


def test_misuse_is_named():
    w = {"w": normal(1, 8, 8)}
    for batches, told in (([], "batches is empty"), ([X], r"batches\[0\] is"), ([(X,)], "quantized already")):
        params = w if told != "quantized already" else qjax.quantize_function(product, w, "nf4-g4", batches=[(X,)])[0]
        with pytest.raises(qjax.QjaxError, match=told):
            qjax.quantize_function(product, params, "nf4-g4", batches=batches)
    with pytest.raises(qjax.QjaxError, match=r"the function itself fails on a batch, TypeError: dot_general requires"):
        qjax.quantize_function(product, w, "nf4-g4", batches=[(X[..., :4],)])
    params, _ = qjax.quantize_function(product, w, "nf4-g4", batches=[(X,)])
    with pytest.raises(qjax.QjaxError, match="w: a quantized parameter reaches sin"):
        qjax.apply_function(lambda p, x: jnp.sin(p["w"]), params, X)
    with pytest.raises(qjax.QjaxError, match="w: a quantized parameter reaches a contraction other than"):
        qjax.apply_function(lambda p, x: x @ p["w"].T, params, X)
    with pytest.raises(qjax.QjaxError, match="w: quantized, but not by"):
        qjax.apply_function(product, {"w": qjax.rtn(w["w"], "nf4-g4")[0]}, X)
    with pytest.raises(qjax.QjaxError, match="unknown statistic variance"):
        qjax.capture_function(experts, CASES["experts"].params, batches=[(X,)], statistics=["variance"])
