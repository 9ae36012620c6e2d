"""Everything that distinguishes one decoder-only language model from another, as data.

A family (Llama, GPT-2, ...) is a mapping from its own configuration file to `DecoderConfig` plus a map of parameter names
(`family.py`); the decoder itself (`decoder.py`) knows no family.
"""

import dataclasses

from qjax.cache_format import CacheFormat, parse_cache_format, require_fit
from qjax.errors import QjaxError
from qjax.models.ranges import RANGES, check_ranges
from qjax.models.scalings import LongScaling, Scaling

POSITIONS = ("rope", "learned", "alibi", "alibi_scaled", "none")


CHOICES = {
    "norm": ("rms", "rms_offset", "layer", "layer_scale"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"),
    "positions": POSITIONS,
    "norm_places": ("before", "both", "after"),
    "qk_norm": ("none", "head", "each_head", "width"),
}


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one layer has of its own where the layers of a model differ: the fields of DecoderConfig with these names."""

    sliding_window: int | None = None
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None

    def __post_init__(self):
        check_ranges(self)
        check_choice("positions", self.positions, POSITIONS)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises QjaxError that lists what is allowed."""
    if value not in allowed:
        raise QjaxError(f"model configuration: {name} is {value!r}; allowed: {', '.join(allowed)}")


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
    norm: str = "rms"  # rms | rms_offset (the scale is 1 + offset) | layer | layer_scale (without a bias)
    norm_epsilon: float = 1e-5
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu | swiglu_oai (gated, `mlp.py`)
    gated: bool = True  # gate/up/down (SwiGLU) or up/down
    positions: str = "rope"  # rope | learned | alibi | alibi_scaled (as Falcon has it) | none
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False  # of a mixture: of every expert, and of the router
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
    kinds: tuple = ()  # a LayerKind for every layer, where layers differ; the fields that it names are then the first layer's
    norm_places: str = "before"  # before | both | after: what is normalised, a branch's input, what it adds, or both
    qk_norm: str = "none"  # of queries and keys: none | head | each_head (a scale for each) | width (all heads together)
    attention_scale: float | None = None  # of scores; head_dim ** -0.5 where there is none
    attention_softcap: float | None = None  # c: scores become c tanh(score / c)
    logit_softcap: float | None = None
    rope_interleaved: bool = False  # positions rotate pairs of neighbouring features, rather than (i, i + half)
    shared_norm: bool = False  # parallel branches read the output of one norm
    embedding_norm: bool = False
    embedding_scale: float = 1.0  # of the tokens' embeddings
    residual_scale: float = 1.0  # of what a branch adds
    logit_scale: float = 1.0
    experts: int = 0  # of the mixture in the MLP's place, each with mlp_size (`mixture.py`); 0: an MLP
    experts_per_token: int = 0
    normalised_shares: bool = True  # a token's experts' shares add up to 1
    head_bias: bool = False  # of a head of its own
    cache_format: str | None = None  # of keys and values that are kept (`cache_format.py`); in the compute type without one
    attention_sinks: bool = False  # each head has a logit that joins the softmax and mixes in no value

    @property
    def cache(self) -> CacheFormat | None:
        """The cache's format."""
        return None if self.cache_format is None else parse_cache_format(self.cache_format)

    @property
    def cache_bytes(self) -> tuple[float, int]:
        """Exact bytes of a token's keys and values in all layers, 16 bits each without a cache format, and of those that stay
        in 16 bits besides, of a text.
        """
        if self.cache is None:
            return 2.0 * 2 * self.layers * self.kv_heads * self.head_dim, 0
        shape = self.kv_heads, self.head_dim
        return self.layers * self.cache.bytes_per_token(*shape), self.layers * self.cache.window_bytes(*shape)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, whether they differ or not."""
        fields = dataclasses.fields(LayerKind)
        return self.kinds or (LayerKind(**{field.name: getattr(self, field.name) for field in fields}),) * self.layers

    def of_layer(self, number: int) -> "DecoderConfig":
        """The configuration of one layer's block: itself where all are equal; equal for layers of one kind."""
        return dataclasses.replace(self, kinds=(), **vars(self.kinds[number])) if self.kinds else self

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
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.kinds and (len(self.kinds) != self.layers or not all(isinstance(kind, LayerKind) for kind in self.kinds)):
            raise QjaxError(f"model configuration: kinds are {len(self.kinds)} of {self.layers} layers, each a LayerKind")
        if self.shared_norm and not (self.parallel_residual and self.norm_places == "before"):
            raise QjaxError("model configuration: shared_norm needs parallel_residual, and norms before the branches")
        if self.experts and not (0 < self.experts_per_token <= self.experts and self.gated):
            raise QjaxError(
                f"model configuration: {self.experts} experts, {self.experts_per_token} for a token; expected 1 to all of "
                "them, gated"
            )
        if self.activation == "swiglu_oai" and not self.gated:
            raise QjaxError("model configuration: swiglu_oai is made of gate and up; expected an MLP that is gated")
        for each in (self, *self.kinds):
            _check_long(each.rope_scaling, self.context, self.rotary_dim)
        low, high = RANGES["eos_id"]
        ends = self.other_eos_ids
        if not isinstance(ends, tuple) or not all(type(i) is int and low <= i <= high for i in ends):
            raise QjaxError(f"model configuration: other_eos_ids must be token ids, got {ends!r}")
        if self.cache_format is not None:
            require_fit(parse_cache_format(self.cache_format), self.head_dim)
        if self.heads % self.kv_heads:
            raise QjaxError(f"model configuration: {self.heads} heads cannot share {self.kv_heads} key/value heads evenly")
        if self.positions == "rope" and (self.rotary_dim == 0 or self.rotary_dim % 2):
            raise QjaxError(
                "model configuration: rotary positions need an even number of features of each head, got "
                f"{self.rotary_fraction} of {self.head_dim}"
            )


def _check_long(scaling: Scaling | None, context: int, rotary_dim: int) -> None:
    """Raises QjaxError where longrope has not a factor for each pair, or is asked for texts of which it has no short ones."""
    if not isinstance(scaling, LongScaling):
        return
    if context > scaling.original_context:
        raise QjaxError(
            f"model configuration: a context of {context}; with longrope it is at most the original one, "
            f"{scaling.original_context}: beyond it frequencies would depend on the length of the text"
        )
    if {len(scaling.short), len(scaling.long)} != {rotary_dim // 2}:
        raise QjaxError(
            f"model configuration: longrope has {len(scaling.short)} short and {len(scaling.long)} long factors, expected "
            f"{rotary_dim // 2}, one for each pair of features"
        )
