"""The experiments: tiny twins run and write what they say, full ones ask for what exists.

Twins run in this process, where they share compiled programs, on the bundled model's first block; one runs from a shell on the
whole model, as a user would.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax.driver.decoder import kernel_shapes
from qjax.driver.placement import place
from qjax.models.walk import TABLE
from qjax.report.plan import STAGES, TERMS, llama_shapes, read_constants
from qjax.sweep.cells import canonical
from qjax.sweep.store import ROWS, read_rows
from tests.conftest import first_block, tiny_config
from tests.dictionary import CELLS, undescribed
from tests.gguf_files import file_bytes, model_tensors, model_values, random_rows
from tests.paths import REPOSITORY, real_data
from tests.random_weights import weights_model

SCRIPTS = REPOSITORY / "experiments"
SUFFIXES = {  # experiment -> tables that it is about; "": of perplexity
    "quickstart": {""},
    "accuracy": {"accuracy", "divergence"},
    "tradeoff": {"accuracy", "tradeoff", "memory"},
    "order": {"seeds"},
    "formats_at_4_bits": {"divergence"},
    "sensitivity": {"sensitivity"},
    "calibration": {"seeds"},
    "composition": {"seeds"},
    "paper_shapes": {"paper_shapes", "accuracy"},
    "bitwidth_sweep": {"widths"},
    "real_models": {"accuracy", "divergence"},
    "real_models_calibration": {"divergence"},
    "activations": {"", "inputs"},
    "compute_types": {"", "compute_types"},
    "embeddings": {"", "sensitivity"},
}
ELSEWHERE = ("formats_at_4_bits", "order")  # have tests of their own
DEAR = (
    "bitwidth_sweep",
    "calibration",
    "composition",
    "tradeoff",
    "activations",
    "real_models",
    "real_models_calibration",
    "compute_types",
    "embeddings",
)  # many cells of what the others do too
TWINS = [pytest.param(name, marks=[pytest.mark.slow] if name in DEAR else []) for name in SUFFIXES if name not in ELSEWHERE]
FEWEST = {
    "real_models": 6,
    "real_models_calibration": 6,
    "activations": 32,
    "compute_types": 32,
}  # windows, of 512 tokens, and of models each


@pytest.fixture
def load(monkeypatch):
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture(scope="module")
def block(tmp_path_factory) -> str:
    """A model of one block of the bundled model's sizes, by its folder's name."""
    return str(first_block(tmp_path_factory.mktemp("models") / "block"))


def twin(script, out: Path, model: str) -> list[dict[str, object]]:
    """Runs a script's tiny twin on a model instead of the bundled one; its rows."""
    (bundled,) = script.common.BUNDLED
    return script.run(out, tiny=True, subjects=(dataclasses.replace(bundled, model=model),))


def run(script: str, *options: str | Path) -> str:
    """Runs experiments/<script> with the qjax under test; its output. Fails with its stderr."""
    environment = os.environ | {"PYTHONPATH": str(Path(qjax.__file__).parents[1])}
    command = [sys.executable, SCRIPTS / script, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_shell(tmp_path):
    said = run("all.py", "formats_at_4_bits", "--tiny", "--out", tmp_path)
    rows = read_rows(tmp_path / "formats_at_4_bits" / ROWS)
    assert [row["recipe"] for row in rows][:2] == ["none", "rtn:nf4-g64"]
    assert "formats_at_4_bits: " in said and ", 0 failed" in said
    log = (tmp_path / "all.log").read_text("utf-8").splitlines()
    assert rows[0]["code"] in log[0] and log[1:] == [
        line for line in said.splitlines() if re.match(r"formats_at_4_bits: |all: ", line)
    ]


@pytest.mark.parametrize("name", TWINS)
def test_tiny_twin(load, block, name, tmp_path):
    model = "bundled" if name == "sensitivity" else block  # the block alone is no worse for 3 bits: there is no cost to draw
    rows = twin(load(name), tmp_path, model)
    assert len(rows) >= 2 and rows == read_rows(tmp_path / ROWS)
    assert {re.sub(r"^.*-windows-\d+-?(cloze-4-\w+-?)?", "", path.stem) for path in tmp_path.glob("*.md")} >= SUFFIXES[name]
    assert list(tmp_path.glob("*.png"))


def test_the_committed_table_of_compute_types_is_that_of_the_rows(load):
    script, folder = load("compute_types"), REPOSITORY / "results" / "compute_types"
    assert (folder / script.TABLE).read_text() == script.table(read_rows(folder / ROWS))


def test_compute_types_are_paired_by_recipe(load):
    """What bfloat16 costs every recipe alike moves no change; what it costs one alone does."""
    script = load("compute_types")
    losses = {("none", "float32"): 0.0, ("none", "bfloat16"): 0.1, ("rtn", "float32"): 1.0, ("rtn", "bfloat16"): 1.3}
    wave = np.sin(np.arange(12))
    common = {"fingerprint": "m", "corpus_fingerprint": "c", "window_tokens": [2] * 12, "window_documents": list(range(12))}
    rows = [
        common | {"recipe": recipe, "compute_dtype": name, "window_nll": list(2 * (wave + loss))}
        for (recipe, name), loss in losses.items()
    ]
    none, rtn = script.pairs(rows)
    found = [each.value for pair in (none, rtn) for each in (pair.change, pair.cost, pair.moved)]
    np.testing.assert_allclose(found, [0, 0.1, 0, 1.0, 0.3, 0.2], atol=1e-12)
    assert script.pairs(rows[:1]) == []


def test_types_of_calibration_are_paired_by_recipe(load):
    script = load("compute_types")
    losses = {("none", None): 0.0, ("gptq", None): 1.0, ("gptq", "bfloat16"): 1.25, ("awq", None): 2.0}
    units = {"window_tokens": [2] * 12, "window_documents": list(range(12)), "compute_dtype": "float32"}
    rows = [
        units
        | {"fingerprint": "m", "corpus_fingerprint": "c", "recipe": recipe, "calibration_compute": name}
        | {"window_nll": list(2 * (np.sin(np.arange(12)) + loss))}
        for (recipe, name), loss in losses.items()
    ]
    (pair,) = script.calibrated_pairs(rows)
    np.testing.assert_allclose([pair.change.value, pair.cost.value], [1.0, 0.25], atol=1e-12)
    assert script.pairs(rows) == []


def test_order_draws_a_calibration_for_every_seed(load, block, tmp_path):
    rows = twin(load("order"), tmp_path, block)
    drawn = [row for row in rows if row["order"]]
    assert [(row["seed"], row["order"]) for row in drawn] == [(0, "parallel"), (1, "parallel")]
    assert len({row["calibration_fingerprint"] for row in drawn}) == 2
    assert [row["seed"] for row in rows if row["recipe"].startswith("rtn")] == [0]  # it draws nothing
    (table,) = tmp_path.glob("*-seeds.md")
    assert "gptq(clip=mse):int3-g128@parallel" in table.read_text()
    assert twin(load("order"), tmp_path, block) == rows  # nothing is measured twice


@pytest.mark.slow
def test_training_twin(load, block, tmp_path):
    """Every treatment is measured, once; the text to fine-tune on is looked for in the data folder."""
    pytest.importorskip("orbax.checkpoint")
    script, data = load("training"), tmp_path / "data"
    (data / "text").mkdir(parents=True)
    (data / "text" / "tinyshakespeare.txt").write_text("To be, or not to be.\n\n" * 300)
    (bundled,) = script.common.BUNDLED
    subject = dataclasses.replace(bundled, model=block, data=data)
    rows = script.run(tmp_path / "out", tiny=True, subjects=(subject,))
    treatments = ["none", "rounded", "trained as quantized", "trained adapters", "none", "LoRA", "QLoRA"]
    assert [row["treatment"] for row in rows] == treatments and undescribed(rows, CELLS) == []
    assert (tmp_path / "out" / "training.md").exists()
    assert script.run(tmp_path / "out", tiny=True, subjects=(subject,)) == rows


@functools.cache
def texts_of(spec: str, split: str) -> frozenset[str]:
    """The documents of a text that has parts, else its name."""
    return frozenset(qjax.load_corpus(spec, split).documents) if spec == "python-docs" else frozenset([Path(spec).name])


@pytest.mark.parametrize("name", SUFFIXES)
def test_full_experiment_asks_for_what_exists(load, name, tmp_path, monkeypatch):
    """Recipes and rules of the full experiment parse, and none is calibrated on what is measured."""
    script, common, asked = load(name), load("common"), []
    kernels = [f"block_0/{path}/kernel" for path in (*(f"attention/{p}" for p in "qkvo"), "mlp/gate", "mlp/up", "mlp/down")]
    kernels.append(TABLE)  # which a rule may name

    def measure(out, subject, recipes, settings, *, calibration=None, rules=(), one_block=False):
        asked.extend(canonical(recipes))
        place(kernels, None, map(qjax.parse_rule, rules))
        assert settings.calibration_windows > 1 and (settings.max_windows or 128) >= FEWEST.get(name, 128)
        for text in subject.corpora:
            assert not texts_of(text, "test") & texts_of(calibration or subject.calibration, "calibration")

    monkeypatch.setattr(common, "texts", lambda specs, data: [spec.format(data=data) for spec in specs])
    monkeypatch.setattr(common, "measure", measure)
    monkeypatch.setattr(common, "report", lambda out: [])
    monkeypatch.setattr(common, "with_outliers", lambda subject, *how: subject)
    monkeypatch.setattr(common, "look_at_inputs", lambda *given: None)
    script.run(tmp_path, subjects=(common.SUBJECTS["bundled"],))
    assert len(asked) >= (4 if name == "real_models_calibration" else 8)
    assert f"results/{name}/" in inspect.getdoc(script)
    assert load("all").EXPERIMENTS.count(name) == 1


def test_no_subject_is_calibrated_on_what_it_measures(load):
    common = load("common")
    for subject in common.SUBJECTS.values():
        for text in subject.corpora:
            halved = text == subject.calibration and text.startswith(common.HALF)
            assert halved or not texts_of(text, "test") & texts_of(subject.calibration, "calibration")


def test_kinds_of_layers_that_a_model_lacks_are_left_out(load, tmp_path, monkeypatch):
    script, common, rules = load("sensitivity"), load("common"), []
    monkeypatch.setattr(common, "kernels", lambda subject: ["block_0/attention/q/kernel", "block_0/mlp/up/kernel"])
    monkeypatch.setattr(common, "measure", lambda *given, **named: rules.extend(named.get("rules", ())))
    monkeypatch.setattr(common, "report", lambda out: [])
    script.run(tmp_path)
    assert {rule.partition("=")[0] for rule in rules} == {"attention/q/", "mlp/up/"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "babyllama", "--data-folder", "nowhere"], "no model to measure is there"),
        (["--model", "no/such/folder/"], "order: .*no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(load, tmp_path, monkeypatch, capsys, options, named):
    common = load("common")
    monkeypatch.setattr(sys, "argv", ["order.py", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stopped:
        common.main("", "order", load("order").run)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and re.search(named, said)


def test_all_names_unknown_experiments(load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["all.py", "ordr"])
    with pytest.raises(SystemExit) as stopped:
        load("all").main()
    assert stopped.value.code == 2 and "unknown experiments ordr; there are small, order" in capsys.readouterr().err


def test_a_row_of_another_kind_is_added_once(load, tmp_path):
    for _ in range(2):
        load("common").add_row(tmp_path, {"key": "a", "kind": "memory"})
    assert len(read_rows(tmp_path / ROWS)) == 1


def test_missing_data_is_left_out_and_said(load, tmp_path, capsys):
    common = load("common")
    found = common.locate(common.LOCAL, tmp_path)
    assert [(each.model, each.corpora) for each in found] == [("bundled", ("python-docs",))]
    assert capsys.readouterr().out.count("left out") == 2  # two models
    assert common.locate(common.REAL, tmp_path, tmp_path / "models") == []
    said = capsys.readouterr().out
    assert said.count("--model-folder names a folder that has it") == 2 and f"{tmp_path}/models/gemma-3" in said


def test_real_models_take_groups_that_divide_their_layers(load):
    """Of 64 at 2 bits; the beginning of text stands before the windows of a model that cannot do without."""
    script, common = load("real_models"), load("common")
    full, by_name = script.Experiment(), {name: common.SUBJECTS[name] for name in common.REAL}
    for name, width in (("smollm2", 576), ("gemma3-270m", 640)):
        formats = {qjax.parse_recipe(each).format for each in full.recipes(by_name[name])[:-1]}
        assert all(width % fmt.group == 0 for fmt in formats)
        assert {fmt.group for fmt in formats if fmt.bits == 2} == {64}
        assert len(formats) == 4
    assert [subject.bos for subject in by_name.values()] == [False, True]


def test_a_gguf_file_is_measured_as_the_values_it_stands_for(load, tmp_path, monkeypatch):
    """From a folder that is written once, in float32, and can be quantized."""
    common = load("common")
    monkeypatch.setattr(common, "PLAIN", tmp_path / "plain")
    made = weights_model(tiny_config(vocabulary_size=64, hidden_size=64, mlp_size=96, heads=4, head_dim=16, layers=1))
    tensors = model_tensors(made)
    shape = tensors["blk.0.ffn_up.weight"][1]
    tensors["blk.0.ffn_up.weight"] = ("Q8_0", shape, random_rows("Q8_0", *shape).tobytes())
    file = tmp_path / "small.Q8_0.gguf"
    file.write_bytes(file_bytes(model_values(made), tensors))
    for _ in range(2):
        model = common.load_model.__wrapped__(str(file))
        assert (model.name, model.recipe) == ("small.Q8_0", "none")
        held = model.params["block_0"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(held, qjax.dequantize(qjax.load(file).params["block_0"]["mlp"]["up"]["kernel"]))


def test_a_text_is_halved_into_what_is_measured_and_what_is_calibrated_on(load, tmp_path, monkeypatch):
    common = load("common")
    monkeypatch.setattr(common, "HALVES", tmp_path / "halves")
    story = tmp_path / "text" / "tinystories_val.txt"
    story.parent.mkdir()
    (tmp_path / "models" / "babyllama-hf").mkdir(parents=True)
    story.write_text("\n\n".join(f"Story {i} of a hen." for i in range(9)))
    (subject,) = common.locate(["babyllama"], tmp_path)
    measured, calibrated = (qjax.load_corpus(spec).documents[0] for spec in (*subject.corpora, subject.calibration))
    assert measured + "\n\n" + calibrated == story.read_text()
    assert 0.4 < len(measured) / len(story.read_text()) < 0.7


@pytest.mark.slow
def test_paper_shapes_on_a_real_model(load, tmp_path):
    common = load("common")
    (subject,) = common.locate(["stories260K"], real_data("."))
    rows = load("paper_shapes").run(tmp_path, tiny=True, subjects=(subject,))
    assert {row["model"] for row in rows if "kind" not in row} == {"stories260K-hf"}


@pytest.mark.slow
def test_profile_of_evaluation(load, capsys):
    """Every product with a weight has its line, and the operations' seconds their sum."""
    script = load("profile_evaluation")
    script.main({"tiny": (tiny_config(tied=True), 2)}, repeats=1)
    out = capsys.readouterr().out
    for layer in ("q", "k", "v", "o", "gate", "up", "down"):
        assert re.search(rf"\d s  .*/{layer}/dot_general", out), layer
    assert len(re.findall(r"all; products with weights alone \d", out)) == 2


def test_kernel_benchmark(load, tmp_path):
    script = load("kernel_benchmark")
    script.run(script.TINY, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    measured = {(row["format"], row["implementation"], row["rows"]) for row in rows}
    assert {("dense", "dense", 1), ("int4-g128", "reference", 16), ("nf4-g64", "xla", 1)} <= measured
    assert all(row["seconds"] > 0 and row["bandwidth_fraction"] > 0 for row in rows)
    assert undescribed(rows, f"Columns of `{ROWS}`") == []
    assert "| int4-g128" in (tmp_path / "kernels.md").read_text()


def test_kernels_are_measured_again_with_other_code_or_versions(load, tmp_path, monkeypatch):
    script = load("kernel_benchmark")
    made = {"device": "cpu", "code": "a", "versions": "1"}
    row = {
        "format": "dense",
        "implementation": "dense",
        "dtype": "float32",
        "seconds": 1.0,
        "speedup": 1.0,
        "bytes_per_second": 1.0,
    }
    monkeypatch.setattr(script, "measure", lambda *_: [row])
    for changes, count in (({}, 2), ({}, 2), ({"code": "b"}, 4), ({"versions": "2"}, 6)):
        monkeypatch.setattr(script, "provenance", lambda found=made | changes: found)
        assert len(script.run(script.TINY, tmp_path)) == count


@pytest.mark.slow
def test_train_bundled_model(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    run("train_bundled_model.py", "--tiny", "--steps", "20", "--run", tmp_path / "run", "--out", tmp_path / "model")
    model = qjax.load(tmp_path / "model")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [10, 20]
    assert log[1]["loss"] < log[0]["loss"] and log[1]["convention"] == "windows-64"
    measured = qjax.perplexity(model, "python-docs", "windows-64", max_windows=64)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{measured.tokens:,} tokens and their {measured.nbytes:,} bytes scored) | {measured.bits_per_byte:.4f} |" in card


def test_packed_decoding_of_a_random_model_is_measured_once(load, tmp_path):
    script, out = load("packed_decode"), tmp_path / "decode.jsonl"
    lines = script.run(out, tiny=True)
    assert [(line["format"], line["batch"]) for line in lines] == [("none", 1), ("int4-g128", 1)]
    assert lines[0]["running_bytes"] > 1.2 * lines[1]["running_bytes"] and all(line["new_tokens"] == 4 for line in lines)
    assert script.run(out, tiny=True) == lines == [json.loads(line) for line in out.read_text().splitlines()]


def test_the_script_for_a_gpu_keeps_within_nine_minutes_and_names_what_exists():
    text = (SCRIPTS / "on_gpu.sh").read_text()
    assert subprocess.run(["bash", "-n", SCRIPTS / "on_gpu.sh"], check=False).returncode == 0
    full = text.rpartition("\nfi\n")[2]
    limits = [int(seconds) for seconds in re.findall(r"^stage \w+ (\d+) ", full, re.MULTILINE)]
    of_blocks = int(re.search(r'stage "blocks, \$1 rows" (\d+)', text)[1]) * len(re.search(r"in ([\d ]+);", full)[1].split())
    assert len(limits) == 4 and sum(limits) + of_blocks <= 540
    named = set(re.findall(r"(?:experiments|tests)/\w+\.py", text))
    assert len(named) >= 4 and all((REPOSITORY / path).exists() for path in named)


def test_speeds_are_paired_and_measured_once(load, tmp_path, monkeypatch):
    script = load("speed")
    monkeypatch.setattr(script, "there", lambda packages: False)
    rows = script.run(tmp_path, tiny=True)
    tasks = ("int4-g128 product, 1 rows", "int4-g128 product of bfloat16, 1 rows", "W8A8 product, 1 rows")
    pairs = [(n, task, peer) for n in (0, 1) for task in tasks for peer in ("dense float32", "dense bfloat16")]
    assert [(row["round"], row["task"], row["peer"]) for row in rows if row["model"] == "256 x 128"] == pairs
    assert len(rows) == len(pairs)
    assert all(row["ratio"] == row["peer_seconds"] / row["seconds"] for row in rows)
    assert undescribed(rows, CELLS) == []
    assert re.search(r"\| int4-g128 product, 1 rows +\| dense float32 +\|", (tmp_path / "speed.md").read_text())
    assert script.run(tmp_path, tiny=True) == rows

    called = []
    ours, theirs = {"a": lambda: called.append("a")}, {"b": lambda: called.append("b") or 3.0}
    script.take_turns(tmp_path, 3, "made up", ours, theirs, warm=False)
    assert called == ["a", "a", "b", "b", "a", "a", "b"]
    found = [row for row in read_rows(tmp_path / ROWS) if row["model"] == "made up"]
    assert [row["peer_seconds"] for row in found] == [3.0] * 3  # as it measured itself


def test_every_script_can_be_loaded(load):
    """Those too whose own tests are slow."""
    for script in sorted(SCRIPTS.glob("*.py")):
        assert load(script.stem).__doc__, script


@pytest.mark.slow
def test_a_profile_of_calibration_names_its_programs():
    """From a shell: programs can be waited for only where JAX has not begun."""
    shape = {"hidden": 64, "mlp": 96, "layers": 1, "head-dim": 16, "vocabulary": 64, "windows": 2, "window": 32}
    sizes = [f"--{name}={value}" for name, value in shape.items()]
    ratio = run("profile_calibration.py", "--traced", "1", *sizes, "gptq:int4-g32@qep")
    assert re.fullmatch(r"gptq:int4-g32@qep: traced, [\d.]+ \([\d.]+ to [\d.]+\) times the driver's time\n", ratio)
    told = run("profile_calibration.py", "--programs", *sizes, "gptq:int4-g32@parallel")
    (compiled,) = re.findall(r"(\d+) programs compiled in", told)
    assert 10 < int(compiled) < 50
    runs = {name: int(number) for number, name in re.findall(r" s +(\d+)  (\w+)$", told, re.MULTILINE)}
    assert runs["factorize"] == 4 and runs["_round_static"] == 7 and "capture" in runs


def test_points_of_scaling_differ_along_one_axis(load):
    script = load("scaling")
    found = script.cases(1e8)
    assert [work for work, sizes in found if sizes == script.MIDDLE] == ["load", "perplexity", "rtn", "gptq", "awq"]
    assert max(sizes.parameters for _, sizes in found) <= 1e8 < script.cases(1e9)[-1][1].parameters <= 1e9
    middle = dataclasses.asdict(script.MIDDLE)
    moved = [(work, {axis for axis in middle if dataclasses.asdict(sizes)[axis] != middle[axis]}) for work, sizes in found]
    assert all(len(axes) <= 1 for _, axes in moved)
    assert ("perplexity", {"vocabulary"}) in moved and ("rtn", {"tokens"}) not in moved


def test_plans_count_the_models_that_scaling_measures(load):
    """The shapes that constants are fitted to are those of the models; every piece of work has terms."""
    script = load("scaling")
    sizes = script.Sizes(width=128, depth=2, vocabulary=256)
    shapes, others = kernel_shapes(load("random_models").random_model(sizes.config, "x"))
    assert sorted(shapes) == sorted(llama_shapes(128, 2))
    assert sizes.parameters == sum(a * b for a, b in shapes) + sum(count for count, _ in others)
    assert set(script.VARIED) == set(STAGES) == set(TERMS["seconds"]) == set(TERMS["peak_bytes"])


def test_scaling_takes_up_where_it_was(load, tmp_path, monkeypatch, capsys):
    """A point is measured once, its model saved before it by another process; without time none is begun."""
    script, asked, written = load("scaling"), [], []
    monkeypatch.setattr(script, "write_reports", lambda folder, rows: written.append((folder, len(rows))))

    def child(work, sizes, folder, seconds):
        assert 600 < seconds <= 720
        asked.append((work, sizes.width))
        if work == "save":
            folder.mkdir()
            return {}
        return {"seconds": sizes.width / 1e3, "peak_bytes": 10**9} if work != "gptq" or len(asked) > 8 else None

    monkeypatch.setattr(script, "child", child)
    script.run(tmp_path, tiny=True)
    each = ("save", "load", "perplexity", "gptq")
    assert asked == [(work, width) for width in (64, 128) for work in each]
    assert len(script.run(tmp_path, tiny=True)) == 6 and asked[8:] == [(w, n) for n in (64, 128) for w in ("save", "gptq")]
    assert written == [(tmp_path, 4), (tmp_path, 6)]
    rows = script.run(tmp_path, tiny=True, minutes=0)
    assert len(rows) == 6 and len(asked) == 12
    other = {**rows[0], "code": "other"}
    (tmp_path / ROWS).write_text(json.dumps(other) + "\n")
    assert script.run(tmp_path, tiny=True, minutes=0) == [other] and "6 points are left" in capsys.readouterr().out


@pytest.mark.slow
def test_scaling_twin(tmp_path):
    run("scaling.py", "--tiny", "--out", tmp_path)
    rows = read_rows(tmp_path / ROWS)
    works = ("load", "perplexity", "gptq")
    assert [(row["work"], row["width"]) for row in rows] == [(work, width) for width in (64, 128) for work in works]
    assert undescribed(rows, CELLS) == [] and all(row["peak_bytes"] > 2**26 for row in rows)
    assert re.search(r"\| gptq +\| width +\| +64 \| +128 \| +2 \|", (tmp_path / "scaling.md").read_text())
    assert set(read_constants(tmp_path / "constants.json")["seconds"]) == set(works)
