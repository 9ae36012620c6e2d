"""What every method costs at every width: 8, 4, 3 and 2 bits, groups of 32 and 128 (or 64) and whole channels, on three models.

    python experiments/bitwidth_sweep.py                 writes results/bitwidth_sweep/, half an hour on 2 cores
    python experiments/bitwidth_sweep.py --tiny --out X  a few windows and formats, for tests

Questions: does perplexity fall with every bit and with smaller groups, for every method? Where do calibrated methods begin to
matter? Do KL divergence and the most likely token tell the same story as perplexity, on text like the calibration text and on
other text?
"""

import dataclasses
from pathlib import Path

import common

from qjax.sweep.cells import expand

SETTINGS = common.Settings(divergence=True, seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    methods: tuple[str, ...] = ("rtn", "gptq(clip=mse)", "awq", "awq+gptq(clip=mse)")
    bits: tuple[int, ...] = (8, 4, 3, 2)
    codebooks: tuple[str, ...] = ("nf4", "fp4")
    groups: tuple[str, ...] | None = None  # the subject's
    settings: common.Settings = SETTINGS

    def recipes(self, subject: common.Subject) -> list[str]:
        """Integers of every width and codebooks, in each group."""
        groups = self.groups or subject.groups
        integers = [recipe for group in groups for recipe in expand(self.methods, self.bits, group)]
        return [*integers, *(recipe for group in groups for recipe in expand(self.codebooks, (4,), group))]


TINY = Experiment(
    methods=("rtn", "rtn(clip=mse)"),
    bits=(4, 3),
    codebooks=("nf4",),
    groups=("32", "128"),
    settings=common.TINY,
)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        common.measure(out, subject, experiment.recipes(subject), experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "bitwidth_sweep", run, common.LOCAL)
