"""What fewer bits cost in the table of embeddings, alone and beside linear layers of 4 bits, by nearest rounding.

    python experiments/embeddings.py                 writes results/embeddings/, some seven minutes on 2 cores
    python experiments/embeddings.py --tiny --out X  two widths on a few windows, for tests

The table holds a tenth of the bundled model's weights, a fifth of SmolLM2's and most of Gemma 3's; the head is tied to it, so
that logits are products with what its codes stand for. Questions: how many bits does it need, and does it cost the same beside
rounded layers as alone? SmolLM2 and Gemma 3 are measured as by `real_models.py`.
"""

import dataclasses
from pathlib import Path

import common

from qjax.recipe import UNQUANTIZED

SETTINGS = common.Settings()
LARGE = common.Settings(max_windows=24, compute="bfloat16")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured. bits: of the table, in groups of 64; settings, large: of small and of large models."""

    bits: tuple[int, ...] = (8, 4, 3, 2)
    settings: common.Settings = SETTINGS
    large: common.Settings = LARGE

    @property
    def rules(self) -> list[tuple[str, ...]]:
        """None, and the table in every width."""
        return [(), *((f"embed=rtn:int{bits}-g64",) for bits in self.bits)]


TINY = Experiment((8, 2), common.TINY, common.TINY)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        settings = experiment.large if subject.large else experiment.settings
        for rules in experiment.rules:
            common.measure(out, subject, (UNQUANTIZED, f"rtn:int4-g{subject.groups[1]}"), settings, rules=rules)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "embeddings", run, ("bundled", *common.REAL))
