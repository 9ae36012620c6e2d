"""What the tests of peer libraries share."""

import importlib.util

import pytest


@pytest.fixture
def float32_bitsandbytes(monkeypatch):
    """bitsandbytes multiplies in float32: with bfloat16 instructions it would round scales and inputs to them."""
    if importlib.util.find_spec("bitsandbytes"):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
