"""Do methods add up? Input scaling, error feedback and range search alone and together at 4, 3 and 2 bits, three draws each.

    python experiments/composition.py                 writes results/composition/, ten minutes on 2 cores
    python experiments/composition.py --tiny --out X  a few windows and methods, for tests

Questions: does AWQ help before GPTQ? How much of each method's gain is its search of the range? Do gains add up or overlap?
"""

import dataclasses
from pathlib import Path

import common

from qjax.sweep.cells import expand

SETTINGS = common.Settings(seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured: transforms x roundings, each with its ways to choose the range."""

    roundings: tuple[str, ...] = (
        "rtn",
        "rtn(clip=mse)",
        "rtn(clip=hessian)",
        "gptq",
        "gptq(clip=mse)",
        "gptq(clip=hessian)",
        "gptq(clip=mse)+descend",
    )
    transforms: tuple[str, ...] = ("", "awq+")
    further: tuple[str, ...] = ("awq(guard=false)", "awq(guard=false)+gptq(clip=mse)")  # the scale kept whatever it gives
    bits: tuple[int, ...] = (4, 3, 2)
    settings: common.Settings = SETTINGS


TINY = Experiment(("rtn", "gptq(clip=mse)"), ("",), (), (3,), dataclasses.replace(common.TINY, seeds=(0, 1)))


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures of all seeds."""
    experiment = TINY if tiny else Experiment()
    methods = [transform + rounding for transform in experiment.transforms for rounding in experiment.roundings]
    methods += experiment.further
    for subject in subjects:
        common.measure(out, subject, expand(methods, experiment.bits), experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "composition", run)
