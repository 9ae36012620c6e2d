"""Everything that distinguishes one decoder-only language model from another, as data.

A family (Llama, GPT-2, ...) is a mapping from its own configuration file to `DecoderConfig` plus a map of parameter names
(`family.py`); the decoder itself (`decoder.py`) knows no family.
"""

import dataclasses

from qjax.errors import QjaxError

SIZE = 2**31 - 1  # what int32 positions and tokens can count
RANGES = {  # of every number of a configuration, both ends included: what any model might have, and a mistake has not
    "vocabulary_size": (1, 2**24),
    "hidden_size": (1, 2**20),
    "mlp_size": (1, 2**22),
    "layers": (1, 2**10),
    "heads": (1, 2**14),
    "kv_heads": (1, 2**14),
    "head_dim": (1, 2**16),
    "context": (2, 2**27),
    "norm_epsilon": (1e-20, 0.1),
    "rope_theta": (1.0, 1e15),
    "sliding_window": (1, SIZE),
    "bos_id": (0, SIZE),
    "eos_id": (0, SIZE),
    "rotary_fraction": (1e-3, 1.0),
    "position_offset": (0, 2**16),
    "factor": (1e-3, 1e6),
    "low_frequency_factor": (1e-3, 1e6),
    "high_frequency_factor": (1e-3, 1e6),
    "original_context": (2, 2**27),
}


def check_ranges(values: object) -> None:
    """Raises QjaxError that lists every number of a dataclass, by `RANGES`, that is out of its range or of another type."""
    problems = []
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if field.name not in RANGES or (value is None and field.default is None):
            continue
        low, high = RANGES[field.name]
        if type(value) not in ((int,) if isinstance(low, int) else (int, float)) or not low <= value <= high:
            problems.append(f"{field.name} is {value!r}, expected {low} to {high}")
    if problems:
        raise QjaxError(f"model configuration: {'; '.join(problems)}")


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
class DecoderConfig:
    """Shape and switches of a decoder. Sizes count elements; `context` counts tokens."""

    family: str
    vocabulary_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm: str = "rms"  # rms | rms_offset (the scale is 1 + offset) | layer
    norm_epsilon: float = 1e-5
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu
    gated: bool = True  # gate/up/down (SwiGLU) or up/down
    positions: str = "rope"  # rope | learned
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | LinearScaling | None = None
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    tied: bool = False  # the head multiplies with the embedding table
    bos_id: int | None = None
    eos_id: int | None = None
    # Fields from here on came later: see __repr__.
    parallel_residual: bool = False  # attention and MLP both read the block's input, rather than one after the other
    rotary_fraction: float = 1.0  # of each head, its first features, which positions rotate
    scaled_embeddings: bool = False  # those of tokens are multiplied by sqrt(hidden_size); a tied head's table is not
    position_offset: int = 0  # rows of the learned positions' table before that of position 0
    other_eos_ids: tuple = ()  # tokens that end a text besides eos_id

    @property
    def rotary_dim(self) -> int:
        """Features of a head that positions rotate."""
        return int(self.head_dim * self.rotary_fraction)

    def __repr__(self):
        """As a dataclass writes it, without later fields that stand at their default: fingerprints of models are made of
        it, and those of models measured before a field existed stay what they were.
        """
        fields = dataclasses.fields(self)
        first = [field.name for field in fields].index("eos_id") + 1
        shown = [*fields[:first], *(field for field in fields[first:] if getattr(self, field.name) != field.default)]
        return f"DecoderConfig({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in shown)})"

    def __post_init__(self):
        check_ranges(self)
        choices = {
            "norm": ("rms", "rms_offset", "layer"),
            "activation": ("silu", "gelu", "gelu_tanh", "relu"),
            "positions": ("rope", "learned"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise QjaxError(f"model configuration: {name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        low, high = RANGES["eos_id"]
        ends = self.other_eos_ids
        if not isinstance(ends, tuple) or not all(type(i) is int and low <= i <= high for i in ends):
            raise QjaxError(f"model configuration: other_eos_ids must be token ids, got {ends!r}")
        if self.heads % self.kv_heads:
            raise QjaxError(f"model configuration: {self.heads} heads cannot share {self.kv_heads} key/value heads evenly")
        if self.positions == "rope" and (self.rotary_dim == 0 or self.rotary_dim % 2):
            raise QjaxError(
                "model configuration: rotary positions need an even number of features of each head, got "
                f"{self.rotary_fraction} of {self.head_dim}"
            )
