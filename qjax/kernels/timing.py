"""Timing of products with a weight, and of the device's memory, in one way for tuning, benchmarks and tests.

A product with a few rows takes microseconds, less than starting a program does, and a weight that was just read may still be in
a cache: so one compiled program multiplies with several weights, and the time is divided.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

Program = Callable[[], object]  # returns when its work is done


def products(function: Callable, x: PyTree, weights: Sequence[PyTree]) -> Program:
    """A program that computes function(x, weight) for every weight."""
    program = jax.jit(lambda x, weights: [function(x, weight) for weight in weights])
    return lambda: jax.block_until_ready(program(x, weights))


def paired_seconds(programs: Sequence[Program], *, repeats: int = 7) -> list[float]:
    """Median seconds of every program after a run that compiles; they take turns, so that all see the same machine."""
    for program in programs:
        program()
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats):
        for program, times in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            program()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def seconds_per_call(function: Callable, x: PyTree, weights: Sequence[PyTree], *, repeats: int = 7) -> float:
    """Median seconds of function(x, weight) over weights of one shape."""
    return paired_seconds([products(function, x, weights)], repeats=repeats)[0] / len(weights)


def copy_bandwidth(nbytes: int, *, repeats: int = 7) -> float:
    """Bytes a second, read and written together, of adding one to so many bytes of float32, eight times over in one program:
    the memory is new the first time alone.
    """
    times = 8
    values = jnp.zeros(nbytes // 4, jnp.float32)

    def add(_, held):
        return jax.lax.fori_loop(0, times, lambda _, values: values + 1, held)

    return 2 * times * nbytes / seconds_per_call(add, None, [values], repeats=repeats)
