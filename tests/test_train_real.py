"""Training of a real model: a step of QLoRA on SmolLM2 fits in 4 GiB."""

import jax
import numpy as np
import pytest

from qjax.checkpoints.load import load
from qjax.train import loop, lora
from tests.paths import real_model

GIB = 2**30


@pytest.mark.real
def test_a_step_of_qlora_fits_in_4_gib():
    """Of the codes as they are in the file, rank 16 on every layer, 2 windows of 512 tokens one after the other."""
    base = load(real_model("SmolLM2-135M-Instruct.Q4_1.gguf"))
    _, adapters = lora.start(base, lora.LoraConfig(rank=16), jax.random.key(0))
    asked = lora.problem(base, adapters)
    config = loop.TrainConfig(steps=1, batch=2, window=512)
    found = loop.bytes_of(asked.trained, asked.frozen, config)
    assert found.trained + found.gradient + found.optimizer < 100 * 2**20 and found.frozen < GIB
    optimizer = loop.make_optimizer(config)
    step = loop.make_step(asked.loss, config, optimizer)
    state = loop.init_state(asked.trained, optimizer)
    tokens = jax.ShapeDtypeStruct((2, 513), np.int32)
    analysis = step.lower(state, asked.frozen, tokens).compile().memory_analysis()
    total = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    assert total < 4 * GIB
