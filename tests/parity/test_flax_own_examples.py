"""Flax's own examples, as its source distribution has them: quantized, they run as with decoded weights.

The folder is $QJAX_FLAX_EXAMPLES, examples/ of what `pip download --no-deps --no-binary flax flax` fetches.
"""

import dataclasses
import importlib.util
import itertools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from tests.test_flax_examples import rounded_by_hand

VARIABLE = "QJAX_FLAX_EXAMPLES"
pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:fewer calibration tokens", "ignore::DeprecationWarning"),
]
TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 1, 32)
LOOKED_UP = {"rules": ("mbed=none",), "reason": "is looked up"}
METHODS = ("rtn", "gptq", "awq", "nf4")


def folder() -> Path:
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"set {VARIABLE} to examples/ of Flax's source distribution")
    return Path(named)


def module(name: str):
    """A file of the examples, imported under a name of its own."""
    path = folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"flax_example_{name.replace('/', '_')}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@dataclasses.dataclass(frozen=True)
class Example:
    """fn(params, *args). rounded: how many leaves are; rules: what is left, with the reason that is given without them."""

    fn: Callable
    params: object
    args: tuple
    rounded: int
    rules: tuple[str, ...] = ()
    reason: str | None = None


def linen(built: nn.Module, *args, rounded: int, rules=(), reason=None, **kwargs) -> Example:
    variables = built.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, *args, **kwargs)
    params, others = variables["params"], {key: found for key, found in variables.items() if key != "params"}
    return Example(lambda p, *x: built.apply({"params": p, **others}, *x, **kwargs), params, args, rounded, rules, reason)


def sizes(config: type, **more):
    """A small one of the three transformers."""
    small = {"emb_dim": 16, "num_heads": 2, "num_layers": 2, "qkv_dim": 16, "mlp_dim": 32, "max_len": 16}
    return config(vocab_size=32, output_vocab_size=32, **small, **more)


def lm1b() -> Example:
    found = module("lm1b/models")
    model = found.TransformerLM(sizes(found.TransformerConfig, deterministic=True))
    return linen(model, TOKENS, rounded=2 * 6 + 1, **LOOKED_UP)


def wmt() -> Example:
    found = module("wmt/models")
    model = found.Transformer(sizes(found.TransformerConfig, deterministic=True))
    return linen(model, TOKENS, TOKENS[:, ::-1], rounded=2 * 6 + 2 * 10 + 1, **LOOKED_UP)


def nlp_seq() -> Example:
    found = module("nlp_seq/models")
    model = found.Transformer(sizes(found.TransformerConfig))
    params = model.init(jax.random.key(1), inputs=TOKENS, train=False)["params"]
    return Example(lambda p, x: model.apply({"params": p}, inputs=x, train=False), params, (TOKENS,), 2 * 6 + 1, **LOOKED_UP)


def imagenet() -> Example:
    found = module("imagenet/models")
    model = found.ResNet([1, 1], found.BottleneckResNetBlock, num_classes=8, num_filters=8)
    return linen(model, jax.random.normal(jax.random.key(3), (2, 32, 32, 3)), rounded=1 + 2 * 4 + 1, train=False)


def ppo() -> Example:
    frames = 255 * jax.random.uniform(jax.random.key(3), (2, 84, 84, 4))
    return linen(module("ppo/models").ActorCritic(6), frames, rounded=6)


def vae() -> Example:
    return linen(module("vae/models").VAE(8), jax.random.normal(jax.random.key(3), (2, 784)), jax.random.key(4), rounded=5)


def seq2seq() -> Example:
    model = module("seq2seq/models").Seq2seq(teacher_force=True, hidden_size=16, vocab_size=32)
    one_hot = jax.nn.one_hot(TOKENS, 32)
    variables = model.init({"params": jax.random.key(1), "lstm": jax.random.key(2)}, one_hot, one_hot)
    run = lambda p, *x: model.apply({"params": p}, *x, rngs={"lstm": jax.random.key(2)})  # noqa: E731
    return Example(run, variables["params"], (one_hot, one_hot), 17)


def sst2() -> Example:
    model = module("sst2/models").TextClassifier(16, 16, 32, 1, 0.1, 0.1, deterministic=True)
    reason = "hi/kernel is joined with other values"  # of the four gates, in one product
    return linen(model, TOKENS, jnp.array([8, 5]), rounded=4, rules=("lstm=none", "embedder=none"), reason=reason)


OTHERS = (wmt, nlp_seq, imagenet, ppo, vae, seq2seq, sst2)  # each by one of the methods
RUNS = [*((lm1b, method) for method in METHODS), *zip(OTHERS, itertools.cycle(METHODS), strict=False)]


@pytest.mark.parametrize(("example", "method"), RUNS, ids=lambda each: getattr(each, "__name__", each))
def test_linen_examples_run_as_with_decoded_weights(example, method):
    found = example()
    recipe = "nf4-b16" if method == "nf4" else f"{method}:int4-g4"
    if found.reason:
        with pytest.raises(qjax.QjaxError, match=found.reason):
            qjax.quantize_function(found.fn, found.params, recipe, batches=[found.args])
    quantized, report = qjax.quantize_function(found.fn, found.params, recipe, batches=[found.args], rules=found.rules)
    assert len([record for record in report.layers if record.recipe != "none"]) == found.rounded
    same(qjax.apply_function(found.fn, quantized, *found.args), found.fn(qjax.dequantize_function(quantized), *found.args))
    other = jax.tree.leaves(found.fn(found.params, *found.args))[0]
    assert float(jnp.max(jnp.abs(jax.tree.leaves(qjax.apply_function(found.fn, quantized, *found.args))[0] - other))) > 1e-5


@pytest.mark.parametrize("example", [lm1b, nlp_seq, wmt], ids=lambda example: example.__name__)
def test_transformers_are_those_of_weights_rounded_by_hand(example):
    found = example()
    quantized, _ = qjax.quantize_function(found.fn, found.params, "rtn:int4-g4", batches=[found.args], rules=found.rules)
    by_hand = rounded_by_hand(nn.meta.unbox(found.params), "int4-g4")
    same(qjax.apply_function(found.fn, quantized, *found.args), found.fn(by_hand, *found.args))


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


def gemma() -> tuple[nnx.Module, tuple, int]:
    place = str(folder() / "gemma")
    sys.path.insert(0, place)
    try:
        import transformer
        import transformer_cfg
    finally:
        sys.path.remove(place)
    local, everywhere = transformer_cfg.AttentionType.LOCAL_SLIDING, transformer_cfg.AttentionType.GLOBAL
    shape = {"num_embed": 32, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8, "num_kv_heads": 1}
    norms = {"use_post_attn_norm": True, "use_post_ffw_norm": True, "use_qk_norm": True, "sliding_window_size": 4}
    config = transformer_cfg.TransformerConfig(
        num_layers=2, attention_types=(local, everywhere), final_logit_softcap=30.0, **shape, **norms
    )
    model = transformer.Transformer(config, rngs=nnx.Rngs(params=0))
    mask = jnp.ones_like(TOKENS, dtype=bool)
    arguments = (TOKENS, transformer.build_positions_from_mask(mask), None, transformer.make_causal_attn_mask(mask))
    return model, arguments, 2 * 6


@pytest.mark.parametrize("method", METHODS)
def test_gemma_runs_as_with_decoded_weights(method):
    model, arguments, rounded = gemma()
    recipe = "nf4-b16" if method == "nf4" else f"{method}:int4-g4"
    runs_as_decoded(model, recipe, arguments, rounded)


@pytest.mark.parametrize(
    ("name", "x", "rounded"),
    [
        ("02_lifted_transforms", jnp.linspace(0, 1, 6)[:, None], 2),
        ("06_scan_over_layers", jax.random.normal(jax.random.key(3), (4, 10)), 5),
    ],
)
def test_toys_of_nnx_run_as_with_decoded_weights(name, x, rounded, monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    model = runpy.run_path(str(folder() / "nnx_toy_examples" / f"{name}.py"))["model"]
    model.eval()
    runs_as_decoded(model, "rtn:int4-channel", (x,), rounded)


def runs_as_decoded(model, recipe, arguments, rounded):
    quantized, report = qjax.quantize_nnx(model, recipe, batches=[arguments])
    assert len([record for record in report.layers if record.recipe != "none"]) == rounded
    _, params, rest = nnx.split(quantized, nnx.Param, ...)
    expected = nnx.merge(nnx.graphdef(model), qjax.dequantize_function(params), rest)(*arguments)
    same(quantized(*arguments), expected)
    first = lambda run: jax.tree.leaves(run(*arguments))[0]  # noqa: E731
    assert float(jnp.max(jnp.abs(first(quantized) - first(model)))) > 1e-5
