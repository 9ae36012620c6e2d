"""How a training goes: numbers that are checked as they are given. No JAX: a mistake is told before it is imported."""

import dataclasses
import math
from typing import Literal

from qjax.errors import QjaxError

LEARNS = {"weights": "weight", "scales": "scale", "zeros": "zero"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a run goes, given its text and its model."""

    steps: int
    batch: int = 8  # windows a step
    micro_batch: int = 1  # windows in memory at a time, per device
    window: int = 512  # tokens of a window that are predicted
    learning_rate: float = 2e-4  # after the warm-up
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # how it falls to zero
    warmup: float = 0.03  # share of the steps
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("steps", "batch", "micro_batch", "window")}
        rates = {name: getattr(self, name) for name in ("learning_rate", "clip_norm", "weight_decay", "warmup")}
        schedules = ("linear", "cosine", "constant")
        if (
            min(sizes.values()) < 1
            or self.batch % self.micro_batch
            or not all(math.isfinite(rate) and rate >= 0 for rate in rates.values())
            or not (self.learning_rate > 0 and self.clip_norm > 0 and self.warmup < 1)
            or self.schedule not in schedules
            or self.seed < 0
        ):
            others = {"schedule": self.schedule, "seed": self.seed}
            told = ", ".join(f"{name}={value}" for name, value in (sizes | rates | others).items())
            raise QjaxError(
                f"training: got {told}; expected sizes of at least 1, a batch that micro_batch divides, rates above 0, a "
                f"warmup below 1, a schedule of {', '.join(schedules)} and a seed of at least 0"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.window


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What adapters there are. targets: patterns of kernels, as in rules ("mlp/down", "q_proj"); none: all of the blocks but
    experts, which take none.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    start: Literal["gaussian", "loftq", "qera", "pissa"] = "gaussian"
    rounds: int = 1  # of loftq

    def __post_init__(self):
        from qjax.grammar import require_pattern  # which imports NumPy

        for target in self.targets:
            require_pattern("adapters", target)
        starts = ("gaussian", "loftq", "qera", "pissa")
        if self.rank < 1 or self.rounds < 1 or not (math.isfinite(self.alpha) and self.alpha > 0) or self.start not in starts:
            raise QjaxError(
                f"adapters: got rank={self.rank}, alpha={self.alpha}, start={self.start!r}, rounds={self.rounds}; expected a "
                f"rank and rounds of at least 1, alpha above 0 and a start of {', '.join(starts)}"
            )

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class QatConfig:
    """What is learned, by which loss. rate: of scales and zeros, as a share of the weights' learning rate. normalised: their
    gradients are scaled as in LSQ, which Adam takes out again but for clipping.
    """

    learns: tuple[str, ...] = ("weights", "scales", "zeros")
    loss: Literal["next-token", "kl"] = "next-token"
    rate: float = 1.0
    normalised: bool = True

    def __post_init__(self):
        losses = ("next-token", "kl")
        if not self.learns or set(self.learns) - set(LEARNS) or self.loss not in losses or not (0 < self.rate < math.inf):
            raise QjaxError(
                f"quantization-aware training: got learns={self.learns}, loss={self.loss!r}, rate={self.rate}; expected some "
                f"of {', '.join(LEARNS)}, a loss of {', '.join(losses)} and a rate above 0"
            )
