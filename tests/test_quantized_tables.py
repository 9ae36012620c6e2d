"""A table of embeddings that keeps its codes (`linear.Table`), as GGUF files have: everything takes the model as if the table
were decoded.
"""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

import qjax
from qjax.checkpoints.export import export
from qjax.checkpoints.gguf.export import export_gguf
from qjax.checkpoints.gguf.model import load_gguf
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.packed import templates_of
from qjax.driver.decoder import kernel_shapes, quantize_together
from qjax.driver.placement import placement
from qjax.driver.report import stored_size
from qjax.errors import QjaxError
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.generate import generate
from qjax.interception.linen import quantized_kernels
from qjax.lazy import is_lazy
from qjax.linear import Table, is_quantized
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import apply
from qjax.models.parameters import flatten, unflatten
from qjax.models.walk import TABLE
from qjax.train.lora import start
from qjax.train.qat import faked, problem
from qjax.train.settings import QatConfig
from tests.conftest import tiny_config
from tests.random_weights import weights_model

TEXT = Corpus("dickens", ("It was the best of times, it was the worst of times. " * 12,), "f")
TOKENS = np.arange(24).reshape(2, 12) * 7 % 257


def pair(tiny_model, tied: bool, fmt: str = "int8-g32-sym-max"):
    """A model whose table is quantized, and the same with the table decoded."""
    model = weights_model(tiny_config(tied=tied))._replace(tokenizer=tiny_model.tokenizer)
    table = Table(qjax.rtn(flatten(model.params)[TABLE].T, fmt)[0])
    with_table = lambda table: model._replace(params=unflatten(flatten(model.params) | {TABLE: table}))  # noqa: E731
    return with_table(table), with_table(qjax.dequantize(table))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def both(request, tiny_model):
    return pair(tiny_model, request.param)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, flatten(found.params), flatten(expected.params))


def test_what_it_is(tiny_model):
    coded, plain = pair(tiny_model, tied=True)
    table, shape = flatten(coded.params)[TABLE], flatten(plain.params)[TABLE].shape
    assert is_quantized(table) and table.shape == shape and str(table.format) == "int8-g32-sym-max"
    assert table.nbytes == table.weight.nbytes < 4 * np.prod(shape) and 8 < table.bits_per_weight < 9
    assert qjax.dequantize(table, jnp.bfloat16).dtype == jnp.bfloat16
    kernels, others = kernel_shapes(coded)
    assert kernels == kernel_shapes(plain)[0] and [count for count, _ in others].count(np.prod(shape)) == 1
    bits, size = stored_size(coded.params)
    assert bits == 0 and sum(count * each for count, each in others) == size - sum(4 * a * b for a, b in kernels)
    assert model_fingerprint(coded) != model_fingerprint(plain)


def test_flax_keeps_it(both):
    coded, _ = both
    blank = jax.tree.map(jnp.zeros_like, coded.params)
    assert_same(coded._replace(params=serialization.from_bytes(blank, serialization.to_bytes(coded.params))), coded)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_it_runs_as_if_decoded(both, compute, packed):
    coded, plain = both
    how = {"compute": compute, "packed": packed}
    assert qjax.perplexity(coded, TEXT, "windows-32", **how).value == qjax.perplexity(plain, TEXT, "windows-32", **how).value
    found = qjax.divergence(coded, plain, TEXT, "windows-32", **how)
    assert found.top1 == 1 and found.kl < 1e-6
    drawn = [generate(model, [TOKENS[0, :5]], 8, packed=packed).tokens[0].tolist() for model in both]
    assert drawn[0] == drawn[1]


def test_it_runs_as_it_is(both):
    coded, plain = both
    np.testing.assert_allclose(apply(coded, TOKENS), apply(plain, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["rtn:int4-g16", "gptq:int4-g16@qep", "awq:int4-g16@parallel", "fp16"])
def test_kernels_are_quantized_beside_it(both, recipe):
    calibration = TOKENS if recipe != "fp16" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qjax.QjaxWarning)  # of few tokens
        (coded, ours), (plain, theirs) = (qjax.quantize(model, recipe, calibration=calibration) for model in both)
    assert isinstance(flatten(coded.params)[TABLE], Table)
    assert ours.size_bytes < theirs.size_bytes
    assert ours.bits_per_weight == theirs.bits_per_weight
    plain_leaves = flatten(plain.params)
    for path, leaf in flatten(coded.params).items():
        if path != TABLE:
            jax.tree.map(np.testing.assert_array_equal, leaf, plain_leaves[path])


def test_folders_keep_it(both, tmp_path):
    coded, plain = both
    qjax.save(tmp_path / "packed", coded)
    assert_same(qjax.load(tmp_path / "packed"), coded)
    assert model_fingerprint(qjax.load(tmp_path / "packed")) == model_fingerprint(coded)
    lazy = qjax.load(tmp_path / "packed", lazy=True)
    assert is_lazy(flatten(lazy.params)[TABLE])
    assert qjax.perplexity(lazy, TEXT, "windows-32").value == qjax.perplexity(plain, TEXT, "windows-32").value
    save_huggingface(tmp_path / "plain", lazy, dtype="float32")
    assert_same(qjax.load(tmp_path / "plain"), plain)


def test_files_for_other_tools(both, tmp_path):
    """A GGUF file has its codes, others the numbers that they stand for."""
    coded, plain = both
    export_gguf(tmp_path / "m.gguf", coded)
    assert_same(load_gguf(tmp_path / "m.gguf"), coded)
    quantized = [qjax.quantize(model, "rtn:int4-g16-sym-full")[0] for model in both]
    for name, model in zip("ab", quantized, strict=True):
        told = pytest.warns(qjax.QjaxWarning, match="no place for codes") if name == "a" else contextlib.nullcontext()
        with told:
            export(tmp_path / name, model, to="compressed-tensors")
    found, expected = (qjax.load(tmp_path / name) for name in "ab")
    assert_same(found, expected)
    np.testing.assert_array_equal(flatten(found.params)[TABLE], flatten(plain.params)[TABLE])


def test_what_a_gguf_file_cannot_hold_is_refused(tiny_model, tmp_path):
    coded, _ = pair(tiny_model, tied=False, fmt="int3-g32")
    said = r"gguf cannot hold token_embd.weight: int3-g32 is no type of blocks; the nearest recipes that fit: rule embed=rtn:"
    with pytest.raises(QjaxError, match=said) as caught:
        export_gguf(tmp_path / "m.gguf", coded)
    advised = str(caught.value).rpartition("rule ")[2]
    model = weights_model(tiny_config(tied=False))._replace(tokenizer=tiny_model.tokenizer)
    export_gguf(tmp_path / "m.gguf", qjax.quantize(model, None, rules=[advised])[0])


def test_scales_of_another_type_that_float16_holds(tiny_model, tmp_path):
    coded, plain = pair(tiny_model, tied=True, fmt="int8-g32-sym-max-bf16")
    export_gguf(tmp_path / "m.gguf", coded)
    np.testing.assert_array_equal(
        *(qjax.dequantize_tree(flatten(each.params)[TABLE]) for each in (load_gguf(tmp_path / "m.gguf"), plain))
    )


def test_what_changes_embeddings_decodes_it(both):
    """A rotation, a start that changes the base, injected outliers: bit by bit as of the decoded table."""
    assert_same(*map(qjax.rotate, both))
    assert_same(*(qjax.inject_outliers(model, 8.0, 2) for model in both))
    recipe = "hadamard+rtn:int4-g16"
    assert_same(*(qjax.quantize(model, recipe)[0] for model in both))
    started = [start(model, qjax.LoraConfig(rank=2, start="pissa"), jax.random.key(0)) for model in both]
    jax.tree.map(np.testing.assert_array_equal, started[0][1], started[1][1])


def test_tokens_out_of_range_are_as_of_any_table(both):
    found, expected = (apply(model, jnp.asarray([[5, 300]])) for model in both)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert np.isnan(found[0, 1]).all()


@pytest.mark.parametrize(
    ("path", "record", "said"),
    [
        (TABLE, {"format": "int8-g32", "in_features": 32}, "in_features is 32, expected 257"),
        (TABLE, {"format": "int8-g32", "in_features": 257}, "the table of embeddings alone is a table"),
        (TABLE, {"format": "int8-g32", "in_features": 32, "table": True, "linear": {}}, "a table has a format and in_features"),
        (TABLE, {"format": "int8-g32", "in_features": 31, "table": True}, "in_features is 31, expected 32"),
        ("block_0/attention/q/kernel", {"format": "int8-g32", "in_features": 32, "table": True}, "alone is a table"),
    ],
)
def test_records_that_are_none(path, record, said):
    with pytest.raises(QjaxError, match=said):
        templates_of(tiny_config(), {path: record})


def test_adapters_are_trained_beside_it(both):
    config, tokens = qjax.TrainConfig(steps=2, window=16, batch=2), np.tile(TOKENS.reshape(-1), 8)
    tuned = []
    for model in both:
        base, adapters = start(qjax.quantize(model, "nf4-g16")[0], qjax.LoraConfig(rank=2), jax.random.key(0))
        tuned.append(qjax.train_adapters(base, adapters, tokens, config))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6), *tuned)


def test_weights_are_trained_beside_it(both):
    """And a teacher may have one."""
    losses = []
    for model in both:
        asked = problem(faked(qjax.quantize(model, "rtn:int4-g16")[0]), QatConfig(loss="kl"), model)
        losses.append(float(asked.loss(asked.trained, asked.frozen, jnp.asarray(TOKENS))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0


def test_any_embed_reads_one(tiny_model):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens, attend=False):
            embed = nn.Embed(96, 64, name="table")
            return embed.attend(embed(tokens)) if attend else embed(tokens)

    table = Table(qjax.rtn(jax.random.normal(jax.random.key(0), (64, 96)), "int4-g16")[0])
    params = {"params": {"table": {"embedding": table}}}
    with quantized_kernels():
        np.testing.assert_array_equal(Net().apply(params, jnp.asarray([[5, 95]])), qjax.dequantize(table)[np.array([[5, 95]])])
        with pytest.raises(QjaxError, match="Embed cannot run with a quantized embedding"):
            Net().apply(params, jnp.asarray([[5, 95]]), attend=True)


@pytest.mark.parametrize("rule", ["embed=rtn:int4-g16", "embed_tokens=rtn:int4-g16"])
@pytest.mark.parametrize("order", ["parallel", "qep"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rule_quantizes_it(tiny_model, tied, order, rule, tmp_path):
    """Its rows along the hidden axis; kernels are as without the rule where calibration does not see the quantized table."""
    model = weights_model(tiny_config(tied=tied))._replace(tokenizer=tiny_model.tokenizer)
    recipe, calibration = f"gptq:int4-g16@{order}", np.tile(TOKENS, (40, 1))
    found, report = qjax.quantize(model, recipe, calibration=calibration, rules=[rule])
    plain, without = qjax.quantize(model, recipe, calibration=calibration)
    table = flatten(found.params)[TABLE]
    expected = qjax.rtn(flatten(model.params)[TABLE].T, "int4-g16")[0]
    assert isinstance(table, Table) and str(table.format) == "int4-g16"
    np.testing.assert_array_equal(qjax.dequantize(table), qjax.dequantize(expected).T)
    assert found.recipe == f"{plain.recipe}; embed=rtn:int4-g16"
    assert report.bits_per_weight == without.bits_per_weight and report.model_bits_per_weight < without.model_bits_per_weight
    record = next(each for each in report.layers if each.path == TABLE)
    assert (record.in_features, record.out_features) == table.weight.shape and record.weight_error > 0
    same = [np.array_equal(*(qjax.dequantize(flatten(each.params)["block_0/mlp/up/kernel"]) for each in (found, plain)))]
    assert same == [order == "parallel"]
    written, _ = qjax.quantize_to(tmp_path / "packed", model, recipe, calibration=calibration, rules=[rule])
    assert_same(qjax.load(tmp_path / "packed"), found)
    assert np.isfinite(qjax.perplexity(written, TEXT, "windows-32").value)


def test_rules_of_tables_and_of_kernels(tiny_model):
    model = weights_model(tiny_config(tied=False))
    by = lambda *rules, recipe="rtn:int4-g16": placement(model, recipe, rules)  # noqa: E731
    assert TABLE not in by() and TABLE not in by(".*=rtn:int8-g16")
    for every in ("re:.*", "model", ".*"):
        assert TABLE not in by(f"{every}=gptq:int8-g16")
    for both in ("embed|head", "lm_head|embed_tokens", "embed|lm_head"):
        placed = by(f"{both}=rtn:int8-g16")
        assert str(placed["head/output/kernel"]) == str(placed[TABLE]) == "rtn:int8-g16"
    assert str(by("embed|down_proj=rtn:int8-g16")["block_0/mlp/down/kernel"]) == "rtn:int8-g16"
    assert str(by("embed=rtn:int8-g16", "embed=rtn:int2-g16")[TABLE]) == "rtn:int8-g16"
    kept = flatten(qjax.quantize(model, "fp16", rules=["embed=none"])[0].params)
    assert kept[TABLE].dtype == jnp.float32 and kept["head/output/kernel"].dtype == jnp.float16
    found, report = qjax.quantize(model, "rtn:int4-g16", rules=["embed=bf16"])
    assert report.bits_per_weight == qjax.quantize(model, "rtn:int4-g16")[1].bits_per_weight
    cast = flatten(found.params)
    assert cast[TABLE].dtype == jnp.bfloat16 and cast["head/output/kernel"].dtype == jnp.float32
    for refused in ("gptq:int8-g16", "awq:int8-g16", "rtn:int8-g16/int8-token", "hadamard+rtn:int8-g16"):
        with pytest.raises(QjaxError, match=r"is looked up, .*take a rounding that reads no data, as embed=rtn:int8-g16"):
            by(f"embed={refused}")
    coded, _ = pair(tiny_model, tied=True)
    with pytest.raises(QjaxError, match="quantized already"):
        placement(coded, "rtn:int4-g16", ["embed=rtn:int8-g16"])


def test_plans_with_and_without_it_go_together():
    model = weights_model(tiny_config(tied=True))
    requests = [("rtn:int4-g16", ()), ("rtn:int4-g16", ["embed=rtn:int8-g16"])]
    for asked in (requests, requests[::-1]):
        for (found, _), (recipe, rules) in zip(quantize_together(model, asked), asked, strict=True):
            assert_same(found, qjax.quantize(model, recipe, rules=rules)[0])


def test_a_run_goes_on_behind_it(tiny_model, tmp_path):
    """To the same bits, with its records."""
    model = weights_model(tiny_config(tied=True))._replace(tokenizer=tiny_model.tokenizer)
    how = {"calibration": np.tile(TOKENS, (40, 1)), "rules": ["embed=rtn:int4-g16"]}

    def stop(record):
        if record.path.startswith("block_1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qjax.quantize_to(tmp_path / "packed", model, "gptq:int4-g16", **how, on_layer=stop)
    _, report = qjax.quantize_to(tmp_path / "packed", model, "gptq:int4-g16", **how)
    expected, all_at_once = qjax.quantize(model, "gptq:int4-g16", **how)
    assert_same(qjax.load(tmp_path / "packed"), expected)
    assert [each._replace(seconds=0) for each in report.layers] == [each._replace(seconds=0) for each in all_at_once.layers]


def test_exports_are_in_the_type_of_what_is_not_quantized(tmp_path):
    model = weights_model(tiny_config(tied=True))
    model = model._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    quantized, _ = qjax.quantize(model, "rtn:int4-g16-sym-full", rules=["embed=rtn:int8-g16"])
    with pytest.warns(qjax.QjaxWarning, match="written as numbers in bfloat16"):
        export(tmp_path / "e", quantized, to="compressed-tensors")
    assert flatten(qjax.load(tmp_path / "e").params)[TABLE].dtype == jnp.bfloat16


def test_a_rotated_model_has_a_rotated_table():
    model = weights_model(tiny_config(tied=True))
    found = flatten(qjax.quantize(model, "hadamard+rtn:int8-g16", rules=["embed=rtn:int8-g16"])[0].params)
    turned = flatten(qjax.rotate(model).params)
    np.testing.assert_array_equal(qjax.dequantize(found[TABLE]), qjax.dequantize(qjax.rtn(turned[TABLE].T, "int8-g16")[0]).T)
    assert "head/output/kernel" in found  # of its own
