"""Where bits are missed most: one block quantized at a time, and one kind of linear layer at a time, the rest as it is.

    python experiments/sensitivity.py                 writes results/sensitivity/, two minutes on 2 cores
    python experiments/sensitivity.py --tiny --out X  one kind of layer on a few windows, for tests

Questions: are some blocks or kinds worth more bits than others? Is what the parts cost, added up, what the whole costs?
"""

import dataclasses
import re
from pathlib import Path

import common

from qjax.recipe import UNQUANTIZED

SETTINGS = common.Settings(seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured. kinds: patterns of kernels' paths; those of which a model has none are left out."""

    recipes: tuple[str, ...] = ("rtn:int3-g128", "gptq(clip=mse):int3-g128")
    blocks: bool = True
    kinds: tuple[str, ...] = (
        "attention/q/",
        "attention/k/",
        "attention/v/",
        "attention/o/",
        "mlp/gate/",
        "mlp/up/",
        "mlp/down/",
    )
    settings: common.Settings = SETTINGS


TINY = Experiment(recipes=("rtn:int3-g128",), blocks=False, kinds=("mlp/down/",), settings=common.TINY)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        common.measure(out, subject, experiment.recipes, experiment.settings)  # the whole, to compare the sum with
        if experiment.blocks:
            common.measure(out, subject, experiment.recipes, experiment.settings, one_block=True)
        kernels = common.kernels(subject)
        kinds = [kind for kind in experiment.kinds if any(re.search(kind, path) for path in kernels)]
        for recipe in experiment.recipes:
            for kind in kinds:
                common.measure(out, subject, (UNQUANTIZED,), experiment.settings, rules=(f"{kind}={recipe}",))
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "sensitivity", run)
