"""What bits cost in accuracy and in divergence, beside perplexity: the bundled model, its held-out text, the built-in task.

    python experiments/accuracy.py                 writes results/accuracy/, ten minutes on 2 cores
    python experiments/accuracy.py --tiny --out X  a few windows, questions and formats, for tests

Claim: accuracy follows perplexity but is far noisier, so that differences at 8 bits are within noise; KL divergence
resolves them, flips from 4 bits on.
"""

import dataclasses
from pathlib import Path

import common

SETTINGS = common.Settings(max_windows=256, questions=None, tasks=True, divergence=True, seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    recipes: tuple[str, ...] = (
        *("rtn:int8-g128", "rtn:int4-g128", "rtn(clip=mse):int4-g128", "nf4-g64", "rtn:int3-g128", "rtn(clip=mse):int3-g128"),
        *("rtn:int2-g128", "rtn(clip=mse):int2-g128", "awq:int4-g128", "awq:int3-g128"),
        *("gptq(clip=mse):int4-g128", "gptq(clip=mse):int3-g128", "gptq(clip=mse):int2-g128"),
    )
    settings: common.Settings = SETTINGS


TINY = Experiment(recipes=("rtn:int8-g128",), settings=dataclasses.replace(common.TINY, tasks=True, divergence=True))


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        common.measure(out, subject, experiment.recipes, experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "accuracy", run)
