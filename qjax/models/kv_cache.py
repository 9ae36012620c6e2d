"""Keys and values as a quantized cache gives them back (`cache_format.py`): simulated over a whole text, or packed.

A text of which all is there sees rounded keys and values beside those in 16 bits, and a mask says which of the two a token sees
where (`simulated`). In generation the rounded ones are kept as packed codes and the window in float16 (`PackedCache`), and
`add` gives back the same `Seen`: attention is one computation for both.

Groups are along the axis before the last: of keys by channel (..., tokens, channels) as they are, else of the transposed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from qjax import packing
from qjax.cache_format import FLOATS, CacheFormat
from qjax.grid import FLOAT8
from qjax.scales import nonzero

LARGEST = float(jnp.finfo(jnp.float16).max)


class Seen(NamedTuple):
    """Keys or values (batch, kv_heads, keys, dim), and where a query sees the rounded ones: old broadcasts against (batch,
    kv_heads, group, time, keys). Without a residual all are rounded, and exact and old are None.
    """

    rounded: Float[Array, "batch kv_heads keys dim"]
    exact: Float[Array, "batch kv_heads keys dim"] | None = None
    old: Bool[Array, "..."] | None = None

    def piece(self, first: int, end: int) -> "Seen":
        """For the queries first ... end - 1 of a text, which see no key after them; old is (time, keys)."""
        if self.exact is None:
            return Seen(self.rounded[:, :, :end])
        return Seen(self.rounded[:, :, :end], self.exact[:, :, :end], self.old[first:end, :end])


class Kept(NamedTuple):
    """Packed codes (..., bytes, columns) with a scale, and a minimum of integers, of every group (..., groups, columns)."""

    codes: Shaped[Array, "*batch bytes columns"]
    scale: Float[Array, "*batch groups columns"]
    minimum: Float[Array, "*batch groups columns"] | None


def halved(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """As float16, the outermost numbers in place of those beyond it."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float16)


def encode(x: Float[Array, "*batch rows columns"], cache: CacheFormat, size: int) -> Kept:
    """Codes of x in groups of `size` rows of a column."""
    *batch, rows, columns = x.shape
    groups = x.astype(jnp.float32).reshape(*batch, rows // size, size, columns)
    if cache.grid in FLOATS:
        kind = FLOAT8[cache.grid]
        bound = float(jnp.finfo(kind).max)
        scale = jnp.max(jnp.abs(groups), axis=-2) / bound
        codes = jnp.clip(groups / nonzero(scale)[..., None, :], -bound, bound).astype(kind)
        return Kept(codes.reshape(x.shape), scale, None)
    low, high, largest = jnp.min(groups, axis=-2), jnp.max(groups, axis=-2), 2**cache.bits - 1
    scale, minimum = ((high - low) / largest).astype(jnp.float16), low.astype(jnp.float16)
    step, start = (each.astype(jnp.float32)[..., None, :] for each in (scale, minimum))
    codes = jnp.clip(jnp.round((groups - start) / nonzero(step)), 0, largest).astype(jnp.uint8)
    return Kept(packing.pack(codes.reshape(x.shape), cache.bits), scale, minimum)


def decode(kept: Kept, cache: CacheFormat, size: int) -> Float[Array, "*batch rows columns"]:
    """float32 values of codes."""
    *batch, count, columns = kept.scale.shape
    scale = kept.scale.astype(jnp.float32)[..., None, :]
    if kept.minimum is None:
        values = kept.codes.astype(jnp.float32).reshape(*batch, count, size, columns) * scale
    else:
        codes = packing.unpack(kept.codes, cache.bits, count * size).reshape(*batch, count, size, columns)
        values = codes.astype(jnp.float32) * scale + kept.minimum.astype(jnp.float32)[..., None, :]
    return values.reshape(*batch, count * size, columns)


def rounded_before(positions: Int[Array, "*batch time"], cache: CacheFormat, *, by_channel: bool) -> Int[Array, "*batch time"]:
    """The first position that a token at each of the positions does not see rounded."""
    if not cache.residual:
        return positions + 1
    return positions // cache.residual * cache.residual if by_channel else positions - cache.residual


def old(
    queries: Int[Array, "*batch time"], keys: Int[Array, "*batch keys"], cache: CacheFormat, *, by_channel: bool
) -> Bool[Array, "*batch time keys"]:
    """Which keys each query sees rounded, of their positions."""
    return keys[..., None, :] < rounded_before(queries, cache, by_channel=by_channel)[..., None]


def simulated(x: Float[Array, "batch kv_heads time dim"], cache: CacheFormat, *, by_channel: bool):
    """(rounded, exact) of a whole text from its position 0 on, in x's type; exact as float16 has it. Gradients pass through
    rounding.
    """
    exact = halved(x)
    if by_channel:
        padding = -x.shape[2] % cache.group  # a last group that is not whole is in every token's window
        rows = jnp.pad(exact, ((0, 0), (0, 0), (0, padding), (0, 0)))
        rounded = decode(encode(rows, cache, cache.group), cache, cache.group)[:, :, : x.shape[2]]
    else:
        size = cache.group_of_values(x.shape[-1])
        rounded = decode(encode(exact.swapaxes(-1, -2), cache, size), cache, size).swapaxes(-1, -2)
    exact = exact.astype(x.dtype)
    return jax.lax.stop_gradient(rounded.astype(x.dtype)) + (exact - jax.lax.stop_gradient(exact)), exact


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCache:
    """Keys and values of one block, packed for every position, and the newest `residual` ones in float16 (batch, kv_heads,
    residual, dim): values of the last positions, keys by channel from the last whole residual on.
    """

    keys: Kept
    values: Kept
    new_keys: Float[Array, "batch kv_heads residual dim"]
    new_values: Float[Array, "batch kv_heads residual dim"]
    cache: CacheFormat = dataclasses.field(metadata={"static": True})


def empty_cache(cache: CacheFormat, batch: int, kv_heads: int, capacity: int, head_dim: int) -> PackedCache:
    """A cache of `capacity` positions, rounded up to whole residuals of keys by channel."""
    capacity += -capacity % cache.residual if cache.group is not None else 0
    by_token = jnp.zeros((batch, kv_heads, head_dim, capacity), jnp.float16)
    values = encode(by_token, cache, cache.group_of_values(head_dim))
    keys = encode(by_token.swapaxes(-1, -2), cache, cache.group) if cache.group is not None else values
    window = jnp.zeros((batch, kv_heads, cache.residual, head_dim), jnp.float16)
    arrays = jax.tree.map(jnp.zeros_like, (keys, values, window, window))  # each its own: a step uses them up
    return PackedCache(*arrays, cache)


def add(
    held: PackedCache,
    k: Float[Array, "batch kv_heads time dim"],
    v: Float[Array, "batch kv_heads time dim"],
    starts: Int[Array, " batch"],
    ends: Int[Array, " batch"],
):
    """(the cache with keys and values of positions starts ... ends - 1, which k and v begin with; (rounded, exact) of all keys
    by position; those of all values), in the type of k and v.
    """
    cache, adding = held.cache, _add_by_token if held.cache.group is None else _add_by_channel
    keys, new_keys, seen_keys = adding(held.keys, held.new_keys, k, starts, ends, cache)
    values, new_values, seen_values = _add_by_token(held.values, held.new_values, v, starts, ends, cache)
    return PackedCache(keys, values, new_keys, new_values, cache), seen_keys, seen_values


def _add_by_token(kept: Kept, window, new, starts, ends, cache: CacheFormat):
    size, exact = cache.group_of_values(new.shape[-1]), halved(new)
    kept = jax.tree.map(lambda a, b: _written(a, b, starts, axis=2), kept, encode(exact.swapaxes(-1, -2), cache, size))
    rounded = decode(kept, cache, size).swapaxes(-1, -2).astype(new.dtype)
    if not cache.residual:
        return kept, window, (rounded, None)
    both = jnp.concatenate([window, exact], axis=2)  # positions from starts - residual on
    shifted = jnp.zeros((*rounded.shape[:2], rounded.shape[2] + cache.residual, rounded.shape[3]), new.dtype)
    placed = _written(shifted, both.astype(new.dtype), starts, axis=1)[:, :, cache.residual :]
    return kept, _taken(both, ends - starts, cache.residual), (rounded, placed)


def _add_by_channel(kept: Kept, window, new, starts, ends, cache: CacheFormat):
    residual, time = cache.residual, new.shape[2]
    base = starts // residual * residual  # of what is in 16 bits
    length = -(-(residual - 1 + time) // residual) * residual
    both = jnp.pad(window, ((0, 0), (0, 0), (0, length), (0, 0)))
    both = _written(both, halved(new), starts - base, axis=1)
    found, wide = encode(both[:, :, :length], cache, cache.group), time > 1
    put = lambda a, b: _written(a, b, base // residual * (b.shape[2] * residual // length), axis=1, wide=wide)  # noqa: E731
    kept = jax.tree.map(put, kept, found)  # groups that are not whole yet are written again before any token sees them
    rounded = decode(kept, cache, cache.group).astype(new.dtype)
    placed = _written(jnp.zeros_like(rounded), both[:, :, :length].astype(new.dtype), base, axis=1, wide=wide)
    newest = _taken(both, ends // residual * residual - base, residual)
    return kept, newest, (rounded, placed)


def _written(held: Array, new: Array, starts: Int[Array, " batch"], *, axis: int, wide: bool = False) -> Array:
    """Each sequence's array with new values from its start on; wide: what goes beyond the end is left out."""
    size = held.shape[axis + 1]
    if wide:
        held = jnp.pad(held, [(0, new.shape[i] if i == axis + 1 else 0) for i in range(held.ndim)])

    def put(kept, added, start):
        return jax.lax.dynamic_update_slice_in_dim(kept, added, start, axis)

    return jax.lax.slice_in_dim(jax.vmap(put)(held, new, starts), 0, size, axis=axis + 1)


def _taken(held: Array, starts: Int[Array, " batch"], size: int) -> Array:
    """`size` positions of each sequence's array from its start on."""
    return jax.vmap(lambda each, start: jax.lax.dynamic_slice_in_dim(each, start, size, axis=1))(held, starts)
