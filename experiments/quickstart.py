"""The quickstart's figures: every method at 8, 4, 3 and 2 bits on the bundled model and the held-out python-docs.

    python experiments/quickstart.py                writes results/quickstart/, five to fifteen minutes on 2 cores
    python experiments/quickstart.py --tiny --out X  a few windows and formats, for tests

Claim: perplexity does not fall with fewer bits; 8 bits cost about a hundredth of a percent, which only the paired difference
resolves; GPTQ with range search and error propagation costs at 4, 3 and 2 bits about 0.42, 0.32 and 0.10 of what nearest
rounding does. Rounding is a draw: other calibration windows move a calibrated cell by 0.1 (4 bits) to 0.3 (3 bits) points.
"""

import argparse
import dataclasses
from pathlib import Path

import qjax
from qjax.cache import enable_compilation_cache
from qjax.evaluate.corpora import load_corpora
from qjax.report.reports import write_reports
from qjax.sweep.cells import expand


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    methods: tuple[str, ...] = (
        *("rtn", "rtn(clip=mse)", "gptq", "gptq(clip=mse)", "awq", "awq+gptq", "awq+gptq(clip=mse)"),
        *("nf4", "nf4-dq", "fp4", "bf16"),
    )
    bits: tuple[int, ...] = (8, 4, 3, 2)
    convention: str = "windows-2048"
    max_windows: int | None = None
    calibration_windows: int = 128


TINY = Experiment(methods=("rtn", "gptq"), bits=(8, 3), max_windows=4, calibration_windows=8)


def run(experiment: Experiment, out: Path) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    enable_compilation_cache()
    recipes = tuple(expand(experiment.methods, experiment.bits))
    convention = qjax.parse_convention(experiment.convention)
    model = qjax.load("bundled")
    tokens = qjax.load_calibration(model, "python-docs", windows=experiment.calibration_windows)
    corpora = load_corpora(["python-docs"])
    sweep = qjax.Sweep(recipes, corpora, convention, experiment.max_windows, calibration=tokens)
    rows = qjax.run_sweep(model, sweep, out)
    write_reports(out, rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/quickstart"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(TINY if options.tiny else Experiment(), options.out)
