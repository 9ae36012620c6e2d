"""How fast qjax is against transformers, llm-compressor, GPTQModel and bitsandbytes on the CPU, paired.

    python experiments/speed.py                  writes results/speed/, under an hour on 2 cores
    python experiments/speed.py --tiny --out X   the smallest of everything, twice, for tests

Needs the libraries that it compares with (`pip install qjax[peer]`); what is not installed is left out, and a line says so. On
random Llamas of 1M and 15M parameters and on SmolLM2-135M (a GGUF file in --model-folder): losses of random tokens; GPTQ of
the whole model, int4-g64, calibrated on 32 windows of 256 tokens, run in float32 and in bfloat16 (SmolLM2 in float32 in the
order `parallel` alone), against libraries that run it in either, and of SmolLM2 on 32 windows of 512 tokens, all in bfloat16;
and products with a packed weight, in several processes. Everything of a task takes turns, ours and each library once a round,
one way round and then the other, so that a ratio is of the same machine in the same state; a row is a ratio of one round. Our
first run, which compiles, is not counted, nor is loading; tasks called cold are first runs, each in a process that finds
nothing compiled. The GPTQ libraries' first runs count. What rounding inputs to 8 bits costs is told against our own without
it. Rounds that are there, of the same code, versions and device, are not measured again.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import kernel_benchmark
import numpy as np

import qjax
from qjax.evaluate.perplexity import score
from qjax.linear import Linear, apply_linear, prepare_tree
from qjax.models.compute import NAMES
from qjax.models.model import runnable
from qjax.report.reports import write_reports
from qjax.sweep.measurements.provenance import provenance
from qjax.sweep.store import ROWS, append_row, read_rows

sys.path.insert(0, str(common.REPOSITORY))
from tests.parity import peers

Runs = Mapping[str, Callable[[], object]]  # name -> what takes the time, or returns the seconds that it measured itself
W8A8 = "rtn:int8-channel-sym-max/int8-token"
RECIPES = ("gptq:int4-g64@parallel", "gptq:int4-g64@qep", "gptq(refine=4):int4-g64@qep")
RANDOM = {  # name: shape, windows that are scored
    "random-1M": ({"hidden": 128, "mlp": 384, "layers": 6, "heads": 4, "vocabulary": 1024}, 64),
    "random-15M": ({"hidden": 320, "mlp": 896, "layers": 6, "heads": 5, "vocabulary": 12000}, 16),
}
TINY = {"random-tiny": ({"hidden": 64, "mlp": 128, "layers": 1, "heads": 2, "vocabulary": 512}, 2)}
COLD = "cold"
REAL, REAL_SCORED = "smollm2", 8
REAL_ASKED = {"float32": RECIPES[:1], "bfloat16": (*RECIPES, COLD)}  # minutes each, so not all in both
PROCESSES = 4  # that measure products, whose times have modes that a process stays in
WINDOWS, WINDOW = 32, 256  # of calibration; tokens
WIDE = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)  # sums as packed products have them
LIBRARIES = {  # peer -> its packages
    "transformers float32": ("transformers", "torch"),
    "transformers bfloat16": ("transformers", "torch"),
    "llm-compressor": ("llmcompressor", "torch"),
    "llm-compressor bfloat16": ("llmcompressor", "torch"),
    "GPTQModel": ("gptqmodel", "torch"),
    "GPTQModel bfloat16": ("gptqmodel", "torch"),
    "bitsandbytes nf4": ("bitsandbytes", "torch"),
}


def run(out: Path, *, tiny: bool = False, real: str | None = None, rounds: int = 5) -> list[dict[str, object]]:
    """Measures what out/rows.jsonl lacks, and writes the table. real: the folder of the real model, None for none."""
    rounds = 2 if tiny else rounds
    if tiny:
        products(out, rounds, (256, 128), (1,))
    else:
        for part in range(1, PROCESSES + 1):
            words = [sys.executable, __file__, "--out", str(out), "--products", str(rounds * part)]
            subprocess.run(words, check=True)
    if there(("transformers", "torch")):
        with tempfile.TemporaryDirectory() as scratch:
            for name, (shape, scored) in (TINY if tiny else RANDOM).items():
                folder = Path(scratch) / name
                peers.save_random_llama(folder, **shape)
                losses(out, rounds, name, folder, scored)
                windows = (2 if tiny else WINDOWS, WINDOW)
                gptq(out, rounds, name, folder, windows, dict.fromkeys(NAMES, (*RECIPES, COLD)))
        if real is not None:
            losses(out, rounds, Path(real).name, Path(real), REAL_SCORED)
            gptq(out, rounds, Path(real).name, Path(real), (WINDOWS, WINDOW), REAL_ASKED)
            gptq(out, rounds, Path(real).name, Path(real), (WINDOWS, 2 * WINDOW), {"bfloat16": RECIPES[:1]})
    rows = read_rows(out / ROWS)
    write_reports(out, rows)
    return rows


def products(out: Path, rounds: int, shape: tuple[int, int] = (4096, 4096), counts: tuple[int, ...] = (1, 8, 64, 512)) -> None:
    """Products of x of so many rows with a packed weight, against the dense product and bitsandbytes'."""
    weight = kernel_benchmark.random_weight(shape)
    for count in counts:
        x = jax.random.normal(jax.random.key(1), (count, shape[0]))
        packed = kernel_benchmark.repeat(prepare_tree(kernel_benchmark.quantized(shape, "int4-g128"), x.dtype), 2)
        timed, narrow = kernel_benchmark.timing.products, x.astype(jnp.bfloat16)
        rounded = prepare_tree(eight(weight, 2), x.dtype)
        ours = {
            f"int4-g128 product, {count} rows": timed(qjax.matmul, x, packed),
            f"int4-g128 product of bfloat16, {count} rows": timed(qjax.matmul, narrow, packed),
            f"W8A8 product, {count} rows": timed(apply_linear, x, rounded),
        }
        dense = kernel_benchmark.repeat(weight, 2)
        theirs = {
            "dense float32": timed(jnp.matmul, x, dense),
            "dense bfloat16": timed(WIDE, narrow, kernel_benchmark.repeat(weight.astype(jnp.bfloat16), 2)),
        }
        if there(LIBRARIES["bitsandbytes nf4"]):
            theirs["bitsandbytes nf4"] = kernel_benchmark.torch_cases(x, weight, 2)["nf4-b64", "bitsandbytes"][0]
        take_turns(out, rounds, f"{shape[0]} x {shape[1]}", ours, theirs)


def eight(weight: jax.Array, copies: int) -> list[Linear]:
    """The layer of a weight in 8 bits that rounds its input to 8 bits a token, so many times."""
    recipe = qjax.parse_recipe(W8A8)
    return [Linear(qjax.rtn(weight, recipe.format)[0], activation=recipe.activation) for _ in range(copies)]


def losses(out: Path, rounds: int, name: str, folder: Path, scored: int) -> None:
    """Losses of a model in a folder."""
    model = qjax.load(folder)
    tokens, ours, theirs = random_tokens(model, scored, WINDOW), {}, {}
    for dtype in NAMES:
        held = runnable(model, compute=dtype)
        ours[f"losses in {dtype}"] = functools.partial(score, held, tokens, compute=dtype)
        loaded = peers.load_transformers(folder, dtype)
        theirs[f"transformers {dtype}"] = functools.partial(peers.losses_transformers, loaded, tokens)
    rounded = qjax.quantize(model, W8A8)[0]
    for dtype in NAMES:
        held = runnable(rounded, compute=dtype)
        ours[f"losses of W8A8 in {dtype}"] = functools.partial(score, held, tokens, compute=dtype)
    theirs |= {f"qjax {dtype}": ours[f"losses in {dtype}"] for dtype in NAMES}
    take_turns(out, rounds, name, ours, theirs)


def gptq(
    out: Path, rounds: int, name: str, folder: Path, windows: tuple[int, int], asked: Mapping[str, tuple[str, ...]]
) -> None:
    """GPTQ of a model in a folder. asked: by the type that calibration runs it in the recipes, and COLD for a first run."""
    model = qjax.load(folder)
    tokens = random_tokens(model, *windows)

    def quantize(recipe, compute):
        given = qjax.Calibration(tokens, compute=compute)
        jax.block_until_ready(qjax.quantize(model, recipe, calibration=given)[0].params)

    ours, theirs = {}, {}
    for dtype, recipes in asked.items():
        said, called = {"float32": ("", ""), "bfloat16": (" in bfloat16", " bfloat16")}[dtype]
        said += "" if windows[1] == WINDOW else f", windows of {windows[1]}"
        for recipe in recipes:
            if recipe == COLD:
                ours[f"{RECIPES[0]}{said}, cold"] = functools.partial(cold, folder, windows, RECIPES[0], dtype)
            else:
                ours[f"{recipe}{said}"] = functools.partial(quantize, recipe, dtype)
        for peer, call in (("llm-compressor", peers.gptq_model_llm_compressor), ("GPTQModel", peers.gptq_model_gptqmodel)):
            if there(LIBRARIES[peer]):
                theirs[f"{peer}{called}"] = functools.partial(call, folder, tokens, group=64, dtype=dtype)
    take_turns(out, rounds, name, ours, theirs, warm=False)


def random_tokens(model: qjax.Model, windows: int, window: int) -> np.ndarray:
    """Windows of so many tokens."""
    return np.random.default_rng(0).integers(0, model.config.vocabulary_size, (windows, window), np.int32)


def take_turns(out: Path, rounds: int, model: str, ours: Runs, theirs: Runs, *, warm: bool = True) -> None:
    """Adds the rounds that are missing: a row for each task of ours and each of theirs. warm: theirs too runs once before."""
    made, rows = provenance() | {"kind": "speed", "model": model}, read_rows(out / ROWS)
    here = [row for row in rows if made.items() <= row.items()]
    done = {(row["task"], row["peer"], row["round"]) for row in here}
    pairs = [(task, peer) for task in ours for peer in theirs if ours[task] is not theirs[peer]]
    missing = [n for n in range(rounds) if any((*pair, n) not in done for pair in pairs)]
    if not missing:
        return
    for call in (*ours.values(), *(theirs.values() if warm else ())):
        call()
    for number in missing:
        turns = [*ours.items(), *theirs.items()][:: -1 if number % 2 else 1]
        seconds = {name: clock(call) for name, call in turns}
        now = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "round": number}
        for task, peer in (pair for pair in pairs if (*pair, number) not in done):
            row = made | now | {"task": task, "peer": peer, "library": versions(peer)}
            row |= {"seconds": seconds[task], "peer_seconds": seconds[peer], "ratio": seconds[peer] / seconds[task]}
            append_row(out / ROWS, {"key": f"speed: {made['device']}, {model}, {task}, {peer}, round {number}"} | row)
            print(f"{model}, {task}: {row['ratio']:.2f} times as fast as {peer} ({row['seconds']:.3f} s)", flush=True)


def cold(folder: Path, windows: tuple[int, int], recipe: str, compute: str) -> float:
    """Seconds of a recipe's first run in a process that finds nothing compiled, without importing and loading."""
    script = (
        "import sys, time, jax, numpy as np, qjax\n"
        "folder, windows, window, recipe, compute = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]\n"
        "model = qjax.load(folder)\n"
        "tokens = np.random.default_rng(0).integers(0, model.config.vocabulary_size, (windows, window), np.int32)\n"
        "given, started = qjax.Calibration(tokens, compute=compute), time.perf_counter()\n"
        "jax.block_until_ready(qjax.quantize(model, recipe, calibration=given)[0].params)\n"
        "print(time.perf_counter() - started)\n"
    )
    words = [sys.executable, "-c", script, str(folder), *map(str, windows), recipe, compute]
    empty = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=empty).stdout)


def clock(call: Callable[[], object]) -> float:
    """Seconds of a call; those that it measured itself where it returns them."""
    started = time.perf_counter()
    found = call()
    return found if isinstance(found, float) else time.perf_counter() - started


def there(packages: tuple[str, ...]) -> bool:
    """Whether the packages are installed; a line for what is not."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out what needs {', '.join(missing)}, which is not installed")
    return not missing


def versions(peer: str) -> str:
    """Packages of a peer with their versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES.get(peer, ("jax",)))


def real_model(models: Path) -> str | None:
    """The folder of the real model, written once from its file; None where that is not there."""
    found = common.locate([REAL], common.DATA, models)
    if not found:
        return None
    common.load_model(found[0].model)
    return str(common.PLAIN / Path(found[0].model).stem)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model-folder", type=Path, default=common.MODELS)
    parser.add_argument("--products", type=int, metavar="ROUNDS", help="products alone, up to so many rounds")
    options = parser.parse_args()
    out = options.out or Path("runs/tiny" if options.tiny else "results") / "speed"
    out.mkdir(parents=True, exist_ok=True)
    if options.products:
        products(out, options.products)
        sys.exit()
    run(out, tiny=options.tiny, real=None if options.tiny else real_model(options.model_folder), rounds=options.rounds)
