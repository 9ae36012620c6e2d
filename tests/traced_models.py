"""Tiny models with the shapes of JAX's libraries, written here: a function of parameters, and each layer as a plain product.

All matrices are (8, 8), so that what is compiled for one serves all.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Case(NamedTuple):
    """products(params, x): for each matrix by name, it as (in, out) and the rows it multiplies."""

    fn: Callable
    params: object
    products: Callable
    rules: tuple[str, ...] = ()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.5


X = normal(0, 2, 8, 8)  # (batch, time, hidden)


def rows(x):
    return x.reshape(-1, x.shape[-1])


def attention_einsums(p, x):  # as in Tunix
    q = jnp.einsum("BTD,DNH->BTNH", x, p["q"]["w"])
    return jnp.einsum("BTNH,NHD->BTD", jnp.tanh(q), p["o"]["w"])


def attention_products(p, x):
    q, o = p["q"]["w"].reshape(8, 8), p["o"]["w"].reshape(8, 8)
    return {"q/w": (q, rows(x)), "o/w": (o, jnp.tanh(rows(x) @ q))}


def experts(p, x):  # every expert on all tokens, then each on its own
    h = jnp.einsum("BTD,EDF->EBTF", x, p["up"])
    return jnp.einsum("EBTF,EFD->EBTD", jnp.tanh(h), p["down"])


def expert_products(p, x):
    up = p["up"].transpose(1, 0, 2).reshape(8, 8)
    h = jnp.tanh(rows(x) @ up).reshape(16, 2, 4)
    return {"up": (up, rows(x))} | {f"down[{e}]": (p["down"][e], h[:, e]) for e in range(2)}


SIZES = jnp.array([5, 11])


def ragged(p, x):
    return lax.ragged_dot(rows(x), p["experts"], SIZES)


def ragged_products(p, x):
    return {"experts[0]": (p["experts"][0], rows(x)[:5]), "experts[1]": (p["experts"][1], rows(x)[5:])}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((2, 4), name="up", use_bias=False)(x)
        return nn.tanh(nn.DenseGeneral(8, axis=(-2, -1), name="down", use_bias=False)(h)), None


class Scanned(nn.Module):  # as in MaxText: checkpointed layers under a scan, the layer axis in position 1
    @nn.compact
    def __call__(self, x):
        body = nn.scan(nn.remat(Layer), variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return body(name="layers")(x, None)[0]


def scanned_products(p, x):
    found, x = {}, rows(x)
    for i in range(3):
        up, down = (jnp.take(p["layers"][name]["kernel"], i, 1).reshape(8, 8) for name in ("up", "down"))
        found |= {f"layers/up/kernel[{i}]": (up, x), f"layers/down/kernel[{i}]": (down, x @ up)}
        x = jnp.tanh(x @ up @ down)
    return found


class OwnEinsum(nn.Module):  # as in gemma
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(0.5), self.shape))


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, x):
        k, v = OwnEinsum((2, 1, 8, 4), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        return OwnEinsum((2, 4, 8), name="o")("BTNH,NHD->BTD", jnp.concatenate([k, v], axis=-2))


def gemma_products(p, x):
    kv = p["kv_einsum"]["w"].transpose(2, 0, 1, 3).reshape(8, 8)
    return {"kv_einsum/w": (kv, rows(x)), "o/w": (p["o"]["w"].reshape(8, 8), rows(x) @ kv)}


class Bonsai(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Einsum("BTD,DNH->BTNH", (8, 2, 4), rngs=rngs)
        self.o = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.o(jnp.tanh(self.q(x).reshape(x.shape)))


def split(model):
    """A function of an NNX module's parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params


def bonsai_products(p, x):
    q = p["q"]["kernel"][...].reshape(8, 8)
    return {"q/kernel": (q, rows(x)), "o/kernel": (p["o"]["kernel"][...], jnp.tanh(rows(x) @ q))}


def self_attention_products(p, x):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value"))
    found = {f"{name}/kernel": (p[name]["kernel"].reshape(8, 8), rows(x)) for name in ("query", "key", "value")}
    return found | {"out/kernel": (p["out"]["kernel"].reshape(8, 8), nn.dot_product_attention(q, k, v).reshape(-1, 8))}


class Heads(nn.Module):  # the same layer side by side under nn.vmap: on one input, then each on its own
    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 2}
        h = nn.vmap(nn.Dense, in_axes=None, **options)(4, use_bias=False, name="up")(x)
        return nn.vmap(nn.Dense, **options)(8, use_bias=False, name="down")(nn.tanh(h))


def heads_products(p, x):
    found = expert_products({name: p[name]["kernel"] for name in ("up", "down")}, x)
    return {f"{name[:4].rstrip('[')}/kernel{name[4:]}": product for name, product in found.items()}


def mlp(p, x):  # as in Equinox: weights are (out, in), a model is of one vector
    def one(x):
        for layer in p["layers"]:
            x = jnp.tanh(layer["weight"] @ x + layer["bias"])
        return x

    return jax.vmap(jax.vmap(one))(x)


def mlp_products(p, x):
    first, second = p["layers"]
    h = jnp.tanh(rows(x) @ first["weight"].T + first["bias"])
    return {"layers/0/weight": (first["weight"].T, rows(x)), "layers/1/weight": (second["weight"].T, h)}


def indexed(p, x):  # layers in a loop, one of them called twice
    for i in (0, 1, 1):
        x = jnp.tanh(x @ p["layers"][i].T)
    return x


def indexed_products(p, x):
    first = jnp.tanh(rows(x) @ p["layers"][0].T)
    twice = jnp.concatenate([first, jnp.tanh(first @ p["layers"][1].T)])
    return {"layers[0]": (p["layers"][0].T, rows(x)), "layers[1]": (p["layers"][1].T, twice)}


def lora(p, x):
    return x @ p["kernel"] + (x @ p["a"]) @ p["b"]


def convolution(p, x):  # of windows of two places side by side, then of one
    convolve = lambda x, w, stride: lax.conv_general_dilated(  # noqa: E731
        x, w, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return convolve(convolve(x.reshape(2, 16, 4), p["conv"], 2), p["point"], 1)


def convolution_products(p, x):
    wide = p["conv"].reshape(8, 8)
    return {"conv": (wide, rows(x)), "point": (p["point"][0], rows(x) @ wide)}


def linen(module, *shape):
    params = module.init(jax.random.key(1), jnp.zeros(shape or X.shape))["params"]
    return lambda p, x: module.apply({"params": p}, x), params


CASES = {
    "tunix": Case(attention_einsums, {"q": {"w": normal(1, 8, 2, 4)}, "o": {"w": normal(2, 2, 4, 8)}}, attention_products),
    "experts": Case(experts, {"up": normal(3, 2, 8, 4), "down": normal(4, 2, 4, 8)}, expert_products),
    "ragged": Case(ragged, {"experts": normal(5, 2, 8, 8)}, ragged_products),
    "maxtext": Case(*linen(Scanned()), scanned_products),
    "gemma": Case(*linen(Gemma()), gemma_products),
    "bonsai": Case(*split(Bonsai(nnx.Rngs(0))), bonsai_products),
    "attention": Case(*linen(nn.MultiHeadDotProductAttention(num_heads=2)), self_attention_products, ("bias=none",)),
    "heads": Case(*linen(Heads()), heads_products),
    "equinox": Case(
        mlp,
        {"layers": [{"weight": normal(i, 8, 8), "bias": normal(i + 1, 8)} for i in (11, 13)]},
        mlp_products,
    ),
    "indexed": Case(indexed, {"layers": normal(6, 2, 8, 8)}, indexed_products),
    "lora": Case(
        lora,
        {"kernel": normal(7, 8, 8), "a": normal(8, 8, 2), "b": normal(9, 2, 8)},
        lambda p, x: {"kernel": (p["kernel"], rows(x))},
        ("^[ab]$=none",),
    ),
    "convolution": Case(convolution, {"conv": normal(10, 2, 4, 8), "point": normal(15, 1, 8, 8)}, convolution_products),
}
