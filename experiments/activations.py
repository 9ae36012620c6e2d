"""What does rounding the inputs of layers cost, and what brings it down: SmoothQuant, LLM.int8(), finer formats.

    python experiments/activations.py                 writes results/activations/, about 40 minutes on 2 idle cores
    python experiments/activations.py --tiny --out X  a few windows and recipes on the bundled model, for tests

W8A8, W4A8 and W4A4, with dynamic and static scales, LLM.int8(), SmoothQuant by alpha, MXFP4 and NVFP4; on a model as it is, and
on the same with outliers injected (`qjax.inject_outliers`: four channels of what every norm makes are 40 times as large, and
the model computes the same), as large models have them. The model with outliers is written to runs/models/, where `qjax rerun
--model` finds it. SmolLM2 is measured where the folder of models has it.

Questions: is W8A8 free (within 1 % of the float perplexity) where there are no outliers? What do outliers cost it, and how much
of that do SmoothQuant and LLM.int8() take away?
"""

import dataclasses
from pathlib import Path

import common

SETTINGS = common.Settings(max_windows=32, divergence=True, calibration_windows=16)
INT8 = "int8-channel-sym-max"
MODELS = ("bundled", "smollm2")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured. factor, channels: of injected outliers; seen: windows whose inputs are looked at."""

    eight: tuple[str, ...] = (f"rtn:{INT8}", f"rtn:{INT8}/int8-token", f"rtn:{INT8}/int8-tensor@parallel", f"llm_int8:{INT8}")
    alphas: tuple[str, ...] = ("alpha=0.25", "alpha=0.5", "alpha=0.75", "search=true")
    four: tuple[str, ...] = ("rtn:{int4}", "rtn:{int4}/int8-token", "rtn:{int4}/int4-token")
    smoothed: tuple[str, ...] = (
        "smoothquant+rtn:{int4}/int8-token@parallel",
        "smoothquant+rtn:{int4}/int4-token@parallel",
        "smoothquant+gptq:{int4}/int8-token@qep",
    )
    floats: tuple[str, ...] = ("rtn:mxfp8/mxfp8", "rtn:mxfp4/mxfp4", "rtn:nvfp4/nvfp4@parallel")
    factor: float = 40.0
    channels: int = 4
    seen: int = 4
    settings: common.Settings = SETTINGS

    def recipes(self, subject: common.Subject) -> list[str]:
        """Those of 8 bits, SmoothQuant's by alpha, of 4 bits in the subject's usual group, and of small floats."""
        by_alpha = [f"smoothquant({option})+rtn:{INT8}/int8-token@parallel" for option in self.alphas]
        four = [each.format(int4=f"int4-g{subject.groups[1]}") for each in (*self.four, *self.smoothed)]
        return [*self.eight, *by_alpha, *four, *self.floats]


TINY = Experiment((f"rtn:{INT8}/int8-token",), ("alpha=0.5",), (), (), (), seen=1, settings=common.TINY)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        injected = common.with_outliers(
            subject, experiment.factor, experiment.channels, out / "models" if tiny else common.PLAIN
        )
        for each in (subject, injected):
            common.look_at_inputs(out, each, experiment.seen)
            common.measure(out, each, experiment.recipes(each), experiment.settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "activations", run, MODELS)
