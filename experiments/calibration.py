"""What calibration data should be: which text, how much of it, in how long windows; three draws of each.

    python experiments/calibration.py                 writes results/calibration/, two minutes on 2 cores
    python experiments/calibration.py --tiny --out X  a few windows and one source, for tests

One thing is varied at a time from 32 windows of 256 tokens of the text's own kind, in the order `parallel`, where the recipes
share what is captured. Questions: does text of another kind cost more than other windows of the same text do? What do fewer
tokens cost?
"""

import dataclasses
from pathlib import Path

import common

SOURCES = ("text:{data}/text/calib/c4.utf8.gz", "text:{data}/text/tinyshakespeare.txt")


SETTINGS = common.Settings(seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured. sizes: (windows, tokens of one)."""

    recipes: tuple[str, ...] = ("gptq(clip=mse):int3-g128@parallel", "awq:int3-g128@parallel")
    sources: tuple[str, ...] = SOURCES
    sizes: tuple[tuple[int, int], ...] = ((32, 256), (2, 256), (8, 256), (128, 256), (128, 64))
    settings: common.Settings = SETTINGS


TINY = Experiment(
    recipes=("gptq(clip=mse):int3-g128",),
    sources=(),
    sizes=((4, 256), (2, 256)),
    settings=dataclasses.replace(common.TINY, seeds=(0, 1)),
)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures of all seeds."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        for windows, window in experiment.sizes:
            sized = dataclasses.replace(experiment.settings, calibration_windows=windows, calibration_window=window)
            common.measure(out, subject, experiment.recipes, sized)
        for source in common.texts(experiment.sources, subject.data):
            common.measure(out, subject, experiment.recipes, experiment.settings, calibration=source)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "calibration", run)
