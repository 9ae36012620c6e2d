"""How time and peak memory of loading, perplexity and quantization grow with a model's width, depth, vocabulary and the tokens.

    python experiments/scaling.py                     writes results/scaling/, models of 10^6 to 10^8 parameters
    python experiments/scaling.py --most 1e9          as far as models of so many parameters
    python experiments/scaling.py --tiny --out X      two small models, for tests

Random Llamas: from a middle one, one size at a time is halved and doubled. Every point runs in a process of its own, whose peak
memory is its own: what it does is done twice, and the second time is what counts; the first compiles. Points that are there, of
the same code, versions and device, are not measured again. The table gives the exponents p of cost ~ size^p, with errors.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from random_models import random_model

import qjax
from qjax.cache import enable_compilation_cache
from qjax.checkpoints.packed import save
from qjax.evaluate.perplexity import score
from qjax.models.model import runnable
from qjax.models.parameters import parameter_shapes
from qjax.report.reports import write_reports
from qjax.sweep.measurements.provenance import peak_rss_bytes, provenance
from qjax.sweep.store import ROWS, append_row, read_rows

WORK = ("load", "perplexity", "rtn", "gptq", "awq")
RECIPES = {"rtn": "rtn:int4-g64", "gptq": "gptq:int4-g64", "awq": "awq:int4-g64"}
WINDOW = 256  # tokens


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A point: width and depth of a model, its vocabulary, and the tokens that are scored or calibrated on."""

    width: int = 512
    depth: int = 8
    vocabulary: int = 8192
    tokens: int = 4096

    @property
    def config(self) -> qjax.DecoderConfig:
        """A Llama whose MLP is three times as wide."""
        heads = self.width // 64
        return qjax.DecoderConfig(
            "llama", self.vocabulary, self.width, 3 * self.width, self.depth, heads, heads, 64, WINDOW, tied=True
        )

    @property
    def parameters(self) -> int:
        """How many."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.config).values())


MIDDLE = Sizes()
AXES = {
    "width": (128, 256, 512, 1024, 2048, 4096),
    "depth": (2, 4, 8, 16, 32),
    "vocabulary": (2048, 8192, 32768, 131072),
    "tokens": (1024, 4096, 16384, 65536),
}
TINY = [Sizes(64, 1, 256, 256), Sizes(128, 1, 256, 256)]


def points(most: float) -> list[Sizes]:
    """The middle and its neighbours along every axis, smallest models first, of at most so many parameters."""
    found = {dataclasses.replace(MIDDLE, **{axis: size}) for axis, sizes in AXES.items() for size in sizes}
    kept = [sizes for sizes in found if sizes.parameters <= most]
    return sorted(kept, key=lambda sizes: (sizes.parameters, sizes.tokens))


def run(out: Path, *, tiny: bool = False, most: float = 1e8) -> list[dict[str, object]]:
    """Measures what out/rows.jsonl lacks, and writes the table."""
    made = provenance() | {"kind": "scaling"}
    for sizes in TINY if tiny else points(most):
        for work in WORK[1:4:2] if tiny else WORK:
            about = made | {"work": work, "parameters": sizes.parameters} | dataclasses.asdict(sizes)
            if any(about.items() <= row.items() for row in read_rows(out / ROWS)):
                continue
            command = [sys.executable, __file__, "--point", json.dumps({"work": work} | dataclasses.asdict(sizes))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{work} of {sizes}: left out, {(done.stderr.strip() or 'killed').splitlines()[-1]}", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            key = f"scaling: {made['device']}, {work}, {sizes.width} x {sizes.depth}, {sizes.vocabulary}, {sizes.tokens} tokens"
            append_row(out / ROWS, {"key": key} | about | found)
            print(f"{key}: {found['seconds']:.2f} s, {found['peak_bytes'] / 1e9:.2f} GB", flush=True)
    rows = read_rows(out / ROWS)
    write_reports(out, rows)
    return rows


def point(work: str, sizes: Sizes) -> dict[str, float]:
    """Seconds of one piece of work, the second time it is done, and the peak memory of this process."""
    enable_compilation_cache()
    model = random_model(sizes.config, "scaling")
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, (sizes.tokens // WINDOW, WINDOW), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        if work == "load":
            save(Path(folder) / "model", model)
            del model
        elif work == "perplexity":
            model = runnable(model)
        for _ in range(2):
            started = time.perf_counter()
            match work:
                case "load":
                    jax.block_until_ready(qjax.load(Path(folder) / "model").params)
                case "perplexity":
                    score(model, tokens)
                case _:
                    read = None if work == "rtn" else jnp.asarray(tokens)
                    jax.block_until_ready(qjax.quantize(model, RECIPES[work], calibration=read)[0].params)
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--most", type=float, default=1e8, help="parameters of the largest model")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        asked = json.loads(options.point)
        print(json.dumps(point(asked.pop("work"), Sizes(**asked))))
    else:
        out = options.out or Path("runs/tiny" if options.tiny else "results") / "scaling"
        out.mkdir(parents=True, exist_ok=True)
        run(out, tiny=options.tiny, most=options.most)
