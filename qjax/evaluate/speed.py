"""How fast a model runs and what memory it needs, with its kernels as evaluation has them ("dense": decoded, but for products
of integers) or packed.

    prefill   tokens of a prompt a second; time to first token is that of the whole prompt
    decode    tokens a second after the first, one at a time with cached keys and values
    memory    bytes of the weights as they are held while running, and the peak: weights, cache, and the largest working memory
              of a compiled stage, as XLA plans it

Times are medians over repeats after a run that compiles.
"""

import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.generate import generate, layout_of
from qjax.lazy import materialised
from qjax.linear import cast_tree
from qjax.models import walk
from qjax.models.compute import compute_of
from qjax.models.model import Model, cached, computing, empty_caches, head_of, require_model, runnable
from qjax.qtensor import nbytes


class Speed(NamedTuple):
    """Figures of one model held one way."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    running_bytes: int  # of the weights while running
    peak_bytes: int  # with cache and working memory
    prompt_tokens: int
    new_tokens: int
    batch: int


def measure_speed(
    model: Model,
    *,
    packed: bool = False,
    compute: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 3,
) -> Speed:
    """Speed of a model on a prompt of random tokens. packed: kernels stay packed; else decoded to the compute type first.
    compute: as in `perplexity`.

    The prompt is shortened to half of the model's context where that is less. Raises QjaxError for fewer than 2 new tokens, of
    which the first is the prompt's.
    """
    require_model("measure_speed", model)
    # Leaves that are not packed are cast once, so that both ways differ in the kernels alone.
    dtype = compute_of(compute or model.compute).dtype
    model = runnable(model._replace(params=cast_tree(materialised(model.params), dtype)), packed, compute)
    limit = model.config.context
    prompt_tokens = min(prompt_tokens, max(1, limit // 2))
    new_tokens = min(new_tokens, limit - prompt_tokens)
    if new_tokens < 2:
        raise QjaxError(
            f"measure_speed: {new_tokens} new tokens of {model.name}, expected at least 2, to time what follows the first"
        )
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, model.config.vocabulary_size, (batch, prompt_tokens)).astype(np.int32)
    runs = [generate(model, list(prompts), new_tokens, packed=True) for _ in range(repeats + 1)][1:]
    first = statistics.median(run.seconds_first for run in runs)
    rest = statistics.median(run.seconds_rest for run in runs)
    return Speed(
        prefill_tokens_per_second=batch * prompt_tokens / first,
        decode_tokens_per_second=batch * runs[0].steps / rest if runs[0].steps else float("nan"),
        first_token_seconds=first,
        running_bytes=nbytes(model.params),
        peak_bytes=nbytes(model.params) + _working_bytes(model, batch, prompt_tokens, new_tokens),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
    )


def _working_bytes(model: Model, batch: int, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes of the cache and of the largest compiled stage's working memory in the prefill."""
    head, dtype = head_of(model), computing(model).dtype
    caches = empty_caches(model, batch, prompt_tokens + new_tokens)
    layout = layout_of(jnp.zeros(batch, jnp.int32), prompt_tokens, prompt_tokens + new_tokens)
    x = jax.ShapeDtypeStruct((batch, prompt_tokens, model.config.hidden_size), dtype)
    last = jax.ShapeDtypeStruct((batch, 1, model.config.hidden_size), dtype)
    *_, block = walk.body(model.config, *computing(model))
    lowered = (
        cached(block.module).lower(walk.params_of(block, model.params), x, layout, caches[0]),
        walk.compiled(head.module).lower(head.params, last, head.table),
    )
    plans = [each.compile().memory_analysis() for each in lowered]
    return nbytes(caches) + max(plan.temp_size_in_bytes + plan.output_size_in_bytes for plan in plans)
