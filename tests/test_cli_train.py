"""`qjax train` and `qjax merge`: whole runs on a tiny model, what they write, and what they refuse."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qjax.checkpoints.companions import GENERATION
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.checkpoints.peft import load_adapter
from qjax.driver.decoder import quantize
from qjax.errors import QjaxError
from qjax.linear import is_quantized
from qjax.models.adapters import attach
from qjax.models.model import apply
from qjax.models.parameters import flatten
from qjax.models.rotation import rotate
from qjax.train import loop, run
from qjax.train.lora import LoraConfig
from qjax.train.merge import load_merge
from qjax.train.settings import QatConfig
from tests.conftest import MIXTRAL, byte_tokenizer, random_model, tiny_config
from tests.fuzz import seeds
from tests.random_weights import small_model, weights_model
from tests.test_cli import TEXT, fails, succeeds

pytest.importorskip("orbax.checkpoint")

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
SMALL = ("--steps", "4", "--window", "16", "--batch", "4", "--learning-rate", "0.01", "--save-every", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied tiny model, a text, and in `ad` what training adapters by the command gives."""
    folder = tmp_path_factory.mktemp("train")
    save_huggingface(folder / "tiny", random_model(tiny_config(tied=True, layers=1), byte_tokenizer()))
    (folder / "tiny" / GENERATION).write_text('{"temperature": 0.6}')
    (folder / "text.txt").write_text(TEXT)
    return folder


def has_companions(*folders):
    """Whether they have what the tiny model's folder has beside its weights."""
    return all((folder / GENERATION).read_text() == '{"temperature": 0.6}' for folder in folders)


def data(folder):
    return ("--data", f"text:{folder / 'text.txt'}")


@pytest.fixture(scope="module")
def adapter(folder):
    """Adapters and their base, trained in this process; killed once on the way."""
    model, config = load(folder / "tiny"), LoraConfig(rank=3)
    tokens = run.training_tokens(model, [run.Corpus("a", [TEXT])])
    settings = loop.TrainConfig(steps=4, batch=4, window=16, learning_rate=0.01)

    def kill(told):
        if told.step == 3:
            raise KeyboardInterrupt

    beside = {"beside": folder / "tiny"}
    asked = run.Run(folder / "ad", settings, save_every=1, on_step=kill, **beside)
    with pytest.raises(KeyboardInterrupt):
        run.qlora(asked, model, tokens, config, recipe="nf4-g16")
    assert not (folder / "ad").exists()
    run.qlora(run.Run(folder / "ad", settings, save_every=1, **beside), model, tokens, config, recipe="nf4-g16")
    return folder / "ad"


def test_a_killed_training_goes_on_from_the_command(adapter, folder, capsys):
    """To the same bits as one that was not killed, which the command line runs."""
    printed = succeeds(
        capsys,
        "train",
        "qlora",
        folder / "tiny",
        *data(folder),
        *SMALL,
        "--rank",
        "3",
        "--recipe",
        "nf4-g16",
        "--out",
        folder / "b",
    )
    assert "adapters of rank 3 for tiny (rtn:nf4-g16)" in printed
    assert has_companions(adapter / "base", folder / "b" / "base")
    first, second = (load_file(each / "adapter_model.safetensors") for each in (adapter, folder / "b"))
    assert first.keys() == second.keys() and len(first) == 14
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    rows = [json.loads(line) for line in (adapter / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    assert (adapter / "loss.png").stat().st_size > 1000 and not (folder / ".ad.training").exists()


@pytest.fixture(scope="module")
def adapted(adapter):
    base = load(adapter / "base")
    return attach(base, load_adapter(adapter, base.config))


def test_the_merged_folder_is_base_and_adapter(adapter, adapted, folder, capsys):
    out = folder / "merged"
    printed = succeeds(capsys, "merge", adapter / "base", adapter, "--out", out, "--dtype", "fp32", *data(folder))
    assert has_companions(out)
    losses = [line.split(": ")[-1] for line in printed.splitlines() if "nats a token" in line]
    assert len(losses) == 2 and losses[0] == losses[1]
    merged, before = load(out), flatten(load(folder / "tiny").params)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    expected = apply(adapted, TOKENS)
    assert float(jnp.abs(apply(merged, TOKENS) - expected).max()) <= 1e-5 * float(jnp.abs(expected).max())
    assert float(jnp.abs(apply(load(adapter / "base"), TOKENS) - expected).max()) > 1e-2
    for path, leaf in flatten(merged.params).items():
        assert leaf.dtype == np.float32 and np.array_equal(leaf, before[path]) != ("block" in path and "kernel" in path), path


def test_merging_into_the_float_model(adapter, folder, capsys):
    out = folder / "into_float"
    printed = succeeds(capsys, "merge", adapter / "base", adapter, "--base", folder / "tiny", "--out", out, *data(folder))
    told = [line for line in printed.splitlines() if "nats a token" in line]
    assert [line.split(" on ")[0] for line in told] == [
        "tiny (rtn:nf4-g16) with its adapter",
        "tiny (none) with the adapter",
        "merged",
    ]
    model = load(folder / "tiny")
    expected = flatten(attach(model, load_adapter(adapter, model.config)).params)["block_0/mlp/up/kernel"]
    found = flatten(load(out).params)["block_0/mlp/up/kernel"]
    product = expected.adapter.scaling * np.asarray(expected.adapter.a, np.float64) @ np.asarray(expected.adapter.b, np.float64)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected.weight, np.float64) + product, rtol=2**-8)


def test_a_base_that_a_start_made_is_kept(folder, tmp_path, monkeypatch):
    """Without it the adapter would be of no use; to another base it does not belong."""

    def no_training(base, adapters, tokens, config, *, on_step, **told):
        on_step(loop.Told(1, 1.0, 1.0, 0.1, 5.0, 0.0))
        return adapters

    monkeypatch.setattr(run, "train_adapters", no_training)
    model, settings = load(folder / "tiny"), loop.TrainConfig(steps=1, batch=1, window=8)
    run.qlora(run.Run(tmp_path / "ad", settings), model, TOKENS[0], LoraConfig(rank=2, start="pissa"))
    base, expected = load(tmp_path / "ad" / "base"), apply(model, TOKENS)
    adapted, _ = load_merge(base, tmp_path / "ad")
    assert float(jnp.abs(apply(adapted, TOKENS) - expected).max()) < 1e-4 * float(jnp.abs(expected).max())
    assert float(jnp.abs(apply(base, TOKENS) - expected).max()) > 1e-2
    with pytest.raises(QjaxError, match=r"began as pissa.*leave --base out"):
        load_merge(base, tmp_path / "ad", model)


def test_adapters_that_begin_by_calibration(folder, tmp_path, capsys):
    """--start qera reads a text whatever the recipe; the base is the recipe's own, and no other is merged into."""
    begin = ("train", "qlora", folder / "tiny", *data(folder), *SMALL, "--recipe", "int4-g16", "--rank", "2", "--start", "qera")
    assert "--start qera reads calibration data; name a text with --calibration" in fails(
        capsys, *begin, "--out", tmp_path / "a"
    )
    few = ("--calibration", f"text:{folder / 'text.txt'}", "--calibration-windows", "4", "--calibration-window", "16")
    succeeds(capsys, *begin, *few, "--out", tmp_path / "a")
    assert load(tmp_path / "a/base").recipe == "rtn:int4-g16"
    merging = ("merge", tmp_path / "a/base", tmp_path / "a", "--out", tmp_path / "plain")
    assert "began as qera" in fails(capsys, *merging, "--base", folder / "tiny")
    succeeds(capsys, *merging)


def test_an_adapter_stays_behind_its_transform(adapter, folder, tmp_path, capsys):
    """Scales that went into norms divide what the adapter was given."""
    model = load(folder / "tiny")
    for recipe in ("smoothquant+rtn:int8-g16@parallel", "awq:int8-g16@parallel"):
        base, _ = quantize(model, recipe, calibration=np.tile(TOKENS, (4, 1)))
        with pytest.raises(QjaxError, match=f"differs from .* by {recipe.partition('+')[0].partition(':')[0]}, which may"):
            load_merge(base, bare(adapter, tmp_path / recipe[:3]), model)
        told = base._replace(recipe="a file of another library")
        with pytest.raises(QjaxError, match=r"differs from .* by block_0/.*norm/scale, which may"):
            load_merge(told, bare(adapter, tmp_path / f"{recipe[:3]}2"), model)


def bare(adapter, folder):
    """A copy of an adapter that does not say what it was trained on."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    return folder


def test_what_is_trained_on_is_not_written_over(adapter, folder, capsys):
    begin = ("train", "qlora", adapter / "base", *data(folder), *SMALL, "--rank", "2", "--out", adapter, "--overwrite")
    assert "is what is read" in fails(capsys, *begin)
    assert load(adapter / "base").recipe


def test_another_calibration_is_another_run(folder, tmp_path):
    """Of a start that it is part of."""
    model, tokens = load(folder / "tiny"), run.training_tokens(load(folder / "tiny"), [run.Corpus("a", [TEXT])])

    def stop(told):
        raise KeyboardInterrupt

    def go(seed, on_step):
        asked = run.Run(tmp_path / "ad", loop.TrainConfig(steps=2, batch=4, window=16), save_every=1, on_step=on_step)
        calibration = np.random.default_rng(seed).integers(0, 256, (4, 24)).astype(np.int32)
        run.qlora(asked, model, tokens, LoraConfig(2, start="qera"), recipe="int4-g16", options={"calibration": calibration})

    with pytest.raises(KeyboardInterrupt):
        go(0, stop)
    with pytest.raises(QjaxError, match=r"another run \(calibration differ"):
        go(1, stop)
    go(0, lambda told: None)


def test_experts_are_refused_before_work(folder, tmp_path):
    model = small_model(tiny_config(**MIXTRAL, layers=1), byte_tokenizer())
    tokens = run.training_tokens(model, [run.Corpus("a", [TEXT])])
    asked = run.Run(tmp_path / "q", loop.TrainConfig(steps=1, batch=4, window=16))
    with pytest.raises(QjaxError, match=r"hold experts, which are not trained.*'mlp/\(gate"):
        run.qat(asked, model, tokens, QatConfig(), recipe="int4-g16")
    assert not list(tmp_path.iterdir())


def test_an_adapter_stays_in_its_residual_stream(adapter, folder):
    model = load(folder / "tiny")
    assert load_merge(load(adapter / "base"), adapter, model)[1].name == "tiny"
    with pytest.raises(QjaxError, match="the embeddings of tiny are others"):
        load_merge(load(adapter / "base"), adapter, rotate(model))


def test_another_teacher_is_another_run(folder, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(run, "train_quantized", lambda *_, identity, **__: told.append(identity) or 1 / 0)
    model, settings = load(folder / "tiny"), loop.TrainConfig(steps=1, batch=1, window=8)
    rounded = quantize(model, "rtn:int3-g16")[0]
    for original in (model, random_model(model.config, byte_tokenizer(), seed=1)):
        with pytest.raises(ZeroDivisionError):
            run.qat(run.Run(tmp_path / "a", settings), rounded, TOKENS[0], run.QatConfig(loss="kl"), original=original)
    assert told[0]["base"] == told[1]["base"] and told[0]["float"] != told[1]["float"]
    with pytest.raises(QjaxError, match="the float model is this one itself"):
        run.qat(run.Run(tmp_path / "a", settings), rounded, TOKENS[0], run.QatConfig(loss="kl"), original=rounded)
    with pytest.raises(QjaxError, match="the loss kl is from the model before"):
        run.qat(run.Run(tmp_path / "a", settings), rounded, TOKENS[0], run.QatConfig(loss="kl"))


def test_requantizing_is_asked_for_and_told(adapter, folder, capsys):
    printed = succeeds(capsys, "merge", adapter / "base", adapter, "--requantize", "rtn:int8-g16", "--out", folder / "again")
    assert "in rtn:int8-g16" in printed and has_companions(folder / "again")
    assert sum(map(is_quantized, flatten(load(folder / "again").params).values())) == 7


def test_quantization_aware_training(folder, capsys):
    """From a folder that is quantized, by divergence from the model it was; the result runs as any other."""
    model = load(folder / "tiny")
    save(folder / "int3", quantize(model, "rtn:int3-g16")[0], beside=folder / "tiny")
    more = (
        "--float",
        folder / "tiny",
        "--loss",
        "kl",
        "--learn",
        "weights,scales",
        "--learning-rate",
        "0.001",
        "--out",
        folder / "qat",
    )
    printed = succeeds(capsys, "train", "qat", folder / "int3", *data(folder), *SMALL, *more)
    assert "rtn:int3-g16, trained" in printed and has_companions(folder / "qat")
    rows = [json.loads(line) for line in (folder / "qat" / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    before, after = (flatten(load(folder / name).params)["block_0/mlp/up/kernel"] for name in ("int3", "qat"))
    assert after.format == before.format and not np.array_equal(before.codes, after.codes)
    np.testing.assert_array_equal(before.zeros, after.zeros)


def test_what_is_refused(adapter, folder, tmp_path, capsys):
    base, tiny = adapter / "base", folder / "tiny"
    assert "was trained on tiny (rtn:nf4-g16), not on tiny (none)" in fails(
        capsys, "merge", tiny, adapter, "--out", tmp_path / "a"
    )
    other = tmp_path / "other"
    save_huggingface(other, random_model(tiny_config(mlp_size=56, layers=1), byte_tokenizer()))
    into = ("--base", other, "--out", tmp_path / "a")
    assert "the adapter does not fit other: block_0/mlp" in fails(capsys, "merge", base, adapter, *into)
    assert "has no adapter_config.json" in fails(capsys, "merge", base, base, "--out", tmp_path / "a")
    assert "--dtype 'int8'" in fails(capsys, "merge", base, adapter, "--dtype", "int8", "--out", tmp_path / "a")
    train = ("train", "qlora", tiny, *data(folder), "--out", tmp_path / "a")
    short = tmp_path / "short.txt"
    short.write_text("short")
    said = fails(capsys, "train", "qlora", tiny, "--data", f"text:{short}", "--out", tmp_path / "a")
    assert "training text: got 5 tokens, expected at least a window + 1 = 33" in said
    assert "'q_projection' names no kernel" in fails(capsys, *train, "--target", "q_projection")
    assert "give a recipe" in fails(capsys, *train, "--rule", "mlp=int4-g16")
    assert "needs a recipe" in fails(capsys, "train", "qat", tiny, *data(folder), "--out", tmp_path / "a")
    assert "is what is read" in fails(capsys, "merge", base, adapter, "--out", adapter, "--overwrite")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / ".a.training").exists()  # nothing was begun
    with pytest.raises(QjaxError, match="has no tokenizer"):
        run.training_tokens(random_model(tiny_config()), [run.Corpus("a", ["b"])])


def test_a_base_is_known_between_two_renamings(tmp_path):
    """What a killed run put aside says too what it was trained on."""
    folder = tmp_path / ".ad.qjax-old"
    folder.mkdir()
    for name, content in seeds.adapter("llama").items():
        (folder / name).write_bytes(content)
    base = seeds.adapted("llama")
    assert load_merge(base, tmp_path / "ad")[0].config == base.config
    with pytest.raises(QjaxError, match=r"ad\.qjax-old was trained on random"):
        load_merge(weights_model(base.config, seed=1), tmp_path / "ad")


def test_an_adapter_that_names_another_base(adapter, folder, tmp_path):
    """As PEFT does, which does not say more of it."""
    copy, base = bare(adapter, tmp_path / "copy"), load(folder / "tiny")
    settings = json.loads((copy / "adapter_config.json").read_text())
    cases = [("tiny", "someone/other", True), ("tiny", "someone/TINY", False), ("tiny", None, False)]
    cases += [
        ("me/tiny", "tiny", False),
        ("tiny.Q4_K_M", "tiny", False),
        ("tiny-bf16", "tiny", False),
        ("tiny-chat", "tiny", True),
    ]
    for name, named, warned in cases:
        (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": named}))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            load_merge(base._replace(name=name), copy)
        said = (
            f"{copy} names {named and named.split('/')[-1]} as its base, and is put on {name}; make sure that it is that model"
        )
        assert [str(each.message) for each in found] == [said] * warned
