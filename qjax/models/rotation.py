"""A decoder whose residual stream is rotated: other parameters, the same logits (QuaRot's offline part).

    x <- x Q,  Q = diag(s) H / sqrt(n):   whoever writes into the stream has W Q (embeddings, o, down), whoever reads it Q^T W
                                          (q, k, v, gate, up, a router, the head)
    norms: x / rms(x) does not see Q; gains g go into the readers, Q^T diag(g) W
    values: each head of v through a Hadamard matrix, which o undoes

A layer norm subtracts the mean: writers do it in its place, W (I - 1 1^T / n), so that the norm is that of RMS, and its
biases go into those of the readers, which have biases then, the head too (SliceGPT). A norm of embeddings goes into their
table. A tied head gets weights of its own. Parameters are computed in float64 and keep the type that they were stored in; of a
lazy model each is made when it is read.

QuaRot: Ashkboos et al. 2024 (arXiv 2404.00456); SliceGPT: Ashkboos et al. 2024 (2401.15024).
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qjax.errors import QjaxError
from qjax.hadamard import hadamard_transform, require_order
from qjax.lazy import Lazy, is_lazy, materialised
from qjax.linear import is_quantized
from qjax.models.config import DecoderConfig
from qjax.models.model import Model, require_model
from qjax.models.parameters import flatten, parameter_shapes, unflatten, with_plain_tables
from qjax.models.walk import TABLE

READS = {  # layers of a block that read the stream, and the norm before them
    **dict.fromkeys(("attention/q", "attention/k", "attention/v"), "attention_norm"),
    **dict.fromkeys(("mlp/gate", "mlp/up", "mlp/router"), "mlp_norm"),
}
WRITES = ("attention/o", "mlp/down")
NORMS = ("attention_norm", "mlp_norm", "norm")
OTHERS = ("tokens", "positions", "output", "attention", "attention/q_norm", "attention/k_norm")  # of attention: its sinks
STREAM = frozenset(f"{layer}/kernel" for layer in (*READS, "output"))  # kernels that read it, by path within their part


def rotate(model: Model, *, seed: int = 0) -> Model:
    """The model with its residual stream rotated, and the values of each head; its logits are the same.

    seed: of the signs. Raises QjaxError for a model that is quantized, a structure that no rotation goes through, and sizes of
    which no Hadamard matrix is known.
    """
    require_model("rotate", model)
    leaves, config = with_plain_tables(flatten(model.params)), rotated_config(model.config)
    if quantized := [path for path, leaf in leaves.items() if is_quantized(leaf)]:
        raise QjaxError(f"rotate: {model.name} is quantized already ({quantized[0]}); start from the unquantized model")
    shapes = parameter_shapes(config)
    if strange := [path for path in leaves if not _is_known(path)]:
        raise QjaxError(
            f"rotate: {model.name} has {strange[0]}, through which no rotation is known; take hadamard(online=true)"
        )
    made = _Rotation(model.config, leaves, np.random.default_rng(seed).choice([-1.0, 1.0], config.hidden_size))

    def leaf(path: str) -> object:
        dtype = leaves[path if path in leaves else TABLE].dtype
        make = lambda: jnp.asarray(made.leaf(path, shapes[path]), dtype)  # noqa: E731
        return Lazy(shapes[path], np.dtype(dtype), make) if is_lazy(model.params) else make()

    return model._replace(config=config, params=unflatten({path: leaf(path) for path in shapes}))


def _is_known(path: str) -> bool:
    layer = path.split("/", 1)[1].rpartition("/")[0]
    return layer in (*READS, *WRITES, *NORMS, *OTHERS)


def rotated_config(config: DecoderConfig) -> DecoderConfig:
    """The configuration of the rotated model. Raises QjaxError with the reason why there is none."""
    layer_norm = config.norm in ("layer", "layer_scale")
    refusal = None
    if config.norm_places != "before":
        refusal = "norms stand behind its branches, with gains that do not commute with a rotation of what is added"
    elif layer_norm and config.qk_norm in ("head", "width"):
        refusal = "its queries and keys have layer norms too, which would change with those of the stream"
    elif config.embedding_norm and (config.positions == "learned" or config.scaled_embeddings or config.embedding_scale != 1):
        refusal = "a norm follows its embeddings that does not go into their table"
    if refusal:
        raise QjaxError(
            f"hadamard: the residual stream of the family {config.family} cannot be rotated: {refusal}; take "
            "hadamard(online=true), which rotates every layer's input as the model runs, or hadamard(block=32)"
        )
    require_order(config.hidden_size, "hadamard: the residual stream")
    require_order(config.head_dim, "hadamard: a head of values")
    changes = {"tied": False, "embedding_norm": False}
    if layer_norm:
        changes["norm"] = "rms"
    if config.norm == "layer":
        changes |= {"qkv_bias": True, "mlp_bias": True, "head_bias": True}
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """config, leaves: of the model as it is. signs (hidden,): of the rotation."""

    config: DecoderConfig
    leaves: Mapping[str, object]
    signs: Float[np.ndarray, " hidden"]

    def leaf(self, path: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """A parameter of the rotated model, float64."""
        part, rest = path.split("/", 1)
        layer, _, kind = rest.rpartition("/")
        if kind == "embedding":
            return self.written(self.embedded(self.read(path)) if layer == "tokens" else self.read(path))
        if layer in NORMS:
            return np.zeros(shape) if kind == "offset" else np.ones(shape)
        if layer == "output":
            return self.reader(part, "norm", self.head(), kind, shape)
        if layer in READS:
            norm = "attention_norm" if self.config.shared_norm else READS[layer]
            matrix = "matrix" if layer == "mlp/router" else "kernel"
            weight = self.read(f"{part}/{layer}/{matrix}")
            found = self.reader(part, norm, weight, kind, shape, f"{part}/{layer}/bias")
            return self.by_head(found) if layer == "attention/v" else found
        if layer in WRITES and kind == "kernel":
            weight = self.read(path)
            return self.written(self.by_head(weight.T).T if layer == "attention/o" else weight)
        value = self.read(path, shape)
        return self.written(value) if layer in WRITES else value

    def read(self, path: str, shape: tuple[int, ...] | None = None) -> Float[np.ndarray, "..."]:
        """A parameter as it is; zeros of a shape where there is none."""
        if path not in self.leaves:
            return np.zeros(shape)
        return np.asarray(materialised(self.leaves[path])).astype(np.float64)

    def turned(self, x: Float[np.ndarray, "... hidden"]) -> Float[np.ndarray, "... hidden"]:
        """x Q."""
        return hadamard_transform(x * self.signs)

    def written(self, x: Float[np.ndarray, "... hidden"]) -> Float[np.ndarray, "... hidden"]:
        """What is added to the stream: less its mean where a layer norm would subtract it, and rotated."""
        return self.turned(x - x.mean(axis=-1, keepdims=True) if self.config.norm.startswith("layer") else x)

    def reader(self, part, norm, weight, kind, shape, bias="") -> Float[np.ndarray, "..."]:
        """Kernel, of experts each, or bias of a layer that reads the stream through a norm: Q^T diag(g) W, b + beta W."""
        if kind == "bias":
            beta = self.read(f"{part}/{norm}/bias", (weight.shape[-2],))
            return self.read(bias, shape) + beta @ weight
        return np.swapaxes(self.turned(np.swapaxes(self.gain(part, norm)[:, None] * weight, -1, -2)), -1, -2)

    def gain(self, part: str, norm: str) -> Float[np.ndarray, " hidden"]:
        """What a norm multiplies with."""
        if (path := f"{part}/{norm}/offset") in self.leaves:
            return 1 + self.read(path)
        return self.read(f"{part}/{norm}/scale")

    def head(self) -> Float[np.ndarray, "hidden vocabulary"]:
        """The head's weight, of the table where it is tied."""
        return self.read(TABLE).T if self.config.tied else self.read("head/output/kernel")

    def by_head(self, x: Float[np.ndarray, "... features"]) -> Float[np.ndarray, "... features"]:
        """Features of each head through a Hadamard matrix."""
        return hadamard_transform(x.reshape(*x.shape[:-1], -1, self.config.head_dim)).reshape(x.shape)

    def embedded(self, table: Float[np.ndarray, "vocabulary hidden"]) -> Float[np.ndarray, "vocabulary hidden"]:
        """The embeddings as they enter the stream, through their norm."""
        if not self.config.embedding_norm:
            return table
        centred = table - table.mean(axis=1, keepdims=True) if self.config.norm.startswith("layer") else table
        scaled = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + self.config.norm_epsilon)
        return scaled * self.gain("embed", "norm") + self.read("embed/norm/bias", (table.shape[1],))
