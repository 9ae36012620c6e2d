"""The command line: what a person sees, and that every mistake is one line and exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax.checkpoints.huggingface import save_huggingface
from qjax.cli import app as cli
from qjax.driver.decoder import kernel_shapes
from qjax.errors import LONGEST
from qjax.report.plan import duration
from qjax.sweep.store import ROWS, read_rows

from .conftest import byte_tokenizer, random_model, tiny_config

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Hugging Face folder and a text beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_huggingface(folder / "tiny", random_model(tiny_config(), byte_tokenizer()))
    (folder / "text.txt").write_text(TEXT)
    return folder


def fails(capsys, *arguments) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    *before, last = captured.err.splitlines()
    assert last.startswith("error: ") and len(last) <= LONGEST
    # Before the error there may be lines of finished cells, nothing else.
    assert all(" bits " in line for line in before if line), captured.err
    return last


def succeeds(capsys, *arguments) -> str:
    """What a successful command prints to stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code in (0, None), captured.err
    return captured.out


def sweep_arguments(checkpoint, out, *more):
    data = ["--data", f"text:{checkpoint / 'text.txt'}"]
    return ["sweep", checkpoint / "tiny", *data, "--out", out, *more]


def test_sweep_prints_a_table_and_writes_rows_tables_and_figures(checkpoint, tmp_path, capsys):
    printed = succeeds(capsys, *sweep_arguments(checkpoint, tmp_path, "--recipes", "rtn:int8-channel,nf4"))
    assert "rtn:int8-channel" in printed
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["recipe"] for row in rows] == ["none", "rtn:int8-channel", "rtn:nf4-g64"]
    assert {path.suffix for path in tmp_path.iterdir()} >= {".jsonl", ".md", ".tex", ".csv", ".png", ".pdf"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    succeeds(capsys, "report", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before  # from rows alone, the same bytes


def test_methods_bits_and_group(checkpoint, tmp_path, capsys):
    succeeds(capsys, *sweep_arguments(checkpoint, tmp_path, "--methods", "rtn,nf4", "--bits", "4,2", "--group", "16"))
    rows = [json.loads(line)["recipe"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == ["none", "rtn:int4-g16", "rtn:int2-g16", "rtn:nf4-g16"]


def test_quantize_then_eval_equals_the_sweep(checkpoint, tmp_path, capsys):
    data = ["--data", f"text:{checkpoint / 'text.txt'}"]
    printed = succeeds(capsys, "quantize", checkpoint / "tiny", "--recipe", "rtn:int3-g16", "--out", tmp_path / "q", "--report")
    assert "block_1/mlp/down" in printed.replace("\n", "")
    succeeds(capsys, *sweep_arguments(checkpoint, tmp_path / "sweep", "--recipes", "rtn:int3-g16"))
    row = json.loads((tmp_path / "sweep" / "rows.jsonl").read_text().splitlines()[1])
    for packed in ([], ["--packed"]):
        printed = succeeds(capsys, "eval", tmp_path / "q", *data, *packed)
        assert f"perplexity {row['perplexity']:.4f}" in printed
    assert "not empty" in fails(capsys, "quantize", checkpoint / "tiny", "--recipe", "nf4", "--out", tmp_path / "q")


def test_an_output_that_is_the_input(checkpoint, capsys):
    """Also by another path, and before anything is computed."""
    before = sorted(path.stat().st_mtime_ns for path in (checkpoint / "tiny").iterdir())
    for same in (checkpoint / "tiny", checkpoint / "tiny" / ".." / "tiny"):
        arguments = ("quantize", checkpoint / "tiny", "--recipe", "nf4", "--overwrite", "--out", same)
        assert "is what is read" in fails(capsys, *arguments)
    assert "is what is read" in fails(capsys, *sweep_arguments(checkpoint, checkpoint / "tiny"))
    assert sorted(path.stat().st_mtime_ns for path in (checkpoint / "tiny").iterdir()) == before


def test_home_is_known_behind_an_equals_sign(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "rows.jsonl").write_text("")
    for arguments in (["report", "~/old"], ["compare", "~/old", "~/old"], ["rerun", "~/old", "--row", "a"]):
        assert f"{tmp_path}/old/rows.jsonl holds no rows" in fails(capsys, *arguments)
    assert f"{tmp_path}/old holds the results" in fails(capsys, "quantize", "m", "--recipe", "nf4", "--out=~/old")


def test_information(checkpoint, capsys):
    assert "6.74" in succeeds(capsys, "info", "--parameters", "6.738e9").replace("\n", " ")
    shown = succeeds(capsys, "info", checkpoint / "tiny")
    assert "INT3" in shown and re.search(r"keys and values: [\d,]+ bytes a token in 16 bits", shown)
    assert "int4-g128" in succeeds(capsys, "formats")
    assert "clip=none" in succeeds(capsys, "recipes").replace("\n", " ")
    assert "accuracy:TASK" in succeeds(capsys, "columns")
    assert "either a model or --parameters" in fails(capsys, "info")


def test_plan(checkpoint, tmp_path, capsys, monkeypatch):
    """Products of the model's linear weights with the tokens asked for, in the time of one; no constants, no plan."""
    constants = {"device": "cpu: A", "parameters": [1, 2], "tokens": [1, 2]}
    constants |= {"seconds": {"perplexity": {"products": 1e-3}}, "seconds_miss": {"perplexity": None}}
    constants |= {"peak_bytes": {"perplexity": {"once": 5e9}}, "peak_bytes_miss": {"perplexity": 0.25}}
    (tmp_path / "c.json").write_text(json.dumps(constants))
    shapes, _ = kernel_shapes(qjax.load(checkpoint / "tiny"))
    seconds = 1e-3 * 100 * sum(inputs * outputs for inputs, outputs in shapes)
    asked = ("info", checkpoint / "tiny", "--plan", "--tokens", "100")
    shown = succeeds(capsys, *asked, "--constants", tmp_path / "c.json")
    assert f"evaluate {duration(seconds)} - 5.0 25" in " ".join(shown.split())
    monkeypatch.setattr("qjax.report.plan.CONSTANTS", tmp_path / "none.json")
    assert "there is no" in fails(capsys, *asked)
    assert "--plan needs a model" in fails(capsys, "info", "--parameters", "7e9", "--plan")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep", "no/such/folder/"], "no/such/folder"),
        (["sweep", "TINY", "--data", "text:missing.txt"], "missing.txt"),
        (["sweep", "TINY", "--data", "wikitex2"], "wikitext2"),
        (["sweep", "TINY", "--recipes", "rtn:int4-q"], "'q'"),
        (["sweep", "TINY", "--recipes", "qptq:int4-g128"], "qptq"),
        (["sweep", "TINY", "--methods", "rtn", "--bits", "4,x"], "--bits '4,x'"),
        (["sweep", "TINY", "--methods", "rtn", "--bits", "12"], "bits 12"),
        (["sweep", "TINY", "--methods", "nf4", "--bits", "8"], "'nf4' has 4 bits"),
        (["sweep", "TINY", "--recipes", "rtn(clip=mse:int4-g16"], "parenthesis"),
        (["sweep", "TINY", "--recipes", ","], "separated by commas"),
        (["sweep", "TINY", "--recipes", "nf4", "--bits", "4"], "either it or"),
        (["sweep", "TINY", "--group", ""], "group ''"),
        (["sweep", "~nosuchuser/here/"], "~nosuchuser/here"),
        (["eval", "A" * 5000 + "/b/c"], "File name too long"),
        (["eval", "TINY", "--data", "text:" + "A" * 5000], "File name too long"),
        (["sweep", "TINY", "--convention", "ppl"], "allowed are windows-N"),
        (["sweep", "TINY", "--methods", "rtn", "--data", "DATA", "--rule", "nothing=none"], "matches no kernel"),
        (["sweep", "TINY", "--methods", "rtn", "--data", "SHORT"], "fewer than one window"),
        (["sweep", "TINY", "--data", "DATA"], "name a text with --calibration"),
        (
            ["sweep", "TINY", "--data", "DATA", "--calibration", "DATA", "--calibration-windows", "2"],
            "both measured and calibrated",
        ),
        (["sweep", "TINY", "--data", "DATA", "--calibration", "SHORT"], "windows of"),
        (["quantize", "TINY", "--recipe", "gptq:int4-g128@qpe"], "did you mean 'qep'"),
        (["sweep", "TINY", "--methods", "gptq", "--order", "reverse", "--data", "DATA"], "unknown order of calibration"),
        (["sweep", "TINY", "--data", "EMPTY"], "empty"),
        (["quantize", "TINY", "--recipe", "rtn"], "needs a format"),
        (["report", "TINY"], "holds no rows"),
        (["report", "no/such/folder"], "no such folder"),
        (["info", "--parameters", "0"], "at least 1"),
        (["eval", "TINY", "--tasks", ""], "--tasks '': expected names separated by commas"),
        (["eval", "TINY", "--lm-eval", ""], "--lm-eval '': expected names separated by commas"),
        (["tune", "TINY", "--of", ""], "--of '': expected names separated by commas"),
        (["tune", "TINY", "--of", "kl,perplexity"], "--of 'kl,perplexity': expected one measure"),
        (["sweep", "TINY", "--measure", ""], "separated by commas"),
        (["eval"], "Missing argument 'MODEL'"),
        (["evel"], "No such command 'evel'. Did you mean 'eval'?"),
        (["eval", "TINY", "--nope"], "No such option: --nope"),
        (["sweep", "TINY", "--max-windows", "x"], "Invalid value for '--max-windows'"),
    ],
)
def test_mistakes_are_one_line(checkpoint, tmp_path, capsys, arguments, named):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").write_text("")
    texts = {"DATA": checkpoint / "text.txt", "SHORT": tmp_path / "short.txt", "EMPTY": tmp_path / "empty.txt"}
    arguments = [f"text:{texts[a]}" if a in texts else str(checkpoint / "tiny") if a == "TINY" else a for a in arguments]
    out = ["--out", tmp_path / "out"] if arguments[0] in ("sweep", "quantize") else []
    assert named in fails(capsys, *arguments, *out)


OF_ADAPTERS = ("--schedule x", "--start x", "--alpha nan", "--learning-rate inf", "--clip 0", "--batch 3 --micro-batch 2")
OF_WEIGHTS = ("--loss x", "--learn x", "--scale-rate nan", "--schedule x")


def test_mistakes_in_names_are_found_without_jax(tmp_path):
    """A second, as against the two to three that importing JAX and Flax takes."""
    out = str(tmp_path / "out")
    wrong = [
        ["sweep", "--recipes", "nonsense"],
        ["sweep", "--recipes", "none,W4A16"],
        ["sweep", "--methods", "rtn,nonsense"],
        ["sweep", "--rule", "nonsense"],
        ["sweep", "--rule", "mlp=nonsense"],
        ["sweep", "--rule", "(=none"],
        ["sweep", "--recipes", "gptq(dam=1):int4"],
        ["sweep", "--methods", "gptq(damp=x)"],
        ["sweep", "--rule", "mlp=rtn(clop=mse):int4"],
        ["sweep", "--rule", "mlp=rtn(clip=mean):int4"],
        ["sweep", "--bits", "4,x"],
        ["sweep", "--bits", "11"],
        ["sweep", "--group", "many"],
        *[["sweep", "--seeds", each] for each in ("0", "1,1", "-1,2", "0,4294967296", "99999999999")],
        ["sweep", "--recipes", "int4", "--bits", "4"],
        ["quantize", "bundled", "--recipe", "gptq:int4@qep(alph=1)", "--out", str(tmp_path / "out")],
        ["sweep", "--tasks", "cloze,nonsense"],
        ["sweep", "--tasks", "piqa:no/such/file"],
        ["eval", "bundled", "--tasks", "cloze,cloze"],
        ["sweep", "--measure", "speed,nonsense"],
        ["sweep", "--order", "nonsense"],
        ["sweep", "--launcher", "nonsense"],
        ["sweep", "--convention", "nonsense"],
        ["sensitivity", "bundled", "--recipe", "int4", "--convention", "nonsense"],
        ["eval", "bundled", "--convention", "nonsense"],
        ["sweep", "--data", "nonsense"],
        ["sweep", "--calibration", "text:no/such/file"],
        ["sweep", "./no/such/model"],
        ["eval", "./no/such/model"],
        ["eval", "bundled", "--data", "nonsense"],
        ["quantize", "bundled", "--recipe", "nonsense", "--out", str(tmp_path / "out")],
        ["sensitivity", "bundled", "--recipe", "nonsense"],
        ["generate", "bundled", "--prompt", "a", "--recipe", "nonsense"],
        ["info", "./no/such/model"],
        ["convert", "bundled", "--to", "nonsense", "--out", str(tmp_path / "out")],
        ["convert", "bundled", "--to", "gguf", "--out", str(tmp_path / "out.bin")],
        ["convert", str(tmp_path), "--to", "gptq", "--out", str(tmp_path)],
        ["merge", "bundled", "./no/such/adapter", "--out", str(tmp_path / "out")],
        ["merge", "bundled", str(tmp_path), "--out", str(tmp_path)],
        ["train", "qlora", str(tmp_path), "--data", "python-docs", "--out", str(tmp_path)],
        ["train", "qat", "bundled", "--data", "python-docs", "--out", "/dev/null"],
        *[["train", "qlora", "bundled", "--data", "c4", "--out", out, *words.split()] for words in OF_ADAPTERS],
        *[["train", "qat", "bundled", "--data", "c4", "--out", out, *words.split()] for words in OF_WEIGHTS],
        ["tune", str(tmp_path), "--out", str(tmp_path)],
    ]
    script = (
        "import sys\nfrom qjax.cli.app import main\n"
        f"for words in {wrong!r}:\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as stop:\n        assert stop.code == 2, words\n"
        "    assert 'jax' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(wrong)


def damage(folder: Path, name: str) -> None:
    """Breaks a checkpoint in one of the ways that happen."""
    weights = folder / "model.safetensors"
    match name:
        case "no config":
            (folder / "config.json").unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "pickle only":
            weights.rename(folder / "pytorch_model.bin")
        case "unknown architecture":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "xyz", "architectures": ["XyzLM"]}))
        case "missing tensor" | "wrong shape" | "nan":
            tensors = load_file(weights)
            key = next(key for key in tensors if "up_proj" in key)
            tensor = tensors.pop(key)
            if name == "wrong shape":
                tensors[key] = tensor[:-1].copy()
            if name == "nan":
                tensor[0, 0] = float("nan")
                tensors[key] = tensor
            save_file(tensors, weights)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("no config", "config.json"),
        ("truncated", "model.safetensors"),
        ("pickle only", "pickle"),
        ("unknown architecture", "xyz"),
        ("missing tensor", "up_proj"),
        ("wrong shape", "up_proj"),
        ("nan", "up_proj"),
    ],
)
def test_broken_checkpoints_are_one_line(tmp_path, capsys, how, named):
    save_huggingface(tmp_path / "broken", random_model(tiny_config(), byte_tokenizer()))
    damage(tmp_path / "broken", how)
    assert named.lower() in fails(capsys, "eval", tmp_path / "broken").lower()


def test_output_that_cannot_be_written_is_found_before_work(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails(capsys, *sweep_arguments(checkpoint, tmp_path / "file"))
    if Path("/dev/full").exists() and os.name == "posix":
        assert "/dev/full" in fails(capsys, *sweep_arguments(checkpoint, "/dev/full"))
        assert "/proc" in fails(capsys, *sweep_arguments(checkpoint, "/proc/qjax"))


def test_rows_survive_a_disk_that_fills_up(checkpoint, tmp_path, capsys, monkeypatch):
    from qjax.sweep import worker

    write, written = worker.write_rows, []

    def fill_up(path, rows):
        if path.name == "rows.jsonl":
            if written:
                raise OSError(28, "No space left on device", str(path))
            written.extend(rows)
        write(path, rows)

    monkeypatch.setattr(worker, "write_rows", fill_up)
    assert "No space left" in fails(capsys, *sweep_arguments(checkpoint, tmp_path, "--recipes", "nf4"))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


def test_formats_are_listed_without_numpy():
    script = (
        "import sys\nfrom qjax.cli.app import main\n"
        "try:\n    main(['formats'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'jax', 'numpy', 'jaxtyping', 'scipy'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "int4-g128" in shown and "4.156" in shown


def test_help_is_fast_and_imports_no_jax():
    script = "import sys, qjax.cli.app; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    shown = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['qjax', '--help']; from qjax.cli.app import main; main()"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    order = (
        "sweep",
        "quantize",
        "sensitivity",
        "tune",
        "eval",
        "generate",
        "info",
        "report",
        "rerun",
        "compare",
        "formats",
        "recipes",
    )
    places = [shown.index(f"│ {command} ") for command in (*order, "columns")]
    assert places == sorted(places)


def test_calibrated_quantization_and_sensitivity(checkpoint, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("The quick brown fox jumps over the lazy dog, and back again. " * 20)
    calibrated = ("--calibration", f"text:{other}", "--calibration-windows", "4")
    printed = succeeds(
        capsys,
        "quantize",
        checkpoint / "tiny",
        "--recipe",
        "awq+gptq:int4-g16",
        "--out",
        tmp_path / "q",
        "--report",
        *calibrated,
    )
    assert "output" in printed and "block_0/attention/q" in printed
    layers = [json.loads(line) for line in (tmp_path / "q" / "layers.jsonl").read_text().splitlines()]
    assert all(layer["output_error"] > 0 and layer["tokens"] == 128 for layer in layers)
    arguments = ("sensitivity", checkpoint / "tiny", "--recipe", "gptq:int3-g16", "--data", f"text:{checkpoint / 'text.txt'}")
    printed = succeeds(capsys, *arguments, *calibrated, "--convention", "windows-32", "--out", tmp_path / "s")
    assert "Sensitivity" in printed
    assert (tmp_path / "s" / "tiny-text-text.txt-windows-32-sensitivity.md").exists()
    assert len((tmp_path / "s" / "rows.jsonl").read_text().splitlines()) == 3


def test_seeds_of_calibration_are_one_line(checkpoint, tmp_path, capsys):
    """Each seed draws other calibration windows; nearest rounding draws nothing and has one row; keys are those of --seed."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"The quick brown fox {i} jumps over {i * i} lazy dogs, and back again. " for i in range(60)))
    out, options = tmp_path / "out", ("--calibration", f"text:{other}", "--calibration-windows", "4")
    recipes = ("--recipes", "rtn:int3-g16,gptq:int3-g16@parallel")
    printed = succeeds(capsys, *sweep_arguments(checkpoint, out, *recipes, *options, "--seeds", "0,7"))
    rows = read_rows(out / ROWS)
    assert [(row["recipe"], row["seed"]) for row in rows] == [
        ("none", 0), ("rtn:int3-g16", 0), ("gptq:int3-g16@parallel", 0), ("gptq:int3-g16@parallel", 7),
    ]  # fmt: skip
    (table,) = out.glob("*-seeds.md")
    assert str(table) in printed.replace("\n", "")
    succeeds(capsys, *sweep_arguments(checkpoint, out, *recipes, *options, "--seed", "7"))
    again = read_rows(out / ROWS)[4:]
    assert [(row["recipe"], row["seed"]) for row in again] == [("none", 7), ("rtn:int3-g16", 7)]
    printed = succeeds(capsys, *sweep_arguments(checkpoint, out, *recipes, *options, "--seeds", "0,7", "--dry-run"))
    assert "4 cells: 4 done" in printed
    wrong = {("0", "--seed", "7"): "by one of the two", ("0,0,1",): "or different ones", ("a",): "expected whole numbers"}
    for given, message in wrong.items():
        assert message in fails(capsys, *sweep_arguments(checkpoint, out, *recipes, *options, "--seeds", *given))
