"""Greedy generation against transformers, token for token; packed weights against the same weights decoded."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qjax.checkpoints.load import load  # noqa: E402
from qjax.driver.decoder import quantize  # noqa: E402
from qjax.evaluate.generate import generate  # noqa: E402
from qjax.evaluate.likelihood import encode  # noqa: E402
from tests.paths import real_data  # noqa: E402

pytestmark = pytest.mark.peer

TOKENS = 100
PROMPTS = ("Once upon a time", "The little dog", "Lily said: ", "One day, Tom and his mom went to the big park.")


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-hf"])
def test_greedy_tokens_are_those_of_transformers(name):
    model = load(real_data(f"models/{name}"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(real_data(f"models/{name}"), dtype=torch.float32)
    prompts = [encode(model.tokenizer, prompt) for prompt in PROMPTS]
    found = generate(model, prompts, TOKENS)  # one batch of unequal lengths
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        expected = reference.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()
        assert len(tokens) == TOKENS


@pytest.mark.parametrize("recipe", ["rtn:int4-g32", "nf4-g64", "rtn:int8-channel"])
def test_packed_weights_say_what_decoded_ones_do(recipe):
    for name in ("stories260K-hf", "babyllama-hf"):
        quantized, _ = quantize(load(real_data(f"models/{name}")), recipe)
        prompts = [encode(quantized.tokenizer, prompt) for prompt in PROMPTS]
        decoded, packed = (generate(quantized, prompts, TOKENS, packed=held).tokens for held in (False, True))
        assert [tokens.tolist() for tokens in packed] == [tokens.tolist() for tokens in decoded]
