"""How much of GPTQ's cost on a real model is its few tokens of calibration: at 3 bits, on all and on a quarter of the text.

    python experiments/real_models_calibration.py                 writes results/real_models_calibration/, 10 minutes on 2 cores
    python experiments/real_models_calibration.py --tiny --out X  the same of few windows of the bundled model, for tests

Models, texts and the rest as in `real_models.py`, in float32. 4,096 tokens are few for the second moments of 1,536 inputs.
"""

import dataclasses
from pathlib import Path

import common
import real_models

METHODS = ("gptq", "gptq(clip=mse)+descend")
WINDOWS = (32, 8)  # of calibration
WHOLE = dataclasses.replace(real_models.SETTINGS, tasks=False, compute=None)
TINY = dataclasses.replace(common.TINY, divergence=True)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    settings, windows = (TINY, (4, 3)) if tiny else (WHOLE, WINDOWS)
    experiment = real_models.Experiment(methods=METHODS, bits=(3,))
    for subject in subjects:
        for count in windows:
            recipes = [recipe for recipe in experiment.recipes(subject) if recipe != experiment.codebook]
            common.measure(out, subject, recipes, dataclasses.replace(settings, calibration_windows=count))
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "real_models_calibration", run, ("smollm2",))
