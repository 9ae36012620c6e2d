"""How rotary frequencies are stretched beyond the context that a model began with, as data; `rope.py` computes them."""

import dataclasses

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


Scaling = Llama3Scaling | LinearScaling
SCALINGS = {"llama3": Llama3Scaling, "linear": LinearScaling}  # by the name that files give them
