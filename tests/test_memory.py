"""Peak memory of loading and sweeping, measured in processes of their own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qjax.checkpoints.huggingface import save_huggingface

from .conftest import byte_tokenizer, random_model, tiny_config

pytestmark = pytest.mark.slow

SCRIPT = textwrap.dedent(
    """
    import pathlib, sys
    import qjax
    from qjax.evaluate.corpora import Corpus
    from qjax.sweep.measurements.provenance import peak_rss_bytes

    model = qjax.load(sys.argv[1])
    text = Corpus("text", ("It was the best of times, it was the worst of times. " * 40,), "0")
    plan = qjax.Sweep(("rtn:int8-g128", "nf4", "rtn(clip=mse):int3-g128"), (text,), qjax.parse_convention("windows-32"))
    rows = qjax.run_sweep(model, plan, pathlib.Path(sys.argv[2]))
    assert len(rows) == 4
    print(peak_rss_bytes())
    """
)


CALIBRATED = textwrap.dedent(
    """
    import sys
    import numpy as np
    import qjax
    from qjax.sweep.measurements.provenance import peak_rss_bytes

    model = qjax.load(sys.argv[1])
    tokens = np.random.default_rng(0).integers(0, 256, (64, 32)).astype(np.int32)
    qjax.quantize(model, "gptq:int4-g128", calibration=tokens)
    print(peak_rss_bytes())
    """
)


def peak(folder: Path, layers: int, script: str = SCRIPT) -> tuple[int, int]:
    """(float32 bytes of a model with that many layers, peak resident bytes of the script)."""
    config = tiny_config(hidden_size=512, mlp_size=1536, layers=layers, heads=8, head_dim=64)
    model = random_model(config, byte_tokenizer())
    save_huggingface(folder / "model", model)
    size = (folder / "model" / "model.safetensors").stat().st_size
    del model
    command = [sys.executable, "-c", script, folder / "model", folder / "out"]
    environment_root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=environment_root, capture_output=True, text=True, check=True)
    return size, int(done.stdout.split()[-1])


def test_peak_is_at_most_two_and_a_half_times_the_model_plus_a_constant(tmp_path):
    small_size, small_peak = peak(tmp_path / "small", layers=4)
    large_size, large_peak = peak(tmp_path / "large", layers=36)
    slope = (large_peak - small_peak) / (large_size - small_size)
    print(f"{large_size / 1e6:.0f} MB of float32 weights: peak {large_peak / 1e6:.0f} MB, slope {slope:.2f}")
    assert slope <= 2.5


def test_calibrated_quantization_holds_one_block_beyond_the_model(tmp_path):
    """The packed result is an eighth of the model; whatever was held for every block would add as much again."""
    small_size, small_peak = peak(tmp_path / "small", layers=4, script=CALIBRATED)
    large_size, large_peak = peak(tmp_path / "large", layers=36, script=CALIBRATED)
    slope = (large_peak - small_peak) / (large_size - small_size)
    print(f"{large_size / 1e6:.0f} MB of float32 weights: peak {large_peak / 1e6:.0f} MB, slope {slope:.2f}")
    assert slope <= 1.5
