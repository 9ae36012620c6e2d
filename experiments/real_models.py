"""What bits cost on language models of 10^8 parameters: SmolLM2 135M and Gemma 3 270M, in perplexity, answers and divergence.

    python experiments/real_models.py                 writes results/real_models/, an hour and a half on 2 cores
    python experiments/real_models.py --tiny --out X  a few windows, questions and formats on the bundled model, for tests

The models are GGUF files of a folder outside the repository ($QJAX_TEST_MODELS or --model-folder), texts and tasks those of the
data folder. What such a file stands for is written once, in float32, to runs/models/, where `qjax rerun` finds it, and
quantized from there: its weights lie on the grid of the file's own format, to which a result at 4 bits in groups of 32 would
be too good; in groups of 64 and 128 they behave as other models' do.

Groups are of 128, and of 64 at 2 bits; of 64 throughout where 128 does not divide a layer's inputs (SmolLM2 is 576 wide): qjax
rounds such a layer, with half a group at the end of every column, but exports and kernels of other tools refuse it.

Calibration is in the order `parallel`, in which the recipes of a model share what they read, in float32. Models are measured in
bfloat16, as models of this size mostly are: products take half the time on processors that have instructions for it, and what
it changes (results/compute_types/) is no more than what weights in 8 bits cost.
"""

import dataclasses
from pathlib import Path

import common

from qjax.sweep.cells import expand

SETTINGS = common.Settings(
    max_windows=24, questions=200, calibration_windows=32, tasks=True, divergence=True, compute="bfloat16"
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured. order: of calibration."""

    methods: tuple[str, ...] = ("rtn", "gptq", "awq", "awq+gptq(clip=mse)", "gptq(clip=mse)+descend")
    bits: tuple[int, ...] = (8, 4, 3, 2)
    codebook: str = "nf4-dq"
    order: str = "parallel"
    settings: common.Settings = SETTINGS

    def recipes(self, subject: common.Subject) -> list[str]:
        """Integers in the subject's usual group, and in groups of 64 at 2 bits; the codebook."""
        groups = {width: "64" if width == 2 else subject.groups[1] for width in self.bits}
        integers = [recipe for bits in self.bits for recipe in expand(self.methods, (bits,), groups[bits], self.order)]
        return [*integers, self.codebook]


TINY = Experiment(
    methods=("rtn", "gptq(clip=mse)+descend"),
    bits=(3, 2),
    settings=dataclasses.replace(common.TINY, tasks=True, divergence=True, compute="bfloat16"),
)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        common.measure(out, subject, experiment.recipes(subject), experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "real_models", run, common.REAL)
