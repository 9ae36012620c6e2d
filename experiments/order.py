"""Whose inputs calibration should see: the orders parallel, block, sequential and qep on the bundled model, three seeds each.

    python experiments/order.py                 writes results/order/, three to ten minutes on 2 cores
    python experiments/order.py --tiny --out X  a few windows and orders, for tests

Claim: `qep`, which also corrects every weight for the error of its inputs, costs least at 4 and at 3 bits, by more than other
calibration windows change; the other three differ by little more than that. This is why it is the default.
"""

import argparse
from pathlib import Path

import qjax
from qjax.cache import enable_compilation_cache
from qjax.evaluate.corpora import load_corpora
from qjax.report.reports import write_reports
from qjax.sweep.store import ROWS, read_rows

ORDERS = ("parallel", "block", "sequential", "qep")
SEEDS = (0, 1, 2)


def run(out: Path, *, tiny: bool = False) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures of all seeds."""
    enable_compilation_cache()
    model, corpora = qjax.load("bundled"), load_corpora(["python-docs"])
    recipes = [f"{method}:int{bits}-g128@{order}" for bits in (4, 3) for method in ("gptq", "awq") for order in ORDERS]
    recipes = ["rtn:int4-g128", "rtn:int3-g128", *recipes]
    for seed in SEEDS[:2] if tiny else SEEDS:
        sweep = qjax.Sweep(
            tuple(recipes[:3] if tiny else recipes),
            corpora,
            qjax.parse_convention("windows-2048"),
            max_windows=2 if tiny else 256,
            seed=seed,
            calibration=qjax.load_calibration(model, "python-docs", windows=4 if tiny else 128, seed=seed),
        )
        qjax.run_sweep(model, sweep, out)
    rows = read_rows(out / ROWS)
    write_reports(out, rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/order"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(options.out, tiny=options.tiny)
