"""Where the time of an evaluation batch goes on this machine: seconds of each operation of a block and of head and loss.

    python experiments/profile_evaluation.py          a bundled and a SmolLM2 shape, random weights, one minute on 2 cores

A line an operation: seconds of one batch, as JAX's profiler counts what XLA's CPU backend runs, and where in the model it
stands. The last line of a program sets the seconds of all its operations against those of its products with weights alone;
operations of independent branches run at a time, so that the sum is not the program's time.
"""

import collections
import functools
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from qjax.models import walk
from qjax.models.config import DecoderConfig
from qjax.models.model import LOGITS_AT_ONCE, losses_of
from qjax.models.vocabulary import BoundHead


def _config(vocabulary: int, hidden: int, mlp: int, heads: int, kv_heads: int, window: int) -> DecoderConfig:
    sizes = {"vocabulary_size": vocabulary, "hidden_size": hidden, "mlp_size": mlp, "heads": heads, "kv_heads": kv_heads}
    return DecoderConfig(family="llama", layers=1, head_dim=hidden // heads, context=window, tied=True, **sizes)


SHAPES = {  # configuration and windows of a batch, each as long as the context
    "bundled": (_config(1024, 128, 384, 4, 2, 256), 4),
    "smollm2": (_config(49152, 576, 1536, 9, 3, 512), 2),
}
REPEATS = 5


def programs(config: DecoderConfig, windows: int) -> dict[str, tuple[Callable, tuple]]:
    """What an evaluation runs a block and a batch, compiled, with arguments: (program, arguments) by name."""
    tokens = jax.random.randint(jax.random.key(0), (windows, config.context), 0, config.vocabulary_size)
    embed, block = walk.body(config)[:2]
    head = walk.head(config).module
    table = embed.module.init(jax.random.key(1), tokens)["params"]["tokens"]["embedding"]
    x = table[tokens]
    of_block, of_head = block.module.init(jax.random.key(2), x)["params"], head.init(jax.random.key(3), x, table)["params"]
    of_losses = jax.jit(functools.partial(losses_of, at_once=LOGITS_AT_ONCE))
    jitted = {
        "block": (walk.compiled(block.module), (of_block, x)),
        "head and loss": (of_losses, (BoundHead(head, of_head, table), x[:, :-1], tokens[:, 1:])),
    }
    return {name: (run.lower(*args).compile(), args) for name, (run, args) in jitted.items()}


def profile(program: Callable, args: tuple, repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of one run by place in the model and operation, the most first."""
    places = {
        found[1]: found[2].split("/", 1)[-1]
        for found in re.finditer(r'%([\w.\-]+) = [^\n]*op_name="([^"]*)"', program.as_text())
    }
    jax.block_until_ready(program(*args))
    seconds: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(program(*args))
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events if event.name in places):
                if not event.name.startswith("while"):  # what a loop runs is counted itself
                    seconds[places[event.name]] += event.duration_ns * 1e-9 / repeats
    return dict(seconds.most_common())


def product_seconds(shapes: list[tuple[int, int, int]], repeats: int = REPEATS) -> float:
    """Seconds of float32 products of these rows, inputs and outputs, alone: medians, added."""
    total = 0.0
    for rows, inputs, outputs in shapes:
        x, weight, taken = jnp.ones((rows, inputs)), jnp.ones((inputs, outputs)), []
        multiply = jax.jit(jnp.matmul).lower(x, weight).compile()
        for _ in range(repeats + 1):
            started = time.perf_counter()
            jax.block_until_ready(multiply(x, weight))
            taken.append(time.perf_counter() - started)
        total += statistics.median(taken[1:])
    return total


def products(config: DecoderConfig, rows: int) -> dict[str, list[tuple[int, int, int]]]:
    """Rows, inputs and outputs of each program's products with weights."""
    hidden, mlp, queries, keys = (
        config.hidden_size,
        config.mlp_size,
        *(config.head_dim * n for n in (config.heads, config.kv_heads)),
    )
    pairs = (hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)
    return {"block": [(rows, *pair) for pair in pairs], "head and loss": [(rows, hidden, config.vocabulary_size)]}


def main(shapes: dict[str, tuple[DecoderConfig, int]], repeats: int = REPEATS) -> None:
    """Prints the tables."""
    for name, (config, windows) in shapes.items():
        for part, (program, args) in programs(config, windows).items():
            found = profile(program, args, repeats)
            print(f"\n{name}: {part}, {windows} x {config.context} tokens")
            print("\n".join(f"{seconds:10.5f} s  {place}" for place, seconds in list(found.items())[:20]))
            alone = product_seconds(products(config, windows * config.context)[part], repeats)
            print(f"{sum(found.values()):10.5f} s  all; products with weights alone {alone:.5f} s")


if __name__ == "__main__":
    main(SHAPES)
