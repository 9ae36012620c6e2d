"""How rotary frequencies are stretched beyond the context that a model began with, as data; `rope.py` computes them.

Two of them depend on how long a text is, which the layers of a compiled model do not know. Within the context that the model
began with neither does, and models that have them run up to that context and no further:

    dynamic     changes nothing up to `max_position_embeddings`, which is the context of these models in any case
    longrope    has the short factors up to the original context; the long ones are kept to be written back
"""

import dataclasses
import math

from qjax.errors import QjaxError
from qjax.models.ranges import check_ranges


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of rotary frequencies (Grattafiori et al. 2024, arXiv 2407.21783)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int

    def __post_init__(self):
        check_ranges(self)
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise QjaxError(
                f"model configuration: the high frequency factor is {self.high_frequency_factor}, expected one above the low, "
                f"{self.low_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): positions are divided by `factor`."""

    factor: float

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling by the length of the text (bloc97 and emozilla 2023): none within the model's context."""

    factor: float

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow pairs are stretched, fast ones stay, cosines and sines grow."""

    factor: float
    original_context: int
    fast_turns: float = 32.0  # pairs that turn more often within the original context stay
    slow_turns: float = 1.0  # those that turn less often are stretched by the whole factor
    amplitude: float | None = None  # of cosines and sines; by the paper, or by the next two, where there is none
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp's ends are whole numbers of pairs

    def __post_init__(self):
        check_ranges(self)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""

        def growth(scale: float) -> float:
            return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.amplitude is not None:
            return self.amplitude
        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor for each pair's frequency, short and long texts' own."""

    short: tuple
    long: tuple
    original_context: int
    context: int  # that of long texts
    factor: float | None = None  # context / original_context where there is none
    amplitude: float | None = None

    def __post_init__(self):
        check_ranges(self)
        for name in ("short", "long"):
            factors = getattr(self, name)
            if not factors or any(type(each) not in (int, float) or not 1e-6 <= each <= 1e6 for each in factors):
                raise QjaxError(f"model configuration: the {name} factors of longrope must be positive numbers")

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        factor = self.context / self.original_context if self.factor is None else self.factor
        if self.amplitude is not None:
            return self.amplitude
        return math.sqrt(1 + math.log(factor) / math.log(self.original_context)) if factor > 1 else 1.0


Scaling = Llama3Scaling | LinearScaling | DynamicScaling | YarnScaling | LongScaling
SCALINGS = {  # by the name that files give them
    "llama3": Llama3Scaling,
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "longrope": LongScaling,
}
