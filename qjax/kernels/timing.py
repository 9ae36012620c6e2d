"""Timing of products with a weight, and of the device's memory, in one way for tuning, benchmarks and tests.

A product with a few rows takes microseconds, less than starting a program does, and a weight that was just read may still be in
a cache: so one compiled program multiplies with several different weights, one after the other, and the time is divided.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def seconds_per_call(function: Callable, x: PyTree, weights: Sequence[PyTree], *, repeats: int = 7) -> float:
    """Median seconds of function(x, weight) over weights of one shape, after a run that compiles."""
    (seconds,) = paired_seconds([(function, x, weights)], repeats=repeats)
    return seconds


def paired_seconds(cases: Sequence[tuple[Callable, PyTree, Sequence[PyTree]]], *, repeats: int = 7) -> list[float]:
    """`seconds_per_call` of several (function, x, weights), which take turns so that all see the same machine."""
    programs = [_all_products(function, x, weights) for function, x, weights in cases]
    for program in programs:
        program()
    seconds = [[] for _ in cases]
    for _ in range(repeats):
        for program, (_, _, weights), times in zip(programs, cases, seconds, strict=True):
            start = time.perf_counter()
            program()
            times.append((time.perf_counter() - start) / len(weights))
    return [statistics.median(times) for times in seconds]


def copy_bandwidth(nbytes: int, *, repeats: int = 7) -> float:
    """Bytes a second, read and written together, of adding one to so many bytes of float32."""
    values = jnp.zeros(nbytes // 4, jnp.float32)
    return 2 * nbytes / seconds_per_call(lambda _, held: held + 1, None, [values], repeats=repeats)


def _all_products(function: Callable, x: PyTree, weights: Sequence[PyTree]) -> Callable[[], object]:
    program = jax.jit(lambda x, weights: [function(x, weight) for weight in weights])
    return lambda: jax.block_until_ready(program(x, weights))
