"""Makes results/ again, one experiment after another, and writes how long each took to results/all.log too.

    python experiments/all.py small            those on models of a million parameters: an hour and a half on 2 cores
    python experiments/all.py                  those on SmolLM2 and Gemma, of training and of speed too: some eight, by estimate
    python experiments/all.py order calibration    these alone

Each runs in a process of its own, so that its times and its memory are its own. What the same code, versions and kind of
machine have measured is not measured again; rows of others stay: to start afresh, give another folder with --out, or remove
results/NAME/rows.jsonl.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

SMALL = (
    *("order", "formats_at_4_bits", "sensitivity", "calibration", "composition", "quickstart", "accuracy", "tradeoff"),
    *("paper_shapes", "bitwidth_sweep"),
)
EXPERIMENTS = (
    *(*SMALL, "kernel_benchmark", "real_models", "real_models_calibration", "activations", "training", "compute_types"),
    *("embeddings", "speed", "scaling"),
)
MADE = """from qjax.sweep.measurements.provenance import provenance
print("{device}, {versions}, code {code}".format(**provenance()))"""  # in a process that lets the device go
FOLDERS = {"kernel_benchmark": "kernels"}  # those not named like their script


def main() -> int:
    """The number of experiments that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"small, {', '.join(EXPERIMENTS)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="every experiment's tiny twin")
    options = parser.parse_args()
    names = [each for name in options.names or EXPERIMENTS for each in (SMALL if name == "small" else [name])]
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown experiments {', '.join(unknown)}; there are small, {', '.join(EXPERIMENTS)}")
    flags = ["--tiny"] if options.tiny else []
    environment = os.environ | ({"QJAX_TEST_DATA": str(options.data_folder)} if options.data_folder else {})
    out = options.out or Path("runs/tiny" if options.tiny else "results")
    out.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(line, flush=True)
        with (out / "all.log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    failed, started = 0, time.monotonic()
    made = subprocess.run([sys.executable, "-c", MADE], env=environment, capture_output=True, text=True, check=True).stdout
    say(f"{time.strftime('%Y-%m-%d %H:%M')}: {made.strip()}")
    for name in names:
        begun = time.monotonic()
        script = Path(__file__).with_name(f"{name}.py")
        folder = out / FOLDERS.get(name, name)
        done = subprocess.run([sys.executable, script, "--out", folder, *flags], env=environment, check=False)
        failed += done.returncode != 0
        say(f"{name}: {'failed after ' * bool(done.returncode)}{time.monotonic() - begun:.0f} s")
    say(f"all: {(time.monotonic() - started) / 60:.0f} min, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
