"""What does rounding inputs of layers and caches cost, and what brings it down: SmoothQuant, LLM.int8(), rotations, formats.

    python experiments/activations.py                 writes results/activations/, about 40 minutes on 2 idle cores
    python experiments/activations.py --tiny --out X  a few windows and recipes on the bundled model, for tests

W8A8, W4A8 and W4A4, with dynamic and static scales, LLM.int8(), SmoothQuant by alpha, MXFP4 and NVFP4 with and without block
rotations, QuaRot, caches of keys and values in 8, 4 and 2 bits; on a model as it is, and on small ones with outliers
injected too (`qjax.inject_outliers`: four channels of what every norm makes are 40 times as large, and the model computes the
same), as large models have them. Models with outliers are written to runs/models/, where `qjax rerun --model` finds them.
SmolLM2 is measured where the folder of models has it, on fewer tokens.

Questions: is W8A8 free (within 1 % of the float perplexity) where there are no outliers? What do outliers cost it, and how much
of that do SmoothQuant and LLM.int8() take away? How much of W4A4's loss does a rotation recover? Are caches of 8 bits within
0.1 %, of 4 within 1 %?
"""

import dataclasses
from pathlib import Path

import common

SETTINGS = common.Settings(max_windows=32, divergence=True, calibration_windows=16)
INT8 = "int8-channel-sym-max"
UNDIVIDED = "stories260K"  # has layers with 172 inputs, which no block of 16 or 32 divides
MODELS = ("bundled", "stories260K", "smollm2")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured. factor, channels: of injected outliers; seen: windows whose inputs are looked at."""

    eight: tuple[str, ...] = (f"rtn:{INT8}", f"rtn:{INT8}/int8-token", f"llm_int8:{INT8}")
    static: tuple[str, ...] = tuple(f"{each}rtn:{INT8}/int8-tensor@parallel" for each in ("", "smoothquant+", "hadamard+"))
    alphas: tuple[str, ...] = ("alpha=0.25", "alpha=0.5", "alpha=0.75", "search=true")
    four: tuple[str, ...] = ("rtn:{int4}", "rtn:{int4}/int8-token", "rtn:{int4}/int4-token")
    smoothed: tuple[str, ...] = (
        "smoothquant+rtn:{int4}/int8-token@parallel",
        "smoothquant+rtn:{int4}/int4-token@parallel",
        "smoothquant+gptq:{int4}/int8-token@qep",
    )
    floats: tuple[str, ...] = (
        *("rtn:mxfp8/mxfp8", "rtn:mxfp4/mxfp4", "hadamard(block=32)+rtn:mxfp4/mxfp4"),
        *("rtn:nvfp4/nvfp4@parallel", "rtn:nvfp4", "hadamard(block=16)+rtn:nvfp4"),
        "hadamard(block=16)+rtn:nvfp4/nvfp4@parallel",
    )
    rotated: tuple[str, ...] = (
        *("rtn:int4-channel", "rtn:int4-channel/int4-token", "hadamard+rtn:int4-channel/int4-token"),
        *("gptq:int4-channel/int4-token@qep", "hadamard+gptq:int4-channel/int4-token@qep"),
    )
    caches: tuple[str, ...] = (
        *("kv:int8-token", "kv:fp8_e4m3-token", "kv:int4-token", "hadamard:int8-channel kv:int4-token"),
        *("kv:int8-g32", "kv:int4-g32", "kv:int2-g32", "kv:int4-g32(residual=32)", "kv:int2-g32(residual=32)"),
    )
    large: int = 8  # windows of large subjects
    of_large: tuple[str, ...] = (  # whose inputs have outliers, smaller than 6, as they are
        *(f"llm_int8(threshold=3):{INT8}", f"rtn:{INT8}/int8-g64", f"rtn:{INT8}/fp8_e4m3-token"),
        f"hadamard+rtn:{INT8}/int8-token",
    )
    factor: float = 40.0
    channels: int = 4
    seen: int = 4
    settings: common.Settings = SETTINGS

    def recipes(self, subject: common.Subject) -> list[str]:
        """Those of 8 bits, SmoothQuant's by alpha, of 4 bits in the subject's usual group, of small floats, rotated, caches."""
        by_alpha = [f"smoothquant({option})+rtn:{INT8}/int8-token@parallel" for option in self.alphas]
        four = [each.format(int4=f"int4-g{subject.groups[1]}") for each in (*self.four, *self.smoothed)]
        of_large = self.of_large if subject.large else ()
        recipes = [*self.eight, *self.static, *by_alpha, *of_large, *four, *self.floats, *self.rotated, *self.caches]
        return [each for each in recipes if "(block=" not in each or UNDIVIDED not in subject.model]


TINY = Experiment(
    (f"rtn:{INT8}/int8-token",), (), ("alpha=0.5",), (), (), (), (), ("kv:int8-token",), seen=1, settings=common.TINY
)


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        settings, measured = experiment.settings, [subject]
        if subject.large:
            settings = dataclasses.replace(settings, max_windows=experiment.large)
        else:
            folder = out / "models" if tiny else common.PLAIN
            measured.append(common.with_outliers(subject, experiment.factor, experiment.channels, folder))
        for each in measured:
            common.look_at_inputs(out, each, experiment.seen)
            common.measure(out, each, experiment.recipes(each), settings)
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "activations", run, MODELS)
