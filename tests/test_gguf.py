"""GGUF files: values of every type of block against an oracle, models against the same model in memory, and what is refused."""

import contextlib
import dataclasses
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import qtensor
from qjax.checkpoints.gguf.architectures import FAMILIES
from qjax.checkpoints.gguf.blocks import KINDS, quantized
from qjax.checkpoints.gguf.config import HARMLESS, READ_HERE, config_of, llama3_scaling
from qjax.checkpoints.gguf.model import load_gguf
from qjax.checkpoints.gguf.vocabulary import tokenizer_json
from qjax.checkpoints.leaves import blank
from qjax.cli.app import main
from qjax.errors import QjaxError
from qjax.kernels import xla
from qjax.lazy import is_lazy, materialised
from qjax.linear import is_quantized
from qjax.models.parameters import flatten
from tests.conftest import FAMILY_CHANGES, tiny_config
from tests.gguf_files import LLAMA_LIKE, NUMBERS, file_bytes, model_tensors, model_values, random_rows, rotated
from tests.oracles import gguf as oracle
from tests.paths import real_data
from tests.random_weights import weights_model

NAMES = [kind.name for kind in KINDS.values()]
FORMATS = {
    **{"Q4_0": "int4-g32-sym-full", "Q4_1": "int4-g32-m16", "Q5_0": "int5-g32-sym-full", "Q5_1": "int5-g32-m16"},
    **{"Q8_0": "int8-g32-sym-max", "Q2_K": "int2-g16-k4m-k4", "Q3_K": "int3-g16-sym-full-k6s", "Q4_K": "int4-g32-k6m-k6"},
    **{"Q5_K": "int5-g32-k6m-k6", "Q6_K": "int6-g16-sym-full-k8s", "IQ4_NL": "iq4_nl-g32-fp16", "MXFP4": "mxfp4"},
}


@pytest.fixture(scope="module")
def model():
    """A Llama with an untied head."""
    return weights_model(tiny_config(vocabulary_size=64, hidden_size=64, mlp_size=96, heads=4, head_dim=16, kv_heads=2))


def written(path, values, tensors, **options):
    path.write_bytes(file_bytes(values, tensors, **options))
    return path


def assert_equal(found, expected):
    found, expected = flatten(found.params), flatten(expected.params)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("kind", KINDS.values(), ids=NAMES)
def test_blocks_are_read_as_they_are(kind):
    """Values bit for bit, bytes as many as the file's, and a QTensor like any other of its format."""
    rows = random_rows(kind.name, 3, 2 * 256)
    q = quantized(kind, rows)
    expected = [[oracle.decode(kind.name, block.tobytes()) for block in row] for row in rows.reshape(3, -1, kind.nbytes)]
    expected = np.array(expected, np.float32).reshape(3, -1)
    expected += 0.0 if kind.name == "MXFP4" else -0.0  # -0 of FP4 is 0 here
    np.testing.assert_array_equal(np.asarray(qtensor.dequantize(q)).T.view(np.uint32), expected.view(np.uint32))
    assert str(q.format) == FORMATS[kind.name] == str(qjax.parse_format(FORMATS[kind.name]))
    assert q.nbytes == rows.nbytes == q.format.nbytes(*q.shape)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), (q, blank(q.format, *q.shape)))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["Q4_1", "Q5_K", "Q6_K"])
def test_products_with_file_formats(name):
    q = quantized(KINDS[NUMBERS[name]], random_rows(name, 5, 256))
    x = jax.random.normal(jax.random.key(0), (3, 256))
    np.testing.assert_allclose(qjax.matmul(x, q, precision="highest"), x @ qtensor.dequantize(q), rtol=1e-4, atol=1e-5)
    assert (name != "Q6_K") == ("minima" in str(xla.refusal(q)))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    np.testing.assert_array_equal(qtensor.dequantize(stacked)[1], qtensor.dequantize(q))


KEYS = {
    "gemma3": {"gemma3.attention.sliding_window": 5, "gemma3.rope.freq_base": 1e6},
    "granite": {
        "granite.embedding_scale": 2.0,
        "granite.residual_scale": 0.5,
        "granite.attention.scale": 0.25,
        "granite.logit_scale": 8.0,
    },
}


@pytest.mark.parametrize("architecture", LLAMA_LIKE)
def test_a_model_comes_back(architecture, tmp_path):
    """Rows of Llama's q and k are moved back, biases with them; a tied head is not stored; Gemma's norms are less 1, and every
    sixth layer of Gemma 3 sees everything.
    """
    original = weights_model(tiny_config(**LLAMA_LIKE[architecture] | {"vocabulary_size": 64}))
    values = model_values(original, architecture) | KEYS.get(architecture, {})
    found = load_gguf(written(tmp_path / "tiny.gguf", values, model_tensors(original, architecture)))
    assert found.name == "tiny" and found.recipe == "none" and found.tokenizer is None
    epsilon = np.float32(original.config.norm_epsilon).item()  # as files hold it
    assert found.config == dataclasses.replace(original.config, norm_epsilon=epsilon)
    if not architecture.startswith("gemma"):
        return assert_equal(found, original)
    for path, leaf in flatten(original.params).items():
        np.testing.assert_allclose(flatten(found.params)[path], leaf, rtol=0, atol=2e-7 if path.endswith("offset") else 0)


def test_names_of_tensors(model):
    block = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    expected = {f"blk.{i}.{name}.weight" for i in range(2) for name in block}
    assert model_tensors(model).keys() == expected | {"token_embd.weight", "output_norm.weight", "output.weight"}
    gpt2 = weights_model(tiny_config(**FAMILY_CHANGES["gpt2"]))
    assert {"blk.1.attn_qkv.weight", "blk.1.attn_qkv.bias", "position_embd.weight"} <= model_tensors(gpt2, "gpt2").keys()


def test_quantized_kernels_keep_their_codes(model, tmp_path):
    """q is moved back as it is, unread: rows of the file are columns here. So does the table of embeddings. Lazy or not."""
    tensors = model_tensors(model)
    kinds = {"blk.0.attn_q.weight": "Q4_1", "blk.1.attn_v.weight": "MXFP4", "token_embd.weight": "Q8_0"}
    rows = {name: random_rows(kind, tensors[name][1][0], 64, seed) for seed, (name, kind) in enumerate(kinds.items())}
    tensors |= {name: (kinds[name], tensors[name][1], content.tobytes()) for name, content in rows.items()}
    half = np.asarray(np.frombuffer(tensors["output.weight"][2], np.float32), np.float16)
    tensors["output.weight"] = ("F16", tensors["output.weight"][1], half.tobytes())
    path = written(tmp_path / "tiny.gguf", model_values(model), tensors)
    read = load_gguf(path)
    assert read.recipe == "gguf file: int4-g32-m16; mxfp4"
    found = flatten(read.params)

    def of(name):
        return np.asarray(qtensor.dequantize(quantized(KINDS[NUMBERS[kinds[name]]], rows[name])))

    q = found["block_0/attention/q/kernel"]
    assert str(q.format) == "int4-g32-m16" and q.nbytes == rows["blk.0.attn_q.weight"].nbytes
    np.testing.assert_array_equal(rotated(np.asarray(qtensor.dequantize(q)).T, 16), of("blk.0.attn_q.weight").T)
    np.testing.assert_array_equal(qtensor.dequantize(found["block_1/attention/v/kernel"]), of("blk.1.attn_v.weight"))
    table = found["embed/tokens/embedding"]
    np.testing.assert_array_equal(qjax.dequantize(table), of("token_embd.weight").T)
    assert table.nbytes == rows["token_embd.weight"].nbytes and found["head/output/kernel"].dtype == jnp.float16
    assert sum(map(is_quantized, found.values())) == 3
    lazy = load_gguf(path, lazy=True)
    assert all(map(is_lazy, flatten(lazy.params).values()))
    assert str(flatten(lazy.params)["block_0/attention/q/kernel"].format) == "int4-g32-m16"
    jax.tree.map(np.testing.assert_array_equal, materialised(lazy.params), load_gguf(path).params)
    qjax.save(tmp_path / "packed", load_gguf(path))
    jax.tree.map(np.testing.assert_array_equal, qjax.load(tmp_path / "packed").params, load_gguf(path).params)


def test_tensors_lie_apart_and_even(model, tmp_path):
    path, tensors = tmp_path / "m.gguf", model_tensors(model)
    good = file_bytes(model_values(model), tensors)
    name, (_, shape, _) = list(tensors.items())[-1]
    place = good.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 8 * len(shape) + 4
    (offset,) = struct.unpack_from("<Q", good, place)
    for value, said in ((offset + 1, "begins at no multiple of 32 bytes"), (0, "begins within|do not fit")):
        path.write_bytes(changed(good, place, "Q", value))
        with pytest.raises(QjaxError, match=said):
            load_gguf(path)


def test_more_texts_than_any_vocabulary_has(model, tmp_path, monkeypatch):
    monkeypatch.setattr("qjax.checkpoints.gguf.container.TEXTS", 5)
    values = model_values(model)
    written(tmp_path / "m.gguf", values | {"some.texts": ["a"] * 6}, model_tensors(model))
    with pytest.raises(QjaxError, match=r"it has lists of \d+ texts, expected at most 5"):
        load_gguf(tmp_path / "m.gguf")


def test_the_sizes_that_info_tells(model, tmp_path, capsys):
    """Of the file, which holds a tokenizer and names too, and of what qjax holds in memory."""
    tensors = model_tensors(model)
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        shape = tensors[name][1]
        tensors[name] = ("Q8_0", shape, random_rows("Q8_0", shape[0], shape[1]).tobytes())
    file = written(tmp_path / "m.gguf", model_values(model), tensors)
    with pytest.raises(SystemExit):
        main(["info", str(file)])
    held = sum(leaf.nbytes for leaf in flatten(qjax.load(file).params).values())
    size = file.stat().st_size
    said = f"8.500 bits per quantized weight, {size:,} bytes in its files; as qjax holds it in memory, {held:,} bytes"
    assert said in capsys.readouterr().out and size / 2 < held < size


def test_a_model_in_several_files(model, tmp_path):
    tensors = model_tensors(model)
    split = {"split.count": 2, "split.tensors.count": len(tensors)}
    halves = [dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])]
    paths = [tmp_path / f"tiny-0000{number}-of-00002.gguf" for number in (1, 2)]
    written(paths[0], model_values(model) | split | {"split.no": 0}, halves[0])
    with pytest.raises(QjaxError, match=r"lacks tiny-00002-of-00002.gguf of a model in 2 files; copy or download"):
        qjax.load(tmp_path)
    written(paths[1], split | {"split.no": 1}, halves[1])
    for place in (tmp_path, *paths):
        assert_equal(qjax.load(place), model)
    mine = [tmp_path / "mine" / path.name for path in paths]
    mine[0].parent.mkdir()
    for link, path in zip(mine, paths, strict=True):
        link.symlink_to(path)
    assert_equal(qjax.load(mine[0]), model)  # the user's own links
    mine[0].unlink()
    mine[0].write_bytes(paths[0].read_bytes())
    with pytest.raises(QjaxError, match=r"00002.gguf is a link to .*; links out of a model's folder are not followed"):
        qjax.load(mine[0])
    written(paths[1], split | {"split.no": 1}, halves[0])
    with pytest.raises(QjaxError, match=r"00002.gguf has .*blk.0.*, as another part of the model has"):
        qjax.load(tmp_path)


def test_what_stands_in_a_folder(model, tmp_path):
    written(tmp_path / "a.gguf", model_values(model), model_tensors(model), version=2)
    (tmp_path / "mmproj-b.gguf").write_bytes(b"")
    assert_equal(qjax.load(tmp_path), model)
    written(tmp_path / "b.GGUF", model_values(model) | {"general.alignment": 64}, model_tensors(model))
    assert_equal(qjax.load(tmp_path / "b.GGUF", lazy=False), model)
    with pytest.raises(QjaxError, match=r"holds several models, a.gguf; b.GGUF; name one of the files"):
        qjax.load(tmp_path)


def test_what_a_file_asks_for_is_done_or_refused(model):
    base = model_values(model)

    def read(**changes):
        infos = {"token_embd.weight": type("Info", (), {"shape": (64, 64)})}
        return config_of(base | changes, infos)

    assert read()["tie_word_embeddings"] is True and "attention_bias" not in read()
    assert read(**{"llama.expert_count": 0, "llama.vocab_size": 3})["vocab_size"] == 64
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert read(**linear)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.yarn_beta_fast": 16.0}
    yarn |= {"llama.rope.scaling.original_context_length": 8}
    stretched = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 8}
    assert read(**yarn)["rope_scaling"] == stretched
    ends = read(**{f"tokenizer.ggml.{name}_token_id": i for name, i in (("bos", 1), ("eos", 2), ("eot", 5))})
    assert ends["bos_token_id"] == 1 and ends["eos_token_id"] == [2, 5]
    assert read(**{"llama.attention.head_count_kv": np.array([2, 2], np.int32)})["num_key_value_heads"] == 2
    lists = {key: np.array([8, 8]) for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    assert read(**{f"llama.{key}": value for key, value in lists.items()})["head_dim"] == 8
    usual = {"attention.causal": True, "residual_scale": 1.0, "rope.scaling.attn_factor": 1.0, "attention.clamp_kqv": 0.0}
    assert read(**{f"llama.{key}": value for key, value in usual.items()}) == read()
    for changes, said in (
        ({"llama.attention.value_length": np.array([8, 4])}, r"value_length is array\(\[8, 4\]\), expected a number that all"),
        ({"llama.rope.dimension_count": np.array([8, 4])}, "dimension_count is .* expected a number that all"),
        ({"llama.rope.scaling.type": np.array([1, 2])}, r"scaling.type is '\[1 2\]'; supported"),
        ({"general.architecture": "mamba"}, "'mamba' is not read; read are llama, qwen2"),
        ({"llama.attention.sliding_window": 512}, "not understood: llama.attention.sliding_window = 512"),
        ({"llama.attention.causal": False}, "not understood: llama.attention.causal = False"),
        ({"llama.attention.scale": 1.0}, r"not understood: llama.attention.scale = 1\.0"),
        ({"llama.use_parallel_residual": True}, "not understood: llama.use_parallel_residual = True"),
        ({"llama.rope.scaling.attn_factor": 1.5}, r"not understood: llama.rope.scaling.attn_factor = 1\.5"),
        ({"llama.rope.scaling.type": "dynamic"}, "'dynamic'; supported: none, linear, yarn"),
        (yarn | {"llama.rope.scaling.attn_factor": 2.0}, "attn_factor is 2.0; with yarn only 1 is supported"),
        ({"llama.attention.value_length": 8}, "different lengths"),
        ({"llama.attention.head_count_kv": np.array([2, 1], np.int32)}, "a number that all layers share"),
        ({"llama.block_count": "two"}, "'two', expected a number"),
    ):
        with pytest.raises(QjaxError, match=said):
            read(**changes)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_values_of_any_kind_are_read_or_refused(architecture):
    """Lists where a number or a text is expected among them."""
    infos = {"token_embd.weight": type("Info", (), {"shape": (64, 32)})}
    base = {"attention.head_count": 4, "embedding_length": 32, "block_count": 2, "rope.scaling.type": "linear"}
    base = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in base.items()}
    for key in (*FAMILIES[architecture][2], *READ_HERE, *HARMLESS):
        for value in (np.array([], np.int32), np.array([1, 2]), [], ["a"], "", "a", 0, -1, True, math.nan):
            with contextlib.suppress(QjaxError):
                config_of(base | {f"{architecture}.{key}": value}, infos)


@pytest.mark.parametrize("value", [np.array([1, 2]), ["gpt2"]], ids=str)
def test_a_tokenizer_of_a_strange_kind_is_left_aside(value):
    for values in ({"model": value}, {"model": "gpt2", "pre": value}):
        with pytest.warns(qjax.QjaxWarning, match="tokenizer is of the kind .*, which is not read"):
            assert tokenizer_json({f"tokenizer.ggml.{key}": each for key, each in values.items()}) is None


def test_llama_3s_factors_are_known_again(model):
    """As convert_hf_to_gguf.py makes them, of Llama 3.2's settings."""
    theta, half, factor = 500000.0, 32, 32.0
    factors = []
    for frequency in theta ** (-np.arange(half) / half):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    found = llama3_scaling(np.float32(factors), {"rope_theta": theta})
    assert found["rope_type"] == "llama3" and found["factor"] == 32 and found["original_max_position_embeddings"] == 8192
    with pytest.raises(QjaxError, match="not Llama 3's scaling"):
        llama3_scaling(np.linspace(1, 8, half), {"rope_theta": theta})


def test_longropes_factors_need_their_context():
    values = {"general.architecture": "phi3", "phi3.context_length": 128, "phi3.embedding_length": 32}
    values |= {"phi3.attention.head_count": 4, "phi3.rope.dimension_count": 6}
    infos = {"token_embd.weight": type("Info", (), {"shape": (64, 32)})}
    constants = {f"rope_factors_{name}.weight": np.float32([1, 2, 3]) for name in ("long", "short")}
    original = {"phi3.rope.scaling.original_context_length": 32}
    found = config_of(values | original, infos, constants)
    assert found["rope_scaling"]["long_factor"] == [1.0, 2.0, 3.0] and found["partial_rotary_factor"] == 0.75
    for changes, said in (
        ({}, "belong together"),
        (original | {"phi3.rope.scaling.attn_factor": 2.0}, "is 2.0, expected 1.18"),
    ):
        with pytest.raises(QjaxError, match=said):
            config_of(values | changes, infos, constants)


def changed(content: bytes, at: int, code: str, value: int) -> bytes:
    return content[:at] + struct.pack(f"<{code}", value) + content[at + struct.calcsize(code) :]


def test_broken_files_are_refused_before_anything_is_read(model, tmp_path):
    path, good = tmp_path / "m.gguf", file_bytes(model_values(model), model_tensors(model))
    cases = [
        (b"GGUX" + good[4:], "it is no GGUF file"),
        (b"", "it is no GGUF file"),
        (changed(good, 4, "I", 1), "of version 1, expected version 2 or 3"),
        (good[:4] + struct.pack(">I", 3) + good[8:], "big-endian"),
        (changed(good, 8, "Q", 2**40), "1099511627776 tensors"),
        (changed(good, 24, "Q", 2**60), "a text of 1152921504606846976 bytes"),
        (good[:300], "it ends after byte"),
        (good[:-40], r"output.weight ends after the file"),
        (file_bytes(model_values(model) | {"general.alignment": 0}, {}), "general.alignment is 0"),
        (file_bytes(model_values(model), {}), "no token_embd.weight"),
    ]
    for content, said in cases:
        path.write_bytes(content)
        with pytest.raises(QjaxError, match=said) as error:
            load_gguf(path)
        assert str(error.value).startswith(str(path)) and error.value.args[0].count(str(path)) == 1


def test_tensors_that_do_not_fit_are_all_named(model, tmp_path):
    tensors = model_tensors(model)
    name = "blk.0.ffn_up.weight"
    strange = {
        "blk.0.ffn_up.bias": tensors["output_norm.weight"],
        "blk.0.ffn_gate.weight": ("F32", (96, 32), b"\0" * 96 * 32 * 4),
    }
    strange["blk.1.ffn_down.weight"] = ("Q4_0", (64, 96), b"")
    left = {key: value for key, value in tensors.items() if key not in (name, "blk.1.ffn_down.weight")}
    with pytest.raises(QjaxError, match="do not fit") as error:
        load_gguf(written(tmp_path / "m.gguf", model_values(model), left | strange))
    for said in (f"missing {name}", "unexpected blk.0.ffn_up.bias", "(96, 32), expected (96, 64)", "ends after the file"):
        assert said in str(error.value)
    broken = np.frombuffer(tensors[name][2], np.float32).copy()
    broken[5] = np.nan
    tensors[name] = ("F32", tensors[name][1], broken.tobytes())
    path = written(tmp_path / "m.gguf", model_values(model), tensors)
    with pytest.raises(QjaxError, match=f"NaN or infinite weights in {name}; get an intact file"):
        load_gguf(path)
    infinite = random_rows("Q5_0", 64, 96)
    infinite[3, :2] = np.float16([np.inf]).view(np.uint8)
    tensors |= {name: model_tensors(model)[name], "blk.1.ffn_down.weight": ("Q5_0", (64, 96), infinite.tobytes())}
    with pytest.raises(QjaxError, match=r"NaN or infinite weights in blk.1.ffn_down.weight"):
        load_gguf(written(tmp_path / "m.gguf", model_values(model), tensors))


def test_the_same_small_model_as_a_folder_of_hugging_face():
    """stories260K, as llama2.c's own converter made the file: F32, its order of rows, an untied head, a SentencePiece."""
    ours = load_gguf(real_data("models/stories260K/stories260K_tok512.gguf"))
    theirs = qjax.load(real_data("models/stories260K-hf"))
    expected = flatten(theirs.params)
    for path, leaf in flatten(ours.params).items():
        np.testing.assert_array_equal(leaf, expected.get(path, np.asarray(expected["embed/tokens/embedding"]).T), err_msg=path)
    text = real_data("text/tinystories_val.txt").read_text()[:20_000]
    np.testing.assert_array_equal(ours.tokenizer.encode(text), theirs.tokenizer.encode(text))
