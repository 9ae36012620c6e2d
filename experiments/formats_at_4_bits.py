"""Which 16 values should 4 bits stand for? Codebooks and integers with equal groups, by nearest rounding and by GPTQ.

    python experiments/formats_at_4_bits.py                 writes results/formats_at_4_bits/, ten minutes on 2 cores
    python experiments/formats_at_4_bits.py --tiny --out X  a few windows and formats, for tests

NF4, FP4-E2M1 and bitsandbytes' FP4; integers symmetric about zero with the scale max/7 and max/7.5, and affine ones, whose zero
point costs as many bits as a weight; scales as they are and doubly quantized. Questions: does NF4's advantage over integers at
nearest rounding outlast GPTQ? Does double quantization change anything that can be measured?
"""

import dataclasses
from pathlib import Path

import common

SETTINGS = common.Settings(divergence=True, seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    methods: tuple[str, ...] = ("rtn", "gptq")
    grids: tuple[str, ...] = ("nf4-g{}", "fp4_e2m1-g{}", "fp4_bnb-g{}", "int4-g{}-sym-max", "int4-g{}-sym", "int4-g{}")
    groups: tuple[int, ...] = (64, 128)
    scales: tuple[str, ...] = ("", "-dq")
    settings: common.Settings = SETTINGS

    @property
    def recipes(self) -> list[str]:
        """Every method in every format."""
        formats = [grid.format(group) + scale for grid in self.grids for group in self.groups for scale in self.scales]
        return [f"{method}:{fmt}" for method in self.methods for fmt in formats]


TINY = Experiment(("rtn",), ("nf4-g{}", "int4-g{}-sym-max"), (64,), settings=dataclasses.replace(common.TINY, divergence=True))


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        common.measure(out, subject, experiment.recipes, experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "formats_at_4_bits", run)
