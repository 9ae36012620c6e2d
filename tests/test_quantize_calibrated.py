"""quantize, quantize_together and quantize_flax with calibrated recipes: what must not matter, what must, and bad input."""

import collections
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import capture
from qjax.calibrate.tokens import BATCH_TOKENS, Calibration
from qjax.checkpoints.packed import load_packed, save
from qjax.driver.decoder import quantize_together
from qjax.errors import QjaxError, QjaxWarning
from qjax.linear import Linear, dequantize_tree
from qjax.models import walk
from qjax.models.parameters import flatten, unflatten
from qjax.qtensor import QTensor
from qjax.transforms import awq
from tests.conftest import FAMILY_CHANGES, tiny_config
from tests.random_weights import small_model

LLAMA = tiny_config(vocabulary_size=61)  # grouped heads: o cannot be folded
TOKENS = np.random.default_rng(0).integers(0, 61, (16, 32)).astype(np.int32)  # 512, many more than any layer has inputs
AWQ_GPTQ = "awq+gptq:int3-g16"


@pytest.fixture(scope="module")
def model():
    return small_model(LLAMA)


@pytest.fixture(scope="module")
def both(model):
    """awq+gptq in the default order: a model with folded scales, and with scales of its own before o."""
    return qjax.quantize(model, AWQ_GPTQ, calibration=TOKENS)


def assert_same_bits(a, b):
    a, b = flatten(a.params), flatten(b.params)
    assert a.keys() == b.keys()
    for path in a:
        assert jax.tree.structure(a[path]) == jax.tree.structure(b[path]), path
        for x, y in zip(jax.tree.leaves(a[path]), jax.tree.leaves(b[path]), strict=True):
            assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def assert_near(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance * float(jnp.max(jnp.abs(expected))))


def test_report_and_leaves(model, both):
    quantized, report = both
    leaves = flatten(quantized.params)
    assert quantized.recipe == AWQ_GPTQ
    for path, leaf in leaves.items():
        if path.startswith("block_") and path.endswith("kernel"):
            assert isinstance(leaf, Linear if "attention/o" in path else QTensor), path
    assert leaves["block_0/attention_norm/scale"].dtype == jnp.float32
    assert float(jnp.max(jnp.abs(leaves["block_0/mlp_norm/scale"] - model.params["block_0"]["mlp_norm"]["scale"]))) > 0.01
    chosen = [record for record in report.layers if record.recipe != "none"]
    assert len(chosen) == 14
    assert [record.path for record in report.layers] == [path for path in leaves if path.endswith("kernel")]
    for record in chosen:
        assert record.recipe == AWQ_GPTQ and record.tokens == 512
        assert 0 < record.output_error < 0.2
        assert record.damp == pytest.approx(0.01)
        assert record.bits_per_weight == pytest.approx(leaves[record.path].bits_per_weight)
    assert report.size_bytes == sum(leaf.nbytes for leaf in leaves.values())


def test_is_better_than_nearest(model, both):
    """Logits are nearer to the model's than those of rtn with the same grid, on the calibration text and on other tokens."""
    plain, _ = qjax.quantize(model, "rtn:int3-g16")
    others = jnp.asarray(np.random.default_rng(5).integers(0, 61, TOKENS.shape))
    for tokens in (jnp.asarray(TOKENS), others):
        exact = qjax.apply(model, tokens)
        errors = [float(jnp.mean(jnp.square(qjax.apply(each, tokens) - exact))) for each in (both[0], plain)]
        assert errors[0] < 0.9 * errors[1]


def test_twice_the_same_bits_and_a_packed_folder_too(model, both, tmp_path):
    quantized, _ = both
    again, _ = qjax.quantize(model, AWQ_GPTQ, calibration=TOKENS)
    assert_same_bits(quantized, again)
    save(tmp_path / "model", quantized)
    loaded = load_packed(tmp_path / "model")
    assert_same_bits(quantized, loaded)
    assert loaded.recipe == quantized.recipe
    decoded = quantized._replace(params=dequantize_tree(quantized.params))
    assert_near(qjax.apply(loaded, TOKENS), qjax.apply(decoded, TOKENS))


def test_parallel_together_is_each_alone_bit_for_bit(model):
    requests = [
        ("gptq:int4-g16@parallel", ()),
        ("gptq(damp=0.05):nf4-g16@parallel", ("attention/v=none",)),
        ("awq+gptq:int4-g16@parallel", ()),
        ("rtn(clip=hessian):int4-g16@parallel", ("mlp/down=awq:int8-g16@parallel",)),
        ("rtn:int3-g16", ()),
        (None, ()),
    ]
    together = quantize_together(model, requests, calibration=TOKENS)
    for (recipe, rules), (result, report) in zip(requests, together, strict=True):
        alone, alone_report = qjax.quantize(model, recipe, rules=rules, calibration=TOKENS)
        assert_same_bits(result, alone)
        assert result.recipe == alone.recipe
        for ours, theirs in zip(report.layers, alone_report.layers, strict=True):
            if recipe not in ("rtn:int3-g16", None):  # in company these are measured too
                assert ours._replace(seconds=0) == theirs._replace(seconds=0)


def test_other_orders_do_not_go_together(model):
    with pytest.raises(QjaxError, match="cannot be quantized together"):
        quantize_together(model, [("gptq:int4-g16", ()), ("gptq:int3-g16", ())], calibration=TOKENS, order="block")
    with pytest.raises(QjaxError, match=r"block, parallel|parallel, block"):
        qjax.quantize(model, "gptq:int4-g16@block", rules=["mlp=gptq:int4-g16@parallel"], calibration=TOKENS)


@pytest.mark.parametrize(
    ("recipe", "least"),  # a tie that falls the other way moves everything after it: least of what may be equal in other shapes
    [
        ("gptq:int4-g16@qep", 0.5),
        ("gptq:int4-g16@parallel", 0.95),
        pytest.param("awq(loss=module):int4-g16@block", 0.97, marks=pytest.mark.slow),
    ],
)
def test_masked_tokens_change_nothing(model, recipe, least):
    """Whatever tokens of weight 0 are, as long as no other token sees them; and weights count by their ratios alone."""
    weights = np.ones(TOKENS.shape, np.float32)
    weights[:, 24:] = 0
    weights[12:] = 0
    changed = np.where(weights > 0, TOKENS, (TOKENS + 7) % 61)
    first, report = qjax.quantize(model, recipe, calibration=Calibration(TOKENS, weights))
    second, _ = qjax.quantize(model, recipe, calibration=Calibration(changed, weights))
    doubled, _ = qjax.quantize(model, recipe, calibration=Calibration(TOKENS, weights * 2))
    short, _ = qjax.quantize(model, recipe, calibration=TOKENS[:12, :24])
    assert next(iter(report.layers)).tokens == 288
    plain, _ = qjax.quantize(model, recipe, calibration=TOKENS)

    def agreement(a, b):
        pairs = zip(*(jax.tree.leaves(dequantize_tree(each.params)) for each in (a, b)), strict=True)
        return np.mean([float(jnp.mean(jnp.abs(x - y) <= 1e-5 * jnp.max(jnp.abs(y)))) for x, y in pairs])

    assert_same_bits(first, second)
    assert_same_bits(first, doubled)  # a power of two, so no sum rounds differently
    assert agreement(first, short) > least  # sums in another order: where one meets a tie, what follows it differs
    assert agreement(first, plain) < agreement(first, short)


def test_rules_give_layers_their_own_recipes(model):
    rules = ["block_0/attention/k=none", "block_1/attention/v=rtn:int8-g16", "mlp/down=gptq:nf4-g16", "head=gptq:int8-g16"]
    quantized, report = qjax.quantize(model, AWQ_GPTQ, rules=rules, calibration=TOKENS)
    leaves, original = flatten(quantized.params), flatten(model.params)
    assert leaves["block_0/attention/k/kernel"] is original["block_0/attention/k/kernel"]
    assert isinstance(leaves["block_0/attention/q/kernel"], Linear)  # k is left alone, so the norm cannot take a scale
    np.testing.assert_array_equal(leaves["block_0/attention_norm/scale"], original["block_0/attention_norm/scale"])
    assert leaves["block_0/mlp/gate/kernel"].format == qjax.parse_format("int3-g16")
    assert isinstance(leaves["block_0/mlp/gate/kernel"], QTensor)
    assert leaves["head/output/kernel"].format == qjax.parse_format("int8-g16")
    assert leaves["block_0/mlp/down/kernel"].format == qjax.parse_format("nf4-g16")
    by_path = {record.path: record for record in report.layers}
    assert by_path["head/output/kernel"].tokens == 512
    assert by_path["block_0/attention/k/kernel"].recipe == "none"
    held = [leaf for leaf in leaves.values() if isinstance(leaf, QTensor | Linear)]  # of all formats and sizes together
    bits = 8 * sum(leaf.nbytes for leaf in held) / sum(leaf.shape[0] * leaf.shape[1] for leaf in held)
    assert report.bits_per_weight == pytest.approx(bits)
    decoded = quantized._replace(params=dequantize_tree(quantized.params))
    assert_near(qjax.apply(quantized, TOKENS), qjax.apply(decoded, TOKENS))


@pytest.mark.parametrize("rule", ["attention/k=rtn:int8-g16", "attention/k=bf16"])
def test_a_recipe_that_reads_no_data_is_not_changed_by_its_neighbours(model, rule):
    """k shares its input with q and v, which are corrected for its error; k itself is what its own recipe makes of it."""
    quantized, _ = qjax.quantize(model, "gptq:int2-g16@qep", rules=[rule], calibration=TOKENS)
    plain, _ = qjax.quantize(model, None, rules=[rule])
    for block in ("block_0", "block_1"):
        got, expected = (each.params[block]["attention"]["k"]["kernel"] for each in (quantized, plain))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=block)


def test_v_that_is_left_alone_takes_no_scale(tmp_path):
    """With a head of keys for every head o's scale goes into v; but not into one that a rule leaves as it is."""
    model = small_model(tiny_config(vocabulary_size=61, kv_heads=4))
    quantized, _ = qjax.quantize(model, "awq:int4-g16@parallel", calibration=TOKENS)
    assert isinstance(quantized.params["block_0"]["attention"]["o"]["kernel"], QTensor)
    left, _ = qjax.quantize(model, "awq:int4-g16@parallel", rules=["attention/v=none"], calibration=TOKENS)
    assert left.params["block_0"]["attention"]["v"]["kernel"] is model.params["block_0"]["attention"]["v"]["kernel"]
    assert isinstance(left.params["block_0"]["attention"]["o"]["kernel"], Linear)
    save(tmp_path / "model", left)
    assert_same_bits(load_packed(tmp_path / "model"), left)


@pytest.mark.parametrize(("order", "most"), [("parallel", 2), ("block", 1), ("sequential", 1), ("qep", 2)])
def test_hidden_states_are_held_as_often_as_the_driver_says(model, order, most, monkeypatch):
    """Of all batches, `most` times, and of one batch more while a block runs, besides the results that layers keep."""
    monkeypatch.setitem(BATCH_TOKENS, jax.default_backend(), 64)
    monkeypatch.setattr(capture, "KEPT_BYTES", 0)
    batches, shape, seen = 8, (2, 32, 32), []

    def count(*_):
        seen.append(sum(array.shape == shape for array in jax.live_arrays()))

    def counting(module):
        def run(params, x, *further):
            count()
            return honest(module)(params, x, *further)

        return run

    honest, before = walk.compiled, sum(array.shape == shape for array in jax.live_arrays())
    monkeypatch.setattr(walk, "compiled", counting)
    qjax.quantize(model, f"gptq:int4-g16@{order}", calibration=TOKENS, on_layer=count)
    assert batches <= max(seen) - before <= most * batches + 1


@pytest.mark.parametrize("order", ["parallel", "qep"])
@pytest.mark.parametrize("rounding", ["+rtn"])
def test_module_loss_goes_with_every_rounding(model, order, rounding):
    quantized, report = qjax.quantize(model, f"awq(loss=module){rounding}:int4-g16@{order}", calibration=TOKENS)
    assert isinstance(quantized.params["block_1"]["attention"]["o"]["kernel"], Linear)
    assert all(record.weight_error < 0.1 for record in report.layers if record.recipe != "none")


def test_scales_by_an_output_that_is_not_finite_are_refused(model):
    """Inputs of the layers are finite, the output of the attention they are in is not."""
    leaves = flatten(model.params)
    leaves["block_1/attention/o/kernel"] = leaves["block_1/attention/o/kernel"].at[3].set(jnp.inf)
    broken = model._replace(params=unflatten(leaves))
    rules = ["block_0|mlp|attention/o=none"]
    with pytest.raises(QjaxError, match=r"awq finds no finite scale for block_1/attention/q/kernel"):
        qjax.quantize(broken, "awq(loss=module)+rtn:int4-g16@parallel", rules=rules, calibration=TOKENS)


def test_scales_of_two_transforms_are_the_ones_stored(model):
    """What Info reports is the error of the weight that the leaf decodes to."""
    _, report = qjax.quantize(model, "awq:int8-g16@parallel", calibration=TOKENS, rules=["attention/[qkv]|mlp|block_1=none"])
    twice, again = qjax.quantize(
        model, "awq+awq(scaling=reference):int8-g16@parallel", calibration=TOKENS, rules=["attention/[qkv]|mlp|block_1=none"]
    )
    leaf = twice.params["block_0"]["attention"]["o"]["kernel"]
    weight = model.params["block_0"]["attention"]["o"]["kernel"]
    relative = float(jnp.sum(jnp.square(qjax.dequantize(leaf) - weight)) / jnp.sum(jnp.square(weight)))
    errors = [next(r for r in each.layers if r.path == "block_0/attention/o/kernel").weight_error for each in (report, again)]
    assert relative < 3 * max(errors)


def test_gpt2_from_end_to_end(tmp_path):
    """Layer norms with biases take scales, down keeps its own (nothing folds through gelu), the head is tied."""
    model = small_model(tiny_config(vocabulary_size=61, **FAMILY_CHANGES["gpt2"]), dtype=jnp.bfloat16)
    quantized, report = qjax.quantize(model, "awq+gptq:int4-g16", calibration=TOKENS)
    leaves = flatten(quantized.params)
    assert isinstance(leaves["block_0/mlp/down/kernel"], Linear)
    assert isinstance(leaves["block_0/mlp/up/kernel"], QTensor)
    assert isinstance(leaves["block_0/attention/o/kernel"], QTensor)
    assert leaves["block_0/attention_norm/bias"].dtype == leaves["block_0/attention/v/bias"].dtype == jnp.float32
    assert leaves["block_0/attention/q/bias"].dtype == jnp.bfloat16
    save(tmp_path / "model", quantized)
    loaded = load_packed(tmp_path / "model")
    assert_same_bits(loaded, quantized)
    np.testing.assert_array_equal(qjax.apply(loaded, TOKENS), qjax.apply(quantized, TOKENS))
    assert all(record.tokens == 512 for record in report.layers if record.recipe != "none")
    plain, _ = qjax.quantize(model, "rtn:int4-g16")
    exact = qjax.apply(model, TOKENS)
    errors = [float(jnp.mean(jnp.square(qjax.apply(each, TOKENS) - exact))) for each in (quantized, plain)]
    assert errors[0] < errors[1] < float(jnp.var(exact))
    assert report.bits_per_weight < 6.5


ORDERED = ("llama", "gpt_neox", "gpt2")  # the last in a test of its own


@pytest.mark.parametrize(
    ("family", "orders"),
    [
        ("llama", ("block", "sequential", "qep")),
        ("gpt_neox", ("sequential", "qep")),  # parallel branches: its blocks are not halved
        *(pytest.param(family, ("qep",), marks=pytest.mark.slow) for family in FAMILY_CHANGES if family not in ORDERED),
    ],
)
def test_every_family_in_every_order(family, orders, tmp_path):
    """Families differ in their blocks, orders in what they make of any; `parallel` of every family is in a sweep's test."""
    model = small_model(tiny_config(vocabulary_size=61, **FAMILY_CHANGES[family]))
    exact = qjax.apply(model, TOKENS)
    plain, _ = qjax.quantize(model, "rtn:int4-g16")
    error = lambda found: float(jnp.mean(jnp.square(qjax.apply(found, TOKENS) - exact)))  # noqa: E731
    for order in orders:
        quantized, report = qjax.quantize(model, f"awq+gptq:int4-g16@{order}", calibration=TOKENS)
        assert all(record.tokens == 512 for record in report.layers if record.recipe != "none")
        assert error(quantized) < error(plain) < float(jnp.var(exact)), order
    save(tmp_path / "model", quantized)
    loaded = load_packed(tmp_path / "model")
    assert_same_bits(loaded, quantized)
    np.testing.assert_array_equal(qjax.apply(loaded, TOKENS), qjax.apply(quantized, TOKENS))


def test_fewer_tokens_than_inputs_warn(model):
    with pytest.warns(QjaxWarning, match=r"block_0/attention/q/kernel \(10 tokens, 32 inputs\).* and 9 more") as seen:
        quantized, _ = qjax.quantize(model, "gptq:int4-g16", calibration=TOKENS[:1, :10])
    assert seen[0].filename == __file__
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(dequantize_tree(quantized.params)))
    with pytest.warns(QjaxWarning, match=r"block_0/mlp/down/kernel \(40 tokens, 48 inputs\)") as seen:
        qjax.quantize(model, "gptq:int4-g16@parallel", calibration=TOKENS[:4, :10])
    assert "attention" not in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qjax.quantize(model, "rtn:int4-g16", calibration=TOKENS[:1, :10])  # reads none


def test_missing_and_unfit_calibration(model):
    with pytest.raises(QjaxError, match=r"gptq:int4-g16 needs calibration data.*--calibration"):
        qjax.quantize(model, "gptq:int4-g16")
    with pytest.raises(QjaxError, match=r"rtn\(clip=hessian\):int3-g16 needs calibration"):
        qjax.quantize(model, "rtn:int4-g16", rules=["mlp=rtn(clip=hessian):int3-g16"])
    with pytest.raises(QjaxError, match="vocabulary of 61"):
        qjax.quantize(model, "gptq:int4-g16", calibration=TOKENS + 60)
    same, _ = qjax.quantize(model, "gptq:int4-g16", rules=["block|head=none"])  # nothing to calibrate
    assert same.params["block_0"]["mlp"]["up"]["kernel"] is model.params["block_0"]["mlp"]["up"]["kernel"]
    quantized, _ = qjax.quantize(model, "rtn:int4-g16")
    with pytest.raises(QjaxError, match="quantized already"):
        qjax.quantize(quantized, "gptq:int4-g16", calibration=TOKENS)
    with pytest.raises(QjaxError, match=r"alpha is between 0 and 1.*alpha=2"):
        qjax.quantize(model, "gptq:int4-g16@qep(alpha=2)", calibration=TOKENS)


@pytest.mark.parametrize(("order", "value"), [("parallel", jnp.nan), ("qep", 1e30)])
def test_activations_that_are_not_finite_are_named(model, order, value):
    leaves = flatten(model.params)
    leaves["block_1/attention_norm/scale"] = leaves["block_1/attention_norm/scale"].at[3].set(value)
    broken = model._replace(params=unflatten(leaves))
    with pytest.raises(QjaxError, match=r"input of block_1/attention/q/kernel.* is not finite"):
        qjax.quantize(broken, "gptq:int4-g16", calibration=TOKENS, order=order)


def test_order_and_on_layer(model):
    seen = []
    by_option, report = qjax.quantize(model, "gptq:int4-g16", calibration=TOKENS, order="block", on_layer=seen.append)
    by_name, _ = qjax.quantize(model, "gptq:int4-g16@block", calibration=TOKENS)
    assert_same_bits(by_option, by_name)
    assert by_option.recipe == by_name.recipe == "gptq:int4-g16@block"
    assert sorted(record.path for record in seen) == sorted(record.path for record in report.layers)
    with pytest.raises(QjaxError, match="unknown order of calibration 'blok'; did you mean 'block'"):
        qjax.quantize(model, "gptq:int4-g16", calibration=TOKENS, order="blok")


class Net(nn.Module):
    """Two layers that share an input, one that is called twice, a flag, and several results; matrices of one size, so that
    each method is compiled once.
    """

    @nn.compact
    def __call__(self, x, train: bool, scale=1.0):
        if not isinstance(train, bool):
            raise TypeError("train must stay a Python value")
        h = nn.tanh(nn.Dense(16, name="left")(x)) * nn.sigmoid(nn.Dense(16, name="right")(x))
        again = nn.Dense(16, name="again")
        h = again(nn.tanh(again(h))) * scale
        y = nn.DenseGeneral((2, 8), name="split")(h)
        return nn.DenseGeneral(16, axis=(-2, -1), name="join")(nn.tanh(y)), h


@pytest.fixture(scope="module")
def net():
    xs = jax.random.normal(jax.random.key(0), (3, 40, 16))
    batches = [(x, False, 1.0) for x in xs]
    params = Net().init(jax.random.key(1), *batches[0])["params"]
    return Net(), params, batches


def test_scaling_costs_no_layer_anything_before_error_feedback(model):
    """Layers that share an input lose together at most what they lose without scales, as awq(guard=false) does not promise."""
    leaves = flatten(model.params)  # inputs of q, k, v that are all alike: there scales are of no use
    alike = {path: jnp.ones_like(leaf) for path, leaf in leaves.items() if "attention_norm" in path}
    model = model._replace(params=unflatten(leaves | alike))
    inputs = {"attention/q": "q", "attention/k": "q", "attention/v": "q", "mlp/gate": "gate", "mlp/up": "gate"}

    def losses(recipe):  # of inputs that no other fold changes the weights of
        _, report = qjax.quantize(model, recipe, calibration=TOKENS, rules=["attention/o|mlp/down=none"])
        total = collections.Counter()
        for layer in report.layers:
            block, _, name = layer.path.removesuffix("/kernel").partition("/")
            if name in inputs:
                total[block, inputs[name]] += layer.proxy_loss
        return total

    plain, guarded = losses("gptq(clip=mse):int3-g16@parallel"), losses("awq+gptq(clip=mse):int3-g16@parallel")
    always = losses("awq(guard=false)+gptq(clip=mse):int3-g16@parallel")
    assert all(guarded[part] <= plain[part] * (1 + 1e-4) for part in plain)
    assert any(guarded[part] < 0.999 * plain[part] for part in plain)
    assert any(always[part] > 1.001 * plain[part] for part in plain)


@pytest.mark.parametrize("recipe", ["awq+gptq:int4-g8", "awq(loss=module):int4-g8@parallel"])
def test_any_flax_model(net, recipe):
    module, params, batches = net
    quantized, report = qjax.quantize_flax(module, params, recipe, batches=batches)
    tokens = {record.path: record.tokens for record in report.layers}
    assert tokens["left/kernel"] == 120 and tokens["again/kernel"] == 240
    decoded = qjax.dequantize_flax(module, quantized, *batches[0])
    got = qjax.apply_flax(module, quantized, *batches[0])[0]
    assert_near(got, module.apply({"params": decoded}, *batches[0])[0])
    exact = module.apply({"params": params}, *batches[0])[0]
    plain, _ = qjax.quantize_flax(module, params, f"rtn:{recipe.split(':')[1].split('@')[0]}", batches=batches[:1])
    worse = qjax.apply_flax(module, plain, *batches[0])[0]
    assert float(jnp.mean(jnp.square(got - exact))) < float(jnp.mean(jnp.square(worse - exact)))
    again, _ = qjax.quantize_flax(module, params, recipe, batches=batches)
    for x, y in zip(jax.tree.leaves(quantized), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


def test_flax_weights_and_bad_input(net):
    module, params, batches = net
    weights = [jnp.ones(40).at[30:].set(0)] * 3
    changed = [(x.at[30:].set(9.0), *others) for x, *others in batches]
    first, report = qjax.quantize_flax(module, params, "gptq:int4-g8", batches=batches, weights=weights)
    second, _ = qjax.quantize_flax(module, params, "gptq:int4-g8", batches=changed, weights=weights)
    assert next(iter(report.layers)).tokens == 90
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.mean(np.asarray(x) == np.asarray(y)) > 0.98
    stacked, _ = qjax.quantize_flax(module, params, "gptq:int4-g8", batches=batches, weights=jnp.stack(weights))  # an array
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_array_equal(x, y)
    listed, _ = qjax.quantize_flax(module, params, "gptq:int4-g8", batches=iter(batches), weights=(w.tolist() for w in weights))
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(listed), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(QjaxError, match="3 batches but 1 arrays"):
        qjax.quantize_flax(module, params, "gptq:int4-g8", batches=batches, weights=weights[:1])
    with pytest.raises(QjaxError, match=r"shape \(7,\) do not fit the input of left/kernel"):
        qjax.quantize_flax(module, params, "gptq:int4-g8", batches=batches, weights=[jnp.ones(7)] * 3)
    for wrong in (jnp.zeros(40), -jnp.ones(40), jnp.full(40, jnp.nan), ["a"] * 40, [1.0, [2.0]]):
        with pytest.raises(QjaxError, match="weights must be"):
            qjax.quantize_flax(module, params, "gptq:int4-g8", batches=batches, weights=[wrong] * 3)
    with pytest.raises(QjaxError, match=r"input of left/kernel.* is not finite"):
        qjax.quantize_flax(module, params, "gptq:int4-g8", batches=[(batches[0][0].at[0, 0].set(jnp.nan), False, 1.0)])
    with pytest.warns(QjaxWarning, match=r"left/kernel \(4 tokens, 16 inputs\).*again/kernel \(8 tokens, 16 inputs\)"):
        qjax.quantize_flax(module, params, "gptq:int4-g8@parallel", batches=[(batches[0][0][:4], False, 1.0)])


def test_recipes_share_the_search_of_a_scale(model, monkeypatch):
    """Those of one format, whatever rounding follows."""
    searched = []
    search = awq._search_by_hessian
    monkeypatch.setattr(awq, "_search_by_hessian", lambda *arrays, **how: searched.append(how) or search(*arrays, **how))
    alone, _ = qjax.quantize(model, "awq:int4-g16@parallel", calibration=TOKENS)
    once = len(searched)
    requests = [(f"{recipe}@parallel", ()) for recipe in ("awq:int4-g16", "awq+gptq:int4-g16", "awq:int3-g16")]
    together = quantize_together(model, requests, calibration=TOKENS)
    assert len(searched) == 3 * once > 0
    assert_same_bits(together[0][0], alone)
