"""models/walk.py and lazy.py: the parts of a decoder, and models whose parameters lie in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.activations import parse_activation
from qjax.checkpoints import huggingface, tensors
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.driver.decoder import kernel_shapes, quantize
from qjax.driver.placement import placement
from qjax.errors import QjaxError
from qjax.evaluate.divergence import measure_divergence
from qjax.evaluate.generate import generate
from qjax.evaluate.likelihood import Pair, likelihoods
from qjax.evaluate.perplexity import score
from qjax.evaluate.windows import Windows
from qjax.lazy import Lazy, is_lazy, map_lazily, materialised
from qjax.linear import Linear, is_quantized
from qjax.maps import Scale
from qjax.models import model as module
from qjax.models import walk
from qjax.models.config import LayerKind
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import apply, hidden_batches, runnable
from qjax.models.parameters import check_parameters, flatten, parameter_shapes, unflatten
from qjax.qtensor import nbytes
from tests.conftest import FAMILY_CHANGES, FURTHER_CHANGES, byte_tokenizer, tiny_config
from tests.random_weights import small_model

TOKENS = np.random.default_rng(0).integers(0, 256, (5, 12)).astype(np.int32)


@pytest.fixture
def read(monkeypatch):
    """Names of the tensors that are read from files, in order."""
    names = []

    def read_tensor(header):
        names.append(header.name)
        return original(header)

    original = tensors.read_tensor
    for each in (tensors, huggingface):
        monkeypatch.setattr(each, "read_tensor", read_tensor)
    return names


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with fused tensors and a tied head, and one quantized in two formats, in none, and to layers that do more."""
    folder = tmp_path_factory.mktemp("models")
    save_huggingface(folder / "plain", small_model(tiny_config(**FAMILY_CHANGES["gpt2"]), byte_tokenizer()))
    source = small_model(tiny_config(), byte_tokenizer(), dtype=jnp.bfloat16)
    quantized, _ = quantize(source, None, rules=["mlp/(up|gate)=rtn:int4-g16", "mlp/down=rtn:nf4-g16-dq"])
    leaves = flatten(quantized.params)
    for path in ("block_0/mlp/up/kernel", "block_1/mlp/up/kernel"):
        scale = Scale(jnp.linspace(0.5, 2, 32).astype(jnp.float16))
        leaves[path] = Linear(leaves[path], (scale,), parse_activation("int8-token"))
    save(folder / "packed", quantized._replace(params=unflatten(leaves)))
    return folder


def test_parts_in_order():
    names = [(part.name, part.kind, part.children) for part in walk.parts(tiny_config())]
    block = ("attention_norm", "attention", "mlp_norm", "mlp")
    assert names == [
        ("embed", "embed", ("tokens",)),
        ("block_0", "block", block),
        ("block_1", "block", block),
        ("head", "head", ("norm", "output")),
    ]
    split = [(part.prefix, part.children) for part in walk.parts(tiny_config(), halves=True)[1:3]]
    assert split == [("block_0/", block[:2]), ("block_0/", block[2:])]
    parallel = tiny_config(**FAMILY_CHANGES["gpt_neox"])
    assert walk.parts(parallel, halves=True) == walk.parts(parallel)


@pytest.mark.parametrize("family", FAMILY_CHANGES | FURTHER_CHANGES)
def test_parts_read_every_parameter_once(family):
    config = tiny_config(**(FAMILY_CHANGES | FURTHER_CHANGES)[family])
    params = small_model(config).params
    for halves in (False, True):
        found = [
            part.prefix + path for part in walk.parts(config, halves=halves) for path in flatten(walk.params_of(part, params))
        ]
        assert sorted(found) == sorted(parameter_shapes(config))


def test_layers_of_one_kind_have_equal_modules():
    kinds = (LayerKind(sliding_window=4), LayerKind(), LayerKind(sliding_window=4))
    blocks = [part.module for part in walk.parts(tiny_config(layers=3, kinds=kinds))[1:-1]]
    assert blocks[0] == blocks[2] != blocks[1]
    assert walk.compiled(blocks[0]) is walk.compiled(blocks[2])


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_halves_one_after_the_other_are_the_model(family):
    """With the table of a tied head, and layers of two kinds."""
    config = tiny_config(**FAMILY_CHANGES[family])
    model, x = small_model(config), jnp.asarray(TOKENS)
    for part in walk.parts(config, halves=True):
        x = walk.run(part, model.params, x, *walk.further_arguments(part, model.params))
    np.testing.assert_allclose(x, apply(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_only_a_tied_head_takes_the_table():
    tied, untied = (small_model(tiny_config(**FAMILY_CHANGES[family])) for family in ("gpt2", "llama"))
    (table,) = walk.further_arguments(walk.head(tied.config), tied.params)
    assert table is tied.params["embed"]["tokens"]["embedding"]
    assert walk.further_arguments(walk.head(untied.config), untied.params) == (None,)
    held = walk.loaded(walk.head(tied.config), tied.params)
    assert flatten(held).keys() == flatten(tied.params).keys()  # with positions beside the table


def test_names_of_blocks():
    assert [walk.block_of(path) for path in ("block_12/mlp/up/kernel", "embed/tokens/embedding", "head/block_1/x")] == [
        12,
        None,
        None,
    ]
    assert walk.in_blocks(walk.block_name(3) + "/mlp") and not walk.in_blocks("head/output/kernel")


def test_lazy_leaves_know_their_shape_without_being_read(folders, read):
    for name in ("plain", "packed"):
        eager, lazy = load(folders / name), load(folders / name, lazy=True)
        read.clear()
        assert is_lazy(lazy.params) and not is_lazy(eager.params)
        check_parameters(flatten(lazy.params), parameter_shapes(lazy.config))
        assert nbytes(lazy.params) == nbytes(eager.params)
        assert kernel_shapes(lazy) == kernel_shapes(eager)
        for path, leaf in flatten(eager.params).items():
            same = flatten(lazy.params)[path]
            assert (same.shape, same.nbytes, is_quantized(same)) == (leaf.shape, leaf.nbytes, is_quantized(leaf))
            assert not is_quantized(leaf) or (same.format, same.bits_per_weight) == (leaf.format, leaf.bits_per_weight)
        assert name == "packed" or placement(lazy, "int4-g16") == placement(eager, "int4-g16")
        assert read == []


def test_lazy_parameters_are_those_of_the_file(folders):
    for name in ("plain", "packed"):
        eager, lazy = load(folders / name), load(folders / name, lazy=True)
        assert jax.tree.structure(materialised(lazy.params)) == jax.tree.structure(eager.params)
        for a, b in zip(jax.tree.leaves(materialised(lazy.params)), jax.tree.leaves(eager.params), strict=True):
            assert isinstance(a, jax.Array) and a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert model_fingerprint(lazy) == model_fingerprint(eager)


def test_a_part_reads_its_own_tensors_alone(folders, read):
    model = load(folders / "packed", lazy=True)
    half = walk.parts(model.config, halves=True)[4]
    walk.params_of(half, model.params)
    assert {name.split("/kernel")[0].removesuffix("/scale") for name in read} == {
        f"block_1/{child}" for child in ("mlp_norm", "mlp/gate", "mlp/up", "mlp/down")
    }
    tied = load(folders / "plain", lazy=True)
    read.clear()
    (head, _), *_ = hidden_batches(tied, [(jnp.asarray(TOKENS),)])
    count = len(read)
    walk.further_arguments(walk.head(tied.config), head.params)
    assert len(read) == count
    again = 2 * 2 * 2 + 1  # a fused tensor has three parts, two of them in each block; the table is the head's too
    assert len(read) == len(set(read)) + again and not is_lazy(head.params["head"])
    assert read[-3:] == ["transformer.ln_f.bias", "transformer.ln_f.weight", "transformer.wte.weight"]


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_evaluation_part_by_part_is_bit_equal(folders, read, name, monkeypatch):
    """Perplexity, likelihood and divergence, in several batches and groups of them; every tensor is read once a group."""
    eager, lazy = load(folders / name), load(folders / name, lazy=True)
    read.clear()
    monkeypatch.setattr("qjax.evaluate.perplexity.BATCH_TOKENS", {"cpu": 24})
    reported = []
    expected = score(eager, TOKENS)
    found = score(lazy, TOKENS, on_batch=lambda *done: reported.append(done))
    assert found.tobytes() == expected.tobytes() and reported == [(2, 5), (4, 5), (5, 5)]
    once = len(read)
    monkeypatch.setattr(module, "HELD_STATES", 48 * lazy.config.hidden_size)  # two batches
    assert score(lazy, TOKENS).tobytes() == expected.tobytes()
    assert len(read) == 3 * once

    groups = [[Pair(TOKENS[0, :9], 3), Pair(np.append(TOKENS[0, :7], 5), 2)], [Pair(TOKENS[1], 4)]]
    for a, b in zip(*(likelihoods(model, groups, batch_tokens=32) for model in (eager, lazy)), strict=True):
        assert a.tobytes() == b.tobytes()

    windows = Windows(TOKENS, np.ones_like(TOKENS, bool), np.ones(len(TOKENS)), np.arange(len(TOKENS)))
    other = runnable(eager._replace(params=jax.tree.map(lambda leaf: leaf + 0.01 * leaf, runnable(eager).params)))
    expected = measure_divergence(eager, other, windows, batch_tokens=24)
    assert measure_divergence(lazy, other, windows, batch_tokens=24) == expected
    assert expected.kl > 0


def test_lazy_models_run_like_others(folders):
    eager, lazy = load(folders / "packed"), load(folders / "packed", lazy=True)
    """Packed kernels run as they are."""
    np.testing.assert_array_equal(apply(lazy, TOKENS[:2]), apply(eager, TOKENS[:2]))
    one, other = (generate(model, [TOKENS[0]], 1) for model in (eager, lazy))
    np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_lazy_model_saved_over_its_own_files(folders, tmp_path):
    for write, name in ((save, "packed"), (save_huggingface, "plain")):
        write(tmp_path / name, load(folders / name))
        write(tmp_path / name, load(tmp_path / name, lazy=True), overwrite=True)
        a, b = load(tmp_path / name), load(folders / name)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a.params, b.params)))


def test_what_is_wrong_with_values_is_said_when_they_are_read(folders, tmp_path):
    """Values that are not finite, and a stored head that differs from the table that it is tied to."""
    save_huggingface(tmp_path, load(folders / "plain"))
    held = load_file(tmp_path / "model.safetensors")
    held["transformer.h.1.mlp.c_fc.weight"][3, 4] = np.nan
    save_file(held | {"lm_head.weight": held["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    model = load(tmp_path, lazy=True)
    walk.params_of(walk.parts(model.config)[1], model.params)
    with pytest.raises(
        QjaxError, match=r"NaN, infinite or impossible values in transformer.h.1.mlp.c_fc.weight; get an intact checkpoint"
    ):
        walk.params_of(walk.parts(model.config)[2], model.params)
    with pytest.raises(QjaxError, match=r"lm_head.weight differs from the embedding"):
        walk.params_of(walk.parts(model.config)[0], model.params)


def test_map_lazily_reads_nothing():
    def refuse():
        raise AssertionError

    waiting = Lazy((2, 3), np.dtype(np.float16), refuse)
    tree = map_lazily(lambda leaf: leaf + 1, {"a": waiting, "b": 1}, dtype=np.float32, is_leaf=lambda leaf: False)
    assert (tree["a"].shape, tree["a"].dtype, tree["a"].nbytes, tree["a"].ndim, tree["b"]) == ((2, 3), np.float32, 24, 2, 2)
    with pytest.raises(AssertionError):
        materialised(tree)
