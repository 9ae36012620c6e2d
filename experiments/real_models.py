"""What bits cost on language models of 10^8 parameters: SmolLM2 135M and Gemma 3 270M, in perplexity, answers and divergence.

    python experiments/real_models.py                 writes results/real_models/, some two hours on 2 cores
    python experiments/real_models.py --tiny --out X  a few windows, questions and formats on the bundled model, for tests

The models are GGUF files of a folder outside the repository ($QJAX_TEST_MODELS or --model-folder), texts and tasks those of the
data folder. What such a file stands for is written once, in float32, to runs/models/, where `qjax rerun` finds it, and
quantized from there: its weights lie on the grid of the file's own format, to which a result at 4 bits in groups of 32 would
be too good; in groups of 64 and 128 they behave as other models' do.

Groups are of 128, and of 64 at 2 bits; of 64 throughout where 128 does not divide a layer's inputs (SmolLM2 is 576 wide): qjax
rounds such a layer, with half a group at the end of every column, but exports and kernels of other tools refuse it.

Calibration is in the order `parallel`, in which the recipes of a model share what they read. Questions take most of the time:
they are asked of the cheapest method and the two best, at 4 and 3 bits. At 3 bits GPTQ is calibrated on a quarter of the text
too, in results/real_models_calibration/: 4,096 tokens are few for the second moments of up to 2,048 inputs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import common

from qjax.sweep.cells import expand

SETTINGS = common.Settings(max_windows=24, questions=200, calibration_windows=32, divergence=True)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured. asked, asked_bits: whose models are asked questions; order: of calibration."""

    methods: tuple[str, ...] = ("rtn", "gptq", "awq", "awq+gptq(clip=mse)", "gptq(clip=mse)+descend")
    asked: tuple[str, ...] = ("rtn", "awq", "gptq(clip=mse)+descend")
    bits: tuple[int, ...] = (8, 4, 3, 2)
    asked_bits: tuple[int, ...] = (4, 3)
    codebook: str = "nf4-dq"
    shorter: tuple[str, ...] = ("gptq", "gptq(clip=mse)+descend")  # on shorter_windows of calibration text too, at shorter_bits
    shorter_bits: tuple[int, ...] = (3,)
    shorter_windows: int = 8
    order: str = "parallel"
    settings: common.Settings = SETTINGS

    def integers(self, subject: common.Subject, methods: Sequence[str], bits: Sequence[int]) -> list[str]:
        """Recipes in the subject's usual group, and in groups of 64 at 2 bits."""
        groups = {width: "64" if width == 2 else subject.groups[1] for width in bits}
        return [recipe for width in bits for recipe in expand(methods, (width,), groups[width], self.order)]


TINY = Experiment(
    methods=("rtn", "gptq(clip=mse)+descend"),
    asked=("rtn",),
    bits=(3, 2),
    asked_bits=(3,),
    shorter=("gptq(clip=mse)+descend",),
    shorter_windows=3,
    settings=dataclasses.replace(common.TINY, divergence=True),
)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    settings, calibration = experiment.settings, out.with_name(f"{out.name}_calibration")
    asking = dataclasses.replace(settings, tasks=True)
    less = dataclasses.replace(settings, calibration_windows=experiment.shorter_windows)
    for subject in subjects:
        recipes = experiment.integers(subject, experiment.methods, experiment.bits)
        common.measure(out, subject, [*recipes, experiment.codebook], settings)
        common.measure(out, subject, experiment.integers(subject, experiment.asked, experiment.asked_bits), asking)
        recipes = experiment.integers(subject, experiment.shorter, experiment.shorter_bits)
        for each in (settings, less):
            common.measure(calibration, subject, recipes, each)
    common.report(calibration)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "real_models", run, common.REAL)
