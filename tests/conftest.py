"""Models and tokenizers small enough to make in a test. Programs are compiled once for all processes and all runs."""

import contextlib
import ctypes
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import pytest

import qjax
from qjax import registry
from qjax.cache import enable_compilation_cache
from qjax.checkpoints.huggingface import save_huggingface
from qjax.models.config import DecoderConfig, LayerKind
from qjax.models.model import Model
from qjax.models.scalings import YarnScaling
from qjax.models.walk import Decoder

enable_compilation_cache()  # as the command line does: most of a test's time is the compilation of what another compiled too
jax.config.update("jax_traceback_in_locations_limit", 0)  # a seventh of tracing and lowering; no test asks where a line is from
MOST = 1.5e9  # bytes of a process that has run a file
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
OLDER = "--xla_cpu_use_fusion_emitters=false"  # later versions stop at what they do not know


def pytest_configure(config) -> None:
    """The default selection compiles with less care, in half the time: shapes are tiny, and programs take longer to compile
    than to run. Others (slow, peer, real) meet the compiler as users do; so does this one where XLA_FLAGS is set, also to "".
    """
    if config.option.markexpr in config.getini("addopts"):
        quick = f"{QUICK} {OLDER}" if jaxlib.version.__version_info__ < (0, 11) else QUICK
        os.environ.setdefault("XLA_FLAGS", quick)  # read when the first program is compiled, by child processes too


def byte_tokenizer(bos: bool = False):
    """A byte-level tokenizer of 256 tokens (257 with <s>, which it then puts before every text)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    from qjax.models.tokenizer import wrap_tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.add_special_tokens(["<s>"])
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return wrap_tokenizer(inner)


GPT2 = {  # changes that make `tiny_config` a GPT-2
    "family": "gpt2",
    "mlp_size": 128,
    "kv_heads": 4,
    "norm": "layer",
    "activation": "gelu_tanh",
    "gated": False,
    "positions": "learned",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tied": True,
}

GPT_NEOX = {
    "family": "gpt_neox",
    "kv_heads": 4,
    "norm": "layer",
    "activation": "gelu",
    "gated": False,
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "parallel_residual": True,
    "rotary_fraction": 0.25,
}
OPT = GPT2 | {"family": "opt", "mlp_size": 48, "activation": "relu", "position_offset": 2}
GEMMA = {
    "family": "gemma",
    "kv_heads": 1,
    "head_dim": 12,
    "norm": "rms_offset",
    "norm_epsilon": 1e-6,
    "activation": "gelu_tanh",
    "scaled_embeddings": True,
    "tied": True,
}
GEMMA3 = GEMMA | {
    "family": "gemma3_text",
    "kinds": (LayerKind(sliding_window=5), LayerKind(rope_theta=1e6)),
    "sliding_window": 5,
    "norm_places": "both",
    "qk_norm": "head",
    "attention_scale": 0.25,
    "logit_softcap": 5.0,
}
OLMO2 = {"family": "olmo2", "norm_places": "after", "qk_norm": "width"}
COHERE = {
    "family": "cohere",
    "norm": "layer_scale",
    "parallel_residual": True,
    "shared_norm": True,
    "rope_interleaved": True,
    "qk_norm": "each_head",
    "logit_scale": 0.5,
    "tied": True,
}
BLOOM = GPT2 | {"family": "bloom", "positions": "alibi", "embedding_norm": True}
FALCON = GPT2 | {
    "family": "falcon",
    "kv_heads": 1,
    "activation": "gelu",
    "positions": "alibi_scaled",
    "qkv_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "parallel_residual": True,
    "shared_norm": True,
}
MIXTRAL = {"family": "mixtral", "norm_epsilon": 1e-5, "rope_theta": 1e6, "experts": 4, "experts_per_token": 2}
STRETCHED = {"rope_theta": 150000.0, "rope_scaling": YarnScaling(4.0, 8, truncate=False)}
GPT_OSS = {
    "family": "gpt_oss",
    "norm_epsilon": 1e-5,
    "activation": "swiglu_oai",
    "kinds": (LayerKind(sliding_window=5, **STRETCHED), LayerKind(**STRETCHED)),
    "sliding_window": 5,
    **STRETCHED,
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "experts": 4,
    "experts_per_token": 2,
    "attention_sinks": True,
}
SMOLLM3 = {
    "family": "smollm3",
    "kinds": (LayerKind(rope_theta=2e6), LayerKind(sliding_window=5, positions="none", rope_theta=2e6)),
    "rope_theta": 2e6,
    "tied": True,
}
FURTHER_CHANGES = {  # of families that differ from those below in what few tests are about
    "olmo2": OLMO2,
    "cohere": COHERE,
    "bloom": BLOOM,
    "falcon": FALCON,
    "smollm3": SMOLLM3,
    "gpt_oss": GPT_OSS,
}
FAMILY_CHANGES = {  # family -> what makes `tiny_config` one of it
    "llama": {},
    "mistral": {"family": "mistral", "sliding_window": 5},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "tied": True},
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "gemma": GEMMA,
    "gemma3_text": GEMMA3,
}


def some_slow(families: Iterable[str]) -> list[object]:
    """Parameters of a test of whole commands: families that are built in another way each, the others marked slow."""
    kept = ("gpt2", "gpt_neox", "gemma3_text")
    return [family if family in kept else pytest.param(family, marks=pytest.mark.slow) for family in families]


def tiny_config(**changes) -> DecoderConfig:
    """A Llama of 2 layers and 32 features, context 32, 257 tokens."""
    base = {
        "family": "llama",
        "vocabulary_size": 257,
        "hidden_size": 32,
        "mlp_size": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "context": 32,
    }
    return DecoderConfig(**(base | changes))


def random_model(config: DecoderConfig, tokenizer=None, seed: int = 0, dtype=jnp.float32) -> Model:
    """A model with random weights of the size that gives logits of order one; biases and norms are not trivial."""
    params = jax.tree.map(lambda leaf: leaf, _random_parameters(config, seed, dtype))  # dicts of its own
    return Model(config, params, tokenizer, "random")


@functools.lru_cache(maxsize=8)
def _random_parameters(config: DecoderConfig, seed: int, dtype):
    params = Decoder(config).init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [(leaf + 0.1 * jax.random.normal(key, leaf.shape)).astype(dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def first_block(folder: Path) -> Path:
    """The bundled model with its first block alone, saved: what is compiled for it is what the whole runs, but runs faster."""
    whole = qjax.load("bundled")
    params = {name: leaves for name, leaves in whole.params.items() if not name.startswith("block_")}
    config = dataclasses.replace(whole.config, layers=1)
    model = whole._replace(config=config, params=params | {"block_0": whole.params["block_0"]})
    save_huggingface(folder, model)
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """A random Llama with an untied head and a byte-level tokenizer."""
    return random_model(tiny_config(), byte_tokenizer())


@pytest.fixture(scope="module", autouse=True)
def memory():
    """A process of many files gives back what it compiled when that is much: the next file finds it on the disk."""
    yield
    if resident_bytes() > MOST:
        jax.clear_caches()
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # which would keep most of it for itself


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


@pytest.fixture
def registries():
    """Methods and statistics that a test registers are forgotten after it."""
    with registry.scoped():
        yield
