"""Makes the whole of results/ again, one experiment after another, and prints how long each took.

    python experiments/all.py                  some eight hours on 2 cores, by estimate
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

EXPERIMENTS = (
    *("kernel_benchmark", "tradeoff", "quickstart", "accuracy", "order", "paper_shapes", "formats_at_4_bits", "sensitivity"),
    *("calibration", "composition", "bitwidth_sweep", "real_models", "activations", "training", "compute_types"),
    *("speed", "scaling"),
)
FOLDERS = {"kernel_benchmark": "kernels"}  # those not named like their script


def main() -> int:
    """The number of experiments that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="every experiment's tiny twin")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown experiments {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    flags = ["--tiny"] if options.tiny else []
    environment = os.environ | ({"QJAX_TEST_DATA": str(options.data_folder)} if options.data_folder else {})
    failed, started = 0, time.monotonic()
    for name in options.names or EXPERIMENTS:
        begun = time.monotonic()
        script = Path(__file__).with_name(f"{name}.py")
        folder = (options.out or Path("runs/tiny" if options.tiny else "results")) / FOLDERS.get(name, name)
        done = subprocess.run([sys.executable, script, "--out", folder, *flags], env=environment, check=False)
        failed += done.returncode != 0
        print(f"{name}: {'failed after ' * bool(done.returncode)}{time.monotonic() - begun:.0f} s", flush=True)
    print(f"all: {(time.monotonic() - started) / 60:.0f} min, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
