"""What we write, run by llama.cpp: log-probabilities of the next token after prompts of ids, and ids of texts.

xllamacpp is its server within Python. Keys and values stand in float32 there, as here, so that float32 files agree to 1e-4.
What llama.cpp computes otherwise, whoever wrote the file:

    GELU             looked up in a table of float16, and its tanh form for GPT-NeoX and Falcon too
    16-bit weights   inputs are rounded to the same type
    blocks           inputs are rounded to 8 bits, 32 of them with a scale, or 256 for K-quants: as our /int8-g32, /int8-g256
    phi3             a sliding window is read and not kept to
    longrope         long factors are for a server that was given more than the original context, not for texts that are longer
    gpt-oss          the ends of YaRN's ramp are rounded, which OpenAI's model does not do
    text             is not composed (NFC), as the tokenizers of Qwen, GPT-NeoX and Cohere have it
    case             where words are cut by it (gpt-4o, tekken) is that of ASCII, and marks of accents are no letters
    wide spaces      do not count among Asian letters (deepseek-llm, deepseek-coder)

Needs xllamacpp.
"""

import dataclasses
import itertools
import json
import math
import random
import re
import unicodedata
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import qjax
from qjax.checkpoints.gguf.blocks import KINDS, quantized
from qjax.checkpoints.gguf.container import read_contents
from qjax.checkpoints.gguf.cuts import COMPOSED, CUTS
from qjax.checkpoints.gguf.export import export_gguf
from qjax.checkpoints.gguf.vocabulary import CONTROL, USER_DEFINED, tokenizer_json
from qjax.linear import Linear
from qjax.models.config import LayerKind
from qjax.models.model import Model, apply
from qjax.models.parameters import flatten, unflatten
from qjax.models.scalings import YarnScaling
from qjax.models.tokenizer import load_tokenizer, wrap_tokenizer
from qjax.models.tokenizer_trial import parse
from tests.conftest import FAMILY_CHANGES, FURTHER_CHANGES, GPT_OSS, byte_tokenizer, tiny_config
from tests.gguf_files import ARCHITECTURES, FURTHER, LONGROPE, MIXTURES, random_rows
from tests.paths import real_data, real_model
from tests.random_weights import small_model
from tests.test_gguf_tokenizer import MIXED

xllamacpp = pytest.importorskip("xllamacpp", reason="compares with llama.cpp")

pytestmark = pytest.mark.peer

PROMPTS = [np.random.default_rng(length).integers(0, 256, length) for length in (1, 3, 26)]
LETTER = 68  # a token that is a whole character
LEAST = -80.0  # log-probabilities below are 0 in float32, or nearly
FLOAT32 = 1e-4  # nats; a wrong row, window or frequency gives 0.01 to 10
TABLE = 5e-4  # of the range of the log-probabilities: half a digit of float16, for GELU
GELU = ("gelu", "gelu_tanh")
BY_NAME = {kind.name: kind for kind in KINDS.values()}
MILD = YarnScaling(32.0, 4096, truncate=True)  # gpt-oss' own, whose ramp is within the head
GEMMA2 = FAMILY_CHANGES["gemma"] | {
    "family": "gemma2",
    "layers": 4,
    "kinds": (LayerKind(sliding_window=5), LayerKind()) * 2,
    "sliding_window": 5,
    "norm_places": "both",
    "attention_scale": 12**-0.5,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}
CASES = ARCHITECTURES | {
    "phi3": FURTHER["phi3"] | {"sliding_window": 30},
    "phi3, longrope": FURTHER["phi3, longrope"]
    | {"context": 256, "rope_scaling": dataclasses.replace(LONGROPE, original_context=256, context=1024)},
    "gemma2": GEMMA2,
    "gptneox, one after the other": FAMILY_CHANGES["gpt_neox"] | {"parallel_residual": False},
    "bloom, 6 heads": FURTHER["bloom"] | {"heads": 6, "kv_heads": 6, "hidden_size": 48, "mlp_size": 192},
    "qwen2, yarn": FAMILY_CHANGES["qwen2"] | {"rope_scaling": YarnScaling(4.0, 8)},
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time is that of compiling programs that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Server:
    """llama.cpp's, of one file, on one thread."""

    def __init__(self, path, context: int = 256):
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.verbosity = context, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup = options.fit_params = False
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.inner = xllamacpp.Server(options)

    def log_probabilities(self, prompts, vocabulary: int) -> np.ndarray:
        """Of the token after a prompt: (prompts, vocabulary). They are those before any sampler. Which token is drawn does not
        matter, but of half a character none are told.
        """
        found = np.full((len(prompts), vocabulary), np.nan)
        options = {"n_predict": 1, "n_probs": vocabulary, "logit_bias": [[LETTER, 1000.0]], "samplers": []}
        for row, prompt in zip(found, prompts, strict=True):
            answer = self.inner.handle_completions(options | {"prompt": [int(i) for i in prompt], "cache_prompt": False})
            for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[each["id"]] = each["logprob"]
        assert not np.isnan(found).any()
        return found

    def tokenize(self, text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
        request = urllib.request.Request(f"{self.inner.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def log_probabilities(model: Model, prompts) -> np.ndarray:
    """Ours of the same; prompts are padded behind, where nothing sees it."""
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    last = [len(prompt) - 1 for prompt in prompts]
    return np.asarray(jax.nn.log_softmax(apply(model, tokens)[np.arange(len(prompts)), last].astype(jnp.float32)), np.float64)


def written(folder, model: Model) -> tuple[Model, Server]:
    export_gguf(folder / "m.gguf", model)
    return qjax.load(folder / "m.gguf"), Server(folder / "m.gguf")


def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return np.abs(ours - theirs)[theirs > LEAST].max()


@pytest.mark.parametrize("case", CASES)
def test_float32(case, tmp_path):
    model, server = written(tmp_path, small_model(tiny_config(**CASES[case]), byte_tokenizer(bos=True)))
    ours, theirs = log_probabilities(model, PROMPTS), server.log_probabilities(PROMPTS, 257)
    tolerance = TABLE * np.ptp(ours) if model.config.activation in GELU else FLOAT32
    assert largest(ours, theirs) < tolerance


def test_gpt_oss_with_a_rounded_ramp(tmp_path):
    """Other than `ARCHITECTURES`' its ramp is within a head. Ours with rounded ends is llama.cpp's; with its own it is near."""
    exact = dataclasses.replace(MILD, truncate=False)
    layers = {"rope_theta": 150000.0, "rope_scaling": exact}
    kinds = (LayerKind(sliding_window=5, **layers), LayerKind(**layers))
    model, server = written(tmp_path, small_model(tiny_config(**GPT_OSS | layers | {"kinds": kinds}), byte_tokenizer()))
    rounded = tuple(dataclasses.replace(kind, rope_scaling=MILD) for kind in model.config.kinds)
    config = dataclasses.replace(model.config, rope_scaling=MILD, kinds=rounded)
    theirs = server.log_probabilities(PROMPTS, 257)
    assert largest(log_probabilities(model._replace(config=config), PROMPTS), theirs) < FLOAT32
    assert FLOAT32 < largest(log_probabilities(model, PROMPTS), theirs) < 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.08)])
def test_16_bits(dtype, tolerance, tmp_path):
    """2^-11 and 2^-8 of every input."""
    config = tiny_config(hidden_size=256, mlp_size=512, head_dim=64)
    model, server = written(tmp_path, small_model(config, byte_tokenizer(bos=True), dtype=jnp.dtype(dtype)))
    model = model._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params))
    assert largest(log_probabilities(model, PROMPTS), server.log_probabilities(PROMPTS, 257)) < tolerance


def of_blocks(model: Model, kind, names) -> Model:
    """Random blocks in some layers' kernels."""
    leaves = flatten(model.params)
    for seed, (path, leaf) in enumerate(leaves.items()):
        if path.endswith(tuple(f"{name}/kernel" for name in names)):
            *stack, inputs, rows = leaf.shape
            blocks = random_rows(kind.name, int(np.prod(stack, dtype=int)) * rows, inputs, seed)
            leaves[path] = quantized(kind, blocks.reshape(*stack, rows, -1))
    return model._replace(params=unflatten(leaves))


def of_rounded_inputs(model: Model) -> Model:
    leaves = flatten(model.params)
    for path, leaf in leaves.items():
        if hasattr(leaf, "codes"):
            whole = str(leaf.format).endswith(("-k4", "-k6", "-k6s", "-k8s"))
            leaves[path] = Linear(leaf, activation="int8-g256" if whole else "int8-g32")
    return model._replace(params=unflatten(leaves))


def agreement(folder, model: Model, kind, names) -> tuple[float, float]:
    """Differences from llama.cpp with random blocks in some layers' kernels: of inputs as they are, and rounded as there."""
    leaves = flatten(model.params)
    kernels = [path for path in leaves if path.endswith(tuple(f"{name}/kernel" for name in names))]
    for seed, path in enumerate(kernels):
        *stack, inputs, rows = leaves[path].shape
        blocks = random_rows(kind.name, math.prod(stack) * rows, inputs, seed)
        leaves[path] = quantized(kind, blocks.reshape(*stack, rows, -1))
    back, server = written(folder, model._replace(params=unflatten(leaves)))
    theirs, leaves, found = server.log_probabilities(PROMPTS, 257), flatten(back.params), []
    for activation in (None, "int8-g256" if kind.weights == 256 else "int8-g32"):
        same = {path: Linear(qjax.dequantize(leaves[path]), activation=activation) for path in kernels}  # one program for all
        found.append(largest(log_probabilities(back._replace(params=unflatten(leaves | same)), PROMPTS), theirs))
    return tuple(found)


@pytest.mark.parametrize(("case", "kind"), [*(("llama", kind) for kind in BY_NAME), ("phi3", "Q8_0"), ("phi3", "Q6_K")])
def test_blocks(case, kind, tmp_path):
    """Of queries, keys and values, which see the same inputs in one layer: two rounded layers one after the other differ by
    what a step of 8 bits makes of 1e-7. Scales of 32 inputs are float16 there, of 256 float32, as ours.
    """
    kind, config = BY_NAME[kind], tiny_config(**CASES[case] | {"hidden_size": 256, "head_dim": 64, "layers": 1})
    as_they_are, rounded = agreement(tmp_path, small_model(config, byte_tokenizer(bos=True)), kind, "qkv")
    assert rounded < min(FLOAT32 if kind.weights == 256 else 0.01, as_they_are / 8)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "MXFP4"])
@pytest.mark.parametrize("case", MIXTURES)
def test_blocks_of_experts(case, kind, tmp_path):
    kind, config = BY_NAME[kind], tiny_config(**MIXTURES[case] | {"hidden_size": 256, "layers": 1, "kinds": ()})
    as_they_are, rounded = agreement(tmp_path, small_model(config, byte_tokenizer(bos=True)), kind, ("gate", "up"))
    assert rounded < min(FLOAT32 if kind.weights == 256 else 0.01, as_they_are / 8)


REFUSED = {
    "gptneox, tied": FAMILY_CHANGES["gpt_neox"] | {"tied": True},
    "olmo2, tied": FURTHER_CHANGES["olmo2"] | {"tied": True},
    "stablelm, tied": FURTHER["stablelm"] | {"tied": True},
    "gpt-oss, tied": GPT_OSS | {"tied": True},
    "gpt-oss, no biases": GPT_OSS | {"qkv_bias": False, "attention_output_bias": False},
    "gemma, untied": FAMILY_CHANGES["gemma"] | {"tied": False},
    "gemma2, untied": GEMMA2 | {"tied": False},
    "command-r, untied": FURTHER["command-r"] | {"tied": False},
    "command-r, biases": FURTHER["command-r"] | {"qkv_bias": True, "attention_output_bias": True},
    "command-r, norms in few layers": FURTHER_CHANGES["cohere"],
    "command-r, 64 layers without": FURTHER["command-r"] | {"layers": 64},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_written_would_not_load(case, tmp_path, monkeypatch):
    model = small_model(tiny_config(**REFUSED[case]), byte_tokenizer())
    with pytest.raises(qjax.QjaxError, match=r"llama\.cpp does not load"):
        export_gguf(tmp_path / "m.gguf", model)
    monkeypatch.setattr("qjax.checkpoints.gguf.export.require_loadable", lambda config: None)
    export_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(RuntimeError, match="Failed to init server"):
        Server(tmp_path / "m.gguf")


def test_a_quantized_model_of_ours(tmp_path):
    """What llama.cpp rounds besides is little: its probabilities are much nearer to ours than those before quantization."""
    model = qjax.load("bundled")
    text = (Path(json.decoder.__file__).read_text() + Path(random.__file__).read_text()).split("\n\n")
    prompts = [model.tokenizer.encode(each)[:40] for each in text if len(each) > 200][:6]
    back, server = written(tmp_path, qjax.quantize(model, "rtn:int4-g32-sym")[0])
    before, ours = (log_probabilities(each, prompts) for each in (model, back))
    theirs = server.log_probabilities(prompts, model.config.vocabulary_size)
    assert divergence(theirs, ours) < divergence(before, ours) / 30


def divergence(of: np.ndarray, other: np.ndarray) -> float:
    """Kullback and Leibler's, in nats."""
    return float((np.exp(of) * (of - other)).sum(1).mean())


NAMES = [name for name in CUTS if name != "gpt-neox"]  # which llama.cpp has no word for
TEXTS = (
    MIXED,
    "",
    " ",
    " a  b",
    "don't I'LL  \n\n\n x",
    "1234567 12",
    "<s>x</s>",
    "Hello<|endoftext|>there",
    "trail  ",
    "<0x41>",
)
LETTERS = list("aZbQé ÉñÑ漢字かなカナ한글мирМИРनमसتत12٣½²'’\"!?.,;:…。，、।۔،()|[]{}<>^~`$€+=_-/\\ \u00a0\u3000\t\n\r")  # noqa: RUF001
LETTERS += [*"😀👍🏽İıſßǅʰ", *" " * 12, *["'s", "'LL", "the", "The", "HTML", "123"] * 3]
SCRAMBLED = tuple("".join(random.Random(seed).choices(LETTERS, k=240)) for seed in range(8))
LEFT_OUT = {  # what llama.cpp cuts otherwise, of texts
    **dict.fromkeys(("gpt-4o", "llama4", "tekken"), "[\u00c0-\u04ff\u093e-\u094d]"),
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), "\u3000"),
}


@pytest.mark.parametrize("name", ["bytes", "bundled", "stories260K", *NAMES])
def test_texts(name, tmp_path, monkeypatch):
    """Ids of texts, with what a tokenizer puts before them, and without."""
    if name in CUTS:
        monkeypatch.setattr("qjax.checkpoints.gguf.tokens.WRITTEN_CUTS", (name,))
    tokenizer = tokenizer_named(name)
    changes = {"vocabulary_size": tokenizer.vocabulary_size, "layers": 1, "tied": True, "eos_id": tokenizer.eos_id}
    _, server = written(tmp_path, small_model(tiny_config(**changes, bos_id=tokenizer.bos_id), tokenizer))
    if name in CUTS:
        assert read_contents(tmp_path / "m.gguf").values["tokenizer.ggml.pre"] == name
    for text in TEXTS + SCRAMBLED:
        same = re.sub(LEFT_OUT.get(name, "(?!)"), "", text)
        same = unicodedata.normalize("NFC", same) if name in COMPOSED else same
        for special in (False, True):
            assert server.tokenize(same, special) == tokenizer.encode(same, special_tokens=special).tolist()


def tokenizer_named(name: str):
    """Of a cut: any two bytes of the texts merge, in some order, so that ids tell where text is cut. Of two names digits do not
    merge: their models have no such merges, and llama.cpp's expressions therefore leave digits together (`cuts.py`).
    """
    match name:
        case "bytes":
            return byte_tokenizer(bos=True)
        case "bundled":
            return qjax.load("bundled").tokenizer
        case "stories260K":
            return load_tokenizer(real_data("models/stories260K-hf/tokenizer.json"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [level.pre_tokenize_str(text)[0][0] for text in TEXTS + SCRAMBLED if text]
    pairs = sorted({pair for text in letters for pair in itertools.pairwise(text)})
    if name in ("falcon", "deepseek-llm"):
        pairs = [pair for pair in pairs if not any(map(str.isnumeric, pair))]
    random.Random(0).shuffle(pairs)
    known = [*sorted(level.alphabet()), *map("".join, pairs)]
    types = np.array([1] * len(known) + [CONTROL, USER_DEFINED], np.int32)
    values = {"model": "gpt2", "pre": name, "tokens": [*known, "<|endoftext|>", "   "], "token_type": types}
    values |= {"merges": list(map(" ".join, pairs)), "bos_token_id": len(known), "eos_token_id": len(known)}
    return wrap_tokenizer(parse(tokenizer_json({f"tokenizer.ggml.{key}": value for key, value in values.items()})))


@pytest.mark.real
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf"])
def test_a_real_file(name):
    """The likeliest token, and divergences as small as inputs of 8 bits leave them, in 30 layers."""
    path = real_model(name)
    model, server = qjax.load(path), Server(path)
    texts = ("The capital of France is", "Once upon a time, in a land far away, there lived a", "2 + 2 = 4 and 3 + 3 =")
    prompts = [model.tokenizer.encode(text, special_tokens=True) for text in texts]
    ours, theirs = log_probabilities(model, prompts), server.log_probabilities(prompts, model.config.vocabulary_size)
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))
    assert divergence(theirs, ours) < 0.02
    for text in (*TEXTS, *SCRAMBLED, f"a{' ' * 40}b"):
        same = unicodedata.normalize("NFC", text)
        assert server.tokenize(same, True) == model.tokenizer.encode(same, special_tokens=True).tolist()
