"""The experiments' tiny twins run from a shell and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qjax
from tests.paths import REPOSITORY


def run(script: str, *options: str | Path) -> None:
    """Runs experiments/<script> with the qjax under test; fails with its stderr."""
    environment = os.environ | {"PYTHONPATH": str(Path(qjax.__file__).parents[1])}
    command = [sys.executable, REPOSITORY / "experiments" / script, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


def test_quickstart(tmp_path):
    run("quickstart.py", "--tiny", "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) >= 3  # unquantized, 8 bits and 3 bits
    assert any(path.suffix == ".png" for path in tmp_path.rglob("*"))


def test_accuracy(tmp_path):
    run("accuracy.py", "--tiny", "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["questions:cloze"] == 8 and row["kl"] >= 0 for row in rows)
    assert {path.name.rpartition("-")[2] for path in tmp_path.glob("*.md")} >= {"accuracy.md", "divergence.md", "tradeoff.md"}


def test_order(tmp_path):
    run("order.py", "--tiny", "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["order"]) for row in rows if row["order"]] == [(0, "parallel"), (1, "parallel")]
    (table,) = tmp_path.glob("*-seeds.md")
    assert "gptq:int4-g128@parallel" in table.read_text()


def test_kernel_benchmark(tmp_path):
    run("kernel_benchmark.py", "--tiny", "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    measured = {(row["format"], row["implementation"], row["rows"]) for row in rows}
    assert {("dense", "dense", 1), ("int4-g128", "reference", 16), ("nf4-g64", "xla", 1)} <= measured
    assert all(row["seconds"] > 0 and row["bandwidth_fraction"] > 0 for row in rows)
    assert "| int4-g128" in (tmp_path / "kernels.md").read_text()


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
