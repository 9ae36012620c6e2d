"""The quickstart's figures: methods at 8, 4, 3 and 2 bits on the bundled model and the held-out python-docs, three draws each.

    python experiments/quickstart.py                writes results/quickstart/, ten minutes on 2 cores
    python experiments/quickstart.py --tiny --out X  a few windows and formats, for tests

Claims: perplexity does not fall with fewer bits; 8 bits cost one or two hundredths of a percent, which the paired difference
hardly resolves; GPTQ with range search, refinement and error propagation costs at 4, 3 and 2 bits less than 0.45, 0.32 and 0.10
of what nearest rounding does.
"""

import dataclasses
from pathlib import Path

import common

from qjax.sweep.cells import expand

SETTINGS = common.Settings(max_windows=256, seeds=(0, 1, 2), calibration_windows=128)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    methods: tuple[str, ...] = (
        *("rtn", "rtn(clip=mse)", "gptq", "gptq(clip=mse)", "gptq(clip=mse)+descend"),
        *("awq", "awq+gptq(clip=mse)", "awq+gptq(clip=mse)+descend", "nf4", "nf4-dq", "fp4", "bf16"),
    )
    bits: tuple[int, ...] = (4, 3, 2)
    of_8_bits: tuple[str, ...] = ("rtn", "gptq", "awq")
    settings: common.Settings = SETTINGS


TINY = Experiment(methods=("rtn", "gptq(clip=mse)"), bits=(4, 3), of_8_bits=("rtn",), settings=common.TINY)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        recipes = [*expand(experiment.of_8_bits, (8,)), *expand(experiment.methods, experiment.bits)]
        common.measure(out, subject, recipes, experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "quickstart", run)
