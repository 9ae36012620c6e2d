"""Where the time of quantizing with calibration goes: how many programs are compiled, and the seconds of each.

    python experiments/profile_calibration.py "gptq:int4-g64@qep" "awq:int4-g64"     blocks of SmolLM2-135M's shape
    python experiments/profile_calibration.py --programs --hidden 128 --mlp 384 --layers 1 "gptq:int4-g64"
    python experiments/profile_calibration.py --traced 5 --hidden 128 --mlp 384 --layers 30 --windows 16 "gptq:int4-g64@qep"

Prints, and writes nothing. The model is random, and runs in the type of --compute to be calibrated. cold: the first run in this
process, with all that it compiles; warm: the second. With several recipes a later one finds what an earlier one compiled.
--programs: on a CPU, Python waits for every program, and the seconds of each in the warm run are told; `Python` is the rest.
--traced: instead, in so many rounds, the seconds of quantizing the same decoder as any function, by tracing it, over those of
the driver, which knows its blocks.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from random_models import random_model

import qjax
from qjax.calibrate.tokens import BATCH_TOKENS
from qjax.driver.placement import one_order
from qjax.models import walk
from qjax.models.compute import NAMES, compute_of

CALL = "PjitFunction("  # what JAX's profiler calls the run of a compiled program, before its name


class Profile(NamedTuple):
    """Seconds of a cold and a warm run, programs compiled and the seconds that took; where they were waited for one by one, the
    (seconds, runs) of each in the warm run.
    """

    cold: float
    warm: float
    compiled: int
    compiling: float
    programs: dict[str, tuple[float, int]]


def profile(work: Callable[[], object], *, by_program: bool = False) -> Profile:
    """The profile of some work, which is done twice."""
    compilations: list[float] = []

    def note(event: str, seconds: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    cold = _seconds(work)
    compiled, compiling = len(compilations), sum(compilations)
    jax.monitoring.unregister_event_duration_listener(note)
    if not by_program:
        return Profile(cold, _seconds(work), compiled, compiling, {})
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            warm = _seconds(work)
        (file,) = Path(folder).rglob("*.xplane.pb")
        programs = _by_program(jax.profiler.ProfileData.from_file(str(file)))
    programs["Python"] = (warm - sum(seconds for seconds, _ in programs.values()), 1)
    return Profile(cold, warm, compiled, compiling, programs)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def _by_program(data: jax.profiler.ProfileData) -> dict[str, tuple[float, int]]:
    """(seconds, runs) by name; a run that another contains is part of it."""
    found: dict[str, tuple[float, int]] = {}
    for line in (line for plane in data.planes for line in plane.lines):
        end = 0.0
        for event in sorted((event for event in line.events if event.name.startswith(CALL)), key=lambda event: event.start_ns):
            if event.start_ns >= end:
                end, name = event.start_ns + event.duration_ns, event.name[len(CALL) : -1]
                seconds, runs = found.get(name, (0.0, 0))
                found[name] = (seconds + event.duration_ns / 1e9, runs + 1)
    return found


def traced_over_driver(model: qjax.Model, recipe: str, tokens: qjax.Calibration, rounds: int) -> list[float]:
    """How often the driver's seconds a traced function takes, by round, after a run of each; on the same batches."""
    parts = walk.parts(model.config, *compute_of(tokens.compute), halves=one_order({"": qjax.parse_recipe(recipe)})().inside)

    def fn(params, x):
        for part in parts:
            x = walk.compiled(part.module)(walk.subtree(part, params), x, *walk.further_arguments(part, params))
        return x

    windows = tokens.tokens
    size = BATCH_TOKENS[jax.default_backend()] // windows.shape[1]
    batches = [(jnp.asarray(windows[start : start + size]),) for start in range(0, len(windows), size)]
    weights = [jnp.ones(batch[0].shape) for batch in batches]
    how = {"batches": batches, "weights": weights, "rules": ["^(embed|head)=none"]}
    driver = functools.partial(_quantized, model, recipe, tokens)
    traced = lambda: jax.tree.leaves(qjax.quantize_function(fn, model.params, recipe, **how)[0])  # noqa: E731
    driver(), traced()
    return [_seconds(traced) / _seconds(driver) for _ in range(rounds)]


def told(recipe: str, found: Profile, most: int = 15) -> Iterable[str]:
    """Lines about a recipe."""
    compiled = f"{found.compiled} programs compiled in {found.compiling:.1f} s"
    yield f"{recipe}: cold {found.cold:.2f} s, {compiled}, warm {found.warm:.2f} s"
    for name, (seconds, runs) in sorted(found.programs.items(), key=lambda item: -item[1][0])[:most]:
        yield f"  {seconds:8.3f} s  {runs:6}  {name}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Profile]:
    """The profiles, by recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    shape = {"hidden": 576, "mlp": 1536, "layers": 2, "head-dim": 64, "vocabulary": 4096, "windows": 32, "window": 256}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--compute", choices=NAMES)
    parser.add_argument("--programs", action="store_true")
    parser.add_argument("--traced", type=int, default=0, metavar="ROUNDS")
    asked = parser.parse_args(arguments)
    if asked.programs:  # before JAX's backend starts
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    heads = max(1, asked.hidden // asked.head_dim)
    kv_heads = heads // 3 if heads % 3 == 0 else heads
    sizes = (asked.vocabulary, asked.hidden, asked.mlp, asked.layers, heads, kv_heads, asked.head_dim, asked.window)
    config = qjax.DecoderConfig("llama", *sizes, tied=True)
    model = random_model(config, "random")
    drawn = np.random.default_rng(0).integers(0, asked.vocabulary, (asked.windows, asked.window)).astype(np.int32)
    tokens = qjax.Calibration(drawn, compute=asked.compute)
    jax.block_until_ready(model.params)
    found = {}
    for recipe in asked.recipes if asked.traced else ():
        ratios = traced_over_driver(model, recipe, tokens, asked.traced)
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{recipe}: traced, {middle:.3f} ({low:.3f} to {high:.3f}) times the driver's time", flush=True)
    for recipe in asked.recipes if not asked.traced else ():
        work = functools.partial(_quantized, model, recipe, tokens)
        found[recipe] = profile(work, by_program=asked.programs)
        print("\n".join(told(recipe, found[recipe])), flush=True)
    return found


def _quantized(model: qjax.Model, recipe: str, tokens: qjax.Calibration) -> object:
    return qjax.quantize(model, recipe, calibration=tokens)[0].params


if __name__ == "__main__":
    main()
