"""Block sizes for the kernels of packed weights: times them on the device at hand and prints rows for the kernel's TABLE.

    python experiments/tune_kernels.py --shapes 4096x4096,4096x14336,14336x4096 --rows 1,16,128,512 --format int4-g128

From the table's row for so many rows of x, one size after the other is halved and doubled as long as that is faster; the
printed row is the best for the sum over all shapes; on GPUs of both kernels for x W, whose VECTOR_ROWS says from where on the
second is used. Sizes that do not compile or do not fit into memory are passed over. x is
bfloat16. A timed program multiplies with several weights, so that starting it costs little and no weight is still in a cache.
"""

import argparse
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

import qjax
from qjax.kernels import layout, timing

WEIGHTS = 8  # a timed program multiplies with so many


def load_kernels():
    """The module of the device's kernels: `TABLE` of Blocks, and `multiply` with blocks=."""
    backend = jax.default_backend()
    if backend == "tpu":
        from qjax.kernels import tpu as kernels
    elif backend == "gpu":
        from qjax.kernels import gpu as kernels
    else:
        raise SystemExit(f"tune_kernels: needs a GPU or a TPU, JAX's default device is {jax.devices()[0].device_kind!r}")
    return kernels


def neighbours(blocks):
    """Blocks with one size halved or doubled."""
    names = [f.name for f in dataclasses.fields(blocks) if isinstance(getattr(blocks, f.name), int) and f.name != "most_rows"]
    for name in names:
        size = getattr(blocks, name)
        yield from (dataclasses.replace(blocks, **{name: other}) for other in (size // 2, size * 2) if other)


def seconds(kernels, x, weights, blocks, *, repeats: int, interpret: bool = False) -> float:
    """Median seconds of one product; infinity where the sizes cannot be had."""
    multiply = functools.partial(kernels.multiply, blocks=blocks, interpret=interpret)
    try:
        return timing.seconds_per_call(multiply, x, weights, repeats=repeats)
    except Exception as error:  # the compilers' own errors share no other base
        print(f"# passed over: {blocks}: {str(error).splitlines()[0][:100]}")
        return math.inf


def tune(kernels, cases, device: str, *, repeats: int = 9, interpret: bool = False):
    """(best Blocks, its seconds) for cases of one number of rows: (x, weights) of every shape."""
    rows = len(cases[0][0])
    serving = [b for b in kernels.TABLE if device.startswith(b.device) and rows <= b.most_rows]
    first = {getattr(b, "kernel", "dot"): b for b in reversed(serving)}  # of every kernel
    starts = [first[kernel] for kernel in ("dot", "vector") if kernel in first]
    timed = {}

    def measure(blocks):
        if blocks not in timed:
            timed[blocks] = sum(seconds(kernels, *case, blocks, repeats=repeats, interpret=interpret) for case in cases)
        return timed[blocks]

    best = min(starts, key=measure)
    while (faster := min(neighbours(best), key=measure)) and measure(faster) < 0.98 * measure(best):
        best = faster
    if math.isinf(measure(best)):
        raise SystemExit(f"tune_kernels: no sizes for {rows} rows compile on {device}; start from others in TABLE")
    return dataclasses.replace(best, device=device, most_rows=rows), measure(best)


def make_case(fmt: str, rows: int, inputs: int, columns: int, weights: int = WEIGHTS):
    """x and packed weights with random codes and scales that differ."""
    keys = jax.random.split(jax.random.key(0), weights)
    make = jax.jit(lambda key: layout.prepare(qjax.rtn(jax.random.normal(key, (inputs, columns)), fmt)[0]))
    return jax.random.normal(jax.random.key(1), (rows, inputs), jnp.bfloat16), [make(key) for key in keys]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096", help="inputs x columns, comma separated")
    parser.add_argument("--rows", default="1,16,128,512", help="rows of x, one table row is printed for each")
    parser.add_argument("--format", default="int4-g128")
    options = parser.parse_args()
    module, kind = load_kernels(), jax.devices()[0].device_kind
    for number in map(int, options.rows.split(",")):
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
        found, total = tune(module, [make_case(options.format, number, *shape) for shape in shapes], kind)
        print(f"    {found},  # {options.format}, {options.shapes}: {1e6 * total:.0f} us together", flush=True)
