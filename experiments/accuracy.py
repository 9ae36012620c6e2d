"""What bits cost in accuracy and in divergence, beside perplexity: the bundled model, its held-out text, the built-in task.

    python experiments/accuracy.py                 writes results/accuracy/, three to ten minutes on 2 cores
    python experiments/accuracy.py --tiny --out X  a few windows, questions and formats, for tests

Claim: accuracy follows perplexity but is far noisier, so that differences at 8 bits are within noise; KL divergence and flips
resolve them.
"""

import argparse
from pathlib import Path

import qjax
from qjax.cache import enable_compilation_cache
from qjax.evaluate.corpora import load_corpora
from qjax.evaluate.tasks import load_tasks
from qjax.report.reports import write_reports

RECIPES = (
    *("rtn:int8-g128", "rtn:int4-g128", "rtn(clip=mse):int4-g128", "nf4-g64", "rtn:int3-g128", "rtn(clip=mse):int3-g128"),
    *("rtn:int2-g128", "rtn(clip=mse):int2-g128", "awq:int4-g128", "awq:int3-g128"),
    *("gptq(clip=mse):int4-g128", "gptq(clip=mse):int3-g128", "gptq(clip=mse):int2-g128"),
)


def run(out: Path, *, tiny: bool = False) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    enable_compilation_cache()
    model = qjax.load("bundled")
    sweep = qjax.Sweep(
        RECIPES[:1] if tiny else RECIPES,
        load_corpora(["python-docs"]),
        qjax.parse_convention("windows-2048"),
        max_windows=2 if tiny else 256,
        tasks=load_tasks(["cloze"], 8 if tiny else None),
        divergence=True,
        speed=True,
        calibration=qjax.load_calibration(model, "python-docs"),
    )
    rows = qjax.run_sweep(model, sweep, out)
    write_reports(out, rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/accuracy"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(options.out, tiny=options.tiny)
