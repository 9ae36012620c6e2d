"""Whose inputs calibration should see: the orders parallel, block, sequential and qep on the bundled model, three seeds each.

    python experiments/order.py                 writes results/order/, three minutes on 2 cores
    python experiments/order.py --tiny --out X  a few windows and orders, for tests

Claim: `qep`, which also corrects every weight for the error of its inputs, costs least at 4 and at 3 bits, by more than other
calibration windows change; the other three differ by little more than that. This is why it is the default.
"""

import dataclasses
from pathlib import Path

import common

SETTINGS = common.Settings(seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    methods: tuple[str, ...] = ("gptq", "awq")
    bits: tuple[int, ...] = (4, 3)
    orders: tuple[str, ...] = ("parallel", "block", "sequential", "qep")
    settings: common.Settings = SETTINGS

    @property
    def recipes(self) -> list[str]:
        """Nearest rounding, then every method in every order."""
        formats = [f"int{bits}-g128" for bits in self.bits]
        calibrated = [f"{method}:{fmt}@{order}" for fmt in formats for method in self.methods for order in self.orders]
        return [*(f"rtn:{fmt}" for fmt in formats), *calibrated]


TINY = Experiment(("gptq(clip=mse)",), (3,), ("parallel",), dataclasses.replace(common.TINY, seeds=(0, 1)))


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures of all seeds."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        common.measure(out, subject, experiment.recipes, experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "order", run)
