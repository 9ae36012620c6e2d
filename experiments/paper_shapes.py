"""Which findings of the GPTQ, AWQ and QLoRA papers hold on models of a million parameters? (`qjax/report/paper_shapes.py`)

    python experiments/paper_shapes.py                 writes results/paper_shapes/, eight minutes on 2 cores
    python experiments/paper_shapes.py --tiny --out X  a few windows and formats, for tests

Every recipe that a finding needs, with the papers' act-order, inputs and formats, but our text and amount of calibration:
GPTQ's without act-order sees the quantized blocks before, LLaMA's GPTQ has act-order and sees the quantized layers before,
AWQ's sees the unquantized model. Three draws of calibration windows.
"""

import dataclasses
from pathlib import Path

import common

from qjax.report.paper_shapes import KIND, recipes_of

SETTINGS = common.Settings(max_windows=128, tasks=True, seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    recipes: tuple[str, ...] = tuple(recipes_of())
    settings: common.Settings = SETTINGS


TINY = Experiment(("rtn:nf4-g64-dq", "rtn:int4-g64-sym-max"), dataclasses.replace(common.TINY, tasks=True))


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures of all seeds."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        first = dataclasses.replace(subject, corpora=subject.corpora[:1])
        common.measure(out, first, experiment.recipes, experiment.settings)
    common.add_row(out, {"kind": KIND, "key": KIND})
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "paper_shapes", run, common.LOCAL)
