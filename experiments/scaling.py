"""How time and peak memory of loading, perplexity and quantization grow with a model's width, depth, vocabulary and the tokens.

    python experiments/scaling.py                     at most 12 minutes on a quiet machine; writes results/scaling/ (rows, a
                                                      table, figures) and, for `qjax info --plan`, qjax/report/constants.json
    python experiments/scaling.py --most 1e9 --minutes 120    as far as models of so many parameters
    python experiments/scaling.py --tiny --out X      two small models, for tests; constants are X/constants.json

Random float32 Llamas: from a middle one, one size at a time is halved and doubled. A process of its own saves the model, and
every piece of work has a process of its own, whose peak memory is its own: it loads the model and works on it twice. The second
time is what counts; the first compiles. After --minutes no further point is begun; points that are there, of the same code,
versions and device, are not measured again. The table gives the exponents p of cost ~ size^p, with errors.
"""

import argparse
import dataclasses
import itertools
import json
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
from qjax.files import write_atomically
from qjax.models.model import runnable
from qjax.report.plan import CONSTANTS, MLP, RECIPES, WINDOW, fit_constants, llama_shapes
from qjax.report.reports import write_reports
from qjax.sweep.measurements.provenance import peak_rss_bytes, provenance
from qjax.sweep.store import ROWS, append_row, read_rows

RESULTS = Path(__file__).resolve().parents[1] / "results" / "scaling"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A point: width and depth of a model, its vocabulary, and the tokens that are scored or calibrated on."""

    width: int = 512
    depth: int = 4
    vocabulary: int = 8192
    tokens: int = 4096

    @property
    def config(self) -> qjax.DecoderConfig:
        """A tied Llama."""
        heads = self.width // 64
        return qjax.DecoderConfig(
            "llama", self.vocabulary, self.width, MLP * self.width, self.depth, heads, heads, 64, WINDOW, tied=True
        )

    @property
    def parameters(self) -> int:
        """Kernels, the table of embeddings, norms."""
        kernels = sum(inputs * outputs for inputs, outputs in llama_shapes(self.width, self.depth))
        return kernels + self.width * (self.vocabulary + 2 * self.depth + 1)


MIDDLE = Sizes()
AXES = {
    "width": (128, 256, 512, 1024, 2048, 4096),
    "depth": (2, 4, 8, 16, 32),
    "vocabulary": (2048, 8192, 32768, 131072),
    "tokens": (1024, 4096, 16384),
}
VARIED = {  # work -> the axes that it depends on
    "load": {"width", "depth", "vocabulary"},
    "perplexity": set(AXES),
    "rtn": {"width", "depth"},
    "gptq": {"width", "depth", "tokens"},
    "awq": {"width", "depth", "tokens"},
}
LAST = 60  # seconds that a point may take beyond --minutes
TINY = [(work, Sizes(width, 1, 256, 256)) for width in (64, 128) for work in ("load", "perplexity", "gptq")]


def cases(most: float) -> list[tuple[str, Sizes]]:
    """Each work at the middle and its neighbours along the axes, models of at most so many parameters, smallest first."""
    found = {dataclasses.replace(MIDDLE, **{axis: size}) for axis, sizes in AXES.items() for size in sizes}
    kept = [sizes for sizes in found if sizes.parameters <= most]
    kept.sort(key=lambda sizes: (sizes.parameters, sizes.width, sizes.depth, sizes.tokens))
    return [(work, sizes) for sizes in kept for work, axes in VARIED.items() if _moved(sizes) <= axes]


def _moved(sizes: Sizes) -> set[str]:
    return {axis for axis in AXES if getattr(sizes, axis) != getattr(MIDDLE, axis)}


def run(out: Path, *, tiny: bool = False, most: float = 1e8, minutes: float = 11) -> list[dict[str, object]]:
    """Measures what out/rows.jsonl lacks, and writes tables and figures."""
    made, ended = provenance() | {"kind": "scaling"}, time.monotonic() + 60 * minutes
    there = [row.items() for row in read_rows(out / ROWS)]
    wanted = []
    for work, sizes in TINY if tiny else cases(most):
        about = made | {"work": work, "parameters": sizes.parameters} | dataclasses.asdict(sizes)
        if not any(about.items() <= row for row in there):
            wanted.append((work, sizes, about))
    left = len(wanted)
    for _, group in itertools.groupby(wanted, key=lambda case: case[1].config):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            for work, sizes, about in group:
                rest = ended - time.monotonic()
                if rest < 0:
                    break
                left -= 1
                if not folder.exists() and child("save", sizes, folder, rest + LAST) is None:
                    continue
                if (found := child(work, sizes, folder, rest + LAST)) is not None:
                    key = f"scaling: {made['device']}, {work}, {sizes.width} x {sizes.depth}, "
                    key += f"{sizes.vocabulary}, {sizes.tokens} tokens"
                    append_row(out / ROWS, {"key": key} | about | found)
                    print(f"{key}: {found['seconds']:.2f} s, {found['peak_bytes'] / 1e9:.2f} GB", flush=True)
    if left:
        print(f"{left} points are left, --minutes are over; the same command goes on")
    rows = read_rows(out / ROWS)
    write_reports(out, rows)
    return rows


def child(work: str, sizes: Sizes, folder: Path, seconds: float) -> dict[str, float] | None:
    """`point` in a process of its own, of at most so many seconds; None where that fails, which is said."""
    asked = {"work": work, "folder": str(folder)} | dataclasses.asdict(sizes)
    command = [sys.executable, __file__, "--point", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{work} of {sizes}: left out, it takes more than the {seconds:.0f} s that were left", flush=True)
        return None
    if done.returncode:
        print(f"{work} of {sizes}: left out, {(done.stderr.strip() or 'killed').splitlines()[-1]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def point(work: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """Seconds of one piece of work, the second time it is done, and the peak memory of this process; "save" makes the model."""
    enable_compilation_cache()
    if work == "save":
        save(folder, random_model(sizes.config, "scaling"))
        return {}
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, (sizes.tokens // WINDOW, WINDOW), np.int32)
    model = None if work == "load" else qjax.load(folder)
    if work == "perplexity":
        model = runnable(model)
    for _ in range(2):
        started = time.perf_counter()
        match work:
            case "load":
                jax.block_until_ready(qjax.load(folder).params)
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
    parser.add_argument("--minutes", type=float, default=11, help="after which no further point is begun")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        asked = json.loads(options.point)
        print(json.dumps(point(asked.pop("work"), folder=Path(asked.pop("folder")), sizes=Sizes(**asked))))
    else:
        out = options.out or (Path("runs/tiny/scaling") if options.tiny else RESULTS)
        out.mkdir(parents=True, exist_ok=True)
        rows = run(out, tiny=options.tiny, most=options.most, minutes=options.minutes)
        constants = CONSTANTS if out.resolve() == RESULTS else out / "constants.json"
        write_atomically(constants, json.dumps(fit_constants(rows), indent=1) + "\n")
        print(f"constants are in {constants}")
