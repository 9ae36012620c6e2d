"""What each precision buys and costs: bytes, tokens a second, perplexity, accuracy; and the memory of a 7B Llama.

    python experiments/tradeoff.py                 writes results/tradeoff/, five minutes on 2 cores, which should be idle
    python experiments/tradeoff.py --tiny --out X  a few windows, questions and formats, for tests

Question: what does a user get for each bit left out? Integers by nearest rounding and by GPTQ with range search, NF4 as QLoRA.
"""

import dataclasses
from pathlib import Path

import common

from qjax.report.memory import memory_row

# (inputs, outputs) of Llama-2-7B's linear layers; (elements, bytes of one) of embedding, head and norms, which stay at 16 bits.
LLAMA_2_7B = {
    "shapes": 32 * [*4 * [(4096, 4096)], *2 * [(4096, 11008)], (11008, 4096)],
    "others": [(2 * 32000 * 4096, 2), (65 * 4096, 2)],
}


SETTINGS = common.Settings(max_windows=None, questions=None, tasks=True, speed=True, calibration_windows=128)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    recipes: tuple[str, ...] = (
        *("fp32", "bf16", "nf4-g64", "nf4-g64-dq"),
        *(f"{method}:int{bits}-g128" for method in ("rtn", "gptq(clip=mse)") for bits in (8, 4, 3, 2)),
    )
    settings: common.Settings = SETTINGS


TINY = Experiment(("nf4-g64-dq",), dataclasses.replace(common.TINY, tasks=True, speed=True))


def run(out: Path, *, tiny: bool = False, subjects: tuple[common.Subject, ...] = common.BUNDLED) -> list[dict[str, object]]:
    """Measures what is missing in out/rows.jsonl and writes the tables and figures."""
    experiment = TINY if tiny else Experiment()
    for subject in subjects:
        common.measure(out, subject, experiment.recipes, experiment.settings)
    common.add_row(out, memory_row("Llama-2-7B", **LLAMA_2_7B))
    return common.report(out)


if __name__ == "__main__":
    common.main(__doc__, "tradeoff", run)
