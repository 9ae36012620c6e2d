"""Peak memory of evaluating a lazy model: that of a part, not of all."""

import subprocess
import sys

import pytest

from qjax.checkpoints.huggingface import save_huggingface
from tests.conftest import tiny_config
from tests.random_weights import weights_model

MEASURE = """
import re, sys
import numpy as np
from qjax.checkpoints.load import load
from qjax.evaluate.perplexity import score

def peak():  # bytes; ru_maxrss would count what the process was before it was this one
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

tokens = np.zeros((2, 16), np.int32)
score(load(sys.argv[1]), tokens)  # compiles
before = peak()
print(float(score(load(sys.argv[2], lazy=sys.argv[3] == "lazy"), tokens).sum()), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_lazy_model_is_not_held(tmp_path):
    """A model of 105 MB against one of a single block: less than a third of it more, where loading it takes all."""
    sizes = {"hidden_size": 512, "mlp_size": 1024, "heads": 8, "kv_heads": 8, "head_dim": 64}
    for layers in (1, 10):
        save_huggingface(tmp_path / str(layers), weights_model(tiny_config(layers=layers, **sizes)))
    size = (tmp_path / "10" / "model.safetensors").stat().st_size
    found = {}
    for way in ("eager", "lazy"):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "1"), str(tmp_path / "10"), way]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = [float(value) for value in run.stdout.split()]
    assert size > 100e6
    assert found["lazy"][0] == found["eager"][0]
    assert found["lazy"][1] < size / 3 < 0.7 * size < found["eager"][1], found
