"""Everything that distinguishes one decoder-only language model from another, as data.

A family (Llama, GPT-2, ...) is a mapping from its own configuration file to `DecoderConfig` plus a map of parameter names
(`family.py`); the decoder itself (`decoder.py`) knows no family.
"""

import dataclasses

from qjax.errors import QjaxError


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of rotary frequencies (Grattafiori et al. 2024, arXiv 2407.21783)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): positions are divided by `factor`."""

    factor: float


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
        sizes = ("vocabulary_size", "hidden_size", "mlp_size", "layers", "heads", "kv_heads", "head_dim", "context")
        bad = {name: value for name in sizes if not isinstance(value := getattr(self, name), int) or value < 1}
        if bad:
            raise QjaxError(f"model configuration: sizes must be positive integers, got {bad}")
        huge = {name: value for name in sizes if (value := getattr(self, name)) >= (10_000 if name == "layers" else 2**31)}
        if huge or self.context < 2:
            raise QjaxError(f"model configuration: sizes out of all bounds: {huge or {'context': self.context}}")
        choices = {
            "norm": ("rms", "rms_offset", "layer"),
            "activation": ("silu", "gelu", "gelu_tanh", "relu"),
            "positions": ("rope", "learned"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise QjaxError(f"model configuration: {name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not isinstance(self.position_offset, int) or not 0 <= self.position_offset < 2**31:
            raise QjaxError(f"model configuration: position_offset must not be negative, got {self.position_offset!r}")
        if not isinstance(self.other_eos_ids, tuple) or not all(type(i) is int and 0 <= i < 2**31 for i in self.other_eos_ids):
            raise QjaxError(f"model configuration: other_eos_ids must be token ids, got {self.other_eos_ids!r}")
        if self.heads % self.kv_heads:
            raise QjaxError(f"model configuration: {self.heads} heads cannot share {self.kv_heads} key/value heads evenly")
        if self.rope_theta <= 0:
            raise QjaxError(f"model configuration: rope_theta must be above 0, got {self.rope_theta}")
        if self.positions == "rope" and not (
            0 < self.rotary_fraction <= 1 and self.rotary_dim > 0 and self.rotary_dim % 2 == 0
        ):
            raise QjaxError(
                "model configuration: rotary positions need an even number of features of each head, got "
                f"{self.rotary_fraction} of {self.head_dim}"
            )
