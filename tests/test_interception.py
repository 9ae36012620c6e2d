"""Quantized kernels in Linen models that know nothing of quantization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import qjax
from qjax.activations import parse_activation
from qjax.interception.linen import linear_layers, recorded
from qjax.linear import Linear, apply_linear, dense_tree, is_quantized
from qjax.maps import Scale


class Mixed(nn.Module):
    """Every kind of linear layer that is served, kernels with one, two and permuted axes."""

    @nn.compact
    def __call__(self, x):  # (batch, 7)
        x = nn.Dense(16, name="dense")(x)
        x = nn.DenseGeneral((4, 8), name="split")(x)  # kernel (16, 4, 8)
        x = nn.DenseGeneral(16, axis=(-1, -2), use_bias=False, name="join")(x)  # kernel (8, 4, 16), axes swapped
        x = nn.Einsum((2, 16, 8), "bd,hdk->bkh", name="permuted")(x)  # out axes around the in axis, result permuted
        x = nn.Einsum((8, 2, 5), "...kh,khd->...d", use_bias=False, name="dots")(x)
        return nn.tanh(x)


class Scanned(nn.Module):
    """A stack of layers under nn.scan: the kernel has a leading layer axis outside and none inside."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda layer, carry, _: (nn.tanh(layer(carry)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(nn.Dense(7, name="layers"), x, None)[0]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (3, 7))


def initialise(module, x):
    params = module.init(jax.random.key(0), x)["params"]
    return jax.tree.map(lambda leaf: leaf + 0.01, params)  # no zero biases


def test_views_are_exact_inverses(x):
    module = Mixed()
    params = initialise(module, x)
    linears = linear_layers(module, params, x)
    assert set(linears.views) == {f"{name}/kernel" for name in ("dense", "split", "join", "permuted", "dots")}
    assert not linears.refused
    for path, view in linears.views.items():
        kernel = params[path.split("/")[0]]["kernel"]
        np.testing.assert_array_equal(view.to_kernel(view.to_matrix(kernel)), kernel)
    assert linears.views["permuted/kernel"].to_matrix(params["permuted"]["kernel"]).shape == (16, 16)


@pytest.mark.parametrize("recipe", ["rtn:int8-g4", "rtn:int3-channel", "nf4"])
def test_quantized_model_equals_dequantized_model(x, recipe):
    module = Mixed()
    params = initialise(module, x)
    quantized, report = qjax.quantize_flax(module, params, recipe, batches=[(x,)])
    assert all(is_quantized(quantized[name]["kernel"]) for name in params)
    assert len(report.layers) == 5
    decoded = qjax.dequantize_flax(module, quantized, x)
    assert jax.tree.map(jnp.shape, decoded) == jax.tree.map(jnp.shape, params)
    got = jax.jit(lambda p: qjax.apply_flax(module, p, x))(quantized)
    np.testing.assert_allclose(got, module.apply({"params": decoded}, x), atol=1e-6)
    assert float(jnp.max(jnp.abs(got - module.apply({"params": params}, x)))) > 1e-4


def test_layers_run_as_their_leaves_say_and_are_recorded_as_they_are_given(x):
    """Maps and activation formats in every kind of layer, decoded or not; calibration sees the input before a leaf's maps."""
    module = Mixed()
    params = initialise(module, x)

    def leaf(matrix):
        scale = jnp.linspace(0.5, 2, len(matrix)).astype(jnp.float16)
        return Linear(qjax.rtn(matrix, "int8-g4")[0], (Scale(scale),), parse_activation("int4-token"))

    views = linear_layers(module, params, x).views
    held = {
        name: layer | {"kernel": leaf(views[f"{name}/kernel"].to_matrix(layer["kernel"]))} for name, layer in params.items()
    }
    with recorded() as packed:
        got = module.apply({"params": held}, x)
    np.testing.assert_array_equal(packed.inputs["dense/kernel"][0], x)
    first = apply_linear(x, held["dense"]["kernel"]) + params["dense"]["bias"]
    np.testing.assert_allclose(packed.inputs["split/kernel"][0], first, atol=1e-6)
    np.testing.assert_allclose(qjax.apply_flax(module, dense_tree(held), x), got, atol=1e-5)
    decoded = qjax.dequantize_flax(module, held, x)
    assert float(jnp.max(jnp.abs(got - module.apply({"params": decoded}, x)))) > 1e-3


def test_float_model_is_untouched(x):
    module = Mixed()
    params = initialise(module, x)
    np.testing.assert_array_equal(qjax.apply_flax(module, params, x), module.apply({"params": params}, x))


def test_gradient_reaches_the_input_through_packed_kernels(x):
    module = Mixed()
    quantized, _ = qjax.quantize_flax(module, initialise(module, x), "rtn:int8-g4", batches=[(x,)])
    decoded = qjax.dequantize_flax(module, quantized, x)
    got = jax.grad(lambda x: qjax.apply_flax(module, quantized, x).sum())(x)
    expected = jax.grad(lambda x: module.apply({"params": decoded}, x).sum())(x)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_layers_under_scan_run_quantized(x):
    module = Scanned()
    params = initialise(module, x)
    kernel = params["layers"]["kernel"]  # (3, 7, 7)
    stacked = jax.vmap(lambda weight: qjax.rtn(weight, "int4-g4")[0])(kernel)
    got = qjax.apply_flax(module, {"layers": params["layers"] | {"kernel": stacked}}, x)
    decoded = {"layers": params["layers"] | {"kernel": qjax.dequantize(stacked)}}
    np.testing.assert_allclose(got, module.apply({"params": decoded}, x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:fewer calibration tokens")
def test_stacked_kernels_are_quantized_layer_by_layer(x):
    params = initialise(Scanned(), x)
    quantized, report = qjax.quantize_flax(Scanned(), params, "gptq:int8-g4", batches=[(x,)])
    assert [record.path for record in report.layers] == [f"layers/kernel[{i}]" for i in range(3)]
    decoded = qjax.dequantize_flax(Scanned(), quantized)
    np.testing.assert_allclose(qjax.apply_flax(Scanned(), quantized, x), Scanned().apply({"params": decoded}, x), atol=1e-5)
    same, _ = qjax.quantize_flax(Scanned(), params, "rtn:int8-g4", batches=[(x,)], rules="layers=none")
    assert not is_quantized(same["layers"]["kernel"])


class Two(nn.Module):
    """A layer that only a flag reaches."""

    @nn.compact
    def __call__(self, x, use):
        x = nn.Dense(8, name="a")(x)
        return nn.Dense(8, name="b")(x) if use else x


@pytest.mark.parametrize("recipe", ["rtn:int8-g4", "gptq:int8-g4", "gptq:int8-g4@parallel"])
def test_every_batch_is_traced(x, recipe):
    params = Two().init(jax.random.key(0), x, True)["params"]
    xs = jax.random.normal(jax.random.key(2), (2, 16, 7))
    quantized, report = qjax.quantize_flax(Two(), params, recipe, batches=[(xs[0], False), (xs[1], True)])
    assert all(is_quantized(quantized[name]["kernel"]) for name in "ab")
    assert [record.path for record in report.layers] == ["a/kernel", "b/kernel"]
    with pytest.raises(qjax.QjaxError, match="do not reach b/kernel"):
        qjax.dequantize_flax(Two(), quantized, x, False)


def test_kernels_that_no_batch_reaches_are_named(x):
    params = Two().init(jax.random.key(0), x, True)["params"]
    with pytest.raises(qjax.QjaxError, match=r"b/kernel: no batch reaches it.*'PATTERN=none'"):
        qjax.quantize_flax(Two(), params, "rtn:int8-g4", batches=[(x, False)])
    for options in ({"recipe": "rtn:int8-g4", "rules": ["b=none"]}, {"recipe": None, "rules": ["a=rtn:int8-g4"]}):
        quantized, _ = qjax.quantize_flax(Two(), params, batches=[(x, False)], **options)
        assert is_quantized(quantized["a"]["kernel"])
        assert quantized["b"]["kernel"] is params["b"]["kernel"]


@pytest.mark.parametrize("recipe", ["rtn:int8-g4", "bf16"])
def test_rules_on_kernels_that_are_not_run_are_done_or_refused(x, recipe):
    """Another recipe than the whole model's cast is an error there; none leaves the kernel as it is."""
    params = Two().init(jax.random.key(0), x, True)["params"]
    with pytest.raises(qjax.QjaxError, match="b/kernel"):
        qjax.quantize_flax(Two(), params, recipe, batches=[(x, False)], rules=["b=fp16"])
    left, _ = qjax.quantize_flax(Two(), params, recipe, batches=[(x, False)], rules=["b=none"])
    assert left["b"]["kernel"].dtype == jnp.float32


def test_misuse_is_named(x):
    params = initialise(Mixed(), x)
    with pytest.raises(qjax.QjaxError, match="batches is empty"):
        qjax.quantize_flax(Mixed(), params, "nf4", batches=[])
    with pytest.raises(qjax.QjaxError, match=r"batches\[1\] is ArrayImpl; give tuples.*\[\(x,\)\]"):
        qjax.quantize_flax(Mixed(), params, "nf4", batches=[(x,), x])
    quantized, _ = qjax.quantize_flax(Mixed(), params, "nf4", batches=[(x,)])
    whole, _ = qjax.quantize_flax(Mixed(), {"params": params}, "nf4", batches=[(x,)])
    jax.tree.map(np.testing.assert_array_equal, whole, {"params": quantized})
    np.testing.assert_array_equal(qjax.apply_flax(Mixed(), whole, x), qjax.apply_flax(Mixed(), quantized, x))
    with pytest.raises(qjax.QjaxError, match="quantized already"):
        qjax.quantize_flax(Mixed(), quantized, "nf4", batches=[(x,)])


@pytest.mark.filterwarnings("ignore:fewer calibration tokens")
@pytest.mark.parametrize("average", [True, False])
def test_further_collections_are_named_and_served(x, average):
    """They run with quantized kernels, and are quantized where all variables are given, as the message says."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=average, name="norm")(nn.Conv(4, (3,), name="conv")(x[..., None]))
            return nn.Dense(8, name="dense")(nn.relu(x).reshape(3, 28))

    variables = Normed().init(jax.random.key(0), x)
    params = variables["params"]
    with pytest.raises(qjax.QjaxError, match=r"Normed reads the collection 'batch_stats'.*give quantize_flax all variables"):
        qjax.quantize_flax(Normed(), params, "rtn:int8-g4", batches=[(x,)])
    kernel, _ = qjax.rtn(params["dense"]["kernel"], "int8-g4")
    with qjax.quantized_kernels():
        got, _ = Normed().apply(
            {**variables, "params": params | {"dense": params["dense"] | {"kernel": kernel}}}, x, mutable=["batch_stats"]
        )
    expected, _ = Normed().apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(got, expected, atol=0.2)
    if average:  # else calibration would change the statistics that it reads
        quantized, report = qjax.quantize_flax(Normed(), variables, "gptq:int8-g4", batches=[(x,)])
        assert [record.path for record in report.layers] == ["params/conv/kernel", "params/dense/kernel"]
        got, state = qjax.apply_flax(Normed(), quantized, x, mutable=("batch_stats",))
        wanted = Normed().apply(qjax.dequantize_flax(Normed(), quantized), x)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert state.keys() == {"batch_stats"}


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(8, name="b")(nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, name="a")(x)))


@pytest.mark.filterwarnings("ignore:fewer calibration tokens")
def test_random_numbers_come_with_a_function_of_them(x):
    """Batches hold none: what a module lacks is said, and the function that gives them is quantized with them."""
    params, key = Dropping().init(jax.random.key(0), x)["params"], jax.random.key(3)
    with pytest.raises(qjax.QjaxError, match=r"Dropping itself fails on a batch, InvalidRngError: .* rngs, goes to qjax.quant"):
        qjax.quantize_flax(Dropping(), params, "rtn:int8-g4", batches=[(x, True)])
    with pytest.raises(qjax.QjaxError, match=r"Dropping itself fails on a batch, ScopeParamShapeError"):
        qjax.quantize_flax(Dropping(), params, "rtn:int8-g4", batches=[(x[:, :5],)])
    fn = lambda params, x, key: Dropping().apply({"params": params}, x, True, rngs={"dropout": key})  # noqa: E731
    quantized, _ = qjax.quantize_function(fn, params, "gptq:int8-g4@parallel", batches=[(x, key)])
    alone, _ = qjax.quantize_flax(Dropping(), params, "gptq:int8-g4@parallel", batches=[(x,)], rules=["b=none"])
    np.testing.assert_array_equal(quantized["a"]["kernel"].weight.codes, alone["a"]["kernel"].codes)
    decoded = qjax.dequantize_function(quantized)
    np.testing.assert_allclose(qjax.apply_function(fn, quantized, x, key), fn(decoded, x, key), atol=1e-6)
    by_flax = qjax.apply_flax(Dropping(), quantized, x, True, rngs={"dropout": key})
    np.testing.assert_allclose(by_flax, fn(decoded, x, key), atol=1e-6)


def test_rules_leave_layers_out(x):
    module = Mixed()
    params = initialise(module, x)
    quantized, _ = qjax.quantize_flax(module, params, "rtn:int8-g4", batches=[(x,)], rules=["dense=none", "dots=nf4"])
    assert not is_quantized(quantized["dense"]["kernel"])
    assert str(quantized["dots"]["kernel"].format) == "nf4-g64"
    with pytest.raises(qjax.QjaxError, match="matches no kernel"):
        qjax.quantize_flax(module, params, "rtn:int8-g4", batches=[(x,)], rules=["nothing=none"])


@pytest.mark.parametrize(
    ("layer", "shape", "paths"),
    [
        (
            nn.DenseGeneral(5, batch_dims=(0,), use_bias=False, name="batched"),
            (3, 7),
            ["batched/kernel[1]"],
        ),
        (nn.Einsum((3, 7, 5), "bd,bde->be", use_bias=False, name="batched"), (3, 7), ["batched/kernel[2]"]),
        (nn.Dense(5, dot_general=jax.lax.dot_general, name="own"), (3, 7), ["own/kernel"]),
        (nn.Dense(5, promote_dtype=lambda *values, **_: [2 * values[0], *values[1:]], name="own"), (3, 7), ["own/kernel"]),
    ],
)
def test_layers_that_interceptors_refuse_are_seen_in_the_trace(layer, shape, paths):
    x = jnp.ones(shape)

    class Wrapper(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="good")(layer.clone(parent=self)(x))

    params = Wrapper().init(jax.random.key(0), x)["params"]
    quantized, report = qjax.quantize_flax(Wrapper(), params, "rtn:int8-channel", batches=[(x,)])
    assert {record.path for record in report.layers} >= {"good/kernel", *paths}
    decoded = qjax.dequantize_flax(Wrapper(), quantized)
    np.testing.assert_allclose(qjax.apply_flax(Wrapper(), quantized, x), Wrapper().apply({"params": decoded}, x), atol=1e-5)
    quantized, _ = qjax.quantize_flax(Wrapper(), params, "rtn:int8-channel", batches=[(x,)], rules=[f"{layer.name}=none"])
    assert is_quantized(quantized["good"]["kernel"])
    assert not is_quantized(quantized[layer.name]["kernel"])


def test_layers_of_other_classes_are_not_skipped_silently(x):
    class Derived(nn.Dense):
        pass

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Derived(8, name="derived")(nn.Dense(8, name="dense")(x))
            return nn.Conv(4, (3,), name="conv")(x[..., None])

    params = initialise(Model(), x)
    quantized, report = qjax.quantize_flax(Model(), params, "nf4", batches=[(x,)])
    assert [record.path for record in report.layers] == ["dense/kernel", "derived/kernel", "conv/kernel"]
    decoded = qjax.dequantize_flax(Model(), quantized)
    np.testing.assert_allclose(qjax.apply_flax(Model(), quantized, x), Model().apply({"params": decoded}, x), atol=1e-5)
    quantized, _ = qjax.quantize_flax(Model(), params, "nf4", batches=[(x,)], rules=["derived|conv=none"])
    assert is_quantized(quantized["dense"]["kernel"])
    cast, report = qjax.quantize_flax(Model(), params, "bf16", batches=[(x,)])
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}
    assert report.model_bits_per_weight == 16


@pytest.mark.parametrize("recipe", ["rtn:int8-g4", "gptq:int8-g4"])
def test_kernels_that_change_on_their_way_to_the_layer_are_refused(x, recipe):
    """A layer's kernel is then not the parameter: rounding that would not be rounding this."""
    double = lambda variables: jax.tree.map(lambda leaf: 2 * leaf, variables)  # noqa: E731
    run = nn.map_variables(lambda layer, x: layer(x), "params", double)

    class Doubled(nn.Module):
        def setup(self):
            self.plain, self.layer = nn.Dense(7), nn.Dense(8)

        def __call__(self, x):
            return self.layer(self.plain(x)) if self.is_initializing() else run(self.layer, self.plain(x))

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(8, name="layer"))(nn.Dense(7, name="plain")(x))

    for module in (Doubled(), Normed()):
        params = module.init(jax.random.key(0), x)["params"]
        with pytest.raises(qjax.QjaxError, match=r"cannot be quantized: layer/kernel is .*'PATTERN=none'"):
            qjax.quantize_flax(module, params, recipe, batches=[(x,)])
    quantized, _ = qjax.quantize_flax(Normed(), params, "rtn:int8-g4", batches=[(x,)], rules=["layer=none"])
    assert is_quantized(quantized["plain"]["kernel"]) and not is_quantized(quantized["layer"]["kernel"])


def test_kernels_that_come_to_the_layer_as_they_are_stay_with_interceptors(x):
    checkpointed = nn.remat(Two, static_argnums=(2,))()
    params = checkpointed.init(jax.random.key(0), x, True)["params"]
    quantized, _ = qjax.quantize_flax(checkpointed, params, "rtn:int8-g4", batches=[(x, True)])
    plain, _ = qjax.quantize_flax(Two(), params, "rtn:int8-g4", batches=[(x, True)])
    assert jax.tree.structure(quantized) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, quantized, plain)


def test_weights_that_are_not_finite_are_named(x):
    params = initialise(Mixed(), x)
    params["join"]["kernel"] = params["join"]["kernel"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(qjax.QjaxError, match=r"not finite.*join/kernel"):
        qjax.quantize_flax(Mixed(), params, "rtn:int8-channel", batches=[(x,)])


def test_quantized_leaf_in_another_layer_is_an_error_that_names_it():
    class Convolution(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3,), name="conv")(x)

    x = jnp.ones((1, 8, 4))
    params = Convolution().init(jax.random.key(0), x)["params"]
    kernel, _ = qjax.rtn(params["conv"]["kernel"].reshape(-1, 4), "int8-channel")
    with pytest.raises(qjax.QjaxError, match=r"conv.*Conv cannot run"):
        qjax.apply_flax(Convolution(), {"conv": params["conv"] | {"kernel": kernel}}, x)

    table, _ = qjax.rtn(jnp.ones((4, 4)), "int8-channel")

    class Embedding(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Embed(4, 4, name="embed")(x)

    with pytest.raises(qjax.QjaxError, match=r"embed.*quantized embedding"):
        qjax.apply_flax(Embedding(), {"embed": {"embedding": table}}, jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize("wrap", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.parametrize("recipe", ["rtn:int4-g16", "bf16", "none"])
def test_boxed_parameters_keep_their_boxes(wrap, recipe):
    """The quantized kernel alone has none; what is computed is what it would be without boxes."""
    x = jax.random.normal(jax.random.key(1), (4, 16))
    inits = wrap(nn.initializers.lecun_normal(), ("embed", "mlp")), wrap(nn.initializers.normal(), ("mlp",))
    layer = nn.Dense(8, kernel_init=inits[0], bias_init=inits[1])
    params = layer.init(jax.random.key(0), x)["params"]
    quantized, _ = qjax.quantize_flax(layer, params, recipe, batches=[(x,)])
    plain, _ = qjax.quantize_flax(layer, nn.meta.unbox(params), recipe, batches=[(x,)])
    assert type(quantized["bias"]) is type(params["bias"]) and quantized["bias"].names == ("mlp",)
    assert is_quantized(quantized["kernel"]) == (recipe == "rtn:int4-g16")
    assert is_quantized(quantized["kernel"]) or quantized["kernel"].names == ("embed", "mlp")
    np.testing.assert_array_equal(qjax.apply_flax(layer, quantized, x), qjax.apply_flax(layer, plain, x))


def test_modules_of_nnx_are_named():
    class Net(nnx.Module):
        pass

    for run in (
        lambda: qjax.quantize_flax(Net(), {}, "nf4", batches=[(1,)]),
        lambda: qjax.apply_flax(Net(), {}),
        lambda: qjax.dequantize_flax(Net(), {}),
    ):
        with pytest.raises(qjax.QjaxError, match=r"expected a Linen.*got Net, an NNX module, which qjax.quantize_nnx takes"):
            run()
    with pytest.raises(qjax.QjaxError, match=r"expected a Linen module .*got int$"):
        qjax.quantize_flax(7, {}, "nf4", batches=[(1,)])


@pytest.mark.parametrize("recipe", ["rtn:int8-g4", "nf4-g4-dq", "rtn:int3-channel-sym/int8-token"])
@pytest.mark.parametrize("module", [Mixed(), Scanned(), nn.Conv(6, (1,))], ids=["layers", "stack", "convolution"])
def test_quantized_parameters_go_through_flax_serialization(module, recipe, x):
    params, _ = qjax.quantize_flax(module, initialise(module, x), recipe, batches=[(x,)])
    fresh = module.init(jax.random.key(5), x)["params"]
    like, _ = qjax.quantize_flax(module, fresh, recipe, batches=[(x,)])
    found = serialization.from_bytes(like, serialization.to_bytes(params))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("kept", ["nf4-g4", "rtn:int4-g4-sym-full", "rtn:int2-g4", None])
def test_states_of_other_leaves_are_refused(kept, x):
    """Also where all shapes are alike."""
    params = initialise(Mixed(), x)
    like, _ = qjax.quantize_flax(Mixed(), params, "rtn:int4-g4-sym-max", batches=[(x,)])
    other = params if kept is None else qjax.quantize_flax(Mixed(), params, kept, batches=[(x,)])[0]
    with pytest.raises(qjax.QjaxError, match=r"what was kept is another leaf than the target \(a QTensor\)"):
        serialization.from_bytes(like, serialization.to_bytes(other))


def test_quantized_parameters_are_kept_by_orbax(x, tmp_path):
    """As the README says; qjax's own folders are for decoders, and say so."""
    orbax = pytest.importorskip("orbax.checkpoint")
    module = Mixed()
    params, _ = qjax.quantize_flax(module, initialise(module, x), "rtn:int8-g4", batches=[(x,)])
    for save in (qjax.save, qjax.save_huggingface):
        with pytest.raises(qjax.QjaxError, match=r"expected a Model, got dict; .*orbax.checkpoint.StandardCheckpointer"):
            save(tmp_path / "own", params)
    with orbax.StandardCheckpointer() as keeper:
        keeper.save(tmp_path / "kept", params)
    again, _ = qjax.quantize_flax(module, module.init(jax.random.key(5), x)["params"], "rtn:int8-g4", batches=[(x,)])
    with orbax.StandardCheckpointer() as keeper:
        found = keeper.restore(tmp_path / "kept", jax.eval_shape(lambda: again))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    np.testing.assert_array_equal(qjax.apply_flax(module, found, x), qjax.apply_flax(module, params, x))
