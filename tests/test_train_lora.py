"""train/lora.py and train/forward.py: adapters on a frozen base, gradients and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax.calibrate.tokens import Calibration
from qjax.driver.decoder import quantize
from qjax.errors import QjaxError
from qjax.evaluate.inputs import input_outliers
from qjax.interception.linen import recorded
from qjax.linear import Linear, LowRank, dequantize, dequantize_tree
from qjax.models.adapters import adapters_of, attach, detached
from qjax.models.config import LayerKind
from qjax.models.model import apply
from qjax.models.parameters import flatten
from qjax.models.walk import Decoder
from qjax.qtensor import QTensor, nbytes
from qjax.train import forward, loop, lora
from qjax.train.lora import LoraConfig
from tests.conftest import GEMMA3, MIXTRAL, random_model, tiny_config
from tests.random_weights import small_model

CONFIG = LoraConfig(rank=3, alpha=6.0)
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 9)).astype(np.int32)


def drawn(adapters):
    """Adapters that do something."""
    return {
        path: dataclasses.replace(each, b=0.3 * jax.random.normal(jax.random.key(number), each.b.shape))
        for number, (path, each) in enumerate(adapters.items())
    }


@pytest.fixture(scope="module")
def base():
    return quantize(random_model(tiny_config()), "nf4-g16-dq", rules=["block_1/mlp/up=int4-g16/int8-token"])[0]


@pytest.fixture(scope="module")
def adapters(base):
    return drawn(lora.start(base, CONFIG, KEY)[1])


@pytest.fixture(scope="module")
def asked(base, adapters):
    return lora.problem(base, adapters)


def by_decoder(model, tokens):
    """The loss of a dense model by the plain module."""
    logits = Decoder(model.config).apply({"params": model.params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def test_the_loss_and_its_gradients_are_those_of_the_dense_model():
    """Of W' + s A B as one dense matrix, by the chain rule; of blocks of two kinds, a tied head and soft caps."""
    kinds = (LayerKind(sliding_window=5), LayerKind(rope_theta=1e6), LayerKind(rope_theta=1e6))
    base = quantize(random_model(tiny_config(**(GEMMA3 | {"layers": 3, "kinds": kinds}))), "nf4-g16")[0]
    adapters = drawn(lora.start(base, CONFIG, KEY)[1])
    asked = lora.problem(base, adapters)
    value, gradient = jax.jit(jax.value_and_grad(asked.loss))(asked.trained, asked.frozen, TOKENS)
    whole = attach(base, adapters)
    dense = whole._replace(params=dequantize_tree(whole.params))
    expected, slopes = jax.jit(jax.value_and_grad(lambda params: by_decoder(dense._replace(params=params), TOKENS)))(
        dense.params
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    slopes, found = flatten(slopes), asked.finished(gradient)
    for path, adapter in adapters.items():
        rows, columns = adapter.scaling * slopes[path] @ adapter.b.T, adapter.scaling * adapter.a.T @ slopes[path]
        assert np.abs(found[path].a - rows).max() <= 1e-5 * max(1, np.abs(rows).max()), path
        assert np.abs(found[path].b - columns).max() <= 1e-5 * max(1, np.abs(columns).max()), path


def test_only_adapters_are_trained_and_what_they_become_lowers_the_loss(base, adapters, asked):
    assert sorted(flatten(adapters)) == sorted(path for path in flatten(base.params) if "block" in path and "kernel" in path)
    assert {key.split("/")[-1] for key in asked.trained} == {"a", "b"}
    tokens = np.tile(TOKENS[0], 20)
    told = []
    config = loop.TrainConfig(steps=8, batch=2, window=8, learning_rate=0.02)
    after = lora.train_adapters(base, adapters, tokens, config, on_step=told.append)
    assert told[-1].loss < told[0].loss - 0.5
    model = attach(base, after)
    logits = apply(model, TOKENS[:, :-1])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()
    assert float(jax.jit(asked.loss)(lora.problem(base, after).trained, asked.frozen, TOKENS)) == pytest.approx(
        float(value), rel=1e-5
    )
    for path, leaf in flatten(detached(model.params)).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, flatten(base.params)[path])


def test_layers_that_differ_are_stacked_apart(base, asked):
    stack = forward.stack(base)
    assert [[part.name for part in run] for run in stack.runs] == [["block_0"], ["block_1"]]
    plain = forward.stack(random_model(tiny_config(layers=3)))
    assert [len(run) for run in plain.runs] == [3]
    back = forward.unstack(stack.runs, stack.tree)
    jax.tree.map(np.testing.assert_array_equal, back, base.params)


def test_bytes_are_the_formula(base, adapters, asked):
    """4 bytes of each adapter's rank (in + out) numbers, once as they are, once as a gradient, twice in Adam."""
    numbers = sum(
        CONFIG.rank * (leaf.shape[0] + leaf.shape[1]) for path, leaf in flatten(base.params).items() if path in adapters
    )
    found = loop.bytes_of(asked.trained, asked.frozen, loop.TrainConfig(steps=1))
    assert found.trained == found.gradient == 4 * numbers and found.optimizer == 8 * numbers + 8
    assert found.frozen == nbytes(base.params)


@pytest.mark.slow
def test_no_float_copy_of_the_base_is_held():
    """A step's temporary memory grows with the depth by far less than a float block."""

    def temporary(layers: int) -> tuple[int, int]:
        config = tiny_config(layers=layers, hidden_size=128, mlp_size=512, heads=4, head_dim=32, vocabulary_size=64)
        base = quantize(random_model(config), "int4-g32")[0]
        asked = lora.problem(base, lora.start(base, CONFIG, KEY)[1])
        step = jax.jit(jax.value_and_grad(asked.loss))
        tokens = jax.ShapeDtypeStruct((1, 9), jnp.int32)
        analysis = step.lower(asked.trained, asked.frozen, tokens).compile().memory_analysis()
        block = sum(
            leaf.shape[0] * leaf.shape[1] * 4 for leaf in base.params["block_0"]["mlp"].values() for leaf in leaf.values()
        )
        return analysis.temp_size_in_bytes, block

    (few, block), (many, _) = temporary(2), temporary(10)
    assert (many - few) / 8 < 0.1 * block


def test_starts():
    model = random_model(tiny_config())
    weights = flatten(model.params)
    path = "block_1/mlp/up/kernel"
    errors = {}
    for name, rounds in (("gaussian", 1), ("loftq", 1), ("loftq", 4), ("pissa", 1)):
        config = LoraConfig(rank=8, alpha=4.0, start=name, rounds=rounds, rslora=True)
        base, adapters = lora.start(model, config, KEY, recipe="int2-g16")
        leaf = flatten(base.params)[path]
        assert isinstance(leaf, QTensor) and adapters[path].scaling == pytest.approx(4 / np.sqrt(8))
        errors[name, rounds] = float(jnp.linalg.norm(dequantize(Linear(leaf, adapter=adapters[path])) - weights[path]))
        if name == "gaussian":
            assert not adapters[path].b.any() and 0.8 < float(jnp.abs(adapters[path].a).max()) * np.sqrt(32) <= 1
    assert errors["loftq", 4] < errors["loftq", 1] < errors["gaussian", 1] and errors["pissa", 1] < errors["gaussian", 1]
    residual = weights[path] - dequantize(flatten(lora.start(model, CONFIG, KEY, recipe="int2-g16")[0].params)[path])
    singular = np.linalg.svd(np.asarray(residual, np.float64), compute_uv=False)
    assert errors["loftq", 1] == pytest.approx(np.sqrt((singular[8:] ** 2).sum()), rel=1e-4)  # Eckart and Young


def test_what_the_inputs_make_of_an_error():
    """qera: the least E ||x (W - W' - s A B)||^2, by singular values in float64; less than loftq's, and less of the loss."""
    model, recipe, path = small_model(tiny_config(layers=1)), "int2-g16", "block_0/mlp/down/kernel"
    tokens = np.random.default_rng(0).integers(0, 257, (8, 32)).astype(np.int32)
    bases, errors, losses = {}, {}, {}
    with recorded() as recording:
        Decoder(model.config).apply({"params": model.params}, tokens)
    x = np.asarray(recording.inputs[path][0], np.float64).reshape(-1, 48)
    for name in ("gaussian", "loftq", "qera"):
        config = LoraConfig(rank=8, alpha=4.0, start=name)
        bases[name], adapters = lora.start(model, config, KEY, recipe=recipe, calibration=tokens)
        assert len(adapters) == 7 and adapters[path].scaling == 0.5
        adapted = flatten(attach(bases[name], adapters).params)[path]
        change = np.asarray(flatten(model.params)[path] - dequantize(adapted), np.float64)
        errors[name] = np.square(x @ change).sum()
        losses[name] = np.square(np.asarray(apply(attach(bases[name], adapters), tokens) - apply(model, tokens))).mean()
    assert losses["qera"] < losses["loftq"] < losses["gaussian"]
    leaves = [flatten(bases[name].params)[path] for name in ("gaussian", "qera")]
    np.testing.assert_array_equal(leaves[0].codes, leaves[1].codes)  # of the base nothing changes
    hessian = x.T @ x / len(x)
    root = np.linalg.cholesky(hessian + lora.DAMP * np.mean(np.diag(hessian)) * np.eye(48)).T
    lost = np.asarray(flatten(model.params)[path] - dequantize(leaves[1]), np.float64)
    least = (np.linalg.svd(root @ lost, compute_uv=False)[8:] ** 2).sum() * len(x)
    assert 0.9 * least < errors["qera"] < 1.001 * least  # which counts the damping too
    assert errors["qera"] < errors["loftq"] < errors["gaussian"]


def test_starts_that_do_not_go_with_a_recipe():
    model, tokens = random_model(tiny_config(layers=1)), TOKENS
    for name in ("loftq", "qera", "pissa"):
        asked, rules = LoraConfig(rank=2, start=name), ["mlp/down=awq:int4-g16@parallel"]
        for given in ({"recipe": "hadamard+rtn:int4-g16"}, {"recipe": "int4-g16", "rules": rules}):
            with pytest.raises(QjaxError, match=f"other layers may take that in; the start {name} knows kernels one by one"):
                lora.start(model, asked, KEY, calibration=tokens, **given)
    for name in ("loftq", "qera"):
        with pytest.raises(QjaxError, match="what a recipe takes of these kernels, none takes nothing"):
            lora.start(model, LoraConfig(rank=2, start=name), KEY, recipe="none", calibration=tokens)
    with pytest.raises(QjaxError, match="qera needs calibration data"):
        lora.start(model, LoraConfig(rank=2, start="qera"), KEY, recipe="int4-g16")
    config = LoraConfig(rank=2, start="qera", targets=("lm_head", "q_proj"))
    with pytest.raises(QjaxError, match="qera is for layers of blocks; head/output/kernel is none"):
        lora.start(model, config, KEY, recipe="int4-g16", calibration=np.tile(tokens, (3, 1)))


def test_kernels_that_nothing_is_taken_of_begin_as_others_do():
    """Adapters of zeros alone have no gradient."""
    model, tokens = random_model(tiny_config(layers=1)), np.tile(TOKENS, (6, 1))
    for name in ("loftq", "qera"):
        config, path = LoraConfig(rank=2, start=name, rounds=2), "block_0/mlp/down/kernel"
        _, adapters = lora.start(model, config, KEY, recipe="int4-g16", rules=["down=none"], calibration=tokens)
        assert adapters[path].a.any() and not adapters[path].b.any()
        assert all(each.b.any() for other, each in adapters.items() if other != path)
        _, adapters = lora.start(model, config, KEY, recipe="bf16", calibration=tokens)
        assert all(each.b.any() for each in adapters.values())


def test_tokens_that_do_not_count_are_no_inputs():
    model = small_model(tiny_config(layers=1))
    tokens = np.random.default_rng(0).integers(0, 257, (4, 20)).astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, 15:] = 0
    found = []
    for padding in (0, 60):
        given = Calibration(np.where(weights > 0, tokens, padding), weights)
        _, adapters = lora.start(model, LoraConfig(rank=2, start="qera"), KEY, recipe="int4-g16", calibration=given)
        found.append([*map(lora.product, adapters.values())])
        rows, alone = input_outliers(model, given), input_outliers(model, tokens[:, :15])
        assert [row["largest"] for row in rows] == pytest.approx([row["largest"] for row in alone], rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_targets(base):
    def paths(*targets):
        return lora.targets_of(base, LoraConfig(targets=targets))

    assert paths("down_proj") == [f"block_{i}/mlp/down/kernel" for i in range(2)]
    assert paths("block_1/attention/[qv]") == ["block_1/attention/q/kernel", "block_1/attention/v/kernel"]
    assert paths("lm_head") == ["head/output/kernel"]
    with pytest.raises(QjaxError, match="'up_projection' names no kernel"):
        paths("down_proj", "up_projection")


def test_experts_take_no_adapter():
    model = random_model(tiny_config(**MIXTRAL, layers=1))
    paths = lora.targets_of(model, CONFIG)
    assert sorted(paths) == [f"block_0/attention/{name}/kernel" for name in "koqv"]
    with pytest.raises(QjaxError, match="block_0/mlp/up/kernel hold experts, which take none"):
        lora.start(model, LoraConfig(targets=("mlp/up", "q_proj")), KEY)
    asked = lora.problem(model, drawn(lora.start(model, CONFIG, KEY)[1]))
    whole = attach(model, asked.finished(asked.trained))
    dense = whole._replace(params=dequantize_tree(whole.params))
    assert float(jax.jit(asked.loss)(asked.trained, asked.frozen, TOKENS)) == pytest.approx(
        float(by_decoder(dense, TOKENS)), rel=1e-5
    )


def test_what_is_refused(base):
    for name in ("loftq", "qera"):
        with pytest.raises(QjaxError, match=f"{name} makes up for what a recipe takes of these kernels, None takes nothing"):
            lora.start(random_model(tiny_config()), LoraConfig(rank=2, start=name), KEY)
    with pytest.raises(QjaxError, match="the start loftq needs weights that are not quantized"):
        lora.start(base, LoraConfig(rank=2, start="loftq"), KEY)
    with pytest.raises(QjaxError, match="a rank of 64 is more than"):
        lora.start(base, LoraConfig(rank=64), KEY)
    with pytest.raises(QjaxError, match=r"is for \(3, 4\).*block_9/x/kernel is no kernel"):
        attach(
            base, dict.fromkeys(("block_0/mlp/up/kernel", "block_9/x/kernel"), LowRank(jnp.zeros((3, 2)), jnp.zeros((2, 4))))
        )
    twice = adapters_of(attach(base, lora.start(base, CONFIG, KEY)[1]).params)
    with pytest.raises(QjaxError, match="has an adapter already"):
        attach(attach(base, twice), twice)
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"start": "zero"}):
        with pytest.raises(QjaxError, match="expected a rank"):
            LoraConfig(**bad)
